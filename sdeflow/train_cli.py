"""`sdeflow train`: a small network, the same weights however the run was broken off."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from sdeflow.checkpoints import save_model, write_atomically
from sdeflow.cli_options import (
    AsJson,
    Device,
    Seed,
    Threads,
    check_folder,
    complete_data,
    device_named,
    progress_shown,
)
from sdeflow.cli_outcome import running, say_json
from sdeflow.data import DATASETS, load
from sdeflow.model import Model
from sdeflow.names import nearest
from sdeflow.run_state import remove_unfinished, steps_kept
from sdeflow.training import train, untrained


def train_command(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help=f"What to train on: {', '.join(DATASETS)}, an array file (.npy, .npz, .safetensors) or a folder of "
            "images.",
            autocompletion=complete_data,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for model.safetensors and train.jsonl.")],
    steps: Annotated[int, typer.Option(help="Number of batches.", min=1)] = 8_000,
    batch: Annotated[int, typer.Option(help="Samples a batch.", min=1)] = 256,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 3e-3,
    seed: Seed = 0,
    threads: Threads = 1,
    labels: Annotated[bool, typer.Option("--labels", help="Train on the data's labels too, for guidance.")] = False,
    net: Annotated[str, typer.Option(help="mlp, or unet for images.")] = "mlp",
    width: Annotated[int | None, typer.Option(help="Of the network; its default unless given.", min=8)] = None,
    precision: Annotated[
        str, typer.Option("--precision", "--dtype", help="float32 or bfloat16 (autocast).")
    ] = "float32",
    save_every: Annotated[
        int, typer.Option(help="Steps between states kept for going on, a multiple of 50.", min=1)
    ] = 500,
    device: Device = "cpu",
    as_json: AsJson = False,
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
    command += f" --device {device}" if device != "cpu" else ""
    rank = int(os.environ.get("RANK", "0"))
    run = out / ("run.safetensors" if rank == 0 else f"run.safetensors.{rank}")
    log, file = out / "train.jsonl", out / "model.safetensors"
    kind: Any = precision

    def write(rows: list[dict[str, float]]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(log, "".join(json.dumps(row) + "\n" for row in rows).encode())

    began = time.perf_counter()
    with running(context, lambda: _kept(run), as_json=as_json, quiet=rank != 0) as stop:
        check_folder(out)
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f'expected precision "float32" or "bfloat16", got {precision!r}')
        if save_every % 50:
            raise ValueError(
                f"expected --save-every as a multiple of 50, the steps of a row of {log.name}, got {save_every}"
            )
        where = _own_device(device)
        torch.set_num_threads(threads)
        images, known = _loaded(data)
        if labels and known is None:
            raise ValueError(f"{data} has no labels")
        classes = int(known.max()) + 1 if labels and known is not None else 0
        model = _on(where, untrained(tuple(images.shape[1:]), seed=seed, classes=classes, net=net, width=width))
        own_labels = known.to(where) if labels and known is not None else None
        if rank == 0 and run.is_file():
            print(f"going on after step {steps_kept(run)}, from {run}", file=sys.stderr)
        with stop.at_step_ends("" if rank else "sdeflow train: stopping after this step"):
            model, history = train(
                model, images.to(where), labels=own_labels, steps=steps, batch=batch, lr=lr, seed=seed, precision=kind,
                save=out / "run.safetensors", save_every=save_every, on_row=write, stop=stop.asked,
                progress=progress_shown(),
            )  # fmt: skip
        loss = history[-1]["loss"]
        if rank == 0:
            write(history)
            save_model(file, model, command=command, data=data, seed=seed, loss=loss)
            remove_unfinished(log, file)
        run.unlink(missing_ok=True)
        remove_unfinished(run)
    if rank != 0:
        return
    if as_json:
        seconds = round(time.perf_counter() - began, 3)
        say_json({"loss": loss, "steps": steps, "file": str(file), "log": str(log), "seconds": seconds})
    else:
        print(f"loss {loss:.4f} after {steps} steps; wrote {file}")


def _kept(run: Path) -> str:
    """What there is of a run that was broken off."""
    step = steps_kept(run)
    if not step:
        return "nothing was kept yet; to start anew: {again}"
    same = "under torchrun as before: " if "WORLD_SIZE" in os.environ else ""
    return f"the state after step {step} is in {run}; to go on: {same}{{again}}"


def _own_device(text: str) -> torch.device:
    """The device; under torchrun, of several the one of this process."""
    local = os.environ.get("LOCAL_RANK")
    return device_named(f"{text}:{local}" if text == "cuda" and local is not None else text)


def _on(device: torch.device, model: Model) -> Model:
    net: Any = model.net
    net.to(device)
    return model


def _loaded(data: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The data, or an error with the nearest name."""
    near = [] if data in DATASETS or Path(data).exists() else nearest(data, DATASETS)
    if near:
        raise ValueError(
            f"no data {data!r} (did you mean {' or '.join(near)}?): expected {', '.join(DATASETS)}, an array file or "
            "a folder of images"
        )
    return load(data)
