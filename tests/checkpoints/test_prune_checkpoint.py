"""Pruning from files to files: bit for bit what the model in memory becomes."""

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fx_sparsity as fxs
from fx_sparsity import SparsityMapping, prune, prune_checkpoint
from fx_sparsity.checkpoints import Checkpoint, CheckpointError, stated_patterns
from fx_sparsity.graph import InputError, MappingError
from fx_sparsity.masks import tiling_holds
from fx_sparsity.pruning.methods import ExactUpdate, Swaps
from fx_sparsity.storage import parameters_on_meta
from tests.models import make
from tests.pruning.test_prune import Fisher, Interrupted
from tests.pruning.tiny_methods import TinyWanda


def save_shards(model, root, count=3, dtype=None):
    """A model's checkpoint as hubs publish them; a tied tensor under its first name alone."""
    root.mkdir(parents=True)
    tensors = {name: t.detach().clone() for name, t in model.named_parameters()}
    kept = model.state_dict().keys()
    tensors |= {name: t.clone() for name, t in model.named_buffers() if name in kept}
    if dtype is not None:
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    places = {}
    for shard in range(count):
        file = f"model-{shard + 1:05}-of-{count:05}.safetensors"
        names = [name for i, name in enumerate(tensors) if i % count == shard]
        save_file({name: tensors[name] for name in names}, root / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "config.json").write_text('{"of": "a test"}')
    return root


def read(root):
    files = sorted(root.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def on_meta(model):
    """The architecture alone: parameters without data, buffers as they are."""
    memo = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def in_memory(model, method, batches, mapping, **options):
    """State of the squashed model, record and report of `prune`."""
    model = copy.deepcopy(model)
    _, report = prune(model, method, batches, mapping, **options)
    model, record = fxs.squash(model, method)
    return model.state_dict(), record, report


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().reshape(-1).view(torch.uint8),
        other.contiguous().reshape(-1).view(torch.uint8),
    )


def assert_same_record(found, expected):
    assert list(found) == list(expected)
    for fqn, mask in expected.items():
        for field in ("shape", "roles", "pattern", "level", "aliases"):
            assert getattr(found[fqn], field) == getattr(mask, field), (fqn, field)
        assert torch.equal(found[fqn].packed, mask.packed)
        assert torch.equal(found[fqn].packed_zeros, mask.packed_zeros)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    with parameters_on_meta():
        empty = LlamaForCausalLM(config)
    batches = [{"input_ids": torch.randint(64, (2, n))} for n in (9, 12)]
    return LlamaForCausalLM(config).eval(), empty, batches


def bare():
    model, (x, index) = make("bare")
    return model, on_meta(model), [(x, index), (x * 2, index.flip(0))]


METHODS = {
    "wanda": fxs.WandaSparsifier,
    "sparsegpt": fxs.SparseGPTSparsifier,
    "pipeline": lambda: fxs.Pipeline(fxs.SparseGPTSparsifier(), Swaps(), ExactUpdate()),
}


@pytest.mark.parametrize(
    ("method", "sequential"),
    [("wanda", False), ("wanda", "blocks"), ("sparsegpt", True), ("pipeline", True)],
)
@pytest.mark.parametrize("make_model", [llama, bare])
def test_bit_for_bit_as_in_memory(tmp_path, make_model, method, sequential):
    """Tied embeddings; packed projections, experts, transposed storage."""
    model, empty, batches = make_model()
    mapping = SparsityMapping().set_global("unstructured 50%")
    if make_model is llama:
        mapping = SparsityMapping().set_global("2:4").set_object_type("embedding", "rows 25%")
    source, target = save_shards(model, tmp_path / "source"), tmp_path / "target"
    given = METHODS[method]()
    report = prune_checkpoint(
        *(empty, given, batches, mapping),
        source=source,
        target=target,
        sequential=sequential,
        offload=tmp_path,
    )
    state, record, expected = in_memory(
        model, METHODS[method](), batches, mapping, sequential=sequential
    )
    found = read(target)
    assert found.keys() == read(source).keys()
    assert all(same_bits(found[name], state[name]) for name in found)
    assert_same_record(fxs.SparsityRecord.load(target / "sparsity.record"), record)
    assert [w.error for w in report.rows] == [w.error for w in expected.rows]
    assert report.dense == expected.dense
    assert report.activation_bytes >= expected.activation_bytes > 0  # files have gaps
    assert given.names == []
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    anew = ["sparsity.json", "sparsity.record"]
    assert sorted(os.listdir(target)) == sorted([*os.listdir(source), *anew])
    for name in ("config.json", "model.safetensors.index.json"):
        assert (target / name).read_bytes() == (source / name).read_bytes()


