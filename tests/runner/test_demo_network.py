"""The training network on a tiny configuration: causality, routing, balance, the loss, and export and import."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from runner import demo
from runner.demo import layout
from runner.demo.dataset import Stream
from runner.demo.evaluate import evaluate
from runner.demo.export import load_checkpoint, quantize, write_checkpoint
from runner.demo.mixture import MoE
from runner.demo.network import Network, head_loss
from runner.demo.parts import NetworkConfig, linear
from runner.demo.train import TOKENS_PER_STEP, WEIGHTS_FILE, train
from runner.fp8 import Matrix, dequantize

TINY = NetworkConfig(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=48,
    moe_intermediate_size=16,
    n_routed_experts=16,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    num_attention_heads=2,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("position", [5, 600])
def test_a_later_token_changes_nothing_before_it(position: int) -> None:
    # 700 positions are more than the queries that attention takes at a time; near the start, where attention spreads
    # over few tokens, a single one too many would show.
    network = Network(TINY)
    ids = torch.randint(0, TINY.vocab_size, (1, 701))
    changed = ids.clone()
    changed[0, position] = (ids[0, position] + 1) % TINY.vocab_size
    with torch.no_grad():
        for layer in network.layers:
            layer.self_attn.o_proj *= 5
        (hidden, mtp), (hidden_2, mtp_2) = network(ids), network(changed)
    # Groups of other sizes round differently, so equal means close.
    torch.testing.assert_close(hidden[:, :position], hidden_2[:, :position], atol=0.02, rtol=0)
    assert (hidden[:, position] - hidden_2[:, position]).abs().max() > 0.2
    torch.testing.assert_close(mtp[:, : position - 1], mtp_2[:, : position - 1], atol=0.02, rtol=0)
    assert (mtp[:, position - 1] - mtp_2[:, position - 1]).abs().max() > 0.2  # the MTP layer sees one token more


def test_routing_stays_inside_the_best_groups_and_uses_unbiased_weights() -> None:
    moe = MoE(TINY)
    with torch.no_grad():
        moe.gate.normal_(std=1.0)
        moe.e_score_correction_bias.uniform_(-2.0, -1.0)  # all biased scores negative: a mask of zero would win
    x = torch.randn(50, TINY.hidden_size)
    weights, ids = moe.route(x)
    scores = torch.sigmoid(x @ moe.gate.T)
    biased = (scores + moe.e_score_correction_bias).view(50, 4, 4)
    for token in range(50):
        groups = biased[token].topk(2, -1).values.sum(-1).topk(2).indices.tolist()
        allowed = [group * 4 + member for group in groups for member in range(4)]
        expected = sorted(allowed, key=lambda expert: -biased[token].flatten()[expert].item())[:2]
        assert sorted(ids[token].tolist()) == sorted(expected)
        chosen = scores[token][ids[token]]
        torch.testing.assert_close(weights[token], 2.5 * chosen / chosen.sum())


def test_balance_moves_the_bias_against_the_load() -> None:
    moe = MoE(TINY)
    moe.load[:2] = 100  # two busy experts and fourteen idle ones: the signs alone do not add up to zero
    moe.balance(0.1)
    assert (moe.e_score_correction_bias[:2] < 0).all()
    assert (moe.e_score_correction_bias[2:] > 0).all()
    assert moe.e_score_correction_bias.sum().abs() < 1e-6
    assert not moe.load.any()


def test_experts_compute_the_weighted_sum_of_swiglus() -> None:
    moe = MoE(TINY)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(std=0.2)
    x = torch.randn(1, 40, TINY.hidden_size)
    weights, ids = moe.route(x[0])
    expected = torch.zeros_like(x[0])
    for token in range(40):
        for weight, expert in zip(weights[token], ids[token], strict=True):
            gate, up = (x[0, token] @ moe.experts_gate_up[expert]).chunk(2)
            expected[token] += weight * ((F.silu(gate) * up) @ moe.experts_down[expert])
    expected += moe.shared_experts(x[0])
    torch.testing.assert_close(moe(x)[0].float(), expected, atol=0.05, rtol=0.05)
    assert moe.load.sum() == 80


def test_head_loss_is_cross_entropy_with_its_gradients() -> None:
    hidden = torch.randn(2, 700, 32, requires_grad=True)
    head = torch.randn(300, 32).mul_(0.1).requires_grad_()
    targets = torch.randint(0, 300, (2, 700))
    loss = head_loss(hidden, head, targets)
    loss.backward()
    expected_hidden, expected_head = hidden.detach().clone().requires_grad_(), head.detach().clone().requires_grad_()
    expected = F.cross_entropy(linear(expected_hidden, expected_head).float().flatten(0, 1), targets.flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(hidden.grad, expected_hidden.grad, atol=1e-5, rtol=0.05)
    torch.testing.assert_close(head.grad, expected_head.grad, atol=1e-4, rtol=0.05)


def test_quantize_scales_every_block_to_the_range_of_e4m3() -> None:
    weight = torch.randn(200, 300)  # ragged in both dimensions
    weight[:128, 128:256] *= 1000
    weight[128:, 256:] = 0
    codes, scale = quantize(weight)
    assert (codes.dtype, codes.shape) == (torch.float8_e4m3fn, (200, 300))
    assert (scale.dtype, scale.shape) == (torch.float32, (2, 3))
    assert scale[1, 2] == 1
    torch.testing.assert_close(scale[0, 1], weight[:128, 128:256].abs().max() / 448)
    restored = dequantize(Matrix(weight=codes, scale=scale))
    # e4m3 keeps three bits after the leading one: half a step is 1/16; below 2^-6 of the unit steps are even.
    assert ((restored - weight).abs() <= weight.abs() / 16 + scale.max() * 2**-10).all()


def test_the_layout_holds_every_parameter_exactly_once_beside_the_mtp_copies() -> None:
    network = Network(TINY)
    with torch.no_grad():
        state = {name: torch.zeros_like(tensor) for name, tensor in network.state_dict().items()}
    entries = [entry for stage in layout.stages(TINY) for entry in stage]
    for entry in entries:
        entry.part(state[entry.key]).add_(1)
    for name, tensor in state.items():
        assert (tensor == (2 if name in ("embed_tokens", "lm_head") else 1)).all(), name
    assert len({entry.name for entry in entries}) == len(entries)
    assert len(layout.stages(NetworkConfig())) == 8


def test_a_written_checkpoint_comes_back(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(demo.path() / "tokenizer.json"))
    network, restored = Network(NetworkConfig()), Network(NetworkConfig())
    for moe in network.moe_layers().values():
        moe.e_score_correction_bias.uniform_(-1, 1)
    write_checkpoint(tmp_path / "model", network, tokenizer)
    load_checkpoint(tmp_path / "model", restored)
    assert len(list(tmp_path.glob("model/*.safetensors"))) == 163
    for name, tensor in network.state_dict().items():
        other = restored.state_dict()[name]
        assert (other - tensor).norm() <= 0.03 * tensor.norm(), name
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(other, tensor)


def test_bits_per_byte_of_a_network_that_knows_nothing() -> None:
    stream = Stream(ids=torch.randint(0, 300, (2000,)), text_bytes=5000, line_starts=torch.arange(2000))
    network = Network(TINY)
    with torch.no_grad():
        network.lm_head.zero_()
    figures = evaluate(network, stream, 512)
    assert figures.bits_per_byte == pytest.approx(math.log2(300) * 2000 / 5000, rel=1e-3)
    assert figures.load_min.keys() == {1, 2}  # the MTP layer's included
    assert all(value <= 1 <= figures.load_max[layer] for layer, value in figures.load_min.items())


def test_training_lowers_the_loss_and_leaves_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # One line of eight tokens for ever. Four steps reach the long windows, which come after 70 percent.
    line = torch.tensor([5, 6, 7, 8, 9, 10, 11, 12])
    stream = Stream(ids=line.repeat(1000), text_bytes=16_000, line_starts=torch.arange(0, 8000, 8))
    network = Network(TINY)
    before = evaluate(network, stream, 512, 2)
    train(network, stream, stream, tokens=4 * TOKENS_PER_STEP, minutes=10, out=tmp_path)
    after = evaluate(network, stream, 512, 2)
    assert after.bits_per_byte < before.bits_per_byte
    assert (tmp_path / WEIGHTS_FILE).is_file()
    assert "16,384 tokens in 4 steps" in capsys.readouterr().out
