"""Score matching without a kernel: from samples of p_t alone, for any SDE.

For a score s and the true one, with p s vanishing at the boundary of the domain, integration by parts gives

    E |s - grad log p|^2 = E [|s|^2 + 2 div s] + E |grad log p|^2

(Hyvarinen 2005, Estimation of non-normalized statistical models by score matching, theorem 1, twice his objective,
so that it has the scale and the gradient of `denoising` of the score). The last term is the same for every model.
The divergence is that of R^d: states on a surface (`Sphere`) have no density there, and need `kernel_matching`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdeflow.checked import checked, described
from sdeflow.losses.matching import AnyWeight
from sdeflow.losses.weights import weight_at
from sdeflow.model import Model
from sdeflow.times import Time, align


@checked
def implicit(model: Model, x: Tensor, t: Time, *, weight: AnyWeight | None = None) -> Tensor:
    """mean over components of s_i^2 + 2 d_i s_i, (batch,), the divergence exact: one backward pass a component.

    It may be negative: at the true score its mean is -E |grad log p_t|^2 over the number of components. No gradient
    flows into x; the loss carries a graph to the model's parameters unless gradients are off (`torch.no_grad`).

    Args:
        model: a `Model` of any SDE, twice differentiable, each sample on its own; evaluated once.
        x: samples of p_t (batch, *event).
        t: one time, or one a sample (batch,).
        weight: a function (process, t) -> w, or a `Weight` (of a GaussianSDE); None for 1.

    Raises:
        ValueError: shapes that do not fit, or a weight that is not finite and >= 0.
    """
    t = align(t, x)

    def loss(leaf: Tensor, s: Tensor) -> Tensor:
        flat = s.flatten(1)
        total = flat.square().sum(1)
        if s.requires_grad:  # a score that does not depend on anything has no slope
            for i in range(flat.shape[1]):
                total = total + 2 * _slope(flat[:, i].sum(), leaf).flatten(1)[:, i]
        return total / flat.shape[1]

    return _evaluated(loss, model, x, t, weight)


@checked
def sliced(
    model: Model,
    x: Tensor,
    t: Time,
    directions: Tensor,
    *,
    reduce_variance: bool = True,
    weight: AnyWeight | None = None,
) -> Tensor:
    """Sliced score matching, (batch,): the divergence by random directions v with E v v^T = I, averaged over them.

        plain:              (2 v . (J v) + (v . s)^2)/d
        reduced variance:   (2 v . (J v) + |s|^2)/d

    (Song et al. 2019, Sliced score matching, section 3: SSM and SSM-VR, times two.) Both have the mean of
    `implicit` over the directions; one backward pass a direction.

    Args:
        model, x, t, weight: as `implicit`.
        directions: (*x.shape) or (m, *x.shape): standard normals, or signs (Rademacher), for which the part of the
            divergence on the diagonal is exact.
        reduce_variance: whether |s|^2 is taken in full.

    Raises:
        ValueError: shapes that do not fit, or a weight that is not finite and >= 0.
    """
    t = align(t, x)
    many = directions.unsqueeze(0) if directions.shape == x.shape else directions
    if many.shape[1:] != x.shape or many.ndim != x.ndim + 1 or many.shape[0] < 1:
        raise ValueError(
            f"expected directions of shape {tuple(x.shape)}, or (m, ...) of these, got {tuple(directions.shape)}"
        )

    def loss(leaf: Tensor, s: Tensor) -> Tensor:
        total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        for direction in many:
            # a copy, so that directions made in inference mode can enter the graph
            v = direction.detach().clone().to(device=x.device, dtype=x.dtype)
            along = (v * s).flatten(1).sum(1)
            size = s.flatten(1).square().sum(1) if reduce_variance else along.square()
            slope = (_slope(along.sum(), leaf) * v).flatten(1).sum(1) if s.requires_grad else 0 * size
            total = total + size + 2 * slope
        return total / (len(many) * x[0].numel())

    return _evaluated(loss, model, x, t, weight)


def _evaluated(
    loss: Callable[[Tensor, Tensor], Tensor], model: Model, x: Tensor, t: Tensor, weight: AnyWeight | None
) -> Tensor:
    """The loss at (leaf, score(leaf)), with a graph to the model's parameters where the caller wants one."""
    if not x.is_floating_point() or x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"expected x as floating-point states (batch, *event), got {described(x)}")
    keep = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        time = t.detach().clone()
        value = loss(leaf, model.score(leaf, time))
        if weight is not None:
            w = weight_at(weight, model.sde, time, "score")
            value = w.flatten().to(device=x.device, dtype=x.dtype) * value
    return value if keep else value.detach()


def _slope(value: Tensor, leaf: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad(value, leaf, create_graph=True, allow_unused=True)
    return torch.zeros_like(leaf) if slope is None else slope
