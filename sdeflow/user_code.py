"""Objects named on the command line, as FILE.py:NAME or module:NAME. Finding them runs the user's code."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any


def find(where: str, kind: type) -> Any:
    """The object NAME of a Python file or an importable module. Runs that code.

    Args:
        where: "FILE.py:NAME" or "package.module:NAME".
        kind: what is looked for, to name what there is when NAME is not.

    Raises:
        ValueError: not of that form, no such file or module, no such name, or the code raises.
    """
    source, _, name = where.rpartition(":")
    if not source or not name.isidentifier():
        raise ValueError(f"expected FILE.py:NAME or module:NAME, got {where!r}")
    if source.endswith(".py") or "/" in source:
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"no such file: {source}")
        module = executed(path)
    else:
        module = _imported(source)
    if not hasattr(module, name):
        found = [n for n, v in vars(module).items() if isinstance(v, kind) or _is_class(v, kind)]
        hint = f"; it has {', '.join(found)}" if found else f"; it defines no sf.{kind.__name__}"
        raise ValueError(f"{source} defines no {name}{hint}")
    return getattr(module, name)


def _is_class(value: object, kind: type) -> bool:
    return isinstance(value, type) and issubclass(value, kind) and not value.__module__.startswith("sdeflow.")


def _imported(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # user code may raise anything
        raise ValueError(f"module {name}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(Path.cwd()))


def executed(path: Path) -> ModuleType:
    """The module of a file, run with its own folder importable, as `python FILE` would."""
    spec = importlib.util.spec_from_file_location(f"sdeflow_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"expected a Python file, got {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a file that ends the process would end it as if all were well
        at = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename.endswith(path.name)]
        line = at[-1] if at else getattr(error, "lineno", None)
        where = f"{path}, line {line}" if line else f"{path}"
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
    return module
