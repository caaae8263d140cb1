"""Derivatives of a diffusion, by reverse-mode autodiff: divergence of G G^T, Ito correction, Milstein terms.

Reverse mode only: forward mode is slower in eager torch, and fails inside functions that differentiate themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sdeflow.sde import SDE

NoiseKind = Literal["additive", "diagonal", "scalar", "commutative", "general"]
NOISE_KINDS: tuple[NoiseKind, ...] = ("additive", "diagonal", "scalar", "commutative", "general")
"""additive: G does not depend on x; diagonal: G_i depends on x_i alone; scalar: one component drives all of x;
commutative: L^j G_k = L^k G_j, L^j = G_j . grad; general: none of these."""


def apply_covariance(sde: SDE, x: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """D v = G (G^T v), of the shape of x."""
    g = sde.diffusion(x, t).to(x.dtype)
    if sde.noise == "diagonal":
        return g**2 * v
    matrix = g.reshape(len(g), -1, g.shape[-1])
    return (matrix @ (matrix.mT @ v.flatten(1).unsqueeze(-1))).reshape(x.shape)


def divergence(sde: SDE, x: Tensor, t: Tensor) -> Tensor:
    """(div D)_i = sum_j d_j D_ij of D = G G^T, of the shape of x, by autodiff.

    Zero without work when G does not depend on x. Diagonal noise: 2 G_i d_i G_i, by two vector-Jacobian products
    where each G_i depends on its own coordinate alone (the second verifies it), by one a coordinate otherwise.
    General noise: one directional derivative a coordinate, sum_jk (d_j G_ik) G_jk + G_ik d_j G_jk.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_() if not x.requires_grad else x
        time = t.clone() if t.is_inference() else t
        g = sde.diffusion(leaf, time)
        if not g.requires_grad or not _depends(g, leaf):
            return torch.zeros_like(x)
    if sde.noise == "general":
        return _general_divergence(sde, x, t)
    # a graph only where the caller differentiates: through x, or through parameters of the diffusion
    keep = torch.is_grad_enabled() and (x.requires_grad or sde.diffusion(x, t).requires_grad)
    with torch.inference_mode(False), torch.enable_grad():
        square = (g**2).expand(leaf.shape)
        own = torch.autograd.grad(square.sum(), leaf, create_graph=keep, retain_graph=True)[0]
        if _is_own_coordinate(square, leaf, own):
            return own
        flat = square.flatten(1)
        columns = [
            torch.autograd.grad(flat[:, i].sum(), leaf, create_graph=keep, retain_graph=True)[0].flatten(1)[:, i]
            for i in range(flat.shape[1])
        ]
        return torch.stack(columns, dim=1).reshape(x.shape)


def _depends(g: Tensor, leaf: Tensor) -> bool:
    """Whether g was computed from leaf (it may require grad through parameters alone)."""
    return torch.autograd.grad(g.sum(), leaf, retain_graph=True, allow_unused=True)[0] is not None


def _is_own_coordinate(square: Tensor, leaf: Tensor, own: Tensor) -> bool:
    """Whether the Jacobian J of `square` is diagonal, given own = J^T 1: J^T w is then w own for any weights w."""
    # distinct irrational weights: that off-diagonal entries cancel for these and for 1 is not generic
    weights = 1 + torch.frac(torch.arange(leaf[0].numel(), dtype=leaf.dtype, device=leaf.device) * 0.6180339887)
    weights = weights.reshape(leaf.shape[1:]).expand(leaf.shape)
    weighted = torch.autograd.grad((square * weights).sum(), leaf, retain_graph=True)[0] / weights
    gap, scale = (own - weighted).detach().abs().amax(), own.detach().abs().amax()
    return bool((gap <= 64 * torch.finfo(leaf.dtype).eps * scale).item())


