"""The commands of `fx-sparsity`: inspect, sparsify, convert, verify, diff, report."""

import functools
import shlex
from collections.abc import Callable, Sequence
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
    inspect_checkpoint,
    read_tensors,
    sparsify_checkpoint,
    stated_patterns,
    stated_reasons,
)
from fx_sparsity.cli.differences import differences
from fx_sparsity.cli.display import grouped, printable, say, show
from fx_sparsity.cli.inspect_rows import by_pattern, tensor_row, totals_of
from fx_sparsity.cli.recipe import RecipeError, mapping_of, read_recipe, roles_of
from fx_sparsity.masks import tiling_holds
from fx_sparsity.patterns import Role
from fx_sparsity.reporting import (
    DENSE,
    Compared,
    Densities,
    Density,
    Facts,
    density_of,
    write_html,
)
from fx_sparsity.reports import natural
from fx_sparsity.sparsifier import DataNormSparsifier
from fx_sparsity.storage import FORMATS

FOUND, BAD_INPUT = 1, 3
"""Exit codes, beside 0 for success and 2 for arguments that click refuses."""

_COUNTED = ("tensors", "values", "sparsity", "bytes", "smallest")

SOURCE = click.Path(exists=True, path_type=Path)
TARGET = click.Path(path_type=Path)


class _Commands(click.Group):
    """Errors become one line on standard error and an exit code, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # whoever reads has enough, which click knows
        except (ValueError, OSError, TypeError, MemoryError) as error:
            click.echo(printable(f"Error: {str(error) or type(error).__name__}"), err=True)
            raise SystemExit(BAD_INPUT) from error


def _json_flag(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def _tensors_flag(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--tensors", is_flag=True, help="A row for every tensor, too.")(command)


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
    """Sparsity in safetensors files and checkpoints, without the model's code.

    A PATH is a file, or a folder as model hubs publish them. A PATTERN is one such as "2:4",
    "unstructured 50%", "block:16x16 50%", "rows 25%", or "dense".

    \b
    Examples:
      fx-sparsity inspect model/
      fx-sparsity sparsify model/ sparse/ --pattern 2:4 --name lm_head=dense
      fx-sparsity verify sparse/
      fx-sparsity convert sparse/ small/ --to compressed
      fx-sparsity diff model/ sparse/
      fx-sparsity report sparse/ --before model/
    """


@commands.command()
@click.argument("path", type=SOURCE)
@click.option("--roles", multiple=True, metavar="REGEX=ROLES", help="Roles of axes: in,out.")
@_tensors_flag
@_json_flag
def inspect(path: Path, roles: tuple[str, ...], tensors: bool, as_json: bool) -> None:
    """Show how sparse a file or a checkpoint is, and what it takes.

    Tensors are put together by the tightest pattern that their zeros follow; a weight with less
    than 1% of zeros is called dense. With --tensors each has its row, with the bytes that it takes
    in each format that can hold it; in the totals, what a format cannot hold counts as dense.

    \b
    Examples:
      fx-sparsity inspect model.safetensors
      fx-sparsity inspect model/ --tensors
      fx-sparsity inspect model/ --json > model.json
      fx-sparsity inspect gpt2/ --roles '.*c_attn.weight=in,out'
    """
    found = inspect_checkpoint(Checkpoint(path), roles_of(read_recipe(None, {"roles": roles})))
    say(found.summary, as_json=as_json)
    if not (as_json or tensors):
        show(by_pattern(found), as_json=False, numeric=_COUNTED)
        return
    rows = [tensor_row(row) for row in found.rows]
    last = {**dict.fromkeys(rows[0] if rows else ()), **totals_of(found)}
    last["tensor"] = f"{len(rows)} tensors"
    if as_json:
        last |= {"elements": found.elements, "zeros": found.zeros, "smallest": found.smallest}
    show(rows, as_json=as_json, totals=last, numeric=("sparsity", "bytes", *FORMATS))


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
@_tensors_flag
@_json_flag
def sparsify(
    source: Path, target: Path, recipe: Path | None, tensors: bool, as_json: bool, **flags: Any
) -> None:
    """Set the smallest weights of a checkpoint to zero, in the patterns asked for.

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
        for name, weight in sorted(report.items(), key=lambda item: natural(item[0]))
    ]
    say(report.summary, as_json=as_json)
    if as_json or tensors:
        show(rows, as_json=as_json, numeric=("sparsity",))
    else:
        told = [
            {**row, "becomes": row["pattern"] or f"dense: {row['dense because']}"} for row in rows
        ]
        show(grouped(told, "becomes", ()), as_json=False, numeric=("tensors",))
    _say_skipped(Checkpoint(source), as_json=as_json)


