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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fx_sparsity._native import KERNELS
from fx_sparsity._native.cache import folders, instruction_set, refusal, usable
from fx_sparsity.kernels import group_scales
from fx_sparsity.lowering.dense_tables import DenseTable, Lookup
from fx_sparsity.lowering.layers import DenseLinear
from fx_sparsity.lowering.lowered import LoweredLinear
from fx_sparsity.quantization.torch_ao.modules import quiet

_log = logging.getLogger(__name__)

ROUNDS = 17
_SURE = 4
"""Of 17 paired ratios in order, the fifth lies below the true median in 97.5% of all cases."""
_CALL = 2e-3
"""Seconds: a round repeats calls until it lasts as long, so that the clock is fine enough."""
_HOPELESS = 3
"""Dense forms that take so many times as long as the fastest are not looked at any further."""
_FOOTPRINT = 1 << 28
"""Bytes: weights of larger models are never in a cache when their turn comes again."""


@dataclass(frozen=True)
class Case:
    """What a measurement depends on, besides the machine.

    Attributes:
        dtype: of the weight.
        outputs, inputs: of the layer; rows and columns of a table.
        mode: how activations are quantized, or bags reduce rows; empty where there is one way.
        input_dtype: of the activations, or the indices.
        packing: what was measured against dense.
        device: name of the GPU; empty for the processor.
        blocks: height and width of what the packing stores as a whole, such as `2x16`, in units of
            its own; empty where that is single values.
        percent: of the dense bytes that the packed form takes, to the nearest two.
        tokens: rows of activations in a call; indices, of a table.
        footprint: MiB of weights that a model reads between two calls of the layer, a power of two
            of at most 256: what decides whether the weight is still in a cache.
    """

    dtype: str
    outputs: int
    inputs: int
    mode: str
    input_dtype: str
    packing: str
    device: str
    blocks: str
    percent: int
    tokens: int
    footprint: int

    @classmethod
    def of(
        cls,
        layer: DenseLinear | DenseTable,
        packing: str,
        packed: LoweredLinear | Lookup,
        tokens: int,
        input_dtype: torch.dtype,
        model_bytes: int,
    ) -> "Case":
        """The case of a layer and its packed form in a model with that many bytes of weights."""
        mebibytes = max(min(model_bytes, _FOOTPRINT) >> 20, 1)
        linear = isinstance(packed, LoweredLinear)
        values = packed.get_buffer("values") if linear else None
        stored = () if values is None or values.dim() < 3 else values.shape[1:3]
        return cls(
            dtype=layer.dtype,
            outputs=layer.shape[0],
            inputs=layer.shape[1],
            mode=layer.mode,
            input_dtype=_name(input_dtype),
            packing=packing,
            device=torch.cuda.get_device_name(layer.device) if layer.device.type == "cuda" else "",
            blocks="x".join(map(str, reversed(stored))),
            percent=2 * round(50 * packed.nbytes / layer.nbytes),
            tokens=tokens,
            footprint=1 << (mebibytes.bit_length() - 1),
        )

    @property
    def key(self) -> str:
        """In the table."""
        form = f"{self.packing} {self.blocks}".rstrip()
        mode = f" {self.mode}" if self.mode else ""
        where = f" on {self.device}" if self.device else ""
        return (
            f"{form} {self.percent}% {self.dtype}{mode} {self.outputs}x{self.inputs}, "
            f"{self.tokens} x {self.input_dtype}, in {self.footprint} MiB{where}"
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


def measure(
    layer: DenseLinear | DenseTable,
    packed: Mapping[str, LoweredLinear | Lookup],
    tokens: Sequence[int],
    *,
    input_dtype: torch.dtype,
    model_bytes: int,
    table: dict[str, Timing],
) -> dict[str, dict[int, Timing]]:
    """Packing -> tokens -> timing; what `table` lacks is measured, and then put there.

    Dense is the fastest of what torch has for the dtype: eager, prepacked as a compiled and frozen
    model has it, and its own int8 kernels. All forms take turns, each through as many copies of the
    weight as a model of that footprint reads between two calls.

    Args:
        layer: on the CPU; or on CUDA, not quantized.
        packed: name of a packing -> the layer in that packing.
        tokens: rows of activations in a call; indices, of a table.
        input_dtype: of the activations, or the indices.
        model_bytes: of all weights of the model.
        table: case -> timing, of this machine.
    """
    cases = {
        (name, count): Case.of(layer, name, form, count, input_dtype, model_bytes)
        for name, form in packed.items()
        for count in tokens
    }
    missing = {place: case for place, case in cases.items() if case.key not in table}
    if missing:
        (footprint,) = {case.footprint for case in missing.values()}
        wanted = {name: packed[name] for name, _ in missing}
        dense, ours = (
            _linear_forms(layer, wanted, input_dtype, footprint << 20)
            if isinstance(layer, DenseLinear)
            else _table_forms(layer, wanted)
        )
        for count in sorted({count for _, count in missing}):
            names = [name for name, n in missing if n == count]
            inputs = _inputs(layer, count, input_dtype)
            compared = _compared(dense, {name: ours[name] for name in names}, inputs)
            for name, timing in compared.items():
                key = missing[name, count].key
                table[key] = timing
                _log.info("%s: %.3gx (at least %.3gx)", key, timing.gain, timing.at_least)
    timed: dict[str, dict[int, Timing]] = {name: {} for name in packed}
    for (name, count), case in cases.items():
        timed[name][count] = table[case.key]
    return timed


_BAG = 16
"""Indices in a bag."""

Forms = dict[str, list[Form]]
"""Name -> copies."""


def _linear_forms(
    layer: DenseLinear,
    packed: Mapping[str, LoweredLinear | Lookup],
    input_dtype: torch.dtype,
    footprint: int,
) -> tuple[Forms, Forms]:
    """Copies of the dense forms of a layer, and of the packed ones; without bias and activation."""
    bare = replace(layer, bias=None, activation="none")

    def copies(itemsize: int) -> range:
        nbytes = max(layer.weight.numel() * itemsize, 1)
        return range(min(max(footprint // nbytes, 1), 64))

    dense: Forms = {}
    for name, (make, dtype) in _dense_forms(bare, input_dtype).items():
        dense[name] = [make(_copied(bare)) for _ in copies(dtype.itemsize)]
    ours: Forms = {}
    for name, form in packed.items():
        assert isinstance(form, LoweredLinear)
        one = bare.pack(name, form)
        ours[name] = [copy.deepcopy(one) for _ in copies(layer.weight.itemsize)]
    return dense, ours


def _table_forms(
    layer: DenseTable, packed: Mapping[str, LoweredLinear | Lookup]
) -> tuple[Forms, Forms]:
    """The module as it is, and packed."""
    return {"eager": [layer.module]}, {name: [form] for name, form in packed.items()}


def _inputs(layer: DenseLinear | DenseTable, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """Activations; or lookups all over a table, of which bags have 16 indices."""
    if isinstance(layer, DenseLinear):
        return [torch.randn(tokens, layer.shape[1], dtype=dtype, device=layer.device)]
    inputs = [torch.randint(layer.shape[0], (tokens,), dtype=dtype) for _ in range(16)]
    if layer.mode == "lookup":
        return inputs
    return [indices.view(-1, _BAG if tokens % _BAG == 0 else 1) for indices in inputs]


@torch.no_grad()
def _compared(dense: Forms, ours: Forms, inputs: list[Tensor]) -> dict[str, Timing]:
    """Each of ours against the fastest dense form; forms, copies and inputs take turns."""
    forms = {(True, name): form for name, form in dense.items()}
    forms |= {(False, name): form for name, form in ours.items()}
    for form in forms.values():
        _round(form, inputs, 0)  # warms up
    first = {place: _round(form, inputs, 0) for place, form in forms.items()}
    hopeless = _HOPELESS * min(time for (is_dense, _), time in first.items() if is_dense)
    forms = {p: form for p, form in forms.items() if not (p[0] and first[p] > hopeless)}
    repeats = {place: max(1, round(_CALL / first[place])) for place in forms}
    seconds: dict[tuple[bool, str], list[float]] = {place: [] for place in forms}
    for _ in range(ROUNDS):
        for place, form in forms.items():
            seconds[place].append(_round(form, inputs, repeats[place]))
    medians = {place: statistics.median(times) for place, times in seconds.items()}
    best = min((place for place in forms if place[0]), key=medians.__getitem__)
    timings = {}
    for name in ours:
        taken = seconds[False, name]
        ratios = sorted(d / p for d, p in zip(seconds[best], taken, strict=True))
        timings[name] = Timing(
            dense=best[1],
            dense_us=round(1e6 * medians[best], 2),
            packed_us=round(1e6 * medians[False, name], 2),
            gain=round(statistics.median(ratios), 4),
            at_least=round(ratios[_SURE], 4),
        )
    return timings


def _round(copies: Sequence[Form], inputs: Sequence[Tensor], repeats: int) -> float:
    """Seconds a call, over `repeats` calls, or one through each copy; copies take turns."""
    count = repeats or min(len(copies), 4)
    start = _now(inputs[0].device)
    for i in range(count):
        copies[i % len(copies)](inputs[i % len(inputs)])
    return (_now(inputs[0].device) - start) / count


def _now(device: torch.device) -> float:
    """Seconds, when all that was asked of a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


Make = Callable[[DenseLinear], Form]


def _copied(layer: DenseLinear) -> DenseLinear:
    """With a weight in memory of its own."""
    return replace(layer, weight=layer.weight.clone())


def _dense_forms(
    layer: DenseLinear, input_dtype: torch.dtype
) -> dict[str, tuple[Make, torch.dtype]]:
    """What torch has for a layer: name -> makes one such form, and the dtype it reads.

    Of layers whose activations are quantized, some forms take codes that are ready: the time that
    torch's own quantization takes depends on what it is fused with, and is not counted. Graphs
    quantize them by nodes, which lowering leaves as they are; Inductor fuses those of dense layers
    with their product, where it freezes the model.
    """
    if layer.device.type == "cuda":
        return {"eager": (_eager, input_dtype)}
    if layer.scale is None:
        return {name: (make, input_dtype) for name, make in _float_forms(input_dtype).items()}
    forms: dict[str, tuple[Make, torch.dtype]] = {
        f"dequantized, {name}": (_dequantized_first(make, input_dtype), input_dtype)
        for name, make in _float_forms(input_dtype).items()
    }
    if layer.in_groups:  # torch's product of 4-bit codes takes none of these tensors
        return forms
    engines = torch.backends.quantized.supported_engines
    if layer.quantize_input == "none":
        forms["_weight_int8pack_mm"] = _int8_pack, torch.int8
        if layer.from_codes and "onednn" in engines:
            forms["onednn.qlinear"] = _qlinear(input_dtype), torch.int8
        return forms
    if torch.backends.quantized.engine != "none":
        forms["quantized.linear_dynamic"] = _linear_dynamic, torch.int8
    if "onednn" in engines:
        forms["onednn.qlinear"] = _qlinear(input_dtype), torch.int8
    return forms


def _float_forms(dtype: torch.dtype) -> dict[str, Make]:
    """Eager, and prepacked as a compiled and frozen model has it."""
    forms: dict[str, Make] = {"eager": _eager}
    if dtype == torch.float32 and torch.backends.mkl.is_available():
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
        scale = group_scales.expanded(layer.scale, layer.shape)
        return make(DenseLinear((layer.weight * scale).to(dtype)))

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


def _qlinear(output_dtype: torch.dtype) -> Make:
    one, zero = torch.tensor(1.0), torch.tensor(0)
    codes: dict[torch.Size, Tensor] = {}

    def make(layer: DenseLinear) -> Form:
        scale, zeros = layer.scale, torch.zeros(len(layer.weight), dtype=torch.int64)
        packed = torch.ops.onednn.qlinear_prepack(layer.weight, None)
        qlinear = torch.ops.onednn.qlinear_pointwise
        rest: tuple[Any, ...] = (scale, zeros, None, 1.0, 0, output_dtype, "none", [], "")

        def call(x: Tensor) -> Tensor:
            if x.shape not in codes:
                codes[x.shape] = torch.randint(0, 256, x.shape, dtype=torch.uint8)
            return qlinear(codes[x.shape], one, zero, packed, *rest)

        return call

    return make


def machine() -> str:
    """What the table is about: processor, torch, threads, and the kernels that were measured."""
    digest = hashlib.sha256(instruction_set().encode()).hexdigest()[:8]
    ready, where = KERNELS.state()
    parts = [
        f"{_processor()} {digest}",
        f"torch {torch.__version__}",
        f"{torch.get_num_threads()} threads",
        Path(where).stem if ready else "plain torch",  # the file's name tells kernels apart
        *filter(None, [os.environ.get("FX_SPARSITY_CPU")]),
    ]
    return ", ".join(parts)


def path() -> Path:
    """Where the table is, or would be."""
    places = [folder / "timings.json" for folder in folders()]
    held = (place for place in places if usable(place.parent) and usable(place))
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
    folder = next((f for f in folders() if not refusal(f)), None)
    if folder is None:
        _log.warning("timings are not kept: %s", ", ".join(map(refusal, folders())))
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
