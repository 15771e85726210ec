"""What compressed-tensors looks for in a model's `config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fx_sparsity.storage.container import elements_of
from fx_sparsity.storage.writing import Encoded


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
        quantization = dict(config.get("quantization_config") or {})
        quantization.setdefault("quant_method", "compressed-tensors")
        quantization["sparsity_config"] = sparsity
        return {**config, "quantization_config": quantization}
