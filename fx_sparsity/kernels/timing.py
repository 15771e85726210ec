"""Which is faster here, dense or packed? Measured on this machine, and kept in a table on disk.

The table is one JSON file, `timings.json` in the folder of the compiled libraries (see
`python -m fx_sparsity.env`): machine -> case -> what was measured. `read_table` and `forget` are
all there is to it; deleting the file is fine, too.
"""

import copy
import hashlib
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fx_sparsity._native.cache import folders, instruction_set, usable, writable
from fx_sparsity.kernels.layers import DenseLinear
from fx_sparsity.kernels.tables import DenseTable
from fx_sparsity.quantization.modules import quiet

_log = logging.getLogger(__name__)

ROUNDS = 17
_SURE = 4
"""Of 17 paired ratios in order, the fifth lies below the true median in 97.5% of all cases."""
_CALL = 2e-3
"""Seconds: a round repeats calls until it lasts as long, so that the clock is fine enough."""
_FOOTPRINT = 1 << 28
"""Bytes: weights of larger models are never in a cache when their turn comes again."""


@dataclass(frozen=True)
class Case:
    """What a measurement depends on, besides the machine.

    Attributes:
        dtype: of the weight.
        outputs, inputs: of the layer; rows and columns of a table.
        how: codes meet their activations, or bags reduce rows; empty where there is one way.
        input_dtype: of the activations, or the indices.
        packing: what was measured against dense.
        percent: of values that are not zero, to the nearest five.
        tokens: rows of activations in a call; indices, of a table.
        footprint: MiB of weights that a model reads between two calls of the layer, a power of two
            of at most 256: what decides whether the weight is still in a cache.
    """

    dtype: str
    outputs: int
    inputs: int
    how: str
    input_dtype: str
    packing: str
    percent: int
    tokens: int
    footprint: int

    @classmethod
    def of(
        cls,
        layer: DenseLinear | DenseTable,
        packing: str,
        tokens: int,
        input_dtype: torch.dtype,
        model_bytes: int,
    ) -> "Case":
        """The case of a layer in a model with that many bytes of weights."""
        mebibytes = max(min(model_bytes, _FOOTPRINT) >> 20, 1)
        return cls(
            dtype=layer.dtype,
            outputs=layer.shape[0],
            inputs=layer.shape[1],
            how=layer.how,
            input_dtype=_name(input_dtype),
            packing=packing,
            percent=5 * round(20 * layer.density),
            tokens=tokens,
            footprint=1 << (mebibytes.bit_length() - 1),
        )

    @property
    def key(self) -> str:
        """In the table."""
        how = f" {self.how}" if self.how else ""
        return (
            f"{self.packing} {self.percent}% {self.dtype}{how} {self.outputs}x{self.inputs}, "
            f"{self.tokens} x {self.input_dtype}, in {self.footprint} MiB"
        )


@dataclass(frozen=True)
class Timing:
    """What was measured of one case.

    Attributes:
        dense: which dense form was fastest.
        dense_us, packed_us: microseconds a call, medians.
        gain: dense over packed, the median of paired rounds.
        at_least: the gain that is exceeded with 97.5% certainty, by the order statistics of the
            rounds: the noise that was there while measuring counts against the kernel.
    """

    dense: str
    dense_us: float
    packed_us: float
    gain: float
    at_least: float

    @property
    def faster(self) -> bool:
        """Whether packed beats dense beyond the noise."""
        return self.at_least > 1


Form = Callable[[Tensor], Tensor]
"""One copy of a layer, dense or packed: activations in, result out."""


def measure(case: Case, layer: DenseLinear | DenseTable, table: dict[str, Timing]) -> Timing:
    """The timing of a case; measured if `table` lacks it, and then put there.

    Dense is the fastest of what torch has for the dtype: eager, prepacked as a compiled and frozen
    model has it, and its own int8 kernels. All forms take turns, each through as many copies of the
    weight as a model of that footprint reads between two calls.

    Args:
        case: of `layer`.
        layer: on the CPU.
        table: case -> timing, of this machine.
    """
    if (known := table.get(case.key)) is None:
        forms, inputs = (
            _linear_forms(case, layer)
            if isinstance(layer, DenseLinear)
            else _table_forms(case, layer)
        )
        known = table[case.key] = _compared(forms, inputs)
        _log.info("%s: %.3gx (at least %.3gx)", case.key, known.gain, known.at_least)
    return known


