"""The commands of `fx-sparsity`: inspect, sparsify, convert, verify, diff."""

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click
from torch import Tensor

from fx_sparsity.checkpoints import (
    LAYOUTS,
    Checkpoint,
    CheckpointError,
    assign,
    convert,
    find_checkpoint_weights,
    sparsify_checkpoint,
    stated_patterns,
)
from fx_sparsity.cli.display import say, show
from fx_sparsity.cli.recipe import RecipeError, mapping_of, read_recipe, roles_of
from fx_sparsity.masks import tightest_pattern, tiling_holds
from fx_sparsity.progress import progress
from fx_sparsity.sparsifier import DataNormSparsifier
from fx_sparsity.storage import FORMATS, Contents, sizes

FOUND, BAD_INPUT = 1, 3
"""Exit codes, beside 0 for success and 2 for arguments that click refuses."""

SOURCE = click.Path(exists=True, path_type=Path)
TARGET = click.Path(path_type=Path)


class _Commands(click.Group):
    """Errors become one line on standard error and an exit code, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, TypeError, MemoryError) as error:
            click.echo(f"Error: {str(error) or type(error).__name__}", err=True)
            raise SystemExit(BAD_INPUT) from error


def _json_flag(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def _mapping_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Flags that say which weight gets which pattern."""
    many = functools.partial(click.option, multiple=True)
    for option in reversed(
        [
            click.option("--recipe", type=SOURCE, help="YAML file that says what the flags say."),
            click.option("--pattern", help='For all weights, such as "2:4" or "unstructured 50%".'),
            many("--name", metavar="NAME=PATTERN", help="For one weight or module; wins."),
            many("--regex", metavar="REGEX=PATTERN", help="For names that match from their start."),
            many("--kind", metavar="KIND=PATTERN", help="For linear, embedding or conv weights."),
            many("--roles", metavar="REGEX=ROLES", help="Roles of axes, such as in,out."),
        ]
    ):
        command = option(command)
    return command


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done; 1 verify or diff found something; 2 unknown arguments; "
    "3 files or settings that cannot be used.",
)
def commands() -> None:
    r"""Sparsity in safetensors files and checkpoints, without the model's code.

    A PATH is a file, or a folder as model hubs publish them. A PATTERN is one such as "2:4",
    "unstructured 50%", "block:16x16 50%", "rows 25%", or "dense".

    \b
    Examples:
      fx-sparsity inspect model/
      fx-sparsity sparsify model/ sparse/ --pattern 2:4 --name lm_head=dense
      fx-sparsity verify sparse/
      fx-sparsity convert sparse/ small/ --to compressed
      fx-sparsity diff model/ sparse/
    """


@commands.command()
@click.argument("path", type=SOURCE)
@click.option("--roles", multiple=True, metavar="REGEX=ROLES", help="Roles of axes: in,out.")
@_json_flag
def inspect(path: Path, roles: tuple[str, ...], as_json: bool) -> None:
    r"""Show the sparsity of every tensor, and what it takes in each format.

    Columns: share of zeros, the tightest pattern that they follow, bytes now, and bytes in each
    format that can hold the tensor.

    \b
    Examples:
      fx-sparsity inspect model.safetensors
      fx-sparsity inspect model/ --json | jq .totals
      fx-sparsity inspect gpt2/ --roles '.*c_attn.weight=in,out'
    """
    source = Checkpoint(path)
    weights = find_checkpoint_weights(source, roles_of(read_recipe(None, {"roles": roles})))
    sites = weights.by_any_name()
    rows: list[dict[str, Any]] = []
    totals: dict[str, int] = dict.fromkeys(("elements", "zeros", "bytes", *FORMATS, "smallest"), 0)
    for name, tensor in _tensors(source, "inspecting"):
        contents, where = Contents(tensor), tensor == 0
        each = sizes(contents)
        zeros = int(where.count_nonzero())
        config = None
        if name in sites:
            config = tightest_pattern(where, sites[name].roles)
        row: dict[str, Any] = {
            "tensor": name,
            "dtype": str(tensor.dtype)[6:],
            "shape": "x".join(map(str, tensor.shape)),
            "sparsity": zeros / tensor.numel() if tensor.numel() else 0.0,
            "pattern": None if config is None else str(config),
            "bytes": source.files[source.where[name]].stored_bytes(name),
        }
        row |= {form: each.get(form) for form in FORMATS}
        rows.append(row)
        totals["elements"] += tensor.numel()
        totals["zeros"] += zeros
        totals["bytes"] += row["bytes"]
        totals["smallest"] += min(each.values())
        for form in FORMATS:
            totals[form] += each.get(form, contents.nbytes)
    share = totals["zeros"] / totals["elements"] if totals["elements"] else 0.0
    last: dict[str, Any] = {"tensor": f"{len(rows)} tensors", "dtype": None, "shape": None}
    last |= {"sparsity": share, "pattern": None, "bytes": totals["bytes"]}
    last |= {form: totals[form] for form in FORMATS}
    if as_json:
        last |= {key: totals[key] for key in ("elements", "zeros", "smallest")}
    show(rows, as_json=as_json, totals=last, numeric=("sparsity", "bytes", *FORMATS))
    say(
        f"{totals['smallest']} bytes with the smallest format for each tensor; "
        "what a format cannot hold counts as dense",
        as_json=as_json,
    )