@commands.command(name="convert")
@click.argument("source", type=SOURCE)
@click.argument("target", type=TARGET)
@click.option("--to", "layout", type=click.Choice(LAYOUTS), default="dense", show_default=True)
@_json_flag
def convert_command(source: Path, target: Path, layout: Any, as_json: bool) -> None:
    """Write a file or a checkpoint anew in another layout.

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
@_tensors_flag
@_json_flag
def verify_command(
    path: Path, recipe: Path | None, tensors: bool, as_json: bool, **flags: Any
) -> None:
    """Check that patterns hold and that files are whole; exit code 1 where not.

    Patterns are those stated by flags or a recipe, or else by the checkpoint itself, in the
    sparsity.json that `sparsify` and `prune_checkpoint` leave. Files are checked as far as they
    carry checksums. Whatever is broken has its row, and with --tensors all that holds, too.

    \b
    Examples:
      fx-sparsity verify sparse/
      fx-sparsity verify sparse/ --tensors
      fx-sparsity verify sparse/ --pattern 2:4 --name lm_head=dense
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
    for name, tensor in read_tensors(source, "verifying", stated):
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
    rows.sort(key=lambda row: natural(row["tensor"]))
    faults = [row for row in rows if row["verdict"] != "ok"]
    say(f"{len(stated)} patterns stated, {len(faults)} faults", as_json=as_json)
    show(rows if as_json or tensors else faults, as_json=as_json, numeric=("sparsity",))
    if faults:
        raise SystemExit(FOUND)


@commands.command()
@click.argument("a", type=SOURCE)
@click.argument("b", type=SOURCE)
@_tensors_flag
@_json_flag
def diff(a: Path, b: Path, tensors: bool, as_json: bool) -> None:
    """Show how the tensors of two checkpoints differ; exit code 1 where some do.

    Of tensors in both: elements that became zero, that are zero no more, and other changes; with
    --tensors for each, with the largest difference.

    \b
    Examples:
      fx-sparsity diff model/ sparse/
      fx-sparsity diff model/ sparse/ --tensors
      fx-sparsity diff sparse/ small/ && echo the same
    """
    left, right = Checkpoint(a), Checkpoint(b)
    rows = differences(left, right, (str(a), str(b)))
    say(f"{len(rows)} of {len(left.where.keys() | right.where)} tensors differ", as_json=as_json)
    counts = ("zeros added", "zeros lost", "changed")
    if as_json or tensors:
        show(rows, as_json=as_json, numeric=(*counts, "largest"))
    else:
        show(grouped(rows, "differs in", counts), as_json=False, numeric=("tensors", *counts))
    if rows:
        raise SystemExit(FOUND)


@commands.command()
@click.argument("path", type=SOURCE)
@click.option("--output", type=TARGET, default="report.html", show_default=True, metavar="FILE")
@click.option("--before", type=SOURCE, metavar="PATH", help="What it was made of, to compare with.")
@click.option("--roles", multiple=True, metavar="REGEX=ROLES", help="Roles of axes: in,out.")
def report(path: Path, output: Path, before: Path | None, roles: tuple[str, ...]) -> None:
    """Write one HTML file to look at: zeros, patterns, bytes, and where each weight is zero.

    What `sparsity.json` states is checked, too. The file needs nothing else, and is overwritten.

    \b
    Examples:
      fx-sparsity report sparse/
      fx-sparsity report sparse/ --before model/ --output sparse.html
      fx-sparsity report model.safetensors
    """
    source, axes = Checkpoint(path), roles_of(read_recipe(None, {"roles": roles}))
    original = None if before is None else Checkpoint(before)
    _check_output(output, [source, *([] if original is None else [original])])
    pictures: dict[str, Density] = {}

    def look(name: str, zero: Tensor, roles: Sequence[Role]) -> None:
        if zero.ndim > 1 and zero.numel():
            pictures[name] = density_of(zero, roles)

    found = inspect_checkpoint(source, axes, stated=True, look=look)
    compared = None if original is None else inspect_checkpoint(original, axes)
    write_html(
        output,
        found if compared is None else Compared(compared, found),
        Densities({name: pictures[name] for name in sorted(pictures, key=natural)}),
        Facts(reasons={DENSE: stated_reasons(source)}),
        title=f"Sparsity of {path.resolve().name}",
        reproduce=shlex.join(["fx-sparsity", "report", *map(str, _said(path, before, roles))]),
    )
    say(f"{found.summary}\nwritten to {output}", as_json=False)


def _check_output(output: Path, read: Sequence[Checkpoint]) -> None:
    """Raise where a report would overwrite what it tells of; an earlier report beside it may go."""
    held = {
        (checkpoint.folder / name).resolve()
        for checkpoint in read
        for name in (*checkpoint.shards, checkpoint.index or "", *checkpoint.others)
    }
    if output.resolve() in held and output.suffix != ".html":
        raise CheckpointError(f"{output}: a file of the checkpoint; choose another --output")


def _said(path: Path, before: Path | None, roles: Sequence[str]) -> list[object]:
    """The arguments of `report` that matter."""
    original = [] if before is None else ["--before", before]
    return [path, *original, *(part for role in roles for part in ("--roles", role))]


def _say_skipped(source: Checkpoint, *, as_json: bool) -> None:
    for name in source.skipped:
        say(f"not copied, weights of another kind or a link: {name}", as_json=as_json)
