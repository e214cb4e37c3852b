"""Turns a config spec into an object: `{"name": "module.Attribute", **kwargs}`."""

import ast
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bhsd_jax import fields
from bhsd_jax.platform.errors import UserError


def names(package: str) -> tuple[str, ...]:
    """Modules directly below `package`, sorted."""
    root = importlib.import_module(package)
    return tuple(sorted(info.name for info in pkgutil.iter_modules(root.__path__)))


def find(package: str, name: str) -> Any:
    """The attribute `package.<name>`, where `name` is `"module.Attribute"`.

    Raises:
        ValueError: If there is no such module or attribute; the message lists the choices.
    """
    module_name, _, attribute = name.partition(".")
    if module_name not in names(package):
        raise UserError(
            f"{package}: no {name!r}; write '<module>.<Name>', modules are "
            f"{', '.join(names(package))}"
        )
    module = importlib.import_module(f"{package}.{module_name}")
    found = getattr(module, attribute, None) if attribute else None
    if found is None or attribute.startswith("_"):
        choices = [
            key
            for key, value in vars(module).items()
            if inspect.isclass(value) and value.__module__ == module.__name__ and key[0] != "_"
        ]
        raise UserError(
            f"{package}.{module_name}: no {attribute!r}; it has {', '.join(choices) or 'no class'}"
        )
    return found


def arguments(package: str, name: str) -> set[str]:
    """What `package.<name>` takes, fields of what it is derived from among it; {} if there is none.

    It is read in the source: importing it would start JAX, which is not prepared yet where a
    command line is read.
    """
    module, _, attribute = name.partition(".")
    return _arguments(f"{package}.{module}", attribute) if module in names(package) else set()


def _arguments(module: str, name: str) -> set[str]:
    found = find_spec(module)
    if found is None or not found.origin:
        return set()
    tree = ast.parse(Path(found.origin).read_text(encoding="utf-8"))
    imports = (node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module)
    origins = {alias.name: str(node.module) for node in imports for alias in node.names}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return {each.arg for each in (*node.args.args, *node.args.kwonlyargs)}
        if isinstance(node, ast.ClassDef) and node.name == name:
            own = [each.target for each in node.body if isinstance(each, ast.AnnAssign)]
            bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
            parts = [_arguments(origins.get(base, module), base) for base in bases if base != name]
            return {each.id for each in own if isinstance(each, ast.Name)}.union(*parts)
    return set()


def build(package: str, spec: Mapping[str, Any], **extra: Any) -> Any:
    """Makes the object a config names: `package.<spec["name"]>(**rest of spec, **extra)`.

    Raises:
        ValueError: If the name is unknown, or an argument is, where the message lists the choices;
            or if an argument is of another type than the signature says.
    """
    kwargs = dict(spec) | extra
    name = kwargs.pop("name")
    made = find(package, name)
    require_arguments(f"{package}.{name}", made, kwargs)
    return made(**fitting_arguments(f"{package}.{name}", made, kwargs))


def require_arguments(name: str, made: Callable[..., Any], arguments: Collection[str]) -> None:
    """Refuses arguments that a class or function called `name` does not take.

    Raises:
        ValueError: Lists those that are unknown and all that it takes.
    """
    accepted = inspect.signature(made).parameters
    unknown = sorted(set(arguments) - set(accepted))
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        raise UserError(f"{name}: unknown {', '.join(unknown)}; it takes {', '.join(accepted)}")


def fitting_arguments(
    name: str, made: Callable[..., Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments as the signature of a class or function called `name` wants them.

    A config holds whatever literal a flag gave it: the text "no" would be true. What is of the type
    of the default is taken, whatever the annotation says: of one's own it may be `x: int = None`.

    Raises:
        ValueError: If one is of another type; says which.
    """
    try:
        # Attributes of a class may be annotated otherwise than the arguments of the same name.
        kinds = typing.get_type_hints(made.__init__ if inspect.isclass(made) else made)
    except Exception:  # a class of one's own may have any text there, or types that are not there
        return dict(given)
    accepted = inspect.signature(made).parameters
    found = dict(given)
    for argument, value in given.items():
        default = accepted[argument].default if argument in accepted else None
        if type(value) is type(default) and not isinstance(value, tuple | list):
            continue
        try:
            found[argument] = fields.fitting(kinds.get(argument, Any), value)
        except fields.UnfitError:
            wanted = fields.in_words(kinds[argument])
            raise UserError(f"{name}: {argument} must be {wanted}; got {value!r}") from None
    return found


def require_members(made: Any, protocol: type, how: str) -> None:
    """Refuses an object that lacks a part of a protocol; `how` says where parts may come from.

    Raises:
        ValueError: Lists what it lacks.
    """
    asked = [name for name in {**protocol.__annotations__, **vars(protocol)} if name[0] != "_"]
    lacking = [name for name in asked if not hasattr(made, name)]
    if lacking:
        kind = type(made)
        raise UserError(
            f"{kind.__module__}.{kind.__qualname__}: no {', '.join(lacking)}; it needs all that "
            f"{protocol.__module__}.{protocol.__qualname__} has{how}"
        )
