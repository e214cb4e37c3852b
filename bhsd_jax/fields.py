"""Typed groups of fields: read from dictionaries with every value checked, and told to a reader.

A group is a frozen dataclass. A field is `name: Annotated[type, "what it does", limits] = default`;
types are the plain ones, `Literal`, tuples and unions of them, `Spec`, or another group.
"""

import contextlib
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
_PLAIN = {
    int: numbers.Integral,
    float: numbers.Real,
    bool: int,
    str: str,
    type(None): type(None),
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


class UnfitError(Exception):
    """A value that a field or argument cannot hold; the text says what it can beyond its type."""


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

    Values become what their types say, as by `fitting`.

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


def fitting(kind: Any, value: Any, *, ours: bool = False) -> Any:
    """A value as a type wants it: an argument of a class, or of `ours`, a field of a group.

    Lists become tuples, text with commas a tuple of words, one item a tuple of it where any number
    may be, and 1e3 a whole number. In groups, whose types are all known, whole numbers become
    floats; elsewhere 0 and 1 are truths too, and types that are not plain ones take anything.

    Raises:
        UnfitError: If it is of another type.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if _is_union(origin):
        return _best_fit(inner, value, ours)
    if origin in (tuple, Sequence) and inner:
        return _fitting_items(origin, inner, value, ours)
    if origin is Literal:
        fits = any(type(value) is type(choice) and value == choice for choice in inner)
        return value if fits else _misfit()
    if isinstance(kind, type) and kind in _PLAIN:
        return _plain(kind, value, ours)
    return _spec(value) if ours else value


def _best_fit(kinds: tuple[Any, ...], value: Any, ours: bool) -> Any:
    found = []
    for kind in kinds:
        with contextlib.suppress(UnfitError):
            found.append(fitting(kind, value, ours=ours))
    # In `int | float` 1.0 may be a share and 1 a count: what is taken as it is goes first.
    alike = [one for one in found if type(one) is type(value)]
    return (alike or found)[0] if found else _misfit()


def _fitting_items(origin: Any, kinds: tuple[Any, ...], value: Any, ours: bool) -> tuple[Any, ...]:
    any_number = origin is Sequence or kinds[-1] is Ellipsis
    if isinstance(value, str) and _is_text(kinds[0]):
        value = tuple(word.strip() for word in value.strip("()").split(",") if word.strip())
    if any_number and value is not None and not isinstance(value, list | tuple):
        value = (value,)
    if not isinstance(value, list | tuple):
        _misfit()
    # Of one's own, (int) often stands for any number of them.
    kinds = kinds[:1] * len(value) if any_number or len(kinds) == 1 else kinds
    if len(kinds) != len(value):
        _misfit()
    found = tuple(fitting(one, item, ours=ours) for one, item in zip(kinds, value, strict=True))
    if any(typing.get_origin(kind) is Literal for kind in kinds) and len(set(found)) < len(found):
        _misfit()
    return found


def _plain(kind: type, value: Any, ours: bool) -> Any:
    if kind is int and type(value) is float and value.is_integer():
        return int(value)  # 1e3 of a command line
    if kind is bool:
        truth = isinstance(value, bool) or (not ours and isinstance(value, int) and value in (0, 1))
        return bool(value) if truth else _misfit()
    if not isinstance(value, _PLAIN[kind]) or isinstance(value, bool):
        _misfit()
    return kind(value) if ours and kind in (int, float) else value


def _spec(value: Any) -> Any:
    """Fields with a name, what they hold in tuples."""
    named = isinstance(value, Mapping) and isinstance(value.get("name"), str)
    return files.tuples(value) if named else _misfit()


def _misfit() -> NoReturn:
    raise UnfitError


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
        found = fitting(kind, value, ours=True)
        _require_limits(found, notes[1:])
    except UnfitError as error:
        about = f" ({notes[0]})" if notes else ""
        wanted = str(error) or in_words(kind)
        raise UserError(f"{path} must be {wanted}; got {value!r}{about}") from None
    return found


def _require_limits(value: Any, limits: tuple[Any, ...]) -> None:
    numbers = [n for n in (value if isinstance(value, tuple) else (value,)) if n is not None]
    for limit in limits:  # NaN is neither more nor less than any, and fits none
        if limit.above is not None and not all(number > limit.above for number in numbers):
            raise UnfitError(f"above {limit.above:g}")
        if limit.least is not None and not all(number >= limit.least for number in numbers):
            raise UnfitError(f"{limit.least:g} or more")
        if limit.most is not None and not all(number <= limit.most for number in numbers):
            raise UnfitError(f"{limit.most:g} or less")


def _is_text(kind: Any) -> bool:
    words = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    return kind is str or (bool(words) and all(isinstance(word, str) for word in words))


def _is_union(origin: Any) -> bool:
    return origin in (typing.Union, types.UnionType)
