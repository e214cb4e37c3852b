"""Typed groups of fields: read from dictionaries with every value checked, and told to a reader.

A group is a frozen dataclass. A field is `name: Annotated[type, "what it does", limits] = default`;
types are the plain ones, `Literal`, tuples and unions of them, `Spec`, or another group.
"""

import dataclasses
import numbers
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn

from bhsd_jax.platform import files
from bhsd_jax.platform.errors import UserError

Spec = Mapping[str, Any]  # {"name": "module.Class", **arguments}: something found by its name

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "text",
    type(None): "None",
}


@dataclass(frozen=True)
class Between:
    """The numbers that a field may hold, both ends included; or all above one."""

    least: float | None = None
    most: float | None = None
    above: float | None = None


@dataclass(frozen=True)
class Field:
    """One field for a reader: where it is, what it holds, what it does."""

    path: str  # dotted
    kind: str  # in words
    default: Any
    about: str


class _UnfitError(Exception):
    """A value that a field cannot hold; the text says what it can, where the type does not."""


def describe(group: type, path: str = "") -> Iterator[Field]:
    """All fields of a group, those of groups inside it as well."""
    for part, kind, notes in _parts(group):
        where = f"{path}.{part.name}" if path else part.name
        if dataclasses.is_dataclass(kind):
            yield from describe(typing.cast(type, kind), where)
        else:
            default = None if part.default is dataclasses.MISSING else part.default
            yield Field(where, in_words(kind), default, next(iter(notes), ""))


def read(group: Any, values: Any, path: str) -> Any:
    """A group from a dictionary.

    Lists become tuples and whole numbers floats where the type says so; text with commas becomes a
    tuple of words, and one item a tuple of it where any number may be.

    Args:
        group: A frozen dataclass.
        values: Its fields by name, nested as its groups are; what is left out has its default.
        path: What to call it in errors.

    Raises:
        ValueError: If a field without a default is missing, one is not known, or holds what it
            cannot; names it.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{path} is a group of fields; got {values!r}")
    names = [part.name for part in dataclasses.fields(group)]
    if unknown := sorted(values.keys() - set(names)):
        raise UserError(f"{path} has no field {unknown[0]}; it has {', '.join(names)}")
    # Somebody's own config, written for an older version, need not know what has come since.
    defaults = {part.name: part.default for part in dataclasses.fields(group)}
    values = {k: v for k, v in defaults.items() if v is not dataclasses.MISSING} | dict(values)
    if missing := [name for name in names if name not in values]:
        raise UserError(f"{path}.{missing[0]} is missing; start from configs/common.py")
    found = {}
    for part, kind, notes in _parts(group):
        where, value = f"{path}.{part.name}", values[part.name]
        if dataclasses.is_dataclass(kind):
            found[part.name] = read(kind, value, where)
        else:
            found[part.name] = _read_field(where, kind, notes, value)
    return group(**found)


def fitting(kind: Any, value: Any) -> Any:
    """An argument of a class, as the type in its signature wants it.

    Types that are not plain ones take anything.

    Raises:
        TypeError: If it is of another type.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if _is_union(origin):
        found = [fitting(one, value) for one in inner if _fits(one, value)]
        # In `int | float` 1.0 may be a share and 1 a count: what is taken as it is goes first.
        alike = [one for one in found if type(one) is type(value)]
        return (alike or found)[0] if found else _misfit(value)
    if origin in (tuple, Sequence) and inner:
        # Of one's own, (int) often stands for any number of them.
        many = origin is Sequence or inner[-1:] == (Ellipsis,) or len(inner) == 1
        return _fitting_items(inner[:1] if many else inner, value, many)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)  # 1e3 of a command line
    if kind is bool:
        return bool(value) if isinstance(value, int) and value in (0, 1) else _misfit(value)
    plain = {int: numbers.Integral, float: numbers.Real, str: str, type(None): type(None)}
    if (
        isinstance(kind, type)
        and kind in plain
        and (not isinstance(value, plain[kind]) or isinstance(value, bool))
    ):
        return _misfit(value)
    return value


def _fitting_items(kinds: tuple[Any, ...], value: Any, many: bool) -> tuple[Any, ...]:
    if isinstance(value, str) and kinds[0] is str:
        value = _words(value)
    if not isinstance(value, list | tuple):
        return _misfit(value)
    kinds = kinds * len(value) if many else kinds
    if len(kinds) != len(value):
        return _misfit(value)
    return tuple(fitting(one, item) for one, item in zip(kinds, value, strict=True))


def _fits(kind: Any, value: Any) -> bool:
    try:
        fitting(kind, value)
    except TypeError:
        return False
    return True


def _misfit(value: Any) -> NoReturn:
    raise TypeError(repr(value))


