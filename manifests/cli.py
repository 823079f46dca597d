"""The inspection tool: show, ls, check, diff, schema. Reads headers and manifests, never a tensor."""

import dataclasses
import fnmatch
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import click

from manifests import inventory, urls
from manifests.check import check_files
from manifests.checkpoint import Checkpoint
from manifests.console import Group, counted, format_bytes, json_option, print_json, printable
from manifests.errors import IncompleteError, IntegrityError, ManifestError, Problem, ToolkitError
from manifests.json_schema import json_schema
from manifests.names import parse_name
from manifests.schema import PLAIN
from manifests.summary import Difference, LayerSummary, Parameters, Summary, diff, summarize

EXIT_DIFFERENT = 1
EXIT_DAMAGED = IntegrityError.exit_code
EXIT_UNDECIDED = IncompleteError.exit_code


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="expert-reshard", prog_name="manifests")
def manifests() -> None:
    """Inspect checkpoints of mixture-of-experts models.

    \b
    Example:
      manifests show DeepSeek-V3-experts
      manifests ls DeepSeek-V3 --layer 3 --expert 17

    PATH is a resharded checkpoint, a plain checkpoint folder, a folder with one GGUF model, or one .safetensors or
    .gguf file. It may also be the address of such a folder or .safetensors file on a web server, or
    hf://organisation/name for a repository of the Hugging Face Hub.
    """


@manifests.command()
@click.argument("path")
@json_option
def show(path: str, as_json: bool) -> None:
    """One screen: model, layers, experts, bytes by kind and dtype, parameters in all and per token.

    \b
    Example:
      manifests show DeepSeek-V3-experts
    """
    checkpoint = _open(path)
    summary = summarize(checkpoint.manifest)
    missing_scales = checkpoint.missing_scales()
    if as_json:
        document = dataclasses.asdict(summary)
        document["parameters"]["routed_share"] = _routed_share(summary.parameters)
        print_json(document | {"path": urls.shown_place(path), "missing_scales": missing_scales})
        return
    for line in _show_lines(urls.shown_place(path), summary):
        click.echo(line)
    _warn("name", "that no rule knows (kept in dense files)", summary.unknown)
    _warn("FP8 weight", "without scales", missing_scales)


@manifests.command("ls")
@click.argument("path")
@click.option("--layer", type=int, help="Only this layer.")
@click.option("--expert", type=int, help="Only this routed expert.")
@click.option("--match", "pattern", help="Only names that match this glob, such as '*.kv_b_proj.*'.")
@json_option
def list_tensors(path: str, layer: int | None, expert: int | None, pattern: str | None, as_json: bool) -> None:
    """List tensors: dtype, shape, absolute byte range in the file, file, name.

    Of a quantised tensor the block type and the shape of its matrix; in JSON the stored form as well.

    \b
    Example:
      manifests ls model-00001-of-000163.safetensors --match '*layernorm*'
    """
    rows = []
    for tensor in _open(path).tensors():
        name = parse_name(tensor.name)
        if layer is not None and name.layer != layer:
            continue
        if expert is not None and name.expert != expert:
            continue
        if pattern is not None and not fnmatch.fnmatchcase(tensor.name, pattern):
            continue
        rows.append(tensor)
    if as_json:
        print_json(
            [
                {
                    "name": row.name,
                    "dtype": row.dtype,
                    "shape": list(row.shape),
                    "encoding": row.encoding,
                    "logical_shape": list(row.logical_shape),
                    "begin": row.offset,
                    "end": row.offset + row.size,
                    "file": row.file,
                    "place": row.place,
                    "codec": row.codec,
                }
                for row in rows
            ]
        )
        return
    if not rows:
        click.echo(f"note: no tensor of {printable(urls.shown_place(path))} matches", err=True)
    if any(row.codec != "none" for row in rows):
        click.echo("note: byte ranges in files that end in .zst are those of the unpacked file", err=True)
    cells = [
        (
            row.dtype if row.encoding == PLAIN else printable(row.encoding),
            "x".join(map(str, row.logical_shape)) or "scalar",
            f"{row.offset}-{row.offset + row.size}",
            printable(row.place if urls.is_url(path) else row.file),
            printable(row.name),
        )
        for row in rows
    ]
    widths = [max((len(cell[column]) for cell in cells), default=0) for column in range(4)]
    for cell in cells:
        click.echo("  ".join([*(text.ljust(width) for text, width in zip(cell, widths, strict=False)), cell[4]]))


