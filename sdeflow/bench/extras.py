"""Imports of what only the benchmark's output needs, with one clear error when it is missing."""

from __future__ import annotations

import importlib
from typing import Any


def need(module: str) -> Any:
    """The module.

    Raises:
        ImportError: it is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"the benchmark needs {package}: pip install 'sdeflow[bench]'") from error
