"""The command line: what it prints and writes, exit codes, and errors in one line."""

import json
import re
import shlex
import subprocess
import sys
import textwrap

import pytest
import torch
from click.testing import CliRunner
from expecttest import assert_expected_inline
from safetensors.torch import load_file, save_file
from torch import nn

import fx_sparsity as fxs
from fx_sparsity.cli.commands import commands
from fx_sparsity.cli.display import show


def run(*arguments, code=0):
    result = CliRunner().invoke(commands, [str(a) for a in arguments], prog_name="fx-sparsity")
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.output


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of three tensors, and the place for what is made of it."""
    generator = torch.Generator().manual_seed(0)
    src = tmp_path / "model"
    src.mkdir()
    tensors = {
        "embed.weight": torch.randn(64, 32, generator=generator),
        "mlp.weight": torch.randn(64, 64, generator=generator).bfloat16(),
        "norm.weight": torch.ones(64),
    }
    save_file(tensors, src / "model.safetensors")
    (src / "config.json").write_text("{}")
    return tmp_path


def test_inspect(folder):
    run(
        "sparsify",
        folder / "model",
        folder / "sparse",
        "--kind",
        "linear=2:4",
        "--kind",
        "embedding=rows 25%",
    )
    assert_expected_inline(
        run("inspect", folder / "sparse"),
        """\
3 tensors, 6,208 values, 41.2% zeros; 16.6 kB, 11 kB with the smallest format for each tensor
pattern    tensors  values  sparsity  bytes    smallest  such as
---------  -------  ------  --------  -------  --------  ------------
rows       1        2048    25.0%     8.19 kB  6.15 kB   embed.weight
2:4        1        4096    50.0%     8.19 kB  4.61 kB   mlp.weight
no weight  1        64      0.0%      256 B    256 B     norm.weight
""",
    )
    assert_expected_inline(
        run("inspect", folder / "sparse", "--tensors"),
        """\
