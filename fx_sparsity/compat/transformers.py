"""Compressed checkpoints in `from_pretrained`; needs transformers 5.

A folder in the layout `compressed` calls itself quantized by `fx_sparsity`. transformers has no
such method, and refuses the folder unless `register` was called, as `import fx_sparsity` does.
"""

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fx_sparsity.checkpoints import convert
from fx_sparsity.storage.sparsity_config import METHOD


def register() -> None:
    """Have `from_pretrained` load folders in the layout `compressed`; the model is a dense one.

    Shards are decoded into a temporary folder, which takes the room of the dense checkpoint there
    while it is loaded. Calling it again does nothing.
    """
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(CompressedConfig)
        register_quantizer(METHOD)(Decompressor)


class CompressedConfig(QuantizationConfigMixin):
    """What `quantization_config` says of a compressed folder.

    Args:
        quant_method: `fx_sparsity`.
        replaced: what the dense folder's configuration has in its place.
    """

    dequantize = True  # nothing of it is left in the model that was loaded

    def __init__(
        self, quant_method: str = METHOD, replaced: dict[str, Any] | None = None, **_: Any
    ) -> None:
        self.quant_method = quant_method
        self.replaced = dict(replaced or {})


class Decompressor(HfQuantizer):
    """Decodes shards before they are loaded."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise `ValueError` for a model that is quantized by others, too."""
        del args, kwargs
        if method := self.quantization_config.replaced.get("quantization_config"):
            raise ValueError(
                f"this compressed checkpoint is quantized by {method.get('quant_method')!r}, too: "
                "fx-sparsity convert FOLDER DENSE, and load that"
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Have the shards be looked for; called before, with the configuration."""
        with contextlib.suppress(AttributeError):
            del config.transformers_weights
        for key, value in self.quantization_config.replaced.items():
            setattr(config, key, value)
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        del model, kwargs
        if checkpoint_files is None:
            return
        self._folder = tempfile.TemporaryDirectory(prefix="fx_sparsity-")
        for number, path in enumerate(checkpoint_files):
            dense = Path(self._folder.name, f"{number}.safetensors")
            with torch.device("cpu"):  # not on the meta device, where the model is now
                convert(path, dense, progress=False)
            checkpoint_files[number] = str(dense)  # the list is what is loaded next

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        del kwargs
        self._folder.cleanup()
        return model

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model that was loaded can be trained."""
        return True
