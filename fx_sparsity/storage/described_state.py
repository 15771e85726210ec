"""A `state_dict` as plain tensors and a description in JSON, and back: what quantized models hold.

Quantized tensors become codes, scales and zero points; codes are counted from the zero point, so
that what means zero has no bit set and is left out by the formats. Packed parameters become the
tuples that `torch.ao` states them as; torchao's tensors their inner tensors. Parts go by the
entry's name and a path, `fc.weight/codes`. Nothing is ever built but what is listed here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fx_sparsity.quantization.torchao_tensors import is_torchao
from fx_sparsity.storage.container import FileFormatError

Description = dict[str, Any]
"""What an entry is, for JSON; parts of the state that are plain tensors have none."""

_CODES = {"qint8": torch.int8, "quint8": torch.uint8, "qint32": torch.int32}
_DTYPES = {
    str(dtype)[6:]: dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)
}
_DEEPEST = 4


def flatten(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Description]]:
    """Plain strided tensors by name, and descriptions of the entries that are none.

    Raises:
        TypeError: an entry that cannot be stored; it is named.
    """
    tensors: dict[str, Tensor] = {}
    described: dict[str, Description] = {}
    for name, value in state.items():
        if is_plain(value):
            tensors[name] = value
        else:
            described[name] = _describe(name, value, tensors)
    return tensors, described


def rebuild(name: str, what: Description, tensor: Callable[[str], Tensor]) -> Any:
    """The entry that a description, which was checked, stands for.

    Args:
        name: of the entry.
        what: its description.
        tensor: gives its tensors by their names.

    Raises:
        TypeError: a torchao tensor.
    """
    if what["kind"] == "none":
        return None
    if what["kind"] == "dtype":
        return _DTYPES[what["name"]]
    if what["kind"] == "tensor":
        return tensor(name)
    if what["kind"] == "tuple":
        return tuple(rebuild(f"{name}/{i}", item, tensor) for i, item in enumerate(what["items"]))
    if what["kind"] == "quantized":
        codes, scale, zero_point = (
            tensor(f"{name}/{part}") for part in ("codes", "scale", "zero_point")
        )
        codes = codes + _zero_codes(zero_point, codes, what["axis"])
        return _make_quantized(codes, scale, zero_point, what["axis"])
    raise TypeError(
        f"{name} is a {what['class']}: pass a model that is quantized alike, to load into"
    )


def check(name: str, what: Any, tensors: Mapping[str, Tensor]) -> set[str]:
    """Make sure that a description can be rebuilt; tensors may be on the meta device.

    Returns:
        Names of the tensors that it takes.

    Raises:
        FileFormatError: it cannot; the tensor is named.
    """
    reader = _Reader(tensors)
    reader.check(name, what)
    return reader.taken


def fill(name: str, what: Description, put: Callable[[str, Tensor], None], target: Tensor) -> None:
    """Write the inner tensors of a torchao tensor into those of `target`, in place.

    Args:
        name: of the entry.
        what: its description.
        put: writes a tensor, by its name, into another one.
        target: which it fits, see `misfit`.
    """
    for part in what["parts"]:
        inner, path = getattr(target, part["name"]), f"{name}/{part['name']}"
        if part["what"] is None:
            put(path, inner)
        else:
            fill(path, part["what"], put, inner)


def misfit(name: str, what: Description, tensors: Mapping[str, Tensor], target: Any) -> str | None:
    """Why an entry cannot take the place of `target`, or None.

    Args:
        name: of the entry.
        what: its description.
        tensors: its tensors, which may be on the meta device.
        target: what the model has in that place. It has to be described alike.
    """
    theirs: dict[str, Tensor] = {}
    try:
        found = None if is_plain(target) else _describe(name, target, theirs)
    except TypeError:  # of a kind that no file holds
        found = None
    if found != what:
        named = type(target).__name__ if found is None else _in_words(found)
        return f"{name}: expected {_in_words(what)} in the model, found {named}"
    for path, inner in theirs.items():
        ours = tensors[path]
        if inner.is_meta:
            return f"{path}: on the meta device, where only plain tensors may be; give it memory"
        if (ours.shape, ours.dtype) != (inner.shape, inner.dtype):
            expected, has = (
                f"{str(tensor.dtype)[6:]} {tuple(tensor.shape)}" for tensor in (ours, inner)
            )
            return f"{path}: expected {expected} in the model, found {has}"
    return None


def kind_of(value: object) -> str:
    """What an entry of a state is, for messages."""
    if isinstance(value, Tensor) and value.is_quantized:
        return f"a quantized {value.dtype}"
    return f"a {type(value).__name__}"


def _in_words(what: Description) -> str:
    """A description for messages."""
    if what["kind"] == "subclass":
        return f"{what['class']} {what['context']}"
    if what["kind"] == "tuple":
        return f"({', '.join(_in_words(item) for item in what['items'])})"
    if what["kind"] == "quantized":
        axis = "per tensor" if what["axis"] is None else f"along axis {what['axis']}"
        return f"{what['dtype']} {axis}"
    return str(what["name"] if what["kind"] == "dtype" else what["kind"])


def is_plain(value: object) -> bool:
    """Whether `value` is a strided tensor of plain numbers, no subclass and not quantized."""
    kind = type(value) in (Tensor, nn.Parameter, nn.Buffer)
    return (
        kind
        and isinstance(value, Tensor)
        and not value.is_quantized
        and (value.layout == torch.strided)
    )


def _describe(name: str, value: Any, tensors: dict[str, Tensor]) -> Description:
    if isinstance(value, torch.dtype):
        return {"kind": "dtype", "name": str(value)[6:]}
    if value is None:
        return {"kind": "none"}
    if isinstance(value, tuple):
        items: list[Description] = []
        for i, item in enumerate(value):
            path = f"{name}/{i}"
            if is_plain(item):
                tensors[path] = item
                items.append({"kind": "tensor"})
            else:
                items.append(_describe(path, item, tensors))
        return {"kind": "tuple", "items": items}
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, found {type(value).__name__}")
    if value.is_quantized:
        return _describe_quantized(name, value, tensors)
    if is_torchao(value):
        return _describe_subclass(name, value, tensors)
    found = value.layout if value.layout != torch.strided else type(value).__name__
    raise TypeError(f"{name}: expected a strided tensor of plain numbers, found {found}")


def _describe_quantized(name: str, value: Tensor, tensors: dict[str, Tensor]) -> Description:
    kind = str(value.dtype)[6:]
    if kind not in _CODES:
        raise TypeError(
            f"{name}: expected a tensor of {', '.join(_CODES)}, found a quantized one of {kind}"
        )
    if value.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scale = torch.tensor(value.q_scale(), dtype=torch.float64)
        zero_point = torch.tensor(value.q_zero_point(), dtype=torch.int64)
        axis = None
    else:
        scale, zero_point = value.q_per_channel_scales(), value.q_per_channel_zero_points()
        axis = value.q_per_channel_axis()
    codes = value.int_repr()
    tensors[f"{name}/codes"] = codes - _zero_codes(zero_point, codes, axis)
    tensors[f"{name}/scale"], tensors[f"{name}/zero_point"] = scale, zero_point
    return {"kind": "quantized", "dtype": kind, "axis": axis}


def _zero_codes(zero_point: Tensor, codes: Tensor, axis: int | None) -> Tensor:
    """What is subtracted from codes, in their dtype, which wraps around: exact, whatever it is.

    The zero points, along `axis`; 0 where they are fractions, which no code stands for.
    """
    if zero_point.is_floating_point():
        return codes.new_zeros(())
    along = [-1 if i == axis else 1 for i in range(codes.ndim)]
    found = zero_point if axis is None else zero_point.view(along)
    return found.to(codes.dtype)


def _describe_subclass(name: str, value: Any, tensors: dict[str, Tensor]) -> Description:
    attributes, context = value.__tensor_flatten__()
    parts: list[Description] = []
    for attribute in attributes:
        inner, path = getattr(value, attribute), f"{name}/{attribute}"
        what = None
        if is_plain(inner):
            tensors[path] = inner
        else:
            what = _describe(path, inner, tensors)
        parts.append({"name": attribute, "what": what})
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    return {"kind": "subclass", "class": kind, "context": repr(context), "parts": parts}


class _Reader:
    """Checks descriptions against the tensors that there are."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.taken: set[str] = set()

    def check(self, name: str, what: Any, depth: int = 0) -> None:
        _check_keys(name, what, depth)
        if what["kind"] == "tensor":
            self._take(name)
        elif what["kind"] == "dtype" and what["name"] not in _DTYPES:
            raise FileFormatError(f"{name}: unknown dtype {what['name']!r}")
        elif what["kind"] == "tuple":
            for i, item in enumerate(what["items"]):
                self.check(f"{name}/{i}", item, depth + 1)
        elif what["kind"] == "quantized":
            self._check_quantized(name, what)
        elif what["kind"] == "subclass":
            self._check_subclass(name, what, depth)

    def _check_subclass(self, name: str, what: Description, depth: int) -> None:
        for part in what["parts"]:
            if not isinstance(part, dict) or set(part) != {"name", "what"}:
                raise FileFormatError(f"{name}: expected parts with name and what")
            path = f"{name}/{part['name']}"
            if part["what"] is None:
                self._take(path)
            else:
                self.check(path, part["what"], depth + 1)

    def _take(self, name: str) -> Tensor:
        if name not in self._tensors or name in self.taken:
            raise FileFormatError(f"{name}: not in the file")
        self.taken.add(name)
        return self._tensors[name]

    def _check_quantized(self, name: str, what: Description) -> None:
        codes, scale, zero_point = (
            self._take(f"{name}/{part}") for part in ("codes", "scale", "zero_point")
        )
        axis = what["axis"]
        if what["dtype"] not in _CODES or codes.dtype != _CODES[what["dtype"]]:
            raise FileFormatError(
                f"{name}: expected codes of {what['dtype']}, found {str(codes.dtype)[6:]}"
            )
        if axis is not None and not 0 <= axis < codes.ndim:
            raise FileFormatError(f"{name}: expected an axis below {codes.ndim}, found {axis}")
        shape = () if axis is None else (codes.shape[axis],)
        whole = (torch.float64, torch.int64)
        fractions = (torch.float32, torch.float32)
        dtypes = (scale.dtype, zero_point.dtype)
        if dtypes != whole and (axis is None or dtypes != fractions):
            raise FileFormatError(f"{name}: scales and zero points cannot be of {dtypes}")
        for part in (scale, zero_point):
            if tuple(part.shape) != shape:
                raise FileFormatError(
                    f"{name}: expected scales and zero points of shape {shape}, "
                    f"found {tuple(part.shape)}"
                )


