"""Corrupt and hostile files: an error that names what is wrong, never a crash or a huge allocation.

Two kinds of mutants. Blind ones change bytes: they are refused, or load to the very same tensors.
Crafted ones change what the header says and carry the right checksum of the header: they are
refused, or load to whatever they say, within the limits of what a file may ask for.
"""

import json
import os
import random
import resource
import subprocess
import sys
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fx_sparsity as fxs
from fx_sparsity.storage import MOST_EXPANSION, CompressedFile, FileFormatError
from tests.storage.test_formats import random_tensor, same_bits


def example_state():
    generator = torch.Generator().manual_seed(0)
    two_four = torch.randn(16, 32, generator=generator).half()
    two_four.view(-1, 4)[torch.rand(128, 4, generator=generator).argsort(1) < 2] = 0
    state = {
        "dense": torch.randn(5, 3, generator=generator),
        "bitmask": random_tensor((40, 33), torch.bfloat16, 0.4, 1),
        "two_four": two_four,
        "block": random_tensor((64, 64), torch.int8, 0.4, 2, (16, 16)),
        "rows": random_tensor((50, 24), torch.float32, 0.4, 3, (1, 24)),
        "quantized": torch.quantize_per_tensor(
            torch.randn(8, 8, generator=generator), 0.1, 3, torch.quint8
        ),
    }
    return state | {"tied": state["block"]}


def same(a, b):
    if a.is_quantized or b.is_quantized:
        return a.is_quantized and b.is_quantized and torch.equal(a.int_repr(), b.int_repr())
    return same_bits(a, b)


def example(folder):
    path = folder / "example"
    fxs.save(example_state(), path)
    return path.read_bytes()


def blind(content, rng):
    """Bytes changed, removed, added or exchanged anywhere; more often in the header."""
    content = bytearray(content)
    length = 8 + int.from_bytes(content[:8], "little")
    text = content.index(b"  ")  # the header's padding says nothing
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        spot = rng.choice((rng.randrange(8), rng.randrange(text), rng.randrange(len(content))))
        what = rng.randrange(6)
        if what <= 1:
            content[spot] ^= 1 << rng.randrange(8)
        elif what == 2:
            content[spot] = rng.randrange(256)
        elif what == 3:
            del content[spot : spot + rng.choice((1, 8, 1000))]
        elif what == 4:
            content[spot:spot] = rng.randbytes(rng.choice((1, 8, 1000)))
        else:
            other = rng.randrange(min(length, len(content)))
            content[spot : spot + 4] = content[other : other + 4]
        if len(content) < 10:
            break
    return bytes(content)


WEIRD = (
    *(0, -1, 1, 2, 3, 7, 8, 1 << 31, 1 << 40, 1 << 62, 1 << 64, 10**30, 0.5, 1e300),
    *("", "dense", "bitmask", "rows", "block", "two_four", "F64", "I8", "U8", "tensor", "pickle"),
    *(None, True, [], {}, [1], [[1]], {"kind": "none"}, "rows::values", "block"),
)


def crafted(content, rng):
    """Anything in the header or the metadata exchanged, with the right checksum."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    ours = json.loads(metadata["fx_sparsity"])
    for _ in range(rng.choice((1, 1, 2, 4))):
        _exchange(rng.choice((header, ours)), rng)
    text = json.dumps(ours)
    try:
        listed = sorted((n, e["dtype"], list(e["shape"])) for n, e in header.items())
        check = f"{zlib.crc32(json.dumps([text, listed]).encode()):08x}"
    except (TypeError, KeyError):
        check = ""
    metadata = {"fx_sparsity": text, "fx_sparsity_checksum": check}
    raw = json.dumps({"__metadata__": metadata, **header}).encode()
    return len(raw).to_bytes(8, "little") + raw + content[8 + length :]


def _exchange(tree, rng):
    """One value anywhere in a tree of dicts and lists is replaced, removed or doubled."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(tree[key], dict | list) and tree[key] and rng.random() < 0.85:
            tree = tree[key]
            continue
        what = rng.randrange(5)
        if what == 0:
            del tree[key]
        elif what == 1 and isinstance(tree, dict):
            tree[rng.choice(("x", "dense", "rows::kept", "quantized/codes"))] = tree.pop(key)
        elif what == 2 and isinstance(tree[key], int):
            tree[key] += rng.choice((-8, -1, 1, 8))
        else:
            tree[key] = rng.choice(WEIRD)
        return