_PACKED = "packed"
_BAG = 16
"""Indices in a bag."""


def _linear_forms(case: Case, layer: DenseLinear) -> tuple[dict[str, list[Form]], list[Tensor]]:
    """Copies of each form of a layer, and what to call them with."""
    layer = replace(layer, bias=None, activation="none")
    x = torch.randn(case.tokens, case.inputs, dtype=getattr(torch, case.input_dtype))

    def copies(itemsize: int) -> range:
        nbytes = max(layer.weight.numel() * itemsize, 1)
        return range(min(max((case.footprint << 20) // nbytes, 1), 64))

    forms: dict[str, list[Form]] = {}
    for name, (make, dtype) in _dense_forms(layer, x).items():
        forms[name] = [make(_copied(layer)) for _ in copies(dtype.itemsize)]
    packed = layer.pack(case.packing)
    forms[_PACKED] = [copy.deepcopy(packed) for _ in copies(layer.weight.itemsize)]
    return forms, [x]


def _table_forms(case: Case, layer: DenseTable) -> tuple[dict[str, list[Form]], list[Tensor]]:
    """The module as it is and packed, and lookups all over the table; bags have 16 indices."""
    inputs = [
        torch.randint(case.outputs, (case.tokens,), dtype=getattr(torch, case.input_dtype))
        for _ in range(16)
    ]
    if case.how != "lookup":
        inputs = [indices.view(-1, _BAG if case.tokens % _BAG == 0 else 1) for indices in inputs]
    return {"eager": [layer.module], _PACKED: [layer.pack(case.packing)]}, inputs


@torch.no_grad()
def _compared(forms: dict[str, list[Form]], inputs: list[Tensor]) -> Timing:
    """Packed against the fastest of the others; copies and inputs take turns."""
    seconds = {name: [_round(form, inputs, 0)] for name, form in forms.items()}  # also warms up
    repeats = {name: max(1, round(_CALL / first[0])) for name, first in seconds.items()}
    for name in seconds:
        seconds[name].clear()
    for _ in range(ROUNDS):
        for name, form in forms.items():
            seconds[name].append(_round(form, inputs, repeats[name]))
    taken = seconds.pop(_PACKED)
    dense = min(seconds, key=lambda name: statistics.median(seconds[name]))
    ratios = sorted(d / p for d, p in zip(seconds[dense], taken, strict=True))
    return Timing(
        dense=dense,
        dense_us=round(1e6 * statistics.median(seconds[dense]), 2),
        packed_us=round(1e6 * statistics.median(taken), 2),
        gain=round(statistics.median(ratios), 4),
        at_least=round(ratios[_SURE], 4),
    )


def _round(copies: Sequence[Form], inputs: Sequence[Tensor], repeats: int) -> float:
    """Seconds a call, over `repeats` calls, or one through each copy; copies take turns."""
    count = repeats or min(len(copies), 4)
    start = time.perf_counter()
    for i in range(count):
        copies[i % len(copies)](inputs[i % len(inputs)])
    return (time.perf_counter() - start) / count


Make = Callable[[DenseLinear], Form]


def _copied(layer: DenseLinear) -> DenseLinear:
    """With a weight in memory of its own."""
    return replace(layer, weight=layer.weight.clone())


def _dense_forms(layer: DenseLinear, x: Tensor) -> dict[str, tuple[Make, torch.dtype]]:
    """What torch has for a layer: name -> makes one such form, and the dtype it reads.

    Of layers whose activations are quantized, some forms take codes that are ready: the time that
    torch's own quantization takes depends on what it is fused with, and is not counted.
    """
    if layer.scale is None:
        return {name: (make, x.dtype) for name, make in _float_forms(x).items()}
    forms: dict[str, tuple[Make, torch.dtype]] = {
        f"dequantized, {name}": (_dequantized_first(make, x.dtype), x.dtype)
        for name, make in _float_forms(x).items()
    }
    engines = torch.backends.quantized.supported_engines
    if layer.quantize_input == "none":
        forms["_weight_int8pack_mm"] = _int8_pack, torch.int8
        return forms
    if torch.backends.quantized.engine != "none":
        forms["quantized.linear_dynamic"] = _linear_dynamic, torch.int8
    if "onednn" in engines:
        forms["onednn.qlinear"] = _qlinear(x), torch.int8
    return forms


def _float_forms(x: Tensor) -> dict[str, Make]:
    """Eager, and prepacked as a compiled and frozen model has it."""
    forms: dict[str, Make] = {"eager": _eager}
    if x.dtype == torch.float32 and torch.backends.mkl.is_available():
        forms["frozen"] = _frozen_float
    elif torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        forms["frozen"] = _frozen_bfloat
    return forms


def _eager(layer: DenseLinear) -> Form:
    return lambda x: functional.linear(x, layer.weight)


def _frozen_float(layer: DenseLinear) -> Form:
    weight = layer.weight
    packed: dict[int, Tensor] = {}

    def call(x: Tensor) -> Tensor:
        tokens = len(x)
        if tokens not in packed:
            packed[tokens] = torch.ops.mkl._mkl_reorder_linear_weight(weight, tokens)
        return torch.ops.mkl._mkl_linear(x, packed[tokens], weight, None, tokens)

    return call


def _frozen_bfloat(layer: DenseLinear) -> Form:
    packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _dequantized_first(make: Make, dtype: torch.dtype) -> Make:
    def make_float(layer: DenseLinear) -> Form:
        assert layer.scale is not None
        return make(DenseLinear((layer.weight * layer.scale.view(-1, 1)).to(dtype)))

    return make_float


def _int8_pack(layer: DenseLinear) -> Form:
    assert layer.scale is not None
    codes, scale = layer.weight, layer.scale
    scales = {dtype: scale.to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return lambda x: torch._weight_int8pack_mm(x, codes, scales[x.dtype])


def _linear_dynamic(layer: DenseLinear) -> Form:
    assert layer.scale is not None
    zeros = torch.zeros(len(layer.weight), dtype=torch.int64)
    with quiet():
        weight = torch._make_per_channel_quantized_tensor(
            layer.weight, layer.scale.double(), zeros, 0
        )
    packed = torch.ops.quantized.linear_prepack(weight, None)
    return lambda x: torch.ops.quantized.linear_dynamic(x.float(), packed).to(x.dtype)


def _qlinear(example: Tensor) -> Make:
    codes = torch.randint(0, 256, example.shape, dtype=torch.uint8)
    one, zero = torch.tensor(1.0), torch.tensor(0)

    def make(layer: DenseLinear) -> Form:
        scale, zeros = layer.scale, torch.zeros(len(layer.weight), dtype=torch.int64)
        packed = torch.ops.onednn.qlinear_prepack(layer.weight, list(example.shape))
        qlinear = torch.ops.onednn.qlinear_pointwise
        rest: tuple[Any, ...] = (scale, zeros, None, 1.0, 0, example.dtype, "none", [], "")
        return lambda x: qlinear(codes, one, zero, packed, *rest)

    return make


def machine() -> str:
    """What the table is about: processor, torch and threads."""
    digest = hashlib.sha256(instruction_set().encode()).hexdigest()[:8]
    return f"{_processor()} {digest}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def path() -> Path:
    """Where the table is, or would be."""
    places = [folder / "timings.json" for folder in folders()]
    held = (place for place in places if usable(place.parent) and place.is_file())
    return next(held, places[0])


def read_table() -> dict[str, Timing]:
    """Case -> timing, of this machine as it is now; empty where nothing was measured yet."""
    entries = _read().get(machine(), {})
    try:
        return {case: Timing(**entry) for case, entry in entries.items()}
    except TypeError as error:
        _log.warning("%s is of another version and will be measured anew: %s", path(), error)
        return {}


def write_table(table: dict[str, Timing]) -> None:
    """Put timings of this machine into the table on disk, beside those that are there.

    A folder that cannot be written costs the measurement next time, and a warning.
    """
    folder = next((f for f in folders() if writable(f)), None)
    if folder is None:
        _log.warning("timings are not kept: no folder of %s is writable", folders())
        return
    whole = _read()
    whole[machine()] = whole.get(machine(), {}) | {c: asdict(t) for c, t in table.items()}
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".json", delete=False) as file:
        json.dump(whole, file, indent=1)
    os.replace(file.name, folder / "timings.json")


def forget() -> None:
    """Delete the table, of all machines."""
    path().unlink(missing_ok=True)


def _read() -> dict[str, dict[str, dict[str, Any]]]:
    try:
        whole = json.loads(path().read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _log.warning("%s cannot be read and will be replaced: %s", path(), error)
        return {}
    return whole if isinstance(whole, dict) else {}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