_KEYS: dict[str, dict[str, Any]] = {
    "none": {},
    "tensor": {},
    "dtype": {"name": str},
    "tuple": {"items": list},
    "quantized": {"dtype": str, "axis": int | None},
    "subclass": {"class": str, "context": str, "parts": list},
}
"""Kind of a description -> its further keys and their types."""


def _check_keys(name: str, what: Any, depth: int) -> None:
    """Raise unless a description has the keys of its kind, each of its type, and is not too deep.

    Raises:
        FileFormatError: naming the tensor.
    """
    keys = _KEYS.get(str(what.get("kind"))) if isinstance(what, dict) else None
    if keys is None or set(what) != {"kind", *keys} or depth > _DEEPEST:
        raise FileFormatError(
            f"{name}: expected a description of {', '.join(_KEYS)}, found {str(what)[:80]}"
        )
    for key, kind in keys.items():
        if not isinstance(what[key], kind):
            raise FileFormatError(f"{name}: {key} cannot be {str(what[key])[:80]}")


def _make_quantized(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """A quantized tensor of these codes; public functions only quantize floats, which may round."""
    if axis is None:
        scheme = float(scale), int(zero_point)
        return torch._make_per_tensor_quantized_tensor(codes, *scheme)
    return torch._make_per_channel_quantized_tensor(codes, scale, zero_point, axis)
