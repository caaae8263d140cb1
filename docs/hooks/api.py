"""The public names of the library, and which of them say nothing about themselves.

A name is public when it is in the `__all__` of one of `MODULES`, or is a method, property or attribute without a
leading underscore of a public class. A method may have its documentation from the class it overrides; an attribute has
it in a string below it, or by being named in the documentation of its class.

    python docs/hooks/api.py        # the count and the names, exit status 1 if there are any
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

MODULES = (
    "sdeflow",
    "sdeflow.solvers",
    "sdeflow.grids",
    "sdeflow.problems",
    "sdeflow.losses",
    "sdeflow.nets",
    "sdeflow.metrics",
    "sdeflow.guidance",
    "sdeflow.inverse",
    "sdeflow.testing",
    "sdeflow.testing.strategies",
    "sdeflow.bench",
    "sdeflow.tuning",
    "sdeflow.training",
    "sdeflow.integrations.diffusers_scheduler",
    "sdeflow.integrations.k_diffusion",
    "sdeflow.integrations.hub",
)
"""Where public names live, besides the modules in the `__all__` of sdeflow."""


@dataclass(frozen=True)
class Name:
    """A public name: its path, such as `sdeflow.solvers.Heun`, and whether it is documented."""

    path: str
    documented: bool


@cache
def present() -> tuple[str, ...]:
    """`MODULES` and what else sdeflow exports of modules, each once."""
    package = importlib.import_module("sdeflow")
    exported_modules = (getattr(package, name) for name in package.__all__)
    more = [value.__name__ for value in exported_modules if isinstance(value, ModuleType)]
    return tuple(dict.fromkeys([*MODULES, *sorted(more)]))


def exported(module: ModuleType) -> list[str]:
    """Its `__all__`; without one, what it defines itself without a leading underscore."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def each() -> Iterator[tuple[str, ModuleType, list[tuple[str, Any]]]]:
    """(path, module, its public names with their values): a class or function once, where it is exported first."""
    seen: set[int] = set()
    for path in present():
        module = importlib.import_module(path)
        found = []
        for name in exported(module):
            value = getattr(module, name)
            if isinstance(value, ModuleType) or id(value) in seen:
                continue
            if documents_itself(value):
                seen.add(id(value))
            found.append((name, value))
        yield path, module, found


def documents_itself(value: Any) -> bool:
    """Whether a value has a docstring of its own, as classes and functions do."""
    return inspect.isclass(value) or inspect.isfunction(value)


def names() -> list[Name]:
    """Every public name once, under the first module that exports it."""
    found = []
    for path, module, members in each():
        found.append(Name(path, bool(module.__doc__)))
        for name, value in members:
            if documents_itself(value):
                found += _of_value(f"{path}.{name}", value)
            else:
                found.append(Name(f"{path}.{name}", _constant_documented(path, name)))
    return found


def undocumented() -> list[str]:
    """The paths of public names without documentation."""
    return [name.path for name in names() if not name.documented]


def _of_value(path: str, value: Any) -> Iterator[Name]:
    if not inspect.isclass(value):
        yield Name(path, bool(value.__doc__))
        return
    own = value.__doc__ or ""
    # a dataclass without a docstring gets its signature for one
    yield Name(path, bool(own) and not own.startswith(f"{value.__name__}("))
    yield from _members(path, value)


def _members(path: str, cls: type) -> Iterator[Name]:
    about = " ".join(base.__doc__ or "" for base in cls.__mro__ if base.__module__.startswith("sdeflow"))
    words = set(re.findall(r"\w+", about))
    strings = _strings_below(cls)
    # members of a base without a public name are the class's own for whoever reads the reference
    hidden = [base for base in cls.__mro__ if base.__module__.startswith("sdeflow") and base.__name__.startswith("_")]
    members = {name for base in (cls, *hidden) for name in (*vars(base), *vars(base).get("__annotations__", {}))}
    for name in sorted(members):
        if name.startswith("_"):
            continue
        member = inspect.getattr_static(cls, name, None)
        if isinstance(member, staticmethod | classmethod):
            member = member.__func__
        if inspect.isfunction(member) or isinstance(member, property) or hasattr(member, "func"):
            documented = _documented_in_a_base(cls, name) or (isinstance(member, property) and name in words)
        else:
            documented = name in words or name in strings or _documented_in_a_base(cls, name)
        yield Name(f"{path}.{name}", documented)


def _documented_in_a_base(cls: type, name: str) -> bool:
    """Whether the class, or one that it derives from, documents a method or property of that name."""
    for base in cls.__mro__:
        member = vars(base).get(name)
        member = getattr(member, "__func__", member)
        if (inspect.isfunction(member) or isinstance(member, property) or hasattr(member, "func")) and member.__doc__:
            return True
    return False


@cache
def _strings_below(cls: type) -> frozenset[str]:
    """The attributes of a class, or of those it derives from, that have a string below them."""
    found: set[str] = set()
    for base in cls.__mro__:
        if base.__module__.startswith("sdeflow"):
            tree = _tree(base.__module__)
            for part in base.__qualname__.split("."):
                tree = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == part)
            found |= _with_string(tree.body)
    return frozenset(found)


@cache
def _tree(module: str) -> Any:
    """The syntax tree of a module."""
    return ast.parse(Path(str(importlib.import_module(module).__file__)).read_text(encoding="utf-8"))


def _constant_documented(module: str, name: str) -> bool:
    """Whether a string stands below its assignment, in the module or in the one it comes from."""
    tree = _tree(module)
    if name in _with_string(tree.body):
        return True
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and any(alias.name == name for alias in node.names):
            return _constant_documented(node.module, name)
    return False


def _with_string(body: list[ast.stmt]) -> set[str]:
    found = set()
    for statement, after in itertools.pairwise(body):
        if not (
            isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
        ):
            continue
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        targets = [target.value if isinstance(target, ast.Subscript) else target for target in targets]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def main() -> int:
    """Print the count and what is missing."""
    every, missing = names(), undocumented()
    print(f"{len(every)} public names, {len(missing)} without documentation")
    for path in missing:
        print(f"  {path}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
