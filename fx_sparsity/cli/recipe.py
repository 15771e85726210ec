"""What `sparsify` and `verify` are asked for: flags, or a YAML file that says what they say."""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from fx_sparsity.errors import FxSparsityError
from fx_sparsity.graph import SparsityMapping
from fx_sparsity.patterns import ROLES, Role

KEYS = ("pattern", "name", "regex", "kind", "roles", "norm", "ranked", "layout")
"""Flags that a recipe may hold; `name`, `regex`, `kind` and `roles` are mappings."""

_PAIRS = ("name", "regex", "kind", "roles")


class RecipeError(FxSparsityError, ValueError):
    """A recipe or a flag cannot be understood."""


def read_recipe(path: Path | None, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe, with what flags say in its place.

    Args:
        path: YAML file; None for flags alone.
        flags: key -> value; pairs as `left=right`. None and nothing are left out.

    Raises:
        RecipeError: unknown key, or a value of another kind; with the nearest key.
    """
    found: Any = {}
    if path is not None:
        try:
            found = yaml.safe_load(path.read_text()) or {}
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise RecipeError(f"{path}: not YAML: {error}") from error
        if not isinstance(found, dict):
            raise RecipeError(f"{path}: expected keys {', '.join(KEYS)}")
    for key, value in found.items():
        if key not in KEYS:
            near = get_close_matches(str(key), KEYS) or KEYS
            raise RecipeError(f"{path}: unknown key {key!r}; expected {', '.join(near)}")
        if isinstance(value, dict) != (key in _PAIRS):
            kind = "a mapping" if key in _PAIRS else "one value"
            raise RecipeError(f"{path}: {key}: expected {kind}, found {value!r}")
        for name in value if key in _PAIRS else ():
            if not isinstance(name, str):
                raise RecipeError(f"{path}: {key}: expected quotation marks around {name!r}")
    recipe = dict(found)
    for key, value in flags.items():
        if key in _PAIRS:
            recipe[key] = {**recipe.get(key, {}), **dict(_pair(key, text) for text in value)}
        elif value is not None:
            recipe[key] = value
    return recipe


def mapping_of(recipe: Mapping[str, Any]) -> SparsityMapping:
    """The mapping that a recipe describes; `dense` leaves a weight as it is.

    Raises:
        RecipeError: an expression or a pattern that cannot be read.
    """
    mapping = SparsityMapping().set_global(_config(recipe.get("pattern")))
    setters = {
        "kind": mapping.set_object_type,
        "regex": mapping.set_module_name_regex,
        "name": mapping.set_module_name,
    }
    for key, setter in setters.items():
        for name, config in recipe.get(key, {}).items():
            try:
                setter(name, _config(config))
            except re.error as error:
                raise RecipeError(f"{key} {name!r}: {error}") from error
    return mapping


def roles_of(recipe: Mapping[str, Any]) -> dict[str, Sequence[Role]]:
    """Regular expression -> roles.

    Raises:
        RecipeError: an expression that cannot be read, or an unknown role.
    """
    found: dict[str, Sequence[Role]] = {}
    for regex, text in recipe.get("roles", {}).items():
        try:
            re.compile(regex)
        except re.error as error:
            raise RecipeError(f"roles {regex!r}: {error}") from error
        names = text if isinstance(text, list) else str(text).split(",")
        named: dict[str, Role] = {role: role for role in ROLES}
        roles = [named.get(str(name).strip()) for name in names]
        if None in roles:
            raise RecipeError(f"roles {regex!r}: expected some of {', '.join(ROLES)}, found {text}")
        found[regex] = [role for role in roles if role is not None]
    return found


def _pair(key: str, text: str) -> tuple[str, str]:
    left, equals, right = text.rpartition("=")
    if not equals:
        expected = "REGEX=ROLES" if key == "roles" else "NAME=PATTERN"
        raise RecipeError(f"--{key}: expected {expected}, found {text!r}")
    return left, right


def _config(value: Any) -> str | None:
    if value is None or value == "dense":
        return None
    if not isinstance(value, str):
        raise RecipeError(f"expected a pattern in quotation marks, found {value!r}")
    return value