def test_the_architecture_loads_what_comes_out(tmp_path):
    from transformers import AutoModelForCausalLM

    model, empty, batches = llama()
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    mapping = SparsityMapping().set_object_type("linear", "2:4")
    places = {"source": tmp_path / "source", "target": tmp_path / "target"}
    prune_checkpoint(empty, fxs.WandaSparsifier(), batches, mapping, **places)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    method = fxs.WandaSparsifier()
    prune(model, method, batches, mapping, sequential=True)
    model, _ = fxs.squash(model, method)
    assert torch.equal(loaded(**batches[0]).logits, model(**batches[0]).logits)
    fxs.verify(loaded, fxs.SparsityRecord.load(tmp_path / "target" / "sparsity.record"))


def test_the_dtype_is_the_checkpoints(tmp_path):
    model, empty, batches = llama()
    source = save_shards(model, tmp_path / "source", dtype=torch.bfloat16)
    mapping = SparsityMapping().set_global("2:4")
    prune_checkpoint(
        *(empty, fxs.WandaSparsifier(), batches, mapping), source=source, target=tmp_path / "t"
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()  # buffers are the code's, and stay
    state, _, _ = in_memory(model, fxs.WandaSparsifier(), batches, mapping, sequential=True)
    found = read(tmp_path / "t")
    assert all(same_bits(found[name], state[name]) for name in found)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def test_biases_and_batch_norms_are_corrected_in_the_files(tmp_path):
    model, (x,) = make("convnet")
    source = save_shards(model, tmp_path / "source")
    batches = [(x,), (x * 2,)]
    prune_checkpoint(
        *(on_meta(model), TinyWanda(), batches),
        source=source,
        target=tmp_path / "target",
        correct_bias=True,
    )
    state, _, _ = in_memory(model, TinyWanda(), batches, None, correct_bias=True)
    found = read(tmp_path / "target")
    assert found.keys() == state.keys()
    assert all(same_bits(found[name], state[name]) for name in found)
    assert not torch.equal(found["norm.running_mean"], model.norm.running_mean)
    assert not torch.equal(found["stem.bias"], model.stem.bias)


def test_one_file_and_other_names(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    batches = [(torch.randn(20, 8),)]
    tensors = {f"model.{n}": t for n, t in model.state_dict().items()} | {"more": torch.ones(2)}
    save_file(tensors, tmp_path / "all.safetensors")
    names = {name: f"model.{name}" for name in model.state_dict()}
    places = {"source": tmp_path / "all.safetensors", "target": tmp_path / "target"}
    report = prune_checkpoint(on_meta(model), TinyWanda(), batches, **places, names=names)
    assert report.dense == {"more": "the model has no such tensor; copied"}
    state, _, _ = in_memory(model, TinyWanda(), batches, None)
    found = load_file(tmp_path / "target" / "all.safetensors")
    assert all(same_bits(found[f"model.{name}"], tensor) for name, tensor in state.items())
    assert torch.equal(found["more"], torch.ones(2))


def test_every_name_of_a_tied_weight_is_written(tmp_path):
    model, (tokens,) = make("tied")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "all.safetensors")
    places = {"source": tmp_path / "all.safetensors", "target": tmp_path / "target"}
    prune_checkpoint(on_meta(model), TinyWanda(), [(tokens,)], **places)
    found = load_file(tmp_path / "target" / "all.safetensors")
    assert torch.equal(found["head.weight"], found["embed.weight"])
    assert (found["embed.weight"] == 0).float().mean() == 0.5


# -- refusals ------------------------------------------------------------------------------------


def without(name):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def changed(name, change):
    return lambda tensors: {**tensors, name: change(tensors[name])}


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("scale", torch.full((4,), 2.0), persistent=False)

    def forward(self, x):
        return self.layer(x) * self.scale


CHANGES = {
    "missing": (without("layer.bias"), "layer.bias: the checkpoint lacks it; names="),
    "shape": (
        changed("layer.weight", lambda t: t[:3].clone()),
        r"layer.weight: expected shape \(4, 4\), the checkpoint has \(3, 4\)",
    ),
    "codes": (
        changed("layer.weight", lambda t: t.to(torch.int8)),
        "layer.weight: expected torch.float32, the checkpoint has torch.int8",
    ),
    "float8": (
        changed("layer.weight", lambda t: t.to(torch.float8_e4m3fn)),
        "layer.weight: expected torch.float32, the checkpoint has torch.float8_e4m3fn",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_checkpoints_that_do_not_fit_are_refused(tmp_path, case):
    change, message = CHANGES[case]
    model = Counting()
    save_file(change(model.state_dict()), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=message):
        prune_checkpoint(
            *(on_meta(model), TinyWanda(), [(torch.randn(9, 4),)]),
            source=tmp_path / "x.safetensors",
            target=tmp_path / "target",
        )
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_ties_that_the_checkpoint_lacks_are_refused(tmp_path):
    model, (tokens,) = make("tied")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file({**state, "head.weight": state["head.weight"] + 1}, tmp_path / "x.safetensors")
    places = {"source": tmp_path / "x.safetensors", "target": tmp_path / "t"}
    with pytest.raises(CheckpointError, match=r"embed.weight: tied in the model, but"):
        prune_checkpoint(on_meta(model), TinyWanda(), [(tokens,)], **places)


def refuse(tmp_path, error, message, method=TinyWanda, model=None, batches=None, **options):
    options = {"source": tmp_path / "source", "target": tmp_path / "target", **options}
    batches = [(torch.randn(9, 4),)] if batches is None else batches
    with pytest.raises(error, match=message):
        prune_checkpoint(model or on_meta(Counting()), method(), batches, **options)


def test_calls_that_cannot_work_are_refused(tmp_path):
    save_shards(Counting(), tmp_path / "source")
    with torch.device("meta"):
        all_on_meta = Counting()
    refuse(tmp_path, CheckpointError, "scale: a buffer that .* parameters_on", model=all_on_meta)
    refuse(tmp_path, CheckpointError, "x: names speaks of it", names={"x": "y"})
    refuse(tmp_path, ValueError, "Fisher needs gradients of all weights", method=Fisher)
    refuse(tmp_path, TypeError, "needs no data; call prepare", method=fxs.WeightNormSparsifier)
    refuse(tmp_path, FileNotFoundError, "nowhere", source=tmp_path / "nowhere")
    refuse(tmp_path, CheckpointError, "is the source, or lies", target=tmp_path / "source")
    refuse(tmp_path, InputError, "expected at least one batch", batches=[])
    refuse(tmp_path, InputError, "rejects them", batches=[(torch.randn(9, 5),)])
    wrong = SparsityMapping().set_module_name("9", "2:4")
    with pytest.raises(MappingError, match="no weight or owning module '9'"):
        prune_checkpoint(
            *(on_meta(Counting()), TinyWanda(), [(torch.randn(9, 4),)], wrong),
            source=tmp_path / "source",
            target=tmp_path / "target",
        )
    assert os.listdir(tmp_path) == ["source"]
    (tmp_path / "target.partial").mkdir()
    (tmp_path / "target.partial" / "mine.txt").touch()
    refuse(tmp_path, CheckpointError, "holds mine.txt, but no run began it; remove that folder")
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine.txt").touch()
    refuse(tmp_path, CheckpointError, "target: is there already; remove it")


# -- interruptions -------------------------------------------------------------------------------


def mlp(depth=4, width=8):
    torch.manual_seed(0)
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers).eval(), [(torch.randn(20, width),) for _ in range(2)]


@pytest.mark.parametrize("sequential", [True, False])
def test_an_interruption_is_made_up_for(tmp_path, sequential):
    model, batches = mlp()
    places = {"source": save_shards(model, tmp_path / "s"), "target": tmp_path / "t"}
    options = {**places, "sequential": sequential, "correct_bias": True, "held_out": 0.5}
    stopped = Interrupted()
    with pytest.raises(KeyboardInterrupt) as caught:
        prune_checkpoint(on_meta(model), stopped, batches, **options)
    assert any("Make the same call again to go on" in note for note in caught.value.__notes__)
    assert not (tmp_path / "t").exists()
    resumed = Interrupted()  # which takes two weights, as many as are left
    report = prune_checkpoint(on_meta(model), resumed, batches, **options)
    assert resumed.left == 0
    state, record, expected = in_memory(
        model, TinyWanda(), batches, None, sequential=sequential, correct_bias=True, held_out=0.5
    )
    found = read(tmp_path / "t")
    assert [w.held_out for w in report.rows] == [w.held_out for w in expected.rows]
    assert all(same_bits(found[name], state[name]) for name in found)
    assert_same_record(fxs.SparsityRecord.load(tmp_path / "t" / "sparsity.record"), record)
    assert [w.fqn for w in report.rows] == [w.fqn for w in expected.rows]
    assert report.dense == {}
    assert sorted(os.listdir(tmp_path)) == ["s", "t"]


def test_a_resumption_that_asks_for_something_else_is_refused(tmp_path):
    model, batches = mlp()
    places = {"source": save_shards(model, tmp_path / "s"), "target": tmp_path / "t"}
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(on_meta(model), Interrupted(), batches, **places)
    for method, data, options, message in (
        (Interrupted(), batches, {"sequential": False}, "sequential True there, now False"),
        (Interrupted(), batches, {"held_out": 0.5}, "held_out 0.0 there, now 0.5"),
        (TinyWanda(), batches, {}, "method 'Interrupted"),
        (Interrupted(), batches[:1], {}, "batches '"),
        (Interrupted(), [(x + 1,) for (x,) in batches], {}, "batches '"),
    ):
        with pytest.raises(CheckpointError, match=message):
            prune_checkpoint(on_meta(model), method, data, **places, **options)
    for mapping, message in (
        (SparsityMapping().set_global("2:4"), "0.weight is pruned to unstructured at 50.0% there"),
    ):
        with pytest.raises(CheckpointError, match=message):
            prune_checkpoint(on_meta(model), Interrupted(), batches, mapping, **places)


KILLED = """
import os, pickle, signal, sys
import torch
import fx_sparsity as fxs
from fx_sparsity.checkpoints.run import Run
from tests.pruning.tiny_methods import TinyWanda
from tests.checkpoints.test_prune_checkpoint import mlp, on_meta

calls, at = 0, int(sys.argv[3])
plain = Run.save

def save(self):
    global calls
    calls += 1
    if calls == at:
        os.kill(os.getpid(), signal.SIGKILL)
    plain(self)

Run.save = save
model, batches = mlp()
fxs.prune_checkpoint(on_meta(model), TinyWanda(), batches, source=sys.argv[1], target=sys.argv[2])
"""


def test_a_kill_is_made_up_for(tmp_path):
    """Killed when the third weight is written and not yet noted: it is restored and done again.

    What is noted before: that it has begun, and two weights.
    """
    model, batches = mlp()
    places = {"source": save_shards(model, tmp_path / "s"), "target": tmp_path / "t"}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, places.values()), "4"],
        capture_output=True,
        timeout=200,
        check=False,
    )
    assert killed.returncode == -9, killed.stderr.decode()
    partial, source = read(tmp_path / "t.partial"), read(tmp_path / "s")
    differ = {name for name in source if not torch.equal(partial[name], source[name])}
    assert differ == {"0.weight", "2.weight", "4.weight"}
    noted = json.loads((tmp_path / "t.partial" / ".run.json").read_text())["done"]["rows"]
    assert [row["fqn"] for row in noted] == ["0.weight", "2.weight"]
    report = prune_checkpoint(on_meta(model), TinyWanda(), batches, **places)
    state, _, _ = in_memory(model, TinyWanda(), batches, None)
    found = read(tmp_path / "t")
    assert all(same_bits(found[name], state[name]) for name in found)
    assert len(report) == 4


