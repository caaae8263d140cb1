"""`sdeflow sample`: many samples to a folder, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sdeflow.bench.methods import GRIDS, METHODS
from sdeflow.checkpoints import load_model
from sdeflow.plan import Plan
from sdeflow.sample_run import sample_to


def sample_command(
    model: Annotated[str, typer.Argument(help='A shipped model ("digits") or a checkpoint.')],
    out: Annotated[Path, typer.Option(help="Folder for the samples.", file_okay=False)],
    num: Annotated[int, typer.Option(help="Number of samples.", min=1)] = 100,
    solver: Annotated[
        str, typer.Option(help="A name from `sdeflow solvers`, the file of a plan (.json), or auto.")
    ] = "auto",
    steps: Annotated[int | None, typer.Option(help="Steps; with auto the model calls to spend.", min=1)] = None,
    eta: Annotated[float, typer.Option(help="Stochasticity: 0 the flow, 1 the reverse SDE.", min=0)] = 0.0,
    grid: Annotated[str | None, typer.Option(help=f"One of: {', '.join(GRIDS)}.")] = None,
    rtol: Annotated[float | None, typer.Option(help="Solve to a tolerance instead of in steps.")] = None,
    label: Annotated[int | None, typer.Option(help="The class to ask a model with labels for.")] = None,
    final: Annotated[str, typer.Option(help="stay, denoise or zero: see `sf.sample`.")] = "stay",
    chunk: Annotated[int, typer.Option(help="Samples a batch.", min=1)] = 256,
    seed: Annotated[int, typer.Option(help="Of the starts and the noise.")] = 0,
    kind: Annotated[str, typer.Option("--format", help="npz or safetensors.")] = "npz",
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    threads: Annotated[int, typer.Option(help="Of torch.", min=1)] = 1,
) -> None:
    """Draw samples of MODEL into a folder: one file, what it holds, and for images a picture.

    After Ctrl-C the same command goes on where it was, to the same files.
    """
    import torch
    from tqdm.auto import tqdm

    torch.set_num_threads(threads)
    try:
        how = _options(solver, steps, eta, grid, rtol, final, dtype)
        made = load_model(model)
        net: Any = made.net
        if device != "cpu":
            net.to(device)
        if dtype == "float64":
            net.double()
        labels = None if label is None else _labels(net, label, num)
        with tqdm(total=num, unit="sample") as bar:
            file = sample_to(
                out, made, num, shape=tuple(net.shape), labels=labels, chunk=chunk, seed=seed,
                kind=kind,  # type: ignore[arg-type]  # `sample_to` refuses others
                on_chunk=lambda done: bar.update(done - bar.n), device=device, **how,
            )  # fmt: skip
    except KeyboardInterrupt:
        raise SystemExit(f"sdeflow sample: interrupted; the same command goes on from what is in {out}") from None
    except (ArithmeticError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise SystemExit(f"sdeflow sample: {error}") from error
    print(f"wrote {file}")


def _options(
    solver: str, steps: int | None, eta: float, grid: str | None, rtol: float | None, final: str, dtype: str
) -> dict[str, Any]:
    import torch

    how: dict[str, Any] = {"steps": steps, "eta": eta, "rtol": rtol, "final": final}
    if dtype not in ("float32", "float64"):
        raise ValueError(f"expected dtype float32 or float64, got {dtype!r}")
    how["dtype"] = getattr(torch, dtype)
    if grid is not None:
        if grid not in GRIDS:
            raise ValueError(f"unknown grid {grid!r}: expected one of {', '.join(GRIDS)}")
        how["grid"] = GRIDS[grid]
    if solver == "auto":
        how["solver"] = "auto"
        if steps is None and rtol is None:
            how["steps"] = 20
    elif solver.endswith(".json"):
        how["solver"] = Plan.load(solver)
    elif solver in METHODS and METHODS[solver].plan is None:
        how["solver"] = METHODS[solver].make()
    else:
        raise ValueError(f"unknown solver {solver!r}: see sdeflow solvers")
    return how


def _labels(net: Any, label: int, num: int) -> Any:
    import torch

    classes = getattr(net, "classes", 0)
    if not classes:
        raise ValueError("this model takes no labels: train one with sdeflow train DATA --labels")
    if not 0 <= label < classes:
        raise ValueError(f"expected a label from 0 to {classes - 1}, got {label}")
    return torch.full((num,), label)
