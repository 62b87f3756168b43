"""JSON Schemas of the types that handlers declare, with shared definitions.

In the form of draft 7, which AsyncAPI takes; the libraries write a later one. Limitations: a type without a schema, such
as one that its own code validates, is any value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from consumer.core.constraints import is_pydantic
from consumer.core.decode import bare, members

PREFIX = "#/components/schemas/"
_NAMED = "\0"  # before a name that a definition has got already

Schema = dict[str, Any]


class Schemas:
    """Collects the definitions of types by name.

    A number distinguishes types of one name.
    """

    def __init__(self) -> None:
        self.definitions: dict[str, Schema] = {}
        self._names: dict[tuple[str, str], str] = {}  # of a definition and all that it refers to -> its name here

    def of(self, declared: Any) -> Schema:
        """Return the schema of a type, with references to definitions."""
        try:
            return self._of(declared)
        except Exception:  # each library has its own for a type without a schema
            return {}

    def _of(self, declared: Any) -> Schema:
        if any(is_pydantic(bare(part)) for part in members(declared) or [declared]):
            return self._of_pydantic(declared)

        def hook(kind: Any) -> Schema:
            if kind is object:
                return {}
            if not is_pydantic(kind):
                raise NotImplementedError
            inner: Schema = _with_references(self._of_pydantic(kind), lambda name: f"{_NAMED}{name}")
            return inner

        [schema], definitions = msgspec.json.schema_components(
            [declared], schema_hook=hook, ref_template=f"{PREFIX}{{name}}"
        )
        return self._add(schema, definitions)

    def _of_pydantic(self, declared: Any) -> Schema:
        from pydantic import TypeAdapter  # only when a handler declares a pydantic type

        schema = TypeAdapter(declared).json_schema(ref_template=f"{PREFIX}{{model}}")
        definitions = schema.pop("$defs", {})
        name = re.sub(r"[^A-Za-z0-9._-]", "_", getattr(declared, "__name__", ""))  # as pydantic names definitions
        if schema.get("type") == "object" and name and name not in definitions:
            definitions[name], schema = schema, {"$ref": f"{PREFIX}{name}"}
        return self._add(schema, definitions)

    def _add(self, schema: Schema, definitions: Mapping[str, Schema]) -> Schema:
        """Add definitions; return the schema with the names that they got."""
        names = {name: self._name(name, definitions) for name in definitions}

        def named(name: str) -> str:
            return f"{PREFIX}{name.removeprefix(_NAMED)}" if name.startswith(_NAMED) else f"{PREFIX}{names[name]}"

        for name, definition in definitions.items():
            self.definitions[names[name]] = draft_7(_with_references(definition, named))
        renamed: Schema = draft_7(_with_references(schema, named))
        return renamed

    def _name(self, name: str, definitions: Mapping[str, Schema]) -> str:
        reachable: set[str] = set()
        todo = {name}
        while todo:
            reachable |= todo
            todo = {inner for known in todo for inner in _references(definitions[known])} - reachable
            todo &= definitions.keys()
        key = name, json.dumps({inner: definitions[inner] for inner in sorted(reachable)}, sort_keys=True, default=str)
        if key not in self._names:
            free, number = name, 2
            while free in self._names.values():
                free, number = f"{name}_{number}", number + 1
            self._names[key] = free
        return self._names[key]


def _references(schema: Any) -> set[str]:
    """Return the names that a schema refers to."""
    names: set[str] = set()

    def note(name: str) -> str:
        names.add(name)
        return name

    _with_references(schema, note)
    return names


def _with_references(schema: Any, change: Callable[[str], str]) -> Any:
    """Return a schema with other references."""
    if isinstance(schema, list):
        return [_with_references(part, change) for part in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {name: _with_references(part, change) for name, part in schema.items()}
    if isinstance(reference := changed.get("$ref"), str):
        changed["$ref"] = change(reference.removeprefix(PREFIX))
    return changed


def draft_7(schema: Any) -> Any:
    """Return a schema in the form of draft 7.

    Tuples are lists of schemas there. What names the property that distinguishes the members of a union is left out: a
    constant in each does.
    """
    if isinstance(schema, list):
        return [draft_7(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {
        name: draft_7(part)
        for name, part in schema.items()
        if not (name == "discriminator" and isinstance(part, dict) and "propertyName" in part)
    }
    if "prefixItems" in changed and isinstance(changed["prefixItems"], list):
        rest = changed.pop("items", True)
        changed["items"] = changed.pop("prefixItems")
        changed["additionalItems"] = rest
    return changed
