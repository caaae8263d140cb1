"""`sdeflow tune`: a plan fitted to a model, as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sdeflow.cli_options import (
    Address,
    AsJson,
    Device,
    EngineName,
    ModelName,
    Seed,
    Threads,
    Workers,
    check_file,
    complete_solver,
    device_named,
    dtype_named,
    model_named,
    progress_shown,
    solver_makers,
)
from sdeflow.cli_outcome import running, say_json
from sdeflow.engine import named
from sdeflow.files import check_not_read
from sdeflow.names import check_names
from sdeflow.tuning.fit import tune

_DTYPES = ("float32", "float64")


def tune_command(
    context: typer.Context,
    model: ModelName,
    steps: Annotated[int, typer.Option(help="Of the plan.", min=1)],
    out: Annotated[Path, typer.Option(help="The JSON file to write.")],
    solver: Annotated[
        str,
        typer.Option(help="Name of a deterministic solver, see sdeflow solvers.", autocompletion=complete_solver),
    ] = "GaussianSplit(3)",
    calibration: Annotated[int, typer.Option(help="Noises to fit to.", min=2)] = 64,
    iterations: Annotated[int, typer.Option(help="Of each stage by gradient.", min=0)] = 60,
    coefficients: Annotated[bool, typer.Option(help="Fit the coefficients too.")] = True,
    seed: Seed = 0,
    dtype: Annotated[str, typer.Option(help="Of the samples that it is fitted to: float32 or float64.")] = "float32",
    device: Device = "cpu",
    threads: Threads = 1,
    engine: EngineName = "local",
    address: Address = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Fit the grid and the coefficients of a solver to MODEL, for a number of steps, and write the plan.

    The file says what it was fitted to and how well it does on noises that it was not fitted to. `sdeflow bench
    --solvers PLAN.json` measures it beside others, and `sf.sample(model, ..., solver=sf.Plan.load(PLAN))` uses it.
    """
    import torch

    with running(context, lambda: "nothing was written; to start anew: {again}", as_json=as_json) as stop:
        makers = solver_makers()
        check_names([solver], makers, "solver", "a name from sdeflow solvers")
        check_file(out)
        check_not_read(out, [model])
        at = named(engine, address=address, workers=workers)
        where, kind = device_named(device), dtype_named(dtype, _DTYPES)
        torch.set_num_threads(threads)
        made = model_named(model)
        net: Any = made.net
        net.to(where, kind)
        plan = tune(
            made, makers[solver](), steps, calibration=calibration, iterations=iterations,
            coefficients=coefficients, seed=seed, dtype=kind, device=where,
            engine=None if engine == "local" and workers is None else at, progress=progress_shown(),
        )  # fmt: skip
        stop.check()
        out.parent.mkdir(parents=True, exist_ok=True)
        plan.save(out)
    note = plan.note or {}
    if as_json:
        say_json({"note": note, "file": str(out)})
        return
    print(
        f"{note['what']}: median error {note['held_out']:.2e} on held-out noises, {note['train']:.2e} on the fitted, "
        f"{note['held_out_start']:.2e} on the best grid untuned ({note['start']})"
    )
    print(f"wrote {out}")