# -- what it says of itself ----------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "unstructured 33%", "rows 25%", "block:4x4 50%"])
def test_the_stated_patterns_are_those_of_the_files(tmp_path, pattern):
    """By the names of the checkpoint: tied weights, and names of its own."""
    model, empty, batches = llama()
    tensors = {f"base.{name}": t.detach().clone() for name, t in model.state_dict().items()}
    names = {name.removeprefix("base."): name for name in tensors}
    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    places = {"source": tmp_path / "source", "target": tmp_path / "target", "names": names}
    mapping = {"global": pattern, "module_name": {"model.layers.0.mlp.up_proj": None}}
    report = prune_checkpoint(empty, fxs.WandaSparsifier(), batches, mapping, **places)
    stated, roles = stated_patterns(Checkpoint(tmp_path / "target"))
    tied = {"base.lm_head.weight", "base.model.embed_tokens.weight"}
    pruned = {names[fqn] for fqn in report}
    assert stated.keys() == roles.keys() == (pruned | tied if pruned & tied else pruned)
    result = read(tmp_path / "target")
    for name, config in stated.items():
        tiling = config.pattern.tiling(result[name].shape, roles[name])
        assert tiling_holds(result[name] == 0, tiling, config.level)
    weights = json.loads((tmp_path / "target" / "sparsity.json").read_text())["weights"]
    dense = weights["base.model.layers.0.mlp.up_proj.weight"]
    assert dense["pattern"] is None
    assert "excluded by name" in dense["reason"]
    for name in stated:
        assert weights[name]["zeros"] == int((result[name] == 0).sum())
        assert weights[name]["elements"] == result[name].numel()


