"""Denoising score matching: regression on the noise, the data, or the score of the kernel that made x_t.

Denoising score matching draws x_t = alpha x_0 + sigma eps and asks a network for a row (a, b) of the
table of `sdeflow.model`:

    L(x_0, t, eps) = mean over components of (row(x_t, t) - (a x_0 + b eps))^2.

Its minimiser is the conditional mean of that row given x_t, from which the score follows
(Vincent 2011, A connection between score matching and denoising autoencoders, section 4). The rows'
losses differ by a function of t alone: the square of `conversion`'s factor q.

The same holds for any kernel p(x_t | x_0): the conditional mean of grad log p(x_t | x_0) given x_t is the score.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdeflow.checked import checked
from sdeflow.gaussian import GaussianSDE
from sdeflow.linear import LinearSDE
from sdeflow.losses.weights import Weight, weight_at
from sdeflow.model import Model, row_of
from sdeflow.pushforward import Pushforward
from sdeflow.sde import SDE
from sdeflow.times import Time, align

AnyWeight = Weight | Callable[[Any, Tensor], Tensor]
"""A `Weight`, converted to the prediction of the loss, or a function (process, t) of that very loss."""


@checked
def denoising(
    model: Model, x0: Tensor, t: Time, eps: Tensor, as_: str | None = None, *, weight: AnyWeight | None = None
) -> Tensor:
    """The denoising loss of each sample (batch,), in the prediction `as_` (the model's own unless given).

    Args:
        model: a `Model` of a GaussianSDE; evaluated once.
        x0: data (batch, *event).
        t: one time, or one a sample (batch,).
        eps: standard normals of the shape of x0.
        weight: a `Weight`, or a function (process, t) -> w of the loss in `as_`; None for 1.

    Raises:
        ValueError: unknown prediction, shapes that do not fit, or a weight that is not finite and >= 0.
    """
    as_ = model.prediction if as_ is None else as_
    process, t = model.gaussian, align(t, x0)
    x = process.perturb(x0, t, eps)  # first: it refuses shapes that do not fit
    a, b = row_of(as_, process, t)
    target = a.to(x0.dtype) * x0 + b.to(x0.dtype) * eps
    error = model(x, t, as_) - target
    return weighted_mean(error.square(), weight, process, t, as_)


@checked
def flow_matching(model: Model, x0: Tensor, t: Time, eps: Tensor, *, weight: AnyWeight | None = None) -> Tensor:
    """Conditional flow matching, |u(x_t, t) - (alpha' x_0 + sigma' eps)|^2: `denoising` in "velocity"; (batch,).

    (Lipman et al. 2023, Flow matching, equation 9 and theorem 2; their clock runs from noise to data, so that their
    velocity is minus this one.) It is noise prediction with the weight `loss_ratio(process, t, "eps", "velocity")`.
    Arguments and errors as `denoising`.
    """
    return denoising(model, x0, t, eps, "velocity", weight=weight)


@checked
def kernel_matching(model: Model, x: Tensor, t: Time, target: Tensor, *, weight: AnyWeight | None = None) -> Tensor:
    """mean over components of (s(x_t, t) - target)^2, (batch,): denoising score matching with any kernel.

    Its minimiser is E[target | x_t], the score of p_t where target = grad log p(x_t | x_0) with x_0 a draw of the
    data and x_t one of the kernel (Vincent 2011, section 4): see `kernel_score`.

    Args:
        model: a `Model` of any SDE; its score is evaluated once.
        x: draws of x_t (batch, *event).
        t: one time, or one a sample (batch,).
        target: of the shape of x; no gradient flows into it.
        weight: a function (process, t) -> w, or a `Weight` for a GaussianSDE; None for 1.

    Raises:
        ValueError: shapes that do not fit, or a weight that is not finite and >= 0.
    """
    if not x.is_floating_point():
        raise TypeError(f"expected x as floating-point states (batch, *event), got {x.dtype}")
    if target.shape != x.shape:
        raise ValueError(f"expected target of the shape of x, {tuple(x.shape)}, got {tuple(target.shape)}")
    t = align(t, x)
    error = model.score(x, t) - target.detach().to(x.dtype)
    return weighted_mean(error.square(), weight, model.sde, t, "score")


@checked
def kernel_score(process: SDE, x: Tensor, t: Time, x0: Tensor) -> Tensor:
    """grad_x log p(x_t = x | x_0), of the shape and dtype of x: the target of `kernel_matching`.

        GaussianSDE: -(x - alpha x_0)/sigma^2 = -eps/sigma
        LinearSDE:   -L^-T L^-1 (x - mean) = -L^-T eps, L L^T the covariance of the kernel
        Pushforward: its `target`;   a process with `log_kernel` (`KernelSDE`): the gradient of that, by autodiff

    Args:
        x: states (batch, *event).
        t: one time above t0, or one a sample (batch,).
        x0: data of the shape of x.

    Raises:
        ValueError: shapes that do not fit, or a kernel without a density (sigma = 0, a singular covariance).
        TypeError: the process has no known kernel: use `implicit` or `sliced` score matching, which need none.
    """
    if x0.shape != x.shape:
        raise ValueError(f"expected x0 of the shape of x, {tuple(x.shape)}, got {tuple(x0.shape)}")
    time = align(t, x)
    if isinstance(process, GaussianSDE):
        # float64: the difference of x and its mean loses digits next to the data
        mean, std = process.marginal(x0.to(torch.float64), time)
        _need_noise(std, time)
        return (-(x.to(torch.float64) - mean) / std**2).to(x.dtype)
    if isinstance(process, LinearSDE):
        mean, factor = process.marginal(x0.to(torch.float64), time)
        _need_noise(torch.diagonal(factor, dim1=-2, dim2=-1), time)
        rest = (x.to(torch.float64) - mean).reshape(len(x), process.k, -1)
        eps = torch.linalg.solve_triangular(factor, rest, upper=False)
        return -torch.linalg.solve_triangular(factor.mT, eps, upper=True).reshape(x.shape).to(x.dtype)
    if isinstance(process, Pushforward):
        return process.target(x, time, x0).to(x.dtype)
    log_kernel = getattr(process, "log_kernel", None)
    if log_kernel is None:
        raise TypeError(f"{process!r} has no known kernel: use implicit or sliced score matching")
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.detach().clone().to(torch.float64).requires_grad_()
        (slope,) = torch.autograd.grad(log_kernel(leaf, time.clone(), x0.detach().clone()).sum(), leaf)
    return slope.to(x.dtype)


def _need_noise(std: Tensor, t: Tensor) -> None:
    if std.device.type == "cpu" and not bool((std > 0).all()):
        raise ValueError(f"the kernel has no density at t = {float(t.min()):g}: expected times with noise")


def weighted_mean(square: Tensor, weight: AnyWeight | None, sde: SDE, t: Tensor, prediction: str) -> Tensor:
    """The weighted mean over components, (batch,)."""
    if weight is not None:
        # (batch, 1, ..., 1) or 0-d as t is
        square = weight_at(weight, sde, t, prediction).to(device=square.device, dtype=square.dtype) * square
    return square.flatten(1).mean(1)
