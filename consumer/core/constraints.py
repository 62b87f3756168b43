"""Refuses constraints in annotations that the decoder of their type would ignore.

msgspec decodes Structs, dataclasses, TypedDicts, NamedTuples and plain types, and enforces `msgspec.Meta` alone;
pydantic decodes its models, and does not know `msgspec.Meta`. A constraint that its decoder ignores would accept every
value, so it is an error at registration. Text and objects that constrain nothing are allowed.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator
from decimal import Decimal
from typing import Annotated, Any, ClassVar

import msgspec

from consumer.core.errors import RegistrationError

_LIBRARIES = ("annotated_types", "pydantic", "pydantic_core", "pydantic_extra_types", "beartype")
_HARMLESS = ("DocInfo", "Unit", "Discriminator")
_DESCRIBING = {"annotation", "description", "title", "examples", "json_schema_extra", "deprecated", "repr"}
_META = ("gt", "ge", "lt", "le", "multiple_of", "min_length", "max_length", "pattern")


def check(declared: Any) -> None:
    """Raise RegistrationError for a constraint that would be ignored.

    The error says what to write instead.
    """
    _ConstraintWalk().look(declared, "the payload", decodes_itself=_decodes_itself_at_top(declared))


def _decodes_itself_at_top(declared: Any) -> bool:
    """Return whether pydantic decodes the whole value.

    It does where the type, or a member of the outermost union, is a pydantic type.
    """
    inner = _bare(declared)
    is_union = typing.get_origin(inner) in (typing.Union, types.UnionType)
    return any(is_pydantic(_bare(argument)) for argument in (typing.get_args(inner) if is_union else [inner]))


def _bare(declared: Any) -> Any:
    return typing.get_args(declared)[0] if typing.get_origin(declared) is Annotated else declared


def is_pydantic(part: Any) -> bool:
    """Return whether pydantic, and not msgspec, decodes a class."""
    origin = typing.get_origin(part)
    part = origin if isinstance(origin, type) else part
    return any(
        hasattr(part, attribute)
        for attribute in ("__pydantic_validator__", "__pydantic_core_schema__", "__get_pydantic_core_schema__")
    )


class _ConstraintWalk:
    """Visits all annotations inside a type, once for each library."""

    def __init__(self) -> None:
        self._seen: set[tuple[int, bool]] = set()
        self._alive: list[Any] = []  # so that no id() is reused

    def look(self, declared: Any, place: str, decodes_itself: bool) -> None:
        """Check a type. decodes_itself: pydantic decodes it; else msgspec does."""
        if (id(declared), decodes_itself) in self._seen:
            return
        self._seen.add((id(declared), decodes_itself))
        self._alive.append(declared)
        origin = typing.get_origin(declared)
        if origin is ClassVar or origin is typing.Literal:
            return
        if origin is Annotated:
            inner, *metadata = typing.get_args(declared)
            for constraint in metadata:
                self._judge(constraint, inner, place, decodes_itself)
            self.look(inner, place, decodes_itself)
            return
        for part in _parts(declared):
            self.look(part, place, decodes_itself)
        kind = origin if isinstance(origin, type) else declared
        if isinstance(kind, type):
            is_model = is_pydantic(kind) and not dataclasses.is_dataclass(
                kind
            )  # msgspec decodes all dataclasses itself
            self._look_into(kind, decodes_itself or is_model)

    def _look_into(self, kind: type, decodes_itself: bool) -> None:
        if not _has_fields(kind):
            return
        name = kind.__name__
        if not decodes_itself:
            if is_pydantic(kind) and dataclasses.is_dataclass(kind):
                raise RegistrationError(
                    f"{name}: a pydantic dataclass, which msgspec would decode without its checks; derive {name} from "
                    "pydantic.BaseModel"
                )
            if hasattr(kind, "__pydantic_config__"):
                raise _ignored(f"the pydantic configuration of {name}", name, "")
            for attribute, value in vars(kind).items():
                if type(value).__name__ == "PydanticDescriptorProxy":
                    raise _ignored(f"the pydantic validator {name}.{attribute}", name, "")
            for field, default in _defaults(kind):
                if type(default).__name__ == "FieldInfo":
                    raise _ignored(f"pydantic.Field as the default of {name}.{field}", name, "")
        try:
            hints = typing.get_type_hints(kind, include_extras=True)
        except Exception:  # a missing name: the library that decodes the type has the better error
            return
        for field, hint in hints.items():
            self.look(hint, f"{name}.{field}", decodes_itself)

    def _judge(self, metadata: Any, declared: Any, place: str, decodes_itself: bool) -> None:
        if isinstance(metadata, msgspec.Meta):
            if decodes_itself and any(getattr(metadata, attribute) is not None for attribute in _META):
                raise RegistrationError(
                    f"{place}: msgspec.Meta has no effect in a type that pydantic decodes; write pydantic.Field(…)"
                )
            return
        if not decodes_itself and _constrains(metadata):
            kind = metadata if isinstance(metadata, type) else type(metadata)
            name = "pydantic.Field" if kind.__name__ == "FieldInfo" else kind.__name__
            raise _ignored(f"{name} on {place}", place.partition(".")[0], _as_meta(metadata, declared))


def _ignored(what: str, owner: str, instead: str) -> RegistrationError:
    model = f"make {owner} a pydantic model" if owner != "the payload" else "wrap the value in a pydantic model"
    return RegistrationError(
        f"{what} would be ignored: msgspec decodes it; {f'write {instead}, or ' if instead else ''}{model}"
    )


def _constrains(metadata: Any) -> bool:
    """Return whether an object in an annotation may limit or change values."""
    if isinstance(metadata, str | int | float | bytes) or metadata is None:
        return False
    kind = metadata if isinstance(metadata, type) else type(metadata)
    if kind.__name__ in _HARMLESS:
        return False
    if kind.__name__ == "FieldInfo" and kind.__module__.startswith("pydantic"):
        return bool(metadata.metadata or set(getattr(metadata, "_attributes_set", {"unknown"})) - _DESCRIBING)
    return (
        kind.__module__.partition(".")[0] in _LIBRARIES
        or hasattr(metadata, "__get_pydantic_core_schema__")
        or hasattr(metadata, "__get_validators__")
        or inspect.isroutine(metadata)
    )


def _as_meta(metadata: Any, declared: Any) -> str:
    """Return the equivalent msgspec.Meta as code; empty where there is none."""
    constraints: dict[str, Any] = {}
    for constraint in getattr(metadata, "metadata", None) or _members(metadata):
        known = {name: getattr(constraint, name, None) for name in _META}
        if not any(value is not None for value in known.values()):
            return ""
        constraints |= {name: value for name, value in known.items() if value is not None}
    numeric = {"gt", "ge", "lt", "le", "multiple_of"}
    fits = declared in (int, float) if constraints.keys() & numeric else declared is not Decimal
    text = ", ".join(f"{name}={value!r}" for name, value in constraints.items())
    return f"msgspec.Meta({text})" if constraints and fits else ""


def _members(metadata: Any) -> list[Any]:
    try:
        return list(metadata)  # a group of constraints, such as annotated_types.Interval
    except TypeError:
        return [metadata]


def _parts(declared: Any) -> Iterator[Any]:
    """Yield the types inside a type.

    Its arguments, what an alias or a NewType stands for, and the bounds of a type variable.
    """
    for argument in typing.get_args(declared):
        if isinstance(argument, list | tuple):
            yield from argument
        else:
            yield argument
    for name in ("__supertype__", "__value__", "__bound__"):
        inner = getattr(declared, name, None) if not isinstance(declared, type) else None
        if inner is not None:
            yield inner
    if isinstance(declared, typing.TypeVar):
        yield from declared.__constraints__


def _has_fields(kind: type) -> bool:
    return (
        issubclass(kind, msgspec.Struct)
        or dataclasses.is_dataclass(kind)
        or typing.is_typeddict(kind)
        or hasattr(kind, "__pydantic_fields__")
        or hasattr(kind, "__attrs_attrs__")
        or (issubclass(kind, tuple) and hasattr(kind, "_fields"))
    )


def _defaults(kind: type) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(kind):
        yield from ((field.name, field.default) for field in dataclasses.fields(kind))
    elif issubclass(kind, msgspec.Struct):
        defaults = kind.__struct_defaults__
        yield from zip(kind.__struct_fields__[len(kind.__struct_fields__) - len(defaults) :], defaults, strict=True)
    else:
        yield from getattr(kind, "_field_defaults", {}).items()