def judge(path, content, original, identical):
    """Load a mutant. True where it was refused."""
    path.write_bytes(content)
    try:
        state = fxs.load(path, check=True)
    except FileFormatError:
        return True
    if identical:
        assert state.keys() == original.keys()
        assert all(same(state[name], tensor) for name, tensor in original.items())
    bytes_of = sum(t.numel() * t.element_size() for t in state.values() if not t.is_quantized)
    assert bytes_of <= MOST_EXPANSION * 2 * len(content)
    return False


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mutate", [blind, crafted])
def test_mutants(mutate, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutants")
    content, original = example(folder), example_state()

    @given(st.integers(0, 2**32))
    def run(seed):
        mutant = mutate(content, random.Random(seed))
        judge(folder / "mutant", mutant, original, mutate is blind)

    run()


def many(folder, count):
    """Run in a process of its own: memory for mutants is limited, and each has a second."""
    import faulthandler
    from pathlib import Path

    folder = Path(folder)
    content, original = example(folder), example_state()
    torch.set_num_threads(1)
    judge(folder / "mutant", content, original, True)
    status = Path("/proc/self/status").read_text()
    data = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, ((data << 10) + (64 << 20),) * 2)
    refused = 0
    for seed in range(count):
        mutate = (blind, crafted)[seed % 2]
        faulthandler.dump_traceback_later(5, exit=True)
        refused += judge(
            folder / "mutant", mutate(content, random.Random(seed)), original, mutate is blind
        )
    faulthandler.cancel_dump_traceback_later()
    print(count, "mutants,", refused, "refused")


@pytest.mark.parametrize("count", [300, pytest.param(100_000, marks=pytest.mark.exhaustive)])
def test_mutants_in_little_memory(count, tmp_path):
    code = f"from tests.storage import test_hostile as t; t.many({str(tmp_path)!r}, {count})"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"FX_SPARSITY_KERNELS": os.environ.get("FX_SPARSITY_KERNELS", "1")},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"\x00" * 7, "not a safetensors file"),
        (b"\xff" * 100, "not a safetensors file"),
        ((50).to_bytes(8, "little") + b"[" * 50, "header cannot be read"),
        ((9_000).to_bytes(8, "little") + b"[" * 9_000, "header cannot be read"),
        ((2).to_bytes(8, "little") + b"[]", "header that is an object"),
        ((4).to_bytes(8, "little") + b"1e99", "header that is an object"),
        ((6000).to_bytes(8, "little") + b"1" * 6000, "header cannot be read"),
        ((12).to_bytes(8, "little") + b'{"a":1,"a":1', "header cannot be read"),
        ((13).to_bytes(8, "little") + b'{"a":1,"a":1}', "a: listed twice"),
        ((7).to_bytes(8, "little") + b'{"a":1}', "a: expected dtype, shape and data_offsets"),
    ],
)
def test_headers_that_are_none(tmp_path, content, message):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(FileFormatError, match=message):
        fxs.load(tmp_path / "f")


def entry(dtype="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"t": entry(dtype="PICKLE")}, "t: expected a dtype"),
        ({"t": entry(shape=(5,))}, "t: expected 5 bytes"),
        ({"t": entry(offsets=(0, 1 << 70), shape=(1 << 70,))}, "t: expected a shape that fits"),
        ({"t": entry(shape=(0, 1 << 60), offsets=(0, 0))}, "t: expected a shape that fits"),
        ({"t": entry(offsets=(1, 5))}, "t: expected to start at byte 0"),
        ({"t": entry(), "u": entry(offsets=(2, 6))}, "u: expected to start at byte 4"),
        ({"t": entry(offsets=(0, 3), shape=(3,))}, "t: expected the file to end"),
        ({"t": entry(offsets=(-4, 0))}, "t: expected two offsets"),
        ({"t": entry(), "__metadata__": {"a": 1}}, "metadata of strings"),
    ],
)
def test_entries_that_contradict_the_file(tmp_path, header, message):
    raw = json.dumps(header).encode()
    (tmp_path / "f").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
    with pytest.raises(FileFormatError, match=message):
        CompressedFile(tmp_path / "f")
