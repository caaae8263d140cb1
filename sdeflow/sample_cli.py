"""`sdeflow sample`: many samples to a folder, resumable."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from sdeflow.bench.methods import GRIDS
from sdeflow.cli_options import (
    Address,
    AsJson,
    Device,
    EngineName,
    ModelName,
    Seed,
    Threads,
    Workers,
    check_folder,
    complete_grid,
    complete_solver,
    device_named,
    dtype_named,
    model_named,
    progress_bar,
    solver_makers,
)
from sdeflow.cli_outcome import running, say_json
from sdeflow.columns import FORMATS
from sdeflow.dataset import Dataset
from sdeflow.engine import named
from sdeflow.names import check_names
from sdeflow.plan import Plan
from sdeflow.sample_run import sample_to
from sdeflow.solution import Status

_DTYPES = ("bfloat16", "float16", "float32", "float64")


def sample_command(
    context: typer.Context,
    model: ModelName,
    out: Annotated[Path, typer.Option(help="Folder for the samples.")],
    num: Annotated[int, typer.Option(help="Number of samples.", min=1)] = 100,
    solver: Annotated[
        str,
        typer.Option(
            help="A name (see sdeflow solvers), the file of a plan (.json), or auto.", autocompletion=complete_solver
        ),
    ] = "auto",
    steps: Annotated[int | None, typer.Option(help="Steps; with auto the model calls to spend.", min=1)] = None,
    eta: Annotated[float, typer.Option(help="Stochasticity: 0 the flow, 1 the reverse SDE.", min=0)] = 0.0,
    grid: Annotated[
        str | None,
        typer.Option(help="Name of a time grid; the solver's own unless given.", autocompletion=complete_grid),
    ] = None,
    rtol: Annotated[float | None, typer.Option(help="Solve to a tolerance instead of in steps.")] = None,
    label: Annotated[int | None, typer.Option(help="The class to ask a model with labels for.")] = None,
    final: Annotated[str, typer.Option(help="stay, denoise or zero: see `sf.sample`.")] = "stay",
    chunk: Annotated[int, typer.Option(help="Samples a batch.", min=1)] = 256,
    seed: Seed = 0,
    kind: Annotated[str, typer.Option("--format", help="npz, safetensors or parquet.")] = "npz",
    dtype: Annotated[
        str, typer.Option(help="Of network and samples: float32, float64, bfloat16, float16.")
    ] = "float32",
    device: Device = "cpu",
    threads: Threads = 1,
    engine: EngineName = "local",
    address: Address = None,
    workers: Workers = None,
    shard: Annotated[
        int | None, typer.Option(help="Samples a file while it runs; by memory unless given.", min=1)
    ] = None,
    merge: Annotated[bool, typer.Option(help="One file at the end, or the shards as they are.")] = True,
    as_json: AsJson = False,
) -> None:
    """Draw samples of MODEL into a folder: one file, a manifest, and for images a picture.

    After Ctrl-C the same command goes on where it was, to the same files.
    """
    began, done = time.perf_counter(), 0

    def kept() -> str:
        return f"{done} of {num} samples are finished and kept in {out}; to go on: {{again}}"

    with running(context, kept, as_json=as_json) as stop:
        check_folder(out)
        if kind not in FORMATS:
            raise ValueError(f"expected --format {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, got {kind!r}")
        at = named(engine, address=address, workers=workers)
        where, kind_of = device_named(device), dtype_named(dtype, _DTYPES)
        how = _options(solver, steps, eta, grid, rtol, final) | {"dtype": kind_of, "device": device}
        made = model_named(model)
        net: Any = made.net
        net.to(where, kind_of)
        labels = None if label is None else _labels(net, label, num)
        form: Any = kind
        with progress_bar(num, "sample") as bar:

            def on_chunk(finished: int) -> None:
                nonlocal done
                bar.update(finished - done)
                done = finished
                stop.check()

            file = sample_to(
                out, made, num, shape=tuple(net.shape), labels=labels, chunk=chunk, seed=seed,
                kind=form, threads=threads, engine=at, shard=shard, merge=merge, on_chunk=on_chunk, **how,
            )  # fmt: skip
        file = out / file.name  # as it was named
        counts = _counts(out)
    if as_json:
        files = sorted(str(path) for path in out.iterdir() if path.is_file())
        seconds = round(time.perf_counter() - began, 3)
        say_json({"file": str(file), "files": files, "num": num, "status": counts, "seconds": seconds})
        return
    failed = num - counts.get(Status.FINISHED.name.lower(), 0)
    print(f"wrote {file}" + (f"; {failed} of {num} samples failed" if failed else ""))


def _options(
    solver: str, steps: int | None, eta: float, grid: str | None, rtol: float | None, final: str
) -> dict[str, Any]:
    how: dict[str, Any] = {"steps": steps, "eta": eta, "rtol": rtol, "final": final}
    if grid is not None:
        check_names([grid], GRIDS, "grid")
        how["grid"] = GRIDS[grid]
    if solver == "auto":
        how["solver"] = "auto"
        if steps is None and rtol is None:
            how["steps"] = 20
    elif solver.endswith(".json"):
        how["solver"] = Plan.load(solver)
    else:
        makers = solver_makers()
        check_names([solver], makers, "solver", "a name from sdeflow solvers, PLAN.json or auto")
        how["solver"] = makers[solver]()
    return how


def _labels(net: Any, label: int, num: int) -> Any:
    import torch

    classes = getattr(net, "classes", 0)
    if not classes:
        raise ValueError("this model takes no labels: train one with sdeflow train DATA --labels")
    if not 0 <= label < classes:
        raise ValueError(f"expected a label from 0 to {classes - 1}, got {label}")
    return torch.full((num,), label)


def _counts(out: Path) -> dict[str, int]:
    """How many samples ended with which status."""
    data, found = Dataset(out), Counter[int]()
    for shard in data.each():
        found.update(data.columns(shard)["status"].tolist())
    return {Status(number).name.lower(): count for number, count in sorted(found.items())}