3 tensors, 6,208 values, 41.2% zeros; 16.6 kB, 11 kB with the smallest format for each tensor
tensor        dtype     shape  sparsity  pattern   bytes  dense  two_four  rows   block  bitmask
------------  --------  -----  --------  --------  -----  -----  --------  -----  -----  -------
embed.weight  float32   64x32  25.0%     rows 25%  8192   8192   -         6152   6152   6400
mlp.weight    bfloat16  64x64  50.0%     2:4       8192   8192   4608      8200   8193   4608
norm.weight   float32   64     0.0%      -         256    256    -         -      257    264
3 tensors     -         -      41.2%     -         16640  16640  13056     14608  14602  11272
""",
    )


def test_names_are_in_natural_order_and_few_zeros_are_dense(folder):
    tensors = {f"layers.{i}.weight": torch.ones(40, 40) for i in (10, 9, 1)}
    tensors["layers.1.weight"][0, :3] = 0
    tensors["layers.9.weight"].view(-1)[::7] = 0
    save_file(tensors, folder / "model" / "model.safetensors")
    rows = json.loads(run("inspect", folder / "model", "--json"))["rows"]
    assert [(row["tensor"], row["pattern"]) for row in rows] == [
        ("layers.1.weight", "dense"),
        ("layers.9.weight", "unstructured 14.3%"),
        ("layers.10.weight", "dense"),
    ]
    run("sparsify", folder / "model", folder / "sparse", "--pattern", "2:4")
    for arguments in (["verify", folder / "sparse"], ["diff", folder / "model", folder / "sparse"]):
        output = run(*arguments, "--tensors", code=arguments[0] == "diff")
        assert re.findall(r"layers\.(\d+)", output) == ["1", "9", "10"]


def test_inspect_as_json(folder):
    found = json.loads(run("inspect", folder / "model", "--json"))
    assert [row["tensor"] for row in found["rows"]] == ["embed.weight", "mlp.weight", "norm.weight"]
    assert found["totals"]["bytes"] == 64 * 32 * 4 + 64 * 64 * 2 + 64 * 4
    assert found["totals"]["zeros"] == 0


def test_a_recipe_says_what_the_flags_say(folder):
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        """
pattern: "unstructured 50%"
name: {mlp: "2:4"}
regex: {"norm.*": dense}
kind: {embedding: rows 25%}
norm: L2
"""
    )
    flags = [
        *("--pattern", "unstructured 50%", "--name", "mlp=2:4", "--regex", "norm.*=dense"),
        *("--kind", "embedding=rows 25%", "--norm", "L2"),
    ]
    said = run("sparsify", folder / "model", folder / "a", *flags)
    assert run("sparsify", folder / "model", folder / "b", "--recipe", recipe) == said
    run("diff", folder / "a", folder / "b")
    changed = run(
        "sparsify", folder / "model", folder / "c", "--recipe", recipe, "--name", "mlp=dense"
    )
    assert "excluded by name 'mlp'" in changed


def test_a_tied_name_is_known(folder):
    """As transformers writes a tied model: its head is in `config.json` alone."""
    save_file(
        {"model.embed_tokens.weight": torch.randn(64, 32), "model.norm.weight": torch.ones(32)},
        folder / "model" / "model.safetensors",
    )
    (folder / "model" / "config.json").write_text('{"tie_word_embeddings": true}')
    arguments = ("sparsify", folder / "model", folder / "sparse", "--pattern", "2:4", "--name")
    output = run(*arguments, "lm_haed=dense", code=3)
    assert "the nearest are 'lm_head'" in output
    assert "excluded by name 'lm_head'" in run(*arguments, "lm_head=dense")
    run("diff", folder / "model", folder / "sparse")
    output = run("verify", folder / "model", "--name", "lm_head=2:4", code=1)
    assert "model.embed_tokens.weight" in output


def test_verify_leaves_alone_what_sparsify_does(folder):
    tensors = {"mlp.weight": torch.ones(8, 8), "mlp.gate.weight": torch.ones(2, 7)}
    save_file(tensors, folder / "model" / "model.safetensors")
    run("sparsify", folder / "model", folder / "sparse", "--pattern", "2:4")
    assert "1 patterns stated, 0 faults" in run("verify", folder / "sparse", "--pattern", "2:4")


def test_verify(folder):
    run("sparsify", folder / "model", folder / "sparse", "--pattern", "2:4")
    assert "2 patterns stated, 0 faults" in run("verify", folder / "sparse")
    run("convert", folder / "sparse", folder / "small", "--to", "compressed")
    assert "2 patterns stated, 0 faults" in run("verify", folder / "small")
    broken = run("verify", folder / "model", "--name", "mlp=2:4", "--json", code=1)
    (row,) = json.loads(broken)["rows"]
    assert (row["tensor"], row["verdict"]) == ("mlp.weight", "broken")
    path = folder / "small" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    assert "expected checksum" in run("verify", folder / "small", code=1)


def test_verify_knows_what_both_verbs_state(folder):
    flags = ("--pattern", "unstructured 50%", "--ranked", "model")
    run("sparsify", folder / "model", folder / "sparse", *flags)
    assert "2 patterns stated, 0 faults" in run("verify", folder / "sparse")
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64, bias=False))
    fxs.export(model, folder / "dense.safetensors")
    places = {"source": folder / "dense.safetensors", "target": folder / "pruned"}
    method, batches = fxs.WandaSparsifier(), [(torch.randn(8, 64),)]
    fxs.prune_checkpoint(model, method, batches, {"global": "2:4"}, **places)
    assert "2 patterns stated, 0 faults" in run("verify", folder / "pruned")


def test_diff(folder):
    run("sparsify", folder / "model", folder / "sparse", "--name", "mlp=2:4")
    assert_expected_inline(
        run("diff", folder / "model", folder / "sparse", code=1),
        """\
1 of 3 tensors differ
differs in  tensors  zeros added  zeros lost  changed  such as
----------  -------  -----------  ----------  -------  ----------
values      1        2048         0           0        mlp.weight
""",
    )
    assert_expected_inline(
        run("diff", folder / "model", folder / "sparse", "--tensors", code=1),
        """\
