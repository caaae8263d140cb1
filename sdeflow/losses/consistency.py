"""Consistency training and distillation: one function for all states of a path of the probability flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from sdeflow.checked import checked
from sdeflow.gaussian import GaussianSDE
from sdeflow.losses.matching import AnyWeight, weighted_mean
from sdeflow.losses.nodes import bound_teacher, check_span, check_teacher, falling, step_of
from sdeflow.losses.progressive import NodeLoss
from sdeflow.model import Model
from sdeflow.times import Time, align

Gap = Literal["level", "angle"]


_LARGEST_HUBER = 1e6
"""Beyond it, sqrt(d + c^2) - c is rounding in float32, and d/(2 c) what is meant."""


@checked
def consistency(
    grid: Tensor | Sequence[float],
    *,
    teacher: Model | None = None,
    order: Literal[1, 2] = 1,
    huber: float | None = None,
    gap: Gap | None = None,
    weight: AnyWeight | None = None,
) -> NodeLoss:
    """The loss of a consistency model f = `model.x0`: f at a node t and at the next, s < t, are to be the same.

        d(f(x_t, t), stop-gradient of f(x_s, s)),   x_t = alpha x_0 + sigma eps.

    Without a teacher x_s has the same x_0 and eps: consistency training (Song et al. 2023, Consistency models,
    algorithm 3; with the network itself, not an average, on the side of s: Song and Dhariwal 2024, Improved techniques
    for training consistency models). With one, x_s is a step of its flow from x_t: consistency distillation (Song et
    al. 2023, algorithm 2), which needs no x_0 but to draw x_t.

    f(x, t) = x at sigma = 0 has to hold by itself. It does where the network predicts v under a variance-preserving
    process, eps, the velocity of a rectified flow, or is preconditioned as in EDM; it does not for a plain prediction
    of x_0. At the last node of the grid f is not evaluated: the target is x_s/alpha_s. A grid down to t0 thus trains
    the whole of f; one that ends at t_min trains the map to t_min, whose noise is left in the samples.

    The step of the teacher goes by the angle theta = atan(sigma/alpha) in z = x/sqrt(alpha^2 + sigma^2), whose slope is
    v = cos(theta) eps - sin(theta) x_0, and so is defined at alpha = 0 and ends at sigma = 0:

        order 1:  z_s = cos(h) z + sin(h) v(z, theta),   h = theta_s - theta      (DDIM)
        order 2:  z_s = z + 2 sin(h/2) v(z_m, theta + h/2),   z_m a step h/2 of order 1.

    Both are exact for constant x_0 and eps. Local errors are O(h^2) and O(h^3), the latter O(h^4) for Gaussian data.

    Args:
        grid: falling times (steps + 1,). A curriculum is one call of `train` a grid, finer each time.
        teacher: a `Model` of the student's process, of whose flow the student learns the map; conditions that the
            student is bound to are passed to it.
        order: of the teacher's step: 1 or 2 calls of it.
        huber: c of the distance d = sqrt(mean square + c^2) - c (Song and Dhariwal 2024: c = 0.00054 of this mean);
            None for the mean square itself.
        gap: divide by the step's length: "level" in sigma/alpha (Song and Dhariwal 2024), "angle" in the angle, which
            is the same near the data and finite at alpha = 0. None for 1.
        weight: besides, a `Weight` made for squared errors of "x0", or a function (process, t) -> w; None for 1.

    Returns:
        loss(model, x0, t, eps) -> (batch,), for `train(loss=, times=grid_times(grid))`.

    Raises:
        ValueError, TypeError: arguments that do not fit; from the loss: another process than the teacher's, or times
            that are not nodes at which a step begins.
    """
    nodes = falling(grid, "consistency")
    if order not in (1, 2):
        raise ValueError(f"consistency: expected order 1 or 2, got {order!r}")
    if order != 1 and teacher is None:
        raise ValueError("consistency: order is that of the teacher's step, and there is no teacher")
    if huber is not None and not 0 < huber <= _LARGEST_HUBER:
        raise ValueError(
            f"consistency: expected huber as None or a number > 0, at most {_LARGEST_HUBER:g}, got {huber!r}"
        )
    if gap not in (None, "level", "angle"):
        raise ValueError(f'consistency: expected gap None, "level" or "angle", got {gap!r}')
    if teacher is not None:
        check_teacher(teacher, "consistency")
        check_span(nodes, teacher.gaussian, "consistency")
        flow = _Flow(teacher.gaussian, nodes, order)

    def loss(model: Model, x0: Tensor, t: Time, eps: Tensor) -> Tensor:
        process, t = model.gaussian, align(t, x0)
        own = None if teacher is None else bound_teacher(teacher, model)
        check_span(nodes, process, "consistency")
        step = step_of(nodes[:-1], t, "consistency")
        s = nodes.to(t.device)[step + 1]
        x = process.perturb(x0, t, eps)
        with torch.no_grad():
            y = process.perturb(x0, s, eps) if own is None else flow.step(own, x, t, step)
            last = (step == nodes.numel() - 2).to(x.device)
            # a network may not be defined at sigma = 0: there it is asked about another time, and not heard
            inner = model.x0(y, torch.where(step == nodes.numel() - 2, t, s))
            target = torch.where(last, y / process.alpha(s).to(y.dtype), inner)
        square = (model.x0(x, t) - target).square().flatten(1).mean(1)
        distance = square if huber is None else torch.sqrt(square + huber**2) - huber
        if gap is not None:
            distance = distance / _length(process, t, s, gap).to(device=x.device, dtype=x.dtype).flatten()
        return weighted_mean(distance[:, None], weight, process, t.reshape(-1, 1) if t.ndim else t, "x0")

    return loss


def _angle(process: GaussianSDE, t: Tensor) -> Tensor:
    return torch.atan2(process.sigma(t), process.alpha(t))


def _length(process: GaussianSDE, t: Tensor, s: Tensor, gap: Gap) -> Tensor:
    """The length of the steps from t down to s, float64."""
    if gap == "angle":
        return _angle(process, t) - _angle(process, s)
    return process.sigma(t) / process.alpha(t) - process.sigma(s) / process.alpha(s)


class _Flow:
    """One step of a teacher's flow from each node, by the angle."""

    def __init__(self, process: GaussianSDE, nodes: Tensor, order: int) -> None:
        theta = _angle(process, nodes)
        middle = 0.5 * (theta[:-1] + theta[1:])
        self._order = order
        self._h = torch.diff(theta)
        self._radius = torch.hypot(process.alpha(nodes), process.sigma(nodes))
        self._theta, self._middle = theta, middle
        self._between = process.time_of_lam(-torch.log(torch.tan(middle)))
        self._radius_between = torch.hypot(process.alpha(self._between), process.sigma(self._between))

    def step(self, teacher: Model, x: Tensor, t: Tensor, step: Tensor) -> Tensor:
        """The states at the next node from x at the nodes t, whose steps are numbered `step`."""

        def at(values: Tensor, shift: int = 0) -> Tensor:
            return values.to(step.device)[step + shift]

        def cast(values: Tensor) -> Tensor:
            return values.to(device=x.device, dtype=x.dtype)

        def slope(y: Tensor, time: Tensor, theta: Tensor) -> Tensor:
            return teacher.value(y, time, (-torch.sin(theta), torch.cos(theta)))

        h, z = at(self._h), x / cast(at(self._radius))
        v = slope(x, t, at(self._theta))
        if self._order == 1:
            z = cast(torch.cos(h)) * z + cast(torch.sin(h)) * v
        else:
            y = cast(torch.cos(h / 2)) * z + cast(torch.sin(h / 2)) * v
            v = slope(cast(at(self._radius_between)) * y, at(self._between), at(self._middle))
            z = z + cast(2 * torch.sin(h / 2)) * v
        return cast(at(self._radius, 1)) * z
