"""`sdeflow tune`: a plan fitted to a model, as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdeflow.bench.methods import METHODS
from sdeflow.checkpoints import load_model
from sdeflow.tuning.fit import tune


def tune_command(
    model: Annotated[str, typer.Argument(help='A shipped model ("digits") or a checkpoint.')],
    steps: Annotated[int, typer.Option(help="Of the plan.", min=1)],
    out: Annotated[Path, typer.Option(help="The JSON file to write.", dir_okay=False)],
    solver: Annotated[
        str, typer.Option(help="Name of a deterministic solver, from `sdeflow solvers`.")
    ] = "GaussianSplit(3)",
    calibration: Annotated[int, typer.Option(help="Noises to fit to.", min=2)] = 64,
    iterations: Annotated[int, typer.Option(help="Of each stage by gradient.", min=0)] = 60,
    coefficients: Annotated[bool, typer.Option(help="Fit the coefficients too.")] = True,
    seed: Annotated[int, typer.Option(help="Of the noises.")] = 0,
    threads: Annotated[int, typer.Option(help="Of torch.", min=1)] = 1,
) -> None:
    """Fit the grid and the coefficients of a solver to MODEL, for a number of steps, and write the plan.

    The file says what it was fitted to and how well it does on noises that it was not fitted to. `sdeflow bench
    --solvers PLAN.json` measures it beside others, and `sf.sample(model, ..., solver=sf.Plan.load(PLAN))` uses it.
    """
    import torch

    torch.set_num_threads(threads)
    try:
        if solver not in METHODS or METHODS[solver].adaptive:
            raise ValueError(f"unknown solver {solver!r}: see sdeflow solvers")
        plan = tune(
            load_model(model), METHODS[solver].make(), steps, calibration=calibration, iterations=iterations,
            coefficients=coefficients, seed=seed, progress=True,
        )  # fmt: skip
        out.parent.mkdir(parents=True, exist_ok=True)
        plan.save(out)
    except KeyboardInterrupt:
        raise SystemExit("sdeflow tune: interrupted; nothing was written") from None
    except (ArithmeticError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise SystemExit(f"sdeflow tune: {error}") from error
    note = plan.note or {}
    print(
        f"{note['what']}: median error {note['held_out']:.2e} on held-out noises, {note['train']:.2e} on the fitted, "
        f"{note['held_out_start']:.2e} on the best grid untuned ({note['start']})"
    )
    print(f"wrote {out}")
