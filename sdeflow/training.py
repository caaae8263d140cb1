"""Training: AdamW on the denoising loss, and an average of the weights that is what gets sampled.

`sdeflow train digits --out DIR` is `train(untrained((1, 8, 8)), digits()[0])` with the defaults below.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sdeflow.gaussian import GaussianSDE
from sdeflow.losses import denoising, stratified_times
from sdeflow.model import Model
from sdeflow.nets import MLP
from sdeflow.processes import VP

_WARM_UP = 100
"""Steps over which the learning rate rises from 0; the cosine then takes it back to 0."""


def untrained(shape: tuple[int, ...], *, seed: int = 0) -> Model:
    """An `MLP` for samples of `shape` that predicts v under VP, with weights drawn from `seed`.

    v = alpha eps - sigma x_0 is well conditioned at both ends of time.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(MLP(shape), VP(), "v", "lam")


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
    times: Callable[[GaussianSDE, int], Tensor] = stratified_times,
    log_every: int = 50,
    progress: bool = False,
) -> tuple[Model, list[dict[str, float]]]:
    """Train a copy of `model` on `data`; the same arguments give the same weights on one machine.

    The loss is `sdeflow.losses.denoising` in the model's own prediction. The average of the weights
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
        times: the process and n -> n times, float64.
        log_every: steps that a row of the history averages.
        progress: show a progress bar (needs tqdm).

    Returns:
        (trained, history): the model with averaged weights, in evaluation mode and without gradients of its
        weights, and one row {"step", "loss", "grad_norm", "lr"} every `log_every` steps and at the end.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        FloatingPointError: the loss became infinite or NaN.
    """
    if not isinstance(model, Model) or not isinstance(model.net, nn.Module):
        raise TypeError(f"expected a Model of an nn.Module, got {model!r}")
    if model.conditions:
        raise ValueError(f"expected a model without bound conditions, got {', '.join(model.conditions)}")
    _check(model.net, data, steps=steps, batch=batch, log_every=log_every, lr=lr, clip=clip, ema=ema)
    net = copy.deepcopy(model.net).train().requires_grad_()
    average = AveragedModel(net, multi_avg_fn=_warm_average(ema))
    learner = _with_net(model, net)
    parameters = list(net.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    history: list[dict[str, float]] = []
    losses: list[Tensor] = []
    norms: list[Tensor] = []
    with _seeded(seed, data.device):
        bar = _counted(steps, progress)
        for k in bar:
            optimiser.param_groups[0]["lr"] = rate = lr * _share(k, steps)
            x0 = data[torch.randint(data.shape[0], (batch,), device=data.device)]
            t = times(learner.gaussian, batch).to(data.device)
            loss = denoising(learner, x0, t, torch.randn_like(x0)).mean()
            optimiser.zero_grad()
            loss.backward()
            norms.append(nn.utils.clip_grad_norm_(parameters, clip))
            optimiser.step()
            average.update_parameters(net)
            losses.append(loss.detach())
            if k % log_every == 0 or k == steps:
                row = {"step": k, "loss": _mean(losses), "grad_norm": _mean(norms), "lr": rate}
                if not math.isfinite(row["loss"]):
                    raise FloatingPointError(
                        f"the loss became {row['loss']} in steps {k - len(losses) + 1} to {k}: try a lower lr"
                    )
                history.append(row)
                losses, norms = [], []
                if progress:
                    bar.set_postfix(loss=f"{row['loss']:.4f}")
    return _with_net(model, average.module.eval().requires_grad_(False)), history


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


def _counted(steps: int, progress: bool) -> Any:
    """1..steps, shown as a progress bar if wanted."""
    if not progress:
        return range(1, steps + 1)
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from error
    return tqdm(range(1, steps + 1), unit="step")


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
