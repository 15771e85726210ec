"""Saving a model as a file that shrank, or for other runtimes."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fx_sparsity.storage import described_state as states
from fx_sparsity.storage.compressed_tensors import OUTSIDE
from fx_sparsity.storage.container import replacing
from fx_sparsity.storage.formats import FORMATS
from fx_sparsity.storage.json_files import put_json, read_json
from fx_sparsity.storage.prefetch import prefetch
from fx_sparsity.storage.sparsity_config import Counts
from fx_sparsity.storage.writing import (
    CompressedWriter,
    PlainWriter,
    check_dtypes,
    check_layout,
    encode_compressed,
    encode_plain,
    shapes_of,
)


def save(
    model_or_state: nn.Module | Mapping[str, Any], path: str | Path, *, form: str | None = None
) -> None:
    """Write a model's tensors to one safetensors file, each in the format that is smallest for it.

    A tied tensor is written once. Each tensor has a checksum. The file appears whole or not at
    all, whatever happens meanwhile. One tensor is encoded while the one before is written.

    Args:
        model_or_state: a module, or its `state_dict`. Quantized modules of `torch.ao` and torchao's
            tensors are taken apart into codes, scales and zero points.
        path: overwritten.
        form: of every tensor that can take it, the others being dense; a name in `FORMATS`.

    Raises:
        TypeError: an entry of the state cannot be stored; it is named.
        ValueError: unknown `form`.

    Examples:
        >>> from safetensors.torch import load_file
        >>> model = nn.Linear(64, 64)
        >>> model.weight.data[32:] = 0
        >>> fxs.save(model, "model.safetensors")
        >>> sorted(load_file("model.safetensors"))
        ['bias', 'weight::blocks', 'weight::values']
    """
    if form is not None and form not in FORMATS:
        raise ValueError(f"form: expected one of {', '.join(FORMATS)}, found {form!r}")
    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    tensors, described = states.flatten(state)
    check_dtypes(tensors)
    ties = _ties(tensors)
    extra = {
        "described": described,
        "same_as": ties,
        "versions": _versions(state),
        "order": list(state) if described or ties else [],
    }
    pieces = (
        encode_compressed(name, tensor.detach().cpu(), form)
        for name, tensor in tensors.items()
        if name not in ties
    )
    with replacing(path) as file, contextlib.closing(prefetch(pieces)) as ahead:
        writer = CompressedWriter(file, shapes_of(tensors), extra)
        for encoded in ahead:
            writer.write(encoded)
        writer.finish()


def export(
    model_or_state: nn.Module | Mapping[str, Tensor], path: str | Path, *, layout: str = "dense"
) -> None:
    """Write a model's tensors to a safetensors file that other runtimes read.

    Args:
        model_or_state: a module, or its `state_dict`; plain tensors only. Of tied ones the first is
            written.
        path: overwritten. `config.json` beside it, made if it is not there, gets what a sparse
            layout needs: `quantization_config`, with its `sparsity_config`.
        layout: `"dense"`, which everything reads, or one of compressed-tensors: `"sparse-bitmask"`
            and `"sparse-24-bitmask"`. These hold matrices called `weight`; the rest is dense.

    Raises:
        TypeError: an entry that is no plain tensor; it is named.
        ValueError: unknown `layout`.

    Examples:
        >>> from safetensors.torch import load_file
        >>> fxs.export(nn.Linear(8, 4), "model.safetensors")
        >>> sorted(load_file("model.safetensors"))
        ['bias', 'weight']
    """
    check_layout(layout, (*OUTSIDE, "dense"))
    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    tensors, described = states.flatten(state)
    for name in described:
        raise TypeError(f"{name}: expected a strided tensor of plain numbers; `save` stores it")
    check_dtypes(tensors)
    config = Path(path).with_name("config.json")
    said = read_json(config) if layout != "dense" and config.exists() else {}
    ties = _ties(tensors)
    counts = Counts()
    pieces = (
        encode_plain(name, tensor.detach().cpu(), layout)
        for name, tensor in tensors.items()
        if name not in ties
    )
    with replacing(path) as file, contextlib.closing(prefetch(pieces)) as ahead:
        writer = PlainWriter(file, shapes_of(tensors))
        for encoded in ahead:
            writer.write(encoded)
            counts.add(encoded)
        writer.finish()
    if layout != "dense":
        put_json(config, counts.configured(said, layout))


def _ties(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> an earlier one that is the same elements of the same memory."""
    first: dict[tuple[Any, ...], str] = {}
    ties = {}
    for name, tensor in tensors.items():
        # Of the tensor that the state keeps alive: a copy's address may be used again.
        place = (
            *(tensor.device, tensor.data_ptr(), tensor.dtype),
            *(tuple(tensor.shape), tensor.stride()),
        )
        if tensor.numel() and first.setdefault(place, name) != name:
            ties[name] = first[place]
    return ties


def _versions(state: Mapping[str, Any]) -> dict[str, int]:
    """Versions of modules that state themselves otherwise than their first version did."""
    metadata = getattr(state, "_metadata", {})
    return {p: m["version"] for p, m in metadata.items() if (m.get("version") or 1) > 1}
