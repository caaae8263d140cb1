"""The command line: `app` is the entry point `sdeflow`, each command a function registered on it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated, Any

import torch

from sdeflow.checkpoints import save_model, write_atomically
from sdeflow.data import DATASETS, load
from sdeflow.solvers import CATALOGUE
from sdeflow.training import train, untrained

try:
    import typer
    from rich import box
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f'the command line needs its extra: pip install "sdeflow[cli]" ({error})') from error

from sdeflow.bench.cli import bench_command, report_command
from sdeflow.sample_cli import sample_command
from sdeflow.testing.cli import check_command
from sdeflow.tuning.cli import tune_command

app = typer.Typer(
    help="SDE and ODE solvers with a diffusion front end.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def main() -> None:
    """SDE and ODE solvers with a diffusion front end."""


@app.command("train", epilog="Example: sdeflow train digits --out runs/digits")
def train_command(
    data: Annotated[
        str,
        typer.Argument(
            help=f"What to train on: {', '.join(DATASETS)}, an array file (.npy, .npz, .safetensors) or a folder of "
            "images."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for model.safetensors and train.jsonl.", file_okay=False)],
    steps: Annotated[int, typer.Option(help="Number of batches.", min=1)] = 8_000,
    batch: Annotated[int, typer.Option(help="Samples a batch.", min=1)] = 256,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Of the first weights, the batches, times and noise.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads; one is best for the small default network.", min=1)] = 1,
    labels: Annotated[bool, typer.Option("--labels", help="Train on the data's labels too, for guidance.")] = False,
    net: Annotated[str, typer.Option(help="mlp, or unet for images.")] = "mlp",
    width: Annotated[int | None, typer.Option(help="Of the network; its default unless given.", min=8)] = None,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16 (autocast).")] = "float32",
    save_every: Annotated[int, typer.Option(help="Steps between states kept for going on.", min=1)] = 500,
) -> None:
    """Train a small network on DATA and write it to the folder OUT.

    The same command on the same machine gives the same weights, also if it was broken off and given again: it goes on
    from OUT/run.safetensors. Under torchrun each process takes its share of every batch.
    """
    command = (
        f"sdeflow train {data} --out DIR --steps {steps} --batch {batch} --lr {lr:g} --seed {seed} --threads {threads}"
    )
    for flag, given in (("--labels", labels), ("--net unet", net == "unet"), (f"--width {width}", width is not None)):
        command += f" {flag}" if given else ""
    command += f" --precision {precision}" if precision != "float32" else ""
    torch.set_num_threads(threads)
    run = out / "run.safetensors"
    kind: Any = precision  # `train` refuses what it does not know

    def write(rows: list[dict[str, float]]) -> None:
        write_atomically(out / "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())

    try:
        images, known = load(data)
        if labels and known is None:
            raise ValueError(f"{data} has no labels")
        classes = int(known.max()) + 1 if labels and known is not None else 0
        model = untrained(tuple(images.shape[1:]), seed=seed, classes=classes, net=net, width=width)
        out.mkdir(parents=True, exist_ok=True)
        model, history = train(
            model, images, labels=known if labels else None, steps=steps, batch=batch, lr=lr, seed=seed,
            precision=kind, save=run, save_every=save_every, on_row=write, progress=True,
        )  # fmt: skip
        if int(os.environ.get("RANK", "0")) == 0:
            write(history)
            loss = history[-1]["loss"]
            save_model(out / "model.safetensors", model, command=command, data=data, seed=seed, loss=loss)
            print(f"loss {loss:.4f} after {steps} steps; wrote {out / 'model.safetensors'}")
        run.with_name(f"{run.name}.{os.environ['RANK']}" if os.environ.get("RANK", "0") != "0" else run.name).unlink(
            missing_ok=True
        )
    except KeyboardInterrupt:
        state = f"the state is in {run}: give the same command to go on" if run.exists() else "no state was kept yet"
        raise SystemExit(f"sdeflow train: interrupted; {state}") from None
    except (ArithmeticError, ImportError, OSError, ValueError) as error:
        raise SystemExit(f"sdeflow train: {error}") from error


@app.command("solvers", epilog="Example: sdeflow solvers --json")
def solvers_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the solvers: orders, model calls a step, and where they come from."""
    if as_json:
        columns = [field.name for field in dataclasses.fields(CATALOGUE[0]) if field.name != "make"]
        print(json.dumps([{name: getattr(row, name) for name in columns} for row in CATALOGUE], indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("solver", no_wrap=True)
    for name in ("order", "strong", "weak", "NFE/step", "view", "reference"):
        table.add_column(name)
    for row in CATALOGUE:
        numbers = ("" if value is None else str(value) for value in (row.order, row.strong_order, row.weak_order))
        kind = f"{row.view}, adaptive" if row.adaptive else row.view
        table.add_row(row.name, *numbers, str(row.nfe_per_step), kind, row.reference)
    Console().print(table)


app.command("bench", epilog="Example: sdeflow bench --suite quick --out results/quick")(bench_command)
app.command("report", epilog="Example: sdeflow report a/results.jsonl b/results.jsonl --out compared.html")(
    report_command
)
app.command("check", epilog="Example: sdeflow check my_process.py:DoubleWell --emit-tests tests/test_my_process.py")(
    check_command
)
app.command("tune", epilog="Example: sdeflow tune digits --steps 10 --out results/digits-10.json")(tune_command)
app.command("sample", epilog="Example: sdeflow sample digits --num 100 --steps 10 --out results/samples")(
    sample_command
)