1 of 3 tensors differ
tensor      differs in  zeros added  zeros lost  changed  largest
----------  ----------  -----------  ----------  -------  -------
mlp.weight  values      2048         0           0        -
""",
    )
    run("convert", folder / "sparse", folder / "small", "--to", "compressed")
    assert run("diff", folder / "sparse", folder / "small") == "0 of 3 tensors differ\n"
    save_file({"mlp.weight": torch.ones(2)}, folder / "other.safetensors")
    output = run("diff", folder / "model", folder / "other.safetensors", code=1)
    assert "only in" in output
    assert "bfloat16 64x64 -> float32 2" in output


def test_convert_to_compressed_tensors_and_back(folder):
    run("sparsify", folder / "model", folder / "sparse", "--pattern", "2:4")
    for layout in ("compressed", "sparse-24-bitmask", "sparse-bitmask"):
        found = json.loads(
            run("convert", folder / "sparse", folder / layout, "--to", layout, "--json")
        )
        (row,) = found["rows"]
        assert row["bytes after"] < row["bytes before"]
        run("convert", folder / layout, folder / f"{layout}-back")
        run("diff", folder / "sparse", folder / f"{layout}-back")
        assert "mlp.weight" in load_file(folder / f"{layout}-back" / "model.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "{}/config"], "does not exist"),
        (["sparsify", "{}/model", "{}/out"], "nothing to do: give --pattern"),
        (["sparsify", "{}/model", "{}/out", "--pattern", "5:4"], "N:M needs"),
        (["sparsify", "{}/model", "{}/out", "--pattern", "rows"], "needs a level"),
        (["sparsify", "{}/model", "{}/out", "--name", "mpl=2:4"], "the nearest are 'mlp'"),
        (["sparsify", "{}/model", "{}/out", "--name", "2:4"], "expected NAME=PATTERN"),
        (["sparsify", "{}/model", "{}/out", "--regex", "(=2:4"], "regex '('"),
        (["sparsify", "{}/model", "{}/model", "--pattern", "2:4"], "is the source"),
        (["sparsify", "{}/model", "{}/out", "--pattern", "3:5"], "embed.weight: pattern 3:5 needs"),
        (["sparsify", "{}/model", "{}/out", "--recipe", "{}/bad.yaml"], "expected pattern"),
        (["verify", "{}/model", "--recipe", "{}/5.yaml"], "expected quotation marks around 5"),
        (["inspect", "{}/model", "--roles", "mlp=up,down"], "expected some of out, in"),
        (["inspect", "{}/model", "--roles", "((=in,out"], "roles '((': missing ), unterminated"),
        (["inspect", "{}/model", "--roles", "mlp"], "--roles: expected REGEX=ROLES, found 'mlp'"),
        (["inspect", "{}/bad.yaml"], "not a safetensors file"),
        (["verify", "{}/bad.yaml"], "not a safetensors file"),
    ],
)
def test_errors_are_one_line(folder, arguments, message):
    (folder / "bad.yaml").write_text("patern: 2:4\n")
    (folder / "5.yaml").write_text('name: {5: "2:4"}\n')
    arguments = [a.format(folder) for a in arguments]
    output = run(*arguments, code=2 if message == "does not exist" else 3)
    assert message in output
    assert "Traceback" not in output
    assert not (folder / "out").exists()


def examples():
    """Every example of every help text, by its line."""
    groups = {name: command.help for name, command in commands.commands.items()}
    for name, text in {"": commands.help, **groups}.items():
        found = re.findall(r"^ *(fx-sparsity .*)$", text, re.M)
        assert found
        assert all(f"fx-sparsity {name}" in line for line in found)
        yield from found


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """Files of the names that examples have, of a tied model: its head is in `config.json` alone."""
    folder, generator = tmp_path_factory.mktemp("tied"), torch.Generator().manual_seed(0)
    for name, projection in (("model", "q_proj"), ("gpt2", "c_attn")):
        (folder / name).mkdir()
        tensors = {"model.embed_tokens.weight": torch.randn(64, 32, generator=generator)}
        for i in range(2):
            weight = torch.randn(64, 32, generator=generator)
            tensors[f"model.layers.{i}.{projection}.weight"] = weight
        save_file(tensors, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text('{"tie_word_embeddings": true}')
    (folder / "model.safetensors").symlink_to(folder / "model" / "model.safetensors")
    run(
        "sparsify",
        folder / "model",
        folder / "sparse",
        "--pattern",
        "2:4",
        "--name",
        "lm_head=dense",
    )
    run("convert", folder / "sparse", folder / "small", "--to", "compressed")
    recipe = re.search(
        r"A recipe says what the flags say:\n((?: +.*\n)+)", commands.commands["sparsify"].help
    )
    (folder / "recipe.yaml").write_text(textwrap.dedent(recipe[1]))
    return folder


@pytest.mark.parametrize("line", sorted(set(examples())))
def test_the_examples_of_the_help_run_on_a_tied_checkpoint(line, tied, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, command, *arguments = shlex.split(line.partition(" && ")[0].partition(" > ")[0])
    made = {"sparsify": arguments[1:2], "convert": arguments[1:2]}.get(command, [])
    for path in tied.iterdir():
        if path.name not in [name.rstrip("/") for name in made]:
            (tmp_path / path.name).symlink_to(path)
    output = run(command, *arguments, code=int(command == "diff" and "model/" in arguments))
    assert output
    assert all((tmp_path / name).exists() for name in made)


def test_help_shows_each_example_on_a_line_of_its_own():
    shown = [line.strip() for line in run("--help").splitlines()]
    assert {"Examples:", "fx-sparsity verify sparse/"} <= set(shown)


def test_the_report_of_a_checkpoint(folder):
    run("sparsify", folder / "model", folder / "sparse", "--name", "mlp=2:4")
    output = folder / "report.html"
    told = run(
        *("report", folder / "sparse", "--before", folder / "model", "--output", output),
    )
    assert told.endswith(f"written to {output}\n")
    text = output.read_text()
    for expected in ("1 of 1 hold", "no entry of the mapping speaks of it", "data:image/png"):
        assert expected in text


@pytest.mark.parametrize("name", ["model/model.safetensors", "sparse/config.json"])
def test_a_report_does_not_overwrite_what_it_tells_of(folder, name):
    run("sparsify", folder / "model", folder / "sparse", "--name", "mlp=2:4")
    before = (folder / name).read_bytes()
    paths = (folder / "sparse", "--before", folder / "model")
    told = run("report", *paths, "--output", folder / name, code=3)
    assert "a file of the checkpoint; choose another --output" in told
    assert (folder / name).read_bytes() == before
    for _ in range(2):  # a report beside the weights may be made anew
        run("report", *paths, "--output", folder / "sparse" / "report.html")


def test_names_of_a_hostile_file(tmp_path, capsys, monkeypatch):
    names = ["[/bold].weight", "[red]x[/red].weight", "a\nb.weight", "\x1b[31m.weight"]
    save_file({name: torch.ones(4, 4) for name in names}, tmp_path / "w.safetensors")
    piped = run("inspect", tmp_path / "w.safetensors", "--tensors")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show([{"tensor": name} for name in names], as_json=False)  # the table of a terminal
    for output in (piped, capsys.readouterr().out):
        for name in (*names[:2], "a\\nb.weight", "\\x1b[31m.weight"):
            assert name in output
        assert "\x1b" not in output.replace("\x1b[1m", "").replace("\x1b[0m", "")  # bold titles
    name = "\x1b[31m.weight=2:5"
    assert "\x1b" not in run("verify", tmp_path / "w.safetensors", "--name", name, code=3)


def test_as_a_process(folder):
    def process(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "fx_sparsity.cli", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
        )

    fxs.save({"w": torch.eye(8)}, folder / "w.safetensors")
    done = process("inspect", folder / "w.safetensors")
    assert (done.returncode, done.stderr) == (0, "")
    assert "87.5%" in done.stdout
    without = "import sys; sys.modules['click'] = None; from fx_sparsity.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", without], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert done.stderr == 'fx-sparsity needs click: pip install "fx_sparsity[cli]"\n'