# -- memory --------------------------------------------------------------------------------------


def run_limited(root, layers, width, mib):
    """What `tests.pruning.limited` prints; its files are removed."""
    command = [sys.executable, "-m", "tests.pruning.limited", str(root)]
    found = subprocess.run(
        [*command, *map(str, (layers, width, mib))], capture_output=True, check=False, timeout=900
    )
    shutil.rmtree(root)
    assert found.returncode == 0, found.stderr.decode()
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("layers", "width", "mib"),
    [(96, 1024, 80), pytest.param(64, 4096, 800, marks=pytest.mark.exhaustive)],
)
def test_a_checkpoint_larger_than_memory(tmp_path, layers, width, mib):
    """The kernel grants a fifth of the checkpoint's size, too little for loading the model."""
    found = run_limited(tmp_path / "work", layers, width, mib)
    assert found["checkpoint"] > 4.5 * found["limit"]
    assert found["peak"] < found["limit"]
    assert found["pruned"] == layers
    assert found["zeros"] == [0.5, 0.5]
    assert found["loading"] is not None


def test_a_tensor_in_the_place_of_batches_is_refused(tmp_path):
    model, _ = mlp()
    (tmp_path / "a").mkdir()
    save_file(model.state_dict(), tmp_path / "a" / "model.safetensors")
    with pytest.raises(InputError, match="pass a list of batches"):
        prune_checkpoint(
            *(on_meta(model), TinyWanda(), torch.randn(32, 8)),
            source=tmp_path / "a",
            target=tmp_path / "b",
        )
    assert not (tmp_path / "b").exists()