@manifests.command()
@click.argument("path")
@json_option
def check(path: str, as_json: bool) -> None:
    """Find all problems of a manifest, and of its files' sizes and headers. Exit 12 or 13 when there are any.

    Payload bytes are not read; `reshard verify` reads every one.

    \b
    Example:
      manifests check DeepSeek-V3-experts
    """
    problems: list[Problem] = []
    error: ToolkitError | None = None
    try:
        checkpoint = _open(path)
        with _progress("files") as watch:
            # A folder of this machine is looked through before a bar could be read.
            problems = check_files(checkpoint, watch if urls.is_url(path) else None)
    except ManifestError as found:
        error = found
        problems = list(found.problems) or [Problem(loc="", kind="invalid_value", message=str(found))]
    if as_json:
        print_json(
            {"path": urls.shown_place(path), "ok": not problems, "problems": [dataclasses.asdict(p) for p in problems]}
        )
    else:
        for problem in problems:
            click.echo(printable(f"{problem.loc or urls.shown_place(path)}: {problem.message}"))
        if not problems:
            files = len(checkpoint.manifest.files) + len(checkpoint.manifest.documents)
            packed = sum(1 for file in checkpoint.manifest.files if file.codec != "none")
            unseen = f"; {packed} of them are packed, only their sizes were looked at" if packed else ""
            click.echo(
                printable(f"{urls.shown_place(path)}: {counted(files, 'file')}, sizes and headers are right{unseen}")
            )
    if problems:
        raise click.exceptions.Exit(error.exit_code if error else EXIT_DAMAGED)


@manifests.command("diff")
@click.argument("a")
@click.argument("b")
@json_option
def diff_command(a: str, b: str, as_json: bool) -> None:
    """Compare two checkpoints by content. Exit 0 when they are equal, 1 when they differ, 3 when that is undecided.

    A plain folder has no digests: its tensors are compared by name, dtype and shape only, and this is said. In JSON
    `equal` is then null, unless something differs.

    \b
    Example:
      manifests diff DeepSeek-V3-experts DeepSeek-R1-experts
    """
    first = _open(a).manifest
    differences = diff(first, _open(b).manifest)
    real = [difference for difference in differences if difference.kind != "undecided"]
    undecided = sum(1 for d in differences if d.kind == "undecided" and d.what == "tensor")
    if as_json:
        equal = False if real else None if undecided else True
        print_json({"equal": equal, "undecided": undecided, "differences": [dataclasses.asdict(d) for d in real]})
    else:
        for difference in real:
            click.echo(
                printable(_describe(difference.kind, difference.what, difference.name, difference.a, difference.b))
            )
        if real:
            click.echo(_count(real), err=True)
        elif not undecided:
            click.echo(f"equal: {counted(sum(len(file.tensors) for file in first.files), 'tensor')}", err=True)
    if undecided:
        agree, their = ("tensor agrees", "its") if undecided == 1 else ("tensors agree", "their")
        click.echo(f"{undecided} {agree} in dtype and shape; {their} bytes have no digests to compare", err=True)
    if real or undecided:
        raise click.exceptions.Exit(EXIT_DIFFERENT if real else EXIT_UNDECIDED)


@manifests.command()
def schema() -> None:
    """Print the JSON Schema of manifest.json.

    \b
    Example:
      manifests schema > manifest.schema.json
    """
    print_json(json_schema())


_KINDS = {"differ": "not equal", "only_in_a": "only in the first", "only_in_b": "only in the second"}


def _open(path: str) -> Checkpoint:
    """Open a checkpoint, showing how far the headers are that a server is asked for."""
    with _progress("headers") as watch:
        return inventory.open(path, watch)


@contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """On a terminal, a bar that is told how many of how many are done; it appears when it is first told."""
    with ExitStack() as shown:
        bars: list[Any] = []

        def watch(done: int, total: int) -> None:
            if not bars and total > 1 and sys.stderr is not None and sys.stderr.isatty():
                bar = click.progressbar(length=total, label=label, file=sys.stderr)
                bars.append(shown.enter_context(bar))
            for bar in bars:
                bar.update(done - bar.pos)

        yield watch


