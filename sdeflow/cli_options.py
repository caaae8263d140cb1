"""Options that several commands share, each declared once, and the checks that come before any work."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from sdeflow.names import nearest

_SEEDS = 2**63
_MOST = 1024
"""Of threads, and of processes on one machine."""


def _seed(value: int) -> int:
    if not 0 <= value < _SEEDS:
        raise typer.BadParameter(f"expected a seed from 0 to 2^63 - 1, got {value}")
    return value


Seed = Annotated[int, typer.Option(help="Of all that is random: the same seed gives the same result.", callback=_seed)]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]
Threads = Annotated[int, typer.Option(help="Of torch; one is best for small networks.", min=1, max=_MOST)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON; all else goes to standard error.")]
EngineName = Annotated[
    str, typer.Option("--engine", help="Where to compute: local or ray.", autocompletion=lambda: ["local", "ray"])
]
Address = Annotated[
    str | None, typer.Option(help="Of a running Ray cluster, or auto; Ray on this machine alone unless given.")
]
Workers = Annotated[
    int | None, typer.Option(help="Processes: one with local, one a core with ray, unless given.", min=1, max=_MOST)
]


def device_named(text: str) -> torch.device:
    """The device of that name, if torch can compute on it here.

    Raises:
        ValueError: no such device, or not on this machine.
    """
    try:
        device = torch.device(text)
        torch.zeros(1, device=device).item()
    except Exception as error:  # each backend has its own kind of error
        words = str(error).strip() or type(error).__name__
        raise ValueError(f"device {text!r} cannot be used here: {_first(words)}") from error
    return device


def _first(text: str) -> str:
    """The first sentence of the first line."""
    return text.splitlines()[0].partition(". ")[0].rstrip(".")


def dtype_named(text: str, allowed: tuple[str, ...]) -> torch.dtype:
    """The dtype of that name.

    Raises:
        ValueError: not one of those that the command computes in.
    """
    if text not in allowed:
        raise ValueError(f"expected the dtype {' or '.join([', '.join(allowed[:-1]), allowed[-1]])}, got {text!r}")
    found = getattr(torch, text)
    assert isinstance(found, torch.dtype)
    return found


def check_folder(out: Path) -> None:
    """Refuse a folder that files cannot be written to, before any work; one that is not there will be made.

    Raises:
        ValueError: it, or a folder above it, is a file or cannot be written to.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: expected a folder")
    _check_writable(out, out)


def check_file(out: Path) -> None:
    """Refuse a file that cannot be written, before any work; the folder that it is in will be made.

    Raises:
        ValueError: it is a folder, or what is above it is a file or cannot be written to.
    """
    if out.is_dir():
        raise ValueError(f"{out} is a folder: expected the name of a file")
    _check_writable(out.absolute().parent, out)


def _check_writable(folder: Path, out: Path) -> None:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{out} cannot be written: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{out} cannot be written: no permission to write to {there}")


def progress_shown() -> bool:
    """Whether somebody looks: progress goes to a terminal and nowhere else."""
    return sys.stderr.isatty()


def progress_bar(total: int, unit: str) -> Any:
    """A bar with rate and remaining time, on standard error if that is a terminal."""
    from tqdm.auto import tqdm

    return tqdm(total=total, unit=unit, disable=not progress_shown())


# ---- completion by the shell: names, asked for only when they are needed


def _completed(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return complete


def _completed_list(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Of names with commas between: the last one is completed."""

    def complete(incomplete: str) -> list[str]:
        done, comma, last = incomplete.rpartition(",")
        found = [name for name in names() if name.startswith(last) and name not in done.split(",")]
        return [f"{done}{comma}{name}" for name in found]

    return complete


def _solvers() -> list[str]:
    return list(solver_makers())


def _methods() -> list[str]:
    from sdeflow.bench.methods import METHODS

    return list(METHODS)


def _grids() -> list[str]:
    from sdeflow.bench.methods import GRIDS

    return list(GRIDS)


def _suites() -> list[str]:
    from sdeflow.bench.suites import SUITES

    return list(SUITES)


def _models() -> list[str]:
    from importlib import resources

    files = resources.files("sdeflow").joinpath("weights").iterdir()
    return sorted(file.name.partition(".")[0] for file in files if file.name.endswith(".safetensors"))


def _datasets() -> list[str]:
    from sdeflow.data import DATASETS

    return list(DATASETS)


complete_solver = _completed(lambda: [*_solvers(), "auto"])
complete_methods = _completed_list(_methods)
complete_grid = _completed(_grids)
complete_grids = _completed_list(_grids)
complete_suite = _completed(_suites)
complete_model = _completed(_models)
complete_data = _completed(_datasets)


def solver_makers() -> dict[str, Callable[[], Any]]:
    """Every solver of the catalogue by name."""
    from sdeflow.solvers import CATALOGUE

    return {row.name: row.make for row in CATALOGUE}


def model_named(text: str) -> Any:
    """The shipped model of that name, or the one in that checkpoint.

    Raises:
        FileNotFoundError, ValueError: as `sdeflow.load_model`, with the nearest name.
    """
    from sdeflow.checkpoints import load_model

    try:
        return load_model(text)
    except FileNotFoundError as error:
        near = nearest(text, _models())
        raise FileNotFoundError(f"{error}{f'; did you mean {near[0]}?' if near else ''}") from error


ModelName = Annotated[
    str,
    typer.Argument(metavar="MODEL", help='A shipped model ("digits") or a checkpoint.', autocompletion=complete_model),
]
