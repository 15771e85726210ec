"""What a model's `config.json` says of how its files are laid out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fx_sparsity.storage.compressed_tensors import OUTSIDE
from fx_sparsity.storage.container import elements_of
from fx_sparsity.storage.json_files import object_in
from fx_sparsity.storage.writing import Encoded

METHOD = "fx_sparsity"
"""What `quantization_config` calls the layout `compressed`."""
_WEIGHTS = "import-fx_sparsity-to-load-this-model.safetensors"
"""A file that is not there: transformers leaves out a method that it does not know, and would begin
with random weights, but for a file that it is told to load and does not find."""
_KEYS = ("quantization_config", "transformers_weights")


def as_compressed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's `config.json` beside files in the layout `compressed`.

    Whoever does not know that layout finds no weights.
    """
    method = {"quant_method": METHOD, "replaced": {k: config[k] for k in _KEYS if k in config}}
    return {**config, "quantization_config": method, "transformers_weights": _WEIGHTS}


def as_dense(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's `config.json` without what `as_compressed` or `Counts.configured` have put in."""
    method = object_in(config, "quantization_config")
    rest = {key: value for key, value in config.items() if key not in _KEYS}
    if method.get("quant_method") == METHOD:
        return {**rest, **object_in(method, "replaced")}
    if str(object_in(method, "sparsity_config").get("format")) not in OUTSIDE:
        return dict(config)
    method = {key: value for key, value in method.items() if key != "sparsity_config"}
    if method != {"quant_method": "compressed-tensors"}:
        return {**config, "quantization_config": method}
    return {key: value for key, value in config.items() if key != "quantization_config"}


@dataclass
class Counts:
    """What a sparse layout's configuration says of the tensors that were written.

    Attributes:
        sparse, dense: modules whose weight is in the layout, and whose matrix is not.
        zeros, elements: of the former.
    """

    sparse: list[str] = field(default_factory=list)
    dense: list[str] = field(default_factory=list)
    zeros: int = 0
    elements: int = 0

    def add(self, encoded: Encoded) -> None:
        """Count a tensor."""
        module = encoded.name.removesuffix(".weight")
        if encoded.form != "dense":
            self.sparse.append(module)
            self.zeros += encoded.zeros or 0
            self.elements += elements_of(encoded.shape)
        elif module != encoded.name and len(encoded.shape) == 2:
            self.dense.append(module)

    def merge(self, other: "Counts") -> None:
        """Count what another one counted."""
        self.sparse += other.sparse
        self.dense += other.dense
        self.zeros += other.zeros
        self.elements += other.elements

    def configured(self, config: Mapping[str, Any], layout: str) -> dict[str, Any]:
        """A model's `config.json` with what compressed-tensors looks for."""
        sparsity = {
            "format": layout,
            "global_sparsity": self.zeros / self.elements if self.elements else 0.0,
            "ignore": self.dense,
            "registry_requires_subclass": False,
            "sparsity_structure": "2:4" if layout == "sparse-24-bitmask" else "unstructured",
            "targets": self.sparse,
        }
        quantization = dict(object_in(config, "quantization_config"))
        quantization.setdefault("quant_method", "compressed-tensors")
        quantization["sparsity_config"] = sparsity
        return {**config, "quantization_config": quantization}
