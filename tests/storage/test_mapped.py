"""Memory maps of safetensors files, next to the library that defines them."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fx_sparsity.storage import FileFormatError, MappedFile
from fx_sparsity.storage.container import DTYPES

SHAPES = st.lists(st.integers(0, 5), max_size=3)
ENTRIES = st.dictionaries(
    st.text("ab.", min_size=1, max_size=4), st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES)
)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def filled(entries):
    """Name -> tensor of random bytes; of 0 and 1 where they are boolean."""
    tensors = {}
    for name, (dtype, shape) in entries.items():
        size = torch.Size(shape).numel() * DTYPES[dtype].itemsize
        data = torch.randint(0, 2 if dtype == "BOOL" else 256, (size,), dtype=torch.uint8)
        tensors[name] = data.view(DTYPES[dtype]).view(shape)
    return tensors


@settings(max_examples=40)
@given(ENTRIES)
def test_maps_read_what_the_library_wrote(tmp_path_factory, entries):
    path, tensors = tmp_path_factory.mktemp("map") / "x.safetensors", filled(entries)
    save_file(tensors, path, metadata={"format": "pt"})
    mapped = MappedFile(path)
    assert mapped.metadata == {"format": "pt"}
    assert mapped.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert mapped[name].dtype == tensor.dtype
        assert mapped[name].shape == tensor.shape
        assert torch.equal(bits(mapped[name]), bits(tensor))


@settings(max_examples=40)
@given(ENTRIES)
def test_the_library_reads_what_is_written_through_maps(tmp_path_factory, entries):
    path, tensors = tmp_path_factory.mktemp("map") / "x.safetensors", filled(entries)
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, path)
    mapped = MappedFile(path, writable=True)
    for name, tensor in tensors.items():
        mapped[name].copy_(tensor)
        mapped.flush(name)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(bits(found[name]), bits(tensor)) for name, tensor in tensors.items())


def header(**entries):
    return {
        name: {"dtype": dtype, "shape": shape, "data_offsets": list(span)}
        for name, (dtype, shape, span) in entries.items()
    }


MALFORMED = {
    "overlap": (
        header(a=("U8", [4], (0, 4)), b=("U8", [4], (2, 6))),
        8,
        "b: expected to start at byte 4",
    ),
    "hole": (header(a=("U8", [4], (4, 8))), 8, "a: expected to start at byte 0"),
    "short": (header(a=("F32", [4], (0, 16))), 8, "a: expected the file to end"),
    "long": (header(a=("U8", [4], (0, 4))), 8, "a: expected the file to end"),
    "shape": (header(a=("F32", [3], (0, 8))), 8, r"a: .* F32 of shape \(3,\)"),
    "negative": (header(a=("U8", [-2, -4], (0, 8))), 8, r"a: .* shape, found \[-2, -4\]"),
    "dtype": (header(a=("F3", [1], (0, 8))), 8, "a: expected a dtype of .* found 'F3'"),
    "entry": ({"a": {"dtype": "U8"}}, 0, "a: expected dtype, shape and data_offsets"),
    "unaligned": (header(a=("U8", [1], (0, 1)), b=("F32", [1], (1, 5))), 5, "b: expected its"),
    "json": (b"{x", 0, "its header cannot be read"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused(tmp_path, case):
    content, size, message = MALFORMED[case]
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    with pytest.raises(FileFormatError, match=message):
        MappedFile(path)


@pytest.mark.parametrize("data", [b"", b"1234567", struct.pack("<Q", 2**40) + b"{}"])
def test_files_of_other_kinds_are_refused(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(FileFormatError, match="not a safetensors file"):
        MappedFile(tmp_path / "x")
