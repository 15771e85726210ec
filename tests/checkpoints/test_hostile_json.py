"""Whatever JSON lies beside a checkpoint's tensors, there is a result or one line that says why."""

import contextlib
import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import fx_sparsity as fxs
from fx_sparsity.checkpoints import CheckpointError, convert
from fx_sparsity.checkpoints.run import LOG
from fx_sparsity.cli.commands import commands
from fx_sparsity.errors import FxSparsityError

DEEP = "[" * 100_000 + "]" * 100_000
ODD = [None, -1, "x", [], ["x"], [[]], {"x": 1}]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "tie_word_embeddings": True,
    "text_config": {"tie_word_embeddings": True},
    "transformers_weights": "x",
    "quantization_config": {
        "quant_method": "fx_sparsity",
        "replaced": {"quantization_config": {}},
        "weight_block_size": [128, 128],
        "sparsity_config": {"format": "sparse-bitmask"},
    },
}


def save_source(folder):
    folder.mkdir()
    tensors = {
        "model.embed_tokens.weight": torch.randn(8, 8),
        "model.up.weight": torch.randn(4, 8).to(torch.float8_e4m3fn),
        "model.up.weight_scale_inv": torch.ones(1, 1),
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def variants(value):
    """A value with each of its parts replaced by odd ones."""
    yield from ODD
    for key in value if isinstance(value, dict) else ():
        for odd in variants(value[key]):
            yield {**value, key: odd}
    if isinstance(value, list):
        for i in range(len(value)):
            for odd in ODD:
                yield [*value[:i], odd, *value[i + 1 :]]


@pytest.mark.parametrize(
    "layout",
    [
        "compressed",
        *(pytest.param(x, marks=pytest.mark.exhaustive) for x in ("dense", "sparse-bitmask")),
    ],
)
def test_odd_configurations(tmp_path, layout):
    source, target = save_source(tmp_path / "source"), tmp_path / "target"
    for config in variants(CONFIG):
        (source / "config.json").write_text(json.dumps(config))
        with contextlib.suppress(FxSparsityError):
            fxs.sparsify_checkpoint(source, target, "2:4", layout=layout, progress=False)
        if target.exists():
            convert(target, tmp_path / "target-2", "dense", progress=False)
        for left in tmp_path.glob("target*"):
            shutil.rmtree(left)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (name, text)
        for name in ("config.json", "model.safetensors.index.json", "sparsity.json")
        for text in (DEEP, '{"a":' * 50_000, "\x00", "[]", "3", '{"weight_map": 3, "weights": 3}')
    ],
)
@pytest.mark.parametrize("verb", ["inspect", "verify", "sparsify", "convert"])
def test_one_line_for_what_cannot_be_read(tmp_path, name, text, verb):
    source = save_source(tmp_path / "source")
    (source / name).write_text(text)
    rest = {"sparsify": [str(tmp_path / "t"), "--pattern", "2:4"], "convert": [str(tmp_path / "t")]}
    found = CliRunner().invoke(commands, [verb, str(source), *rest.get(verb, [])])
    assert found.exit_code in (0, 3)
    if found.exit_code:
        assert found.stderr.count("\n") == 1
        assert len(found.stderr) < 300
    assert not isinstance(found.exception, Exception)


def test_a_deep_recipe_is_one_line(tmp_path):
    (tmp_path / "recipe.yaml").write_text("pattern: " + "[" * 10_000)
    save_file({"w": torch.ones(4, 4)}, tmp_path / "m.safetensors")
    command = ["sparsify", str(tmp_path / "m.safetensors"), str(tmp_path / "t"), "--recipe"]
    found = CliRunner().invoke(commands, [*command, str(tmp_path / "recipe.yaml")])
    assert found.exit_code == 3, found.output
    assert len(found.stderr) < 300


@pytest.mark.parametrize("place", ["target.partial", "target"])
def test_a_log_that_no_run_wrote_is_refused(tmp_path, place, monkeypatch):
    source, target = save_source(tmp_path / "source"), tmp_path / "target"
    monkeypatch.setattr("fx_sparsity.checkpoints.run.Run.finish", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fxs.sparsify_checkpoint(source, target, "2:4")
    monkeypatch.undo()
    (tmp_path / "target.partial").rename(tmp_path / place)
    whole = (tmp_path / place / LOG).read_text()
    texts = [DEEP, "", "{}", '{"asked": {}}', whole[:-9], whole.replace('"shards"', '"x"')]
    for text in [*texts, whole.replace("null", "3"), whole.replace("0", "1")]:
        (tmp_path / place / LOG).write_text(text)
        with pytest.raises(CheckpointError, match="target: is there already|; remove /") as error:
            fxs.sparsify_checkpoint(source, target, "2:4")
        assert "\n" not in str(error.value)
    (tmp_path / place / LOG).write_text(whole)
    fxs.sparsify_checkpoint(source, target, "2:4")
    assert not (target / LOG).exists()