def _general_divergence(sde: SDE, x: Tensor, t: Tensor) -> Tensor:
    g, push = _slopes(sde, x, t)
    matrix = g.reshape(len(g), -1, g.shape[-1])
    batch, d, _ = matrix.shape
    total = torch.zeros(batch, d, dtype=x.dtype, device=x.device)
    for j in range(d):
        direction = torch.zeros(batch, d, dtype=x.dtype, device=x.device)
        direction[:, j] = 1.0
        slope = push(direction.reshape(x.shape)).reshape(matrix.shape)
        total = total + (slope @ matrix[:, j].unsqueeze(-1) + matrix @ slope[:, j].unsqueeze(-1)).squeeze(-1)
    return total.reshape(x.shape)


def along(sde: SDE, x: Tensor, t: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """(G, (direction . grad) G) at (x, t), of the shape of G; `direction` has that of x."""
    g, push = _slopes(sde, x, t)
    return g, push(direction)


def _slopes(sde: SDE, x: Tensor, t: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(G, push) at (x, t), push(v) = (v . grad) G: one graph for any number of directions."""
    leaf, keep = _leaf(sde, x, t)
    with torch.inference_mode(False), torch.enable_grad():
        g = sde.diffusion(leaf, _outside_inference(t))
        if not g.requires_grad or not _depends(g, leaf):
            return g, lambda direction: torch.zeros_like(g)
        # v -> J^T v is linear, so its own transposed product with the direction is J direction
        dual = torch.zeros_like(g, requires_grad=True)
        pulled = torch.autograd.grad(g, leaf, dual, create_graph=True)[0]

    def push(direction: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            direction = direction.clone() if direction.is_inference() else direction
            pushed = torch.autograd.grad(pulled, dual, direction, create_graph=keep, retain_graph=True)[0]
        return pushed if keep else pushed.detach()

    return (g if keep else g.detach()), push


def own_slope(sde: SDE, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(G, G_i d_i G_i) at (x, t) for diagonal noise whose G_i depends on x_i alone: one product with G^T."""
    keep = torch.is_grad_enabled() and (x.requires_grad or sde.diffusion(x, t).requires_grad)
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return own_slope(sde, x.clone(), _outside_inference(t))
    with torch.enable_grad():
        leaf = x if x.requires_grad else x.detach().requires_grad_()
        g = sde.diffusion(leaf, t)
        g = g if g.shape == x.shape else g.expand(x.shape)
        if not g.requires_grad:
            return g, torch.zeros_like(x)
        slope = torch.autograd.grad(g, leaf, g, create_graph=keep, allow_unused=True)[0]
    slope = torch.zeros_like(x) if slope is None else slope
    return (g, slope) if keep else (g.detach(), slope)


def _leaf(sde: SDE, x: Tensor, t: Tensor) -> tuple[Tensor, bool]:
    """(x to differentiate at, whether the caller differentiates the result: through x, or through parameters)."""
    keep = torch.is_grad_enabled() and (x.requires_grad or sde.diffusion(x, t).requires_grad)
    with torch.inference_mode(False):
        return (x if x.requires_grad else x.detach().clone().requires_grad_()), keep


def _outside_inference(t: Tensor) -> Tensor:
    return t.clone() if t.is_inference() else t


def correction(sde: SDE, x: Tensor, t: Tensor) -> Tensor:
    """c_i = 1/2 sum_jk G_jk d_j G_ik: the Ito drift is the Stratonovich drift plus c (time running forwards)."""
    if sde.noise == "diagonal":
        return 0.25 * divergence(sde, x, t)  # sum_j d_j (G_i^2 delta_ij) = 2 G_i d_i G_i
    g = sde.diffusion(x, t)
    total = torch.zeros_like(x)
    for k in range(g.shape[-1]):
        total = total + along(sde, x, t, g[..., k].to(x.dtype))[1][..., k]
    return 0.5 * total


def noise_kind(sde: SDE, x: Tensor, t: Tensor) -> NoiseKind:
    """What the noise of `sde` is, probed at states near x and verified nowhere else.

    `sde.additive` and `sde.commutative`, where they are not None, are believed instead.
    """
    if sde.additive or sde.scalar_diffusion(t.reshape(1)) is not None:
        return "additive"
    # 16-bit derivatives tell nothing: they are stepped in float32
    rows = _probed_rows(x)
    points = _probes(x[rows] if x.dtype in (torch.float32, torch.float64) else x[rows].float())
    sde = sde.take(rows.repeat(2))
    if sde.additive is None and not any(_slope_size(sde, y, t) > 0 for y in (points, points.flip(0))):
        return "additive"
    if sde.noise == "diagonal":
        return "diagonal" if _own(sde, points, t) else "general"
    if sde.diffusion(points, t).shape[-1] == 1:
        return "scalar"
    commutes = _commutes(sde, points, t) if sde.commutative is None else sde.commutative
    return "commutative" if commutes else "general"


_SANE = 1e12
"""States beyond this are not probed if there are others: their derivatives overflow."""


def _probed_rows(x: Tensor) -> Tensor:
    """Up to 4 samples to probe at: one wild sample must not decide for the others."""
    sane = (x.detach().abs() < _SANE).reshape(len(x), -1).all(1)
    rows = torch.nonzero(sane).flatten()[:4]
    return rows if len(rows) else torch.arange(min(4, len(x)), device=x.device)


def _probes(x: Tensor) -> Tensor:
    """The states and as many near them; relative moves, to stay where the diffusion is defined."""
    some = x.detach()
    generator = torch.Generator(device="cpu").manual_seed(0)
    move = torch.randn(some.shape, generator=generator, dtype=torch.float64).to(some)
    # away from zero, where the derivative of an even G vanishes
    away = torch.where(some < 0, -1.0, 1.0).to(some)
    return torch.cat([some, some * (1 + 0.1 * move) + 1e-3 * move.abs() * away])


def _slope_size(sde: SDE, x: Tensor, t: Tensor) -> float:
    """The size of the derivative of G along a direction without symmetry; 0 where G does not depend on x."""
    direction = 1 + torch.frac(torch.arange(x.numel(), dtype=x.dtype, device=x.device) * 0.6180339887).reshape(x.shape)
    slope = along(sde, x, t, direction)[1]
    return float(torch.nan_to_num(slope.detach()).abs().max())


def _own(sde: SDE, x: Tensor, t: Tensor) -> bool:
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        square = (sde.diffusion(leaf, _outside_inference(t)) ** 2).expand(leaf.shape)
        if not square.requires_grad or not _depends(square, leaf):
            return True
        own = torch.autograd.grad(square.sum(), leaf, retain_graph=True)[0]
        return _is_own_coordinate(square, leaf, own)


def lie_products(sde: SDE, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(G, L) with L[..., j, k] = L^j G_k: (*x.shape, m) and (*x.shape, m, m), for any noise (diagonal as a matrix)."""
    columns: Any = _AsMatrix(sde) if sde.noise == "diagonal" else sde
    g = columns.diffusion(x, t)
    products = [along(columns, x, t, g[..., j])[1] for j in range(g.shape[-1])]
    return g, torch.stack(products, dim=-2)


class _AsMatrix:
    """Diagonal noise as a matrix (*x.shape, D), D the components of a sample."""

    noise = "general"

    def __init__(self, sde: SDE) -> None:
        self._sde = sde

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        g = self._sde.diffusion(x, t).expand(x.shape)
        return torch.diag_embed(g.reshape(len(g), -1)).reshape(*x.shape, -1)


def _commutes(sde: SDE, x: Tensor, t: Tensor) -> bool:
    _, products = lie_products(sde, x, t)
    gap = torch.nan_to_num(products - products.transpose(-1, -2)).abs().max()
    scale = torch.nan_to_num(products).abs().max()
    return bool(gap <= 1e3 * torch.finfo(x.dtype).eps * scale)
