"""What a checkpoint takes of memory and of a pass: the sizes that budgets and floors are counted with."""

from collections.abc import Iterable
from contextlib import suppress

from manifests.console import format_bytes
from manifests.errors import ResourceError, ToolkitError
from runner import kernels, machine
from runner.breakeven import Costs
from runner.budget import Budget, Sizes, plan_budget
from runner.config import ModelConfig
from runner.contents import Contents, mtp_order, pass_order
from runner.expected import head_of
from runner.layout import HUGE_PAGE_BYTES, PAGE_BYTES
from runner.mtp_parts import MtpParts
from runner.policy import Key
from runner.text import MAX_TOKENIZER_BYTES, TEXT_FILES, tokenizer_bytes


def routed_experts(config: ModelConfig, *, has_mtp: bool = False) -> list[Key]:
    """Every routed expert of the main model, and of the MTP layer where that runs too."""
    layers = range(config.first_k_dense_replace, config.num_hidden_layers + has_mtp)
    return [(layer, expert) for layer in layers for expert in range(config.n_routed_experts)]


def default_io(contents: Contents, config: ModelConfig) -> str:
    """How experts come in when nobody says: mapped.

    But not from a server; nor without the compiled library, which that needs; nor where an expert takes less memory
    than the huge pages that its parts share with their neighbours, as in a GGUF file of small experts: then half as
    many would fit.
    """
    layers = range(config.first_k_dense_replace, config.num_hidden_layers)
    is_dear = _shared_bytes(contents, layers) > contents.expert_bytes(layers)
    return "direct" if contents.cache is not None or is_dear or kernels.library() is None else "mmap"


def _shared_bytes(contents: Contents, layers: Iterable[int]) -> int:
    """What a mapped expert takes beyond itself: huge pages of its neighbours in the file, at both ends of each part."""
    return 2 * HUGE_PAGE_BYTES * contents.expert_parts(layers) if contents.is_in_place else 0


def measure(contents: Contents, config: ModelConfig, io: str, mtp: MtpParts | None = None) -> Sizes:
    """Sizes of a checkpoint as they count against memory, with the MTP layer where one is given."""
    experts = routed_experts(config, has_mtp=mtp is not None)
    groups = pass_order(config.num_hidden_layers, head_of(config))
    if mtp is not None:
        groups += mtp_order(mtp.layer, mtp.copies[1].used)
    layers = sorted({layer for layer, _ in experts})
    slot = contents.slot_bytes(layers, PAGE_BYTES)
    if io == "mmap":
        slot += _shared_bytes(contents, layers)
    return Sizes(
        dense=contents.dense_bytes(groups),
        expert=contents.expert_bytes(layers),
        slot=slot,
        experts=len(experts),
        layers=config.num_hidden_layers + (mtp is not None),
    )


def check_cache(contents: Contents, config: ModelConfig, mtp: MtpParts | None = None) -> None:
    """Refuse a cache that holds less than a token needs: the dense part, and the experts that are selected for it.

    Raises:
        ResourceError: Its bound is less; with the least that would do.
    """
    if contents.cache is None or (bound := contents.cache.bound) is None:
        return
    layers = range(config.first_k_dense_replace, config.num_hidden_layers + (mtp is not None))
    groups = [*pass_order(config.num_hidden_layers, head_of(config)), "model.embed_tokens"]
    if mtp is not None:
        groups += mtp_order(mtp.layer, mtp.copies[1].used)
    for name in TEXT_FILES:
        # They are read later, and then they are in the cache beside the weights.
        with suppress(ToolkitError):
            contents.auxiliary.folder.read(name, max_bytes=MAX_TOKENIZER_BYTES)
    dense = contents.kept_bytes(groups)
    experts = max((contents.kept_bytes([f"model.layers.{layer}.mlp.experts.0"]) for layer in layers), default=0)
    least = dense + experts * len(layers) * config.num_experts_per_tok + contents.cache.small_bytes
    if bound < least:
        digit = 10 ** max(0, len(str(least)) - 3)  # three are shown: rounded up, so that what is said is enough
        raise ResourceError(
            f"a token of this model needs {format_bytes(-(-least // digit) * digit)} of cache (dense weights "
            f"{format_bytes(dense)}, {config.num_experts_per_tok} experts of each of {len(layers)} layers), "
            f"but --cache-size is {format_bytes(bound)}; give more"
        )


def plan_memory(
    contents: Contents, config: ModelConfig, sizes: Sizes, *, ram: int | None = None, ctx: int | None = None
) -> Budget:
    """Divide this machine's memory; see `plan_budget`."""
    return plan_budget(
        config,
        sizes,
        ram=ram,
        ctx=ctx,
        here=machine.examine(),
        process=machine.resident_bytes() + tokenizer_bytes(contents.auxiliary),  # it is read later
        is_compiled=kernels.library() is not None,
    )


def mtp_costs(contents: Contents, config: ModelConfig, mtp: MtpParts) -> Costs:
    """Bytes that steps, passes and guesses read."""
    layers = range(config.first_k_dense_replace, config.num_hidden_layers)
    return Costs(
        fixed=contents.used_bytes(pass_order(config.num_hidden_layers, head_of(config))),
        layers=len(layers),
        experts=config.n_routed_experts,
        top=config.num_experts_per_tok,
        expert=contents.expert_bytes(layers),
        mtp_fixed=mtp.bytes_by_kind["dense"],
        head=contents.used_bytes([head_of(config)]),
    )