@commands.command()
@click.argument("source", type=SOURCE)
@click.argument("target", type=TARGET)
@_mapping_flags
@click.option("--norm", type=click.Choice(["L1", "L2"]), help="How weights rank; L1 by default.")
@click.option(
    "--ranked",
    type=click.Choice(["weight", "model"]),
    help="One level for each weight, or over the whole model.",
)
@click.option("--layout", type=click.Choice(LAYOUTS), help="How files hold tensors; dense.")
@_json_flag
def sparsify(source: Path, target: Path, recipe: Path | None, as_json: bool, **flags: Any) -> None:
    r"""Set the smallest weights of a checkpoint to zero, in the patterns asked for.

    The output has the same shards and all other files. Memory holds up to three of the largest
    tensor. What was interrupted goes on when called again.

    \b
    Examples:
      fx-sparsity sparsify model/ sparse/ --pattern 2:4
      fx-sparsity sparsify model/ sparse/ --pattern "unstructured 50%" --ranked model
      fx-sparsity sparsify model/ sparse/ --kind "linear=2:4" --regex '.*lm_head=dense'
      fx-sparsity sparsify model/ sparse/ --recipe recipe.yaml
    \b
    A recipe says what the flags say:
      pattern: "2:4"
      name: {lm_head: dense}
      kind: {embedding: rows 25%}
      norm: L2
      layout: compressed
    """
    found = read_recipe(recipe, flags)
    if not {"pattern", "name", "regex", "kind"} & {key for key, value in found.items() if value}:
        raise RecipeError("nothing to do: give --pattern, --name, --regex, --kind or --recipe")
    report = sparsify_checkpoint(
        source,
        target,
        mapping_of(found),
        DataNormSparsifier(norm=found.get("norm", "L1")),
        ranked=found.get("ranked", "weight"),
        layout=found.get("layout", "dense"),
        roles=roles_of(found),
    )
    rows = [
        {
            "weight": name,
            "pattern": weight.pattern,
            "sparsity": None if weight.zeros is None else weight.zeros / max(1, weight.elements),
            "dense because": weight.reason or None,
        }
        for name, weight in report.items()
    ]
    show(rows, as_json=as_json, numeric=("sparsity",))
    _say_skipped(Checkpoint(source), as_json=as_json)


@commands.command(name="convert")
@click.argument("source", type=SOURCE)
@click.argument("target", type=TARGET)
@click.option("--to", "layout", type=click.Choice(LAYOUTS), default="dense", show_default=True)
@_json_flag
def convert_command(source: Path, target: Path, layout: Any, as_json: bool) -> None:
    r"""Write a file or a checkpoint anew in another layout.

    `dense` is what every runtime reads; `compressed` is what fxs.save writes, each tensor in its
    smallest format; sparse-bitmask and sparse-24-bitmask are those of compressed-tensors.

    \b
    Examples:
      fx-sparsity convert sparse/ small/ --to compressed
      fx-sparsity convert small/ dense/
      fx-sparsity convert model.safetensors small.safetensors --to compressed
    """
    convert(source, target, layout)
    before, after = Checkpoint(source), Checkpoint(target)
    row = {"files": len(after.shards), "bytes before": before.nbytes, "bytes after": after.nbytes}
    show([row], as_json=as_json, numeric=tuple(row))
    _say_skipped(before, as_json=as_json)


