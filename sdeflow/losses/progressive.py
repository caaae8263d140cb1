"""Progressive distillation: a student whose one DDIM step is two of its teacher's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sdeflow.checked import checked
from sdeflow.gaussian import GaussianSDE
from sdeflow.losses.matching import AnyWeight, weighted_mean
from sdeflow.losses.nodes import bound_teacher, check_span, check_teacher, falling, step_of
from sdeflow.losses.weights import truncated_snr
from sdeflow.model import Model
from sdeflow.times import Time, align

NodeLoss = Callable[[Model, Tensor, Time, Tensor], Tensor]
"""`loss(model, x0, t, eps)` (batch,) at times t that are nodes of the loss's grid: see `grid_times`."""


_TRUNCATED_SNR = truncated_snr()


@checked
def progressive(
    teacher: Model, grid: Tensor | Sequence[float], *, weight: AnyWeight | None = _TRUNCATED_SNR
) -> NodeLoss:
    """The loss of progressive distillation: regression of x_0 on what makes one DDIM step two of the teacher's.

    `grid` is the teacher's own, of 2N steps; the student's is `grid[::2]`. From a node t of the student, where
    x_t = alpha x_0 + sigma eps, the teacher steps to t' and on to t'', with its predictions x' at (x_t, t) and x'' at
    (x_t', t'). The target x of the student is where its own step ends there too, alpha'' x + r r' (x_t - alpha x):

        x = (1 - w) x'' + w x',   w = r (alpha' - r' alpha)/(alpha'' - r r' alpha),   r' = sigma'/sigma,
                                                                                      r = sigma''/sigma',

    and the loss is weight mean (model.x0(x_t, t) - x)^2 (Salimans and Ho 2022, Progressive distillation, algorithm 2;
    its weight max(SNR, 1) is that of section 4). A last step to sigma = 0 has w = 0. The next stage takes the student
    as its teacher, on `grid[::2]`; `train` starts it from the teacher's weights if it is given the teacher.

    Args:
        teacher: a `Model` of the student's process; conditions that the student is bound to are passed to it.
        grid: falling times (2N + 1,).
        weight: as in `denoising` of "x0"; None for 1.

    Returns:
        loss(model, x0, t, eps) -> (batch,), for `train(loss=, times=grid_times(grid[::2]))`.

    Raises:
        ValueError, TypeError: not such a grid or teacher; from the loss: another process, or times that are not nodes
            at which the student steps.
    """
    check_teacher(teacher, "progressive")
    nodes = falling(grid, "progressive")
    if nodes.numel() % 2 == 0:
        raise ValueError(f"progressive: expected an even number of the teacher's steps, got {nodes.numel() - 1}")
    check_span(nodes, teacher.gaussian, "progressive")
    table = _coefficients(teacher.gaussian, nodes)

    def loss(model: Model, x0: Tensor, t: Time, eps: Tensor) -> Tensor:
        own, t = bound_teacher(teacher, model), align(t, x0)
        step = step_of(nodes[:-2:2], t, "progressive")
        x = model.gaussian.perturb(x0, t, eps)
        with torch.no_grad():
            ratio, gain, share = (column.to(x.device)[step].to(x.dtype) for column in table)
            first = own.x0(x, t)
            second = own.x0(ratio * x + gain * first, nodes.to(x.device)[2 * step + 1])
            target = torch.lerp(second, first, share)
        return weighted_mean((model.x0(x, t) - target).square(), weight, model.sde, t, "x0")

    return loss


def _coefficients(process: GaussianSDE, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(r', alpha' - r' alpha, w) of each double step, float64 (N,)."""
    sigma, lam = process.sigma(nodes), process.lam(nodes)
    t0, t1, t2 = slice(None, -2, 2), slice(1, None, 2), slice(2, None, 2)
    ratio = sigma[t1] / sigma[t0]
    # alpha' - r' alpha by the step in lam: it does not cancel in short steps
    gain = -process.alpha(nodes[t1]) * torch.expm1(lam[t0] - lam[t1])
    whole = -process.alpha(nodes[t2]) * torch.expm1(lam[t0] - lam[t2])
    return ratio, gain, sigma[t2] / sigma[t1] * gain / whole