def _count(differences: list[Difference]) -> str:
    """How many differ, and how many only one of the two has."""
    parts = []
    for what in ("tensor", "document"):
        kinds = Counter(
            difference.kind if difference.kind.startswith("only_in") else "differ"
            for difference in differences
            if difference.what == what
        )
        for kind, says in _KINDS.items():
            if kinds[kind]:
                parts.append(f"{counted(kinds[kind], what)} {says}")
    return f"different: {', '.join(parts)}"


def _describe(kind: str, what: str, name: str, a: Any, b: Any) -> str:
    if kind in ("only_in_a", "only_in_b"):
        return f"{what} {name}: only in {'the first' if kind == 'only_in_a' else 'the second'}"
    if kind == "digest":
        return f"{what} {name}: bytes differ"
    return f"{what} {name}: {kind} {a} against {b}"


def _warn(noun: str, what: str, names: Iterable[str]) -> None:
    names = list(names)
    if names:
        shown = ", ".join(printable(name) for name in names[:3])
        more = ", ..." if len(names) > 3 else ""
        click.echo(f"note: {counted(len(names), noun)} {what}: {shown}{more}", err=True)


def _routed_share(parameters: Parameters) -> float | None:
    return parameters.routed / parameters.main if parameters.main else None


def _show_lines(path: str, summary: Summary) -> Iterable[str]:
    parameters = summary.parameters
    layout = "resharded" if summary.layout == "resharded" else "original files, in place"
    yield f"{printable(path)}: {printable(summary.model_type or 'unknown model type')}, {layout}" + (
        ", a partial selection" if summary.partial else ""
    )
    yield f"files       {summary.files:>15,}   {format_bytes(summary.file_bytes)}"
    if summary.packed_files:
        unpacked = format_bytes(summary.unpacked_bytes)
        yield (
            f"  packed    {summary.packed_files:>15,}   {format_bytes(summary.packed_bytes)}, "
            f"{unpacked} when unpacked (`reshard unpack`)"
        )
    yield f"tensors     {summary.tensors:>15,}   {format_bytes(summary.tensor_bytes)}"
    yield ""
    yield "parameters"
    yield f"  main      {parameters.main:>19,}"
    share = _routed_share(parameters)
    if share is not None:
        yield f"  routed    {parameters.routed:>19,}   {share:.2%} of main"
    if parameters.activated is not None:
        yield f"  activated {parameters.activated:>19,}   per token, embedding and head counted whole"
    if parameters.mtp:
        yield f"  MTP's own {parameters.mtp:>19,}   and {parameters.mtp_copies:,} in copies of embedding and head"
    yield ""
    yield "bytes by role"
    for role, size in summary.bytes_by_role.items():
        yield f"  {role:<15} {size:>19,}   {format_bytes(size)}"
    yield ""
    yield "bytes by dtype"
    for dtype, size in summary.bytes_by_dtype.items():
        yield f"  {dtype:<15} {size:>19,}   {summary.tensors_by_dtype[dtype]:,} tensors"
    if summary.layers:
        yield ""
        yield "layers"
        for group in _group_layers(summary.layers):
            yield _layer_line(group)


def _group_layers(layers: Iterable[LayerSummary]) -> list[list[LayerSummary]]:
    """Neighbours of the same form, so that 61 layers take three lines."""
    groups: list[list[LayerSummary]] = []
    for layer in layers:
        if groups and _form(groups[-1][-1]) == _form(layer) and groups[-1][-1].layer == layer.layer - 1:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return groups


def _form(layer: LayerSummary) -> tuple[int, ...]:
    return layer.tensors, layer.bytes, layer.experts, layer.is_mtp


def _layer_line(group: list[LayerSummary]) -> str:
    first, last = group[0], group[-1]
    span = f"{first.layer}" if first is last else f"{first.layer}-{last.layer}"
    kind = "MTP" if first.is_mtp else "MoE" if first.experts else "dense"
    line = f"  {span:<7} {kind:<5} {format_bytes(first.bytes):>8} each, {first.tensors:,} tensors"
    if first.experts:
        line += f", {first.experts} experts of {format_bytes(first.expert_bytes / first.experts)}"
    return line
