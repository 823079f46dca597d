"""Forecasts: DeepSeek-V3's own figures, and sense at the edges."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runner.budget import Budget, Sizes, plan_budget
from runner.config import ModelConfig
from runner.forecast import Forecast, Rates, forecast
from runner.machine import Machine
from tests.runner.test_budget import CONFIG, HERE, SIZES

FIXED = 17_200_000_000
EXPERT = 44_050_944
RATES = Rates(memory=35.0, direct=2.0, mapped=1.9)


def budget_of(ram: int) -> Budget:
    return plan_budget(CONFIG, SIZES, ram=ram, ctx=2048, here=HERE, process=250_000_000, is_compiled=True)


def foretell(budget: Budget, rates: Rates = RATES) -> Forecast:
    return forecast(CONFIG, SIZES, fixed_bytes=FIXED, stored_bytes=FIXED, budget=budget, rates=rates)


def test_a_machine_that_holds_the_dense_part_waits_for_its_disk() -> None:
    found = foretell(budget_of(24_000_000_000))
    assert found.routed_bytes == 58 * 8 * EXPERT
    assert 0 < found.hit_rate < 0.01
    assert found.expected_s == pytest.approx((1 - found.hit_rate) * 20.44 / 2.0 + 17.2 / 35, rel=0.01)
    assert found.warm_s == pytest.approx(37.6 / 35, rel=0.01)
    assert found.cold_s == pytest.approx(37.6 / 2, rel=0.01)
    assert (found.io, found.advice.split(":")[0]) == ("mmap", "the disk is what a token waits for")
    assert "all experts need 673 GB" in found.advice


def test_a_machine_that_holds_everything() -> None:
    found = foretell(budget_of(1_000_000_000_000))
    assert (found.hit_rate, found.expected_s) == (1.0, found.warm_s)
    assert found.advice.startswith("everything fits in memory")


def test_a_machine_that_holds_most() -> None:
    found = foretell(budget_of(660_000_000_000))
    assert found.advice.startswith("memory is read longer than the disk")


@pytest.mark.parametrize(("direct", "mapped", "io"), [(2.0, 1.0, "direct"), (2.0, 1.8, "mmap"), (1.0, 2.0, "mmap")])
def test_the_faster_way_in(direct: float, mapped: float, io: str) -> None:
    found = foretell(budget_of(24_000_000_000), Rates(memory=35.0, direct=direct, mapped=mapped))
    assert found.io == io


def test_what_could_not_be_measured_is_not_foretold() -> None:
    for rates in (Rates(memory=None, direct=2.0, mapped=None), Rates(memory=35.0, direct=None, mapped=None)):
        found = foretell(budget_of(24_000_000_000), rates)
        assert (found.warm_s, found.expected_s, found.cold_s) == (None, None, None)
        assert found.to_document()["tokens_per_s_expected"] is None
        assert "unknown" in " ".join(found.lines())


def test_a_model_without_routed_experts() -> None:
    config: ModelConfig = replace(CONFIG, first_k_dense_replace=CONFIG.num_hidden_layers)
    sizes = Sizes(dense=1_000_000_000, expert=0, slot=0, experts=0, layers=61)
    here: Machine = HERE
    budget = plan_budget(config, sizes, ram=None, ctx=None, here=here, process=0, is_compiled=True)
    found = forecast(config, sizes, fixed_bytes=1_000_000_000, stored_bytes=250_000_000, budget=budget, rates=RATES)
    assert (found.routed_bytes, found.hit_rate) == (0, 1.0)
    # The disk need not have what products read: it may be made of less.
    assert (found.warm_s, found.cold_s) == (pytest.approx(1 / 35), pytest.approx(0.25 / 2))