@commands.command()
@click.argument("path", type=SOURCE)
@_mapping_flags
@_json_flag
def verify_command(path: Path, recipe: Path | None, as_json: bool, **flags: Any) -> None:
    r"""Check that patterns hold and that files are whole; exit code 1 where not.

    Patterns are those stated by flags or a recipe, or else by the checkpoint itself, in the
    sparsity.json that `sparsify` and `prune_checkpoint` leave. Files are checked as far as they
    carry checksums.

    \b
    Examples:
      fx-sparsity verify sparse/
      fx-sparsity verify model.safetensors --pattern 2:4 --name lm_head=dense
    """
    source = Checkpoint(path)
    asked = read_recipe(recipe, flags)
    if any(asked.get(key) for key in ("pattern", "name", "regex", "kind")):
        weights = find_checkpoint_weights(source, roles_of(asked))
        stated = dict(assign(weights, mapping_of(asked)).configs)
        roles = {site.fqn: site.roles for site in weights.sites}
    else:
        stated, roles = stated_patterns(source)
    rows: list[dict[str, Any]] = [
        {"tensor": fault.partition(":")[0], "pattern": None, "sparsity": None, "verdict": fault}
        for file in source.files.values()
        for fault in file.faults()
    ]
    for name, tensor in _tensors(source, "verifying", stated):
        zeros = tensor == 0
        tiling = stated[name].pattern.tiling(tensor.shape, roles[name])
        holds = tiling_holds(zeros, tiling, stated[name].level)
        sparsity = int(zeros.count_nonzero()) / max(1, tensor.numel())
        verdict = "ok" if holds else "broken"
        rows.append(
            {
                "tensor": name,
                "pattern": str(stated[name]),
                "sparsity": sparsity,
                "verdict": verdict,
            }
        )
    show(rows, as_json=as_json, numeric=("sparsity",))
    faults = sum(row["verdict"] != "ok" for row in rows)
    say(f"{len(stated)} patterns stated, {faults} faults", as_json=as_json)
    if faults:
        raise SystemExit(FOUND)


@commands.command()
@click.argument("a", type=SOURCE)
@click.argument("b", type=SOURCE)
@_json_flag
def diff(a: Path, b: Path, as_json: bool) -> None:
    r"""Show which tensors of two checkpoints differ; exit code 1 where some do.

    Of tensors in both: elements that became zero, that are zero no more, and other changes with
    the largest difference.

    \b
    Examples:
      fx-sparsity diff model/ sparse/
      fx-sparsity diff sparse/ small/ && echo the same
    """
    left, right = Checkpoint(a), Checkpoint(b)
    rows = [
        _row(name, f"only in {path}")
        for one, other, path in ((left, right, a), (right, left, b))
        for name in one.where
        if name not in other.where
    ]
    both = [name for name in left.where if name in right.where]
    for name, ours in _tensors(left, "comparing", both):
        theirs = right.read(name)
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            kinds = [f"{str(t.dtype)[6:]} {'x'.join(map(str, t.shape))}" for t in (ours, theirs)]
            rows.append(_row(name, " -> ".join(kinds)))
        elif (row := _compare(name, ours, theirs)) is not None:
            rows.append(row)
    show(rows, as_json=as_json, numeric=("zeros added", "zeros lost", "changed", "largest"))
    say(f"{len(rows)} of {len(left.where.keys() | right.where)} tensors differ", as_json=as_json)
    if rows:
        raise SystemExit(FOUND)


def _say_skipped(source: Checkpoint, *, as_json: bool) -> None:
    for name in source.skipped:
        say(f"not copied, weights of another kind or a link: {name}", as_json=as_json)


def _compare(name: str, ours: Tensor, theirs: Tensor) -> dict[str, Any] | None:
    """A row where two tensors of one dtype and shape differ, bit by bit."""
    a, b = Contents(ours).integers, Contents(theirs).integers
    unequal = a != b
    if not unequal.any():
        return None
    x, y = ours.reshape(-1)[unequal], theirs.reshape(-1)[unequal]
    added, lost = int((y == 0).sum()), int((x == 0).sum())
    kept = (x != 0) & (y != 0)
    change = (x[kept].double() - y[kept].double()).abs()
    largest = f"{change.max().item():.3g}" if len(change) else None
    return _row(name, "values", added, lost, int(kept.count_nonzero()), largest)


def _row(
    name: str,
    what: str,
    added: int | None = None,
    lost: int | None = None,
    changed: int | None = None,
    largest: str | None = None,
) -> dict[str, Any]:
    return {
        "tensor": name,
        "differs in": what,
        "zeros added": added,
        "zeros lost": lost,
        "changed": changed,
        "largest": largest,
    }


def _tensors(
    source: Checkpoint, what: str, names: Iterable[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Tensors one after another, with a progress bar."""
    names = [*(source.where if names is None else names)]
    if absent := [name for name in names if name not in source.where]:
        raise CheckpointError(f"{absent[0]}: not in {source.folder}")
    sizes = {name: source.files[source.where[name]].stored_bytes(name) for name in names}
    with progress(what, sum(sizes.values()), True, in_bytes=True) as advance:
        for name, size in sizes.items():
            yield name, source.read(name)
            advance(name, size)
