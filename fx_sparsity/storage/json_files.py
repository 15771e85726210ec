"""The JSON beside tensors: configurations, indices, logs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fx_sparsity.storage.container import FileFormatError, replacing


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        FileFormatError: it does not, or is nested too deeply.
        OSError: it cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise FileFormatError(f"{path}: expected a JSON object")
    return found


def object_in(found: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A part that is an object; an empty one where there is none, or something else."""
    part = found.get(key)
    return part if isinstance(part, dict) else {}


def put_json(path: Path, content: Any) -> None:
    """Write a file of JSON, whole or not at all."""
    with replacing(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")
