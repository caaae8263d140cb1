"""Training: AdamW on the denoising loss, and an average of the weights that is what gets sampled.

`sdeflow train digits --out DIR` is `train(untrained((1, 8, 8)), digits()[0])` with the defaults below. Under
`torchrun` each process takes its share of every batch, and gradients are averaged (through Accelerate).
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sdeflow.gaussian import GaussianSDE
from sdeflow.losses import denoising, stratified_times
from sdeflow.model import Model
from sdeflow.nets import MLP, UNet
from sdeflow.processes import VP
from sdeflow.run_state import RunState, fingerprint

_WARM_UP = 100
"""Steps over which the learning rate rises from 0; the cosine then takes it back to 0."""


Loss = Callable[[Model, Tensor, Tensor, Tensor], Tensor]
"""`loss(model, x0, t, eps)`: one value a sample, such as `sdeflow.losses.denoising`."""

Times = Callable[[GaussianSDE, int], Tensor | tuple[Tensor, Tensor]]
"""`times(process, n)`: n times, float64, or (times, weights) with weights (n,) that multiply the losses.

If it has a method `update`, it is told the losses (n,) of the times that it drew last, before their weights, as
`sdeflow.losses.ImportanceTimes` needs them.
"""


def untrained(
    shape: tuple[int, ...], *, seed: int = 0, classes: int = 0, net: str = "mlp", width: int | None = None
) -> Model:
    """An `MLP` (or a `UNet`) for samples of `shape` that predicts v under VP, with weights drawn from `seed`.

    v = alpha eps - sigma x_0 is well conditioned at both ends of time. With `classes` it takes labels.

    Raises:
        ValueError: another network than "mlp" and "unet", or sizes that do not fit it.
    """
    if net not in ("mlp", "unet"):
        raise ValueError(f"expected the network mlp or unet, got {net!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: nn.Module
        if net == "mlp":
            made = MLP(shape, classes=classes) if width is None else MLP(shape, classes=classes, width=width)
        else:
            made = UNet(shape, classes=classes) if width is None else UNet(shape, classes=classes, width=width)
        return Model(made, VP(), "v", "lam")


def train(
    model: Model,
    data: Tensor,
    *,
    steps: int = 8000,
    batch: int = 256,
    lr: float = 3e-3,
    weight_decay: float = 0.01,
    ema: float = 0.999,
    clip: float = 1.0,
    seed: int = 0,
    labels: Tensor | None = None,
    label_dropout: float = 0.1,
    loss: Loss = denoising,
    times: Times = stratified_times,
    precision: Literal["float32", "bfloat16"] = "float32",
    save: str | Path | None = None,
    save_every: int = 500,
    log_every: int = 50,
    on_row: Callable[[list[dict[str, float]]], None] | None = None,
    stop: Callable[[], bool] | None = None,
    progress: bool = False,
) -> tuple[Model, list[dict[str, float]]]:
    """Train a copy of `model` on `data`; the same arguments give the same weights on one machine.

    The loss is `sdeflow.losses.denoising` in the model's own prediction unless given. The average of the weights
    has decay min(ema, (1 + k)/(10 + k)) at step k, so that the first weights are soon forgotten.

    Args:
        model: its network is an `nn.Module` and stays as it is.
        data: (n, *event), in the dtype and on the device of the network.
        steps: number of batches.
        batch: samples a batch, drawn with replacement.
        lr: the highest learning rate.
        weight_decay: of AdamW.
        ema: decay of the average of the weights; 0 for no average.
        clip: largest norm of the gradient.
        seed: of the batches, times and noise, and of anything random in the network.
        labels: int64 (n,), of the data, passed to the network as `label`.
        label_dropout: the share of labels that are replaced by the network's `classes`, which stands for none: what
            classifier-free guidance takes as unconditional (Ho and Salimans 2021, section 3.2).
        loss: of each sample, `loss(model, x0, t, eps)`.
        times: the process and n -> n times, float64, or (times, weights): see `Times`. The loss of a row of the
            history is then the weighted one.
        precision: of the network's products: "bfloat16" runs it under autocast, weights and sums stay as they are.
        save: a file that the whole state of the run is written to, every `save_every` steps (a multiple of
            `log_every`). If there is one, the run goes on from it: the weights at the end are
            those of a run without a break, bit by bit on a CPU. Not with times that have an `update`: what they
            have been told is not in the file.
        log_every: steps that a row of the history averages.
        on_row: called with the history so far after each new row.
        stop: asked after each step but the last; if it says so, in any of the processes, the run ends there, with its
            state in `save`, if that is given.
        progress: show a progress bar (needs tqdm).

    Returns:
        (trained, history): the model with averaged weights, in evaluation mode and without gradients of its
        weights, and one row {"step", "loss", "grad_norm", "lr"} every `log_every` steps and at the end.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        FloatingPointError: the loss became infinite or NaN.
        KeyboardInterrupt: `stop` said so.
    """
    if not isinstance(model, Model) or not isinstance(model.net, nn.Module):
        raise TypeError(f"expected a Model of an nn.Module, got {model!r}")
    if model.conditions:
        raise ValueError(f"expected a model without bound conditions, got {', '.join(model.conditions)}")
    _check(model.net, data, steps=steps, batch=batch, log_every=log_every, lr=lr, clip=clip, ema=ema)
    _check_labels(model.net, data, labels, label_dropout)
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f'expected precision "float32" or "bfloat16", got {precision!r}')
    if save is not None and (save_every < 1 or save_every % log_every):
        raise ValueError(f"expected save_every as a multiple of log_every = {log_every}, got {save_every!r}")
    if save is not None and hasattr(times, "update"):
        raise ValueError("times that are told the losses cannot be taken up again: expected no file to save to")
    net = copy.deepcopy(model.net).train().requires_grad_()
    average = AveragedModel(net, multi_avg_fn=_warm_average(ema))
    parameters = list(net.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    ranks = _Ranks.of(data.device, batch)
    shared = ranks.prepared(net)
    learner = _with_net(model, shared)
    made_of = fingerprint(
        model, data, labels, steps=steps, batch=batch, lr=lr, weight_decay=weight_decay, ema=ema, clip=clip, seed=seed,
        label_dropout=label_dropout, precision=precision, log_every=log_every, ranks=ranks.count,
        device=data.device.type,
    )  # fmt: skip
    state = RunState(net, average, optimiser, made_of, None if save is None else ranks.own_file(Path(save)))
    history: list[dict[str, float]] = []
    values: list[Tensor] = []
    norms: list[Tensor] = []
    with _seeded(seed + 7919 * ranks.rank, data.device):
        done = state.resume(history, values, norms)
        bar = _counted(steps, progress and ranks.rank == 0, done)
        try:
            for k in bar:
                optimiser.param_groups[0]["lr"] = rate = lr * _share(k, steps)
                value = _step_loss(learner, data, labels, label_dropout, ranks.share, times, loss, precision)
                optimiser.zero_grad()
                value.backward()
                norms.append(nn.utils.clip_grad_norm_(parameters, clip))
                optimiser.step()
                average.update_parameters(net)
                values.append(value.detach())
                if k % log_every == 0 or k == steps:
                    row = {"step": k, "loss": ranks.mean(_mean(values)), "grad_norm": _mean(norms), "lr": rate}
                    if not math.isfinite(row["loss"]):
                        raise FloatingPointError(
                            f"the loss became {row['loss']} in steps {k - len(values) + 1} to {k}: try a lower lr"
                        )
                    history.append(row)
                    values, norms = [], []
                    if on_row is not None and ranks.rank == 0:
                        on_row(history)
                    if progress and ranks.rank == 0:
                        bar.set_postfix(loss=f"{row['loss']:.4f}")
                    if save is not None and k % save_every == 0:
                        state.write(k, history)
                if stop is not None and k < steps and ranks.any(stop()):
                    if save is not None:
                        state.write(k, history, values, norms)
                    raise KeyboardInterrupt(f"stopped after step {k}")
        finally:
            ranks.close()
    return _with_net(model, average.module.eval().requires_grad_(False)), history


def _step_loss(
    learner: Model,
    data: Tensor,
    labels: Tensor | None,
    label_dropout: float,
    batch: int,
    times: Times,
    loss: Loss,
    precision: str,
) -> Tensor:
    """The mean loss of a fresh batch, weighted if the times have weights."""
    rows = torch.randint(data.shape[0], (batch,), device=data.device)
    x0 = data[rows]
    drawn = times(learner.gaussian, batch)
    t, weights = drawn if isinstance(drawn, tuple) else (drawn, None)
    t = t.to(data.device)
    eps = torch.randn_like(x0)
    if labels is not None:
        label = labels[rows]
        none: Any = learner.net
        none = getattr(none, "module", none).classes
        dropped = torch.rand(batch, device=data.device) < label_dropout
        learner = learner.bind(label=torch.where(dropped, none, label))
    context = torch.autocast(data.device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()
    with context:
        losses = loss(learner, x0, t, eps)
        update = getattr(times, "update", None)
        if update is not None:
            update(losses.detach())
        if weights is None:
            return losses.mean()
        if weights.shape != losses.shape:
            raise ValueError(f"expected one weight a time, {tuple(losses.shape)}, got {tuple(weights.shape)}")
        return (weights.to(losses) * losses).mean()


class _Ranks:
    """The processes that train together: one, or those that torchrun started."""

    def __init__(self, accelerator: Any, batch: int) -> None:
        self._accelerator = accelerator
        self.count = 1 if accelerator is None else int(accelerator.num_processes)
        self.rank = 0 if accelerator is None else int(accelerator.process_index)
        if batch % self.count:
            raise ValueError(f"expected a batch that {self.count} processes can share, got {batch}")
        self.share = batch // self.count

    @staticmethod
    def of(device: torch.device, batch: int) -> _Ranks:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return _Ranks(None, batch)
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise ImportError('training by several processes needs Accelerate: pip install "sdeflow[train]"') from error
        return _Ranks(Accelerator(cpu=device.type == "cpu"), batch)

    def prepared(self, net: nn.Module) -> nn.Module:
        """The network whose gradients are averaged over the processes."""
        return net if self._accelerator is None else self._accelerator.prepare_model(net)

    def mean(self, value: float) -> float:
        """The mean of a number over the processes."""
        if self._accelerator is None:
            return value
        return float(self._accelerator.reduce(torch.tensor(value), reduction="mean"))

    def any(self, flag: bool) -> bool:
        """Whether it is true in one of the processes: they must stop after the same step."""
        if self._accelerator is None:
            return flag
        own = torch.tensor(float(flag), device=self._accelerator.device)
        return bool(self._accelerator.reduce(own, reduction="sum") > 0)

    def own_file(self, path: Path) -> Path:
        """Where this process keeps its state: the random numbers are its own."""
        return path if self.rank == 0 else path.with_name(f"{path.name}.{self.rank}")

    def close(self) -> None:
        """Leave the group."""
        if self._accelerator is not None:
            self._accelerator.end_training()


def _check_labels(net: nn.Module, data: Tensor, labels: Tensor | None, dropout: float) -> None:
    if labels is None:
        return
    classes: Any = getattr(net, "classes", 0)
    if not classes:
        raise ValueError("labels need a network that takes them: MLP(..., classes=10), for instance")
    if labels.dtype != torch.int64 or labels.shape != data.shape[:1]:
        raise ValueError(f"expected int64 labels ({len(data)},), got {labels.dtype} of shape {tuple(labels.shape)}")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(f"expected labels from 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"expected label_dropout in [0, 1], got {dropout!r}")


def _share(k: int, steps: int) -> float:
    """The share of the highest learning rate at step k: a linear rise, then half a cosine."""
    rise = min(_WARM_UP, steps // 10)
    if k <= rise:
        return k / rise
    return 0.5 * (1 + math.cos(math.pi * (k - rise) / (steps - rise + 1)))


def _warm_average(decay: float) -> Callable[..., None]:
    @torch.no_grad()
    def update(averaged: Iterable[Tensor], current: Iterable[Tensor], count: Tensor | int) -> None:
        k = float(count)
        weight = 1 - min(decay, (1 + k) / (10 + k))
        for mean, new in zip(averaged, current, strict=True):
            mean.lerp_(new, weight)

    return update


def _with_net(model: Model, net: nn.Module) -> Model:
    return Model(net, model.gaussian, model.prediction, model.time, expand=model.expand)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's global generators started from `seed`, and put back at the end."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _counted(steps: int, progress: bool, done: int = 0) -> Any:
    """done + 1..steps, shown as a progress bar if wanted."""
    if not progress:
        return range(done + 1, steps + 1)
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from error
    return tqdm(range(done + 1, steps + 1), unit="step", initial=done, total=steps)


def _mean(values: Sequence[Tensor]) -> float:
    return float(torch.stack(list(values)).mean())


def _check(net: nn.Module, data: Tensor, lr: float, clip: float, ema: float, **counts: int) -> None:
    like = next(net.parameters(), None)
    if like is None:
        raise ValueError("expected a network with parameters: there is nothing to train")
    if not isinstance(data, Tensor) or data.ndim < 2 or data.shape[0] < 1:
        got = tuple(data.shape) if isinstance(data, Tensor) else type(data).__name__
        raise ValueError(f"expected data of shape (n, *event), got {got}")
    if data.dtype != like.dtype or data.device != like.device:
        raise ValueError(
            f"expected data as the network is, {like.dtype} on {like.device}, got {data.dtype} on {data.device}"
        )
    if not bool(torch.isfinite(data).all()):
        raise ValueError("expected finite data")
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"expected {name} >= 1, got {count!r}")
    if not (lr > 0 and clip > 0 and 0 <= ema < 1):
        raise ValueError(f"expected lr > 0, clip > 0 and ema in [0, 1), got {lr!r}, {clip!r} and {ema!r}")