def complete(saved: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Dictionaries that another version wrote: what it lacked is as the defaults have it.

    Fields that are no more are left out. A part with a name says all about itself.
    """
    filled = dict(defaults)
    for name, value in saved.items():
        known = defaults.get(name)
        if isinstance(value, Mapping) and isinstance(known, Mapping) and "name" not in value:
            filled[name] = complete(value, known)
        elif name in defaults:
            filled[name] = value
    return filled


def with_defaults(saved: Mapping[str, Any], group: type) -> dict[str, Any]:
    """Dictionaries that an older version wrote: what it lacked is at the group's defaults."""
    filled = dict(saved)
    for part, kind, _ in _parts(group):
        if dataclasses.is_dataclass(kind):
            inner = filled.get(part.name, {})
            filled[part.name] = with_defaults(inner, typing.cast(type, kind))
        elif part.default is not dataclasses.MISSING:
            filled.setdefault(part.name, part.default)
    return filled


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Names of the fields in which two configs differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path} ({old} -> {new})"


def in_words(kind: Any) -> str:
    """A type in words for a user."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if _is_union(origin):
        return " or ".join(in_words(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join("nothing" if choice == "" else str(choice) for choice in arguments)
    if origin in (tuple, Sequence):
        if origin is Sequence or arguments[-1] is Ellipsis:
            return f"({in_words(arguments[0])}, ...)"
        return f"({', '.join(in_words(argument) for argument in arguments)})"
    return _WORDS.get(kind, "fields with a name")


def _parts(group: type) -> Iterator[tuple[dataclasses.Field, Any, tuple[Any, ...]]]:
    hints = typing.get_type_hints(group, include_extras=True)
    for part in dataclasses.fields(group):
        kind, notes = hints[part.name], ()
        if typing.get_origin(kind) is Annotated:
            kind, *notes = typing.get_args(kind)
        yield part, kind, tuple(notes)


def _read_field(path: str, kind: Any, notes: tuple[Any, ...], value: Any) -> Any:
    try:
        found = _value(kind, value)
        _require_limits(found, notes[1:])
    except _UnfitError as error:
        about = f" ({notes[0]})" if notes else ""
        wanted = str(error) or in_words(kind)
        raise UserError(f"{path} must be {wanted}; got {value!r}{about}") from None
    return found


def _value(kind: Any, value: Any) -> Any:
    """The value as the type has it."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if _is_union(origin):
        return _first_fit(arguments, value)
    if origin is tuple:
        return _tuple(arguments, value)
    if origin is Literal:
        fits = any(type(value) is type(choice) and value == choice for choice in arguments)
    else:
        if kind is float and type(value) is int:
            value = float(value)
        fits = isinstance(value, origin or kind) and (kind is bool or not isinstance(value, bool))
        if isinstance(value, Mapping):
            fits = fits and isinstance(value.get("name"), str)
    if not fits:
        raise _UnfitError
    return files.tuples(value) if isinstance(value, Mapping) else value


def _first_fit(kinds: tuple[Any, ...], value: Any) -> Any:
    for kind in kinds:
        try:
            return _value(kind, value)
        except _UnfitError:
            continue
    raise _UnfitError


def _tuple(kinds: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if isinstance(value, str) and _is_text(kinds[0]):
        value = _words(value)
    any_number = kinds[-1] is Ellipsis
    if any_number and value is not None and not isinstance(value, list | tuple):
        value = (value,)
    if not isinstance(value, list | tuple):
        raise _UnfitError
    kinds = (kinds[0],) * len(value) if any_number else kinds
    if len(kinds) != len(value):
        raise _UnfitError
    found = tuple(_value(kind, item) for kind, item in zip(kinds, value, strict=True))
    if any(typing.get_origin(kind) is Literal for kind in kinds) and len(set(found)) < len(found):
        raise _UnfitError
    return found


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.strip("()").split(",") if word.strip())


def _require_limits(value: Any, limits: tuple[Any, ...]) -> None:
    numbers = [n for n in (value if isinstance(value, tuple) else (value,)) if n is not None]
    for limit in limits:  # NaN is neither more nor less than any, and fits none
        if limit.above is not None and not all(number > limit.above for number in numbers):
            raise _UnfitError(f"above {limit.above:g}")
        if limit.least is not None and not all(number >= limit.least for number in numbers):
            raise _UnfitError(f"{limit.least:g} or more")
        if limit.most is not None and not all(number <= limit.most for number in numbers):
            raise _UnfitError(f"{limit.most:g} or less")


def _is_text(kind: Any) -> bool:
    words = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    return kind is str or (bool(words) and all(isinstance(word, str) for word in words))


def _is_union(origin: Any) -> bool:
    return origin in (typing.Union, types.UnionType)
