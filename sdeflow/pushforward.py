"""The image of an SDE under a diffeomorphism: state-dependent, full-matrix diffusion with exact density and score.

For x = phi(y), dY = f dt + G dW (Ito), J = d phi/dy and D = G G^T, Ito's formula gives

    dX = [J f + 1/2 sum_ab (d_a d_b phi) D_ab] dt + J G dW,     all at y = phi^-1(x),

p_X(x) = p_Y(y)/|det J(y)| and grad log p_X = J^-T (grad log p_Y - grad_y log |det J|) (Oksendal 2003, theorem 4.2.1).
Kernels, samples and training targets go through phi too. Data that are positive, in (0, 1) or on a simplex are
modelled so: by exp, the logistic function, or the additive logistic map of a process on all of R^d.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdeflow.checked import checked_class
from sdeflow.gaussian import GaussianSDE
from sdeflow.sde import SDE, checked_shape
from sdeflow.times import Time, align

Map = Callable[[Tensor], Tensor]


@checked_class
class Pushforward(SDE):
    """The SDE of x = phi(y), y from `base`.

    Args:
        phi: a diffeomorphism of (batch, d) to (batch, d), each sample on its own, twice differentiable by autograd.
        base: the SDE of y; states (batch, d).
        inverse: phi^-1; None solves phi(y) = x by Newton's method, from y = x.
        law: of y at time t: a distribution of `sdeflow.problems` (the data of a Gaussian or linear base), or a callable
            log_density(y, t) -> (batch,); None takes `base.log_density` where it has one.
        domain: the interval of the components of x.

    Raises:
        TypeError: phi is not callable or base is not an SDE.
        ValueError: at the first use, phi does not keep the shape, or Newton's method does not converge.
    """

    noise = "general"

    def __init__(
        self,
        phi: Map,
        base: SDE,
        *,
        inverse: Map | None = None,
        law: Any = None,
        domain: tuple[float, float] = (-math.inf, math.inf),
    ) -> None:
        if not callable(phi) or (inverse is not None and not callable(inverse)):
            raise TypeError("expected phi (and inverse) as functions of a tensor (batch, d)")
        if not isinstance(base, SDE):
            raise TypeError(f"expected an SDE as base, got {type(base).__name__}")
        self.phi, self.base, self.law = phi, base, law
        self._inverse = inverse
        self.domain, self.event = domain, base.event
        self.t0, self.t1, self.direction = base.t0, base.t1, base.direction

    def __repr__(self) -> str:
        return f"Pushforward({getattr(self.phi, '__name__', self.phi)!s}, {self.base!r})"

    @property
    def t_min(self) -> float:
        return self.base.t_min

    # ---- the map

    def inverse(self, x: Tensor) -> Tensor:
        """y with phi(y) = x, of the shape of x; differentiable up to third order."""
        if self._inverse is not None:
            return checked_shape(self._inverse(x), x, "the inverse of phi")
        with torch.no_grad():
            y = self._newton(x.detach())
        # each Newton step from the solution doubles the order up to which it is right as a function of x
        return self._step(self._step(y, x), x) if x.requires_grad and torch.is_grad_enabled() else y

    def _image(self, y: Tensor) -> Tensor:
        """phi(y), if it is one state for each."""
        return checked_shape(self.phi(y), y, "phi")

    def _differentiable(self, leaf: Tensor) -> Tensor:
        """phi(leaf), which must record how it came about."""
        value = self._image(leaf)
        if not value.requires_grad:
            raise ValueError("phi does not depend on y by torch operations: its Jacobian is needed")
        return value

    def _newton(self, x: Tensor) -> Tensor:
        try:
            return self._descended(x)
        except RuntimeError as error:  # of torch.linalg
            raise ValueError(
                f"Newton's method met a singular Jacobian of phi ({error}): give the inverse, or states it reaches"
            ) from error

    def _descended(self, x: Tensor) -> Tensor:
        y = x.clone()
        error = (self._image(y) - x).abs().amax(1)
        tolerance = 64 * torch.finfo(x.dtype).eps * (1 + x.abs().amax(1))
        for _ in range(100):
            if bool((error <= tolerance).all()):
                return self._step(y, x)
            move = self._step(y, x) - y
            share = torch.ones_like(error)
            for _ in range(30):  # halve steps that do not bring phi(y) nearer
                trial = (self._image(y + share[:, None] * move) - x).abs().amax(1)
                worse = ~(trial < error) & (error > tolerance)
                if not bool(worse.any()):
                    break
                share = torch.where(worse, 0.5 * share, share)
            y = y + share[:, None] * move
            error = (self._image(y) - x).abs().amax(1)
        raise ValueError(
            f"Newton's method found no y with phi(y) = x for {int((error > tolerance).sum())} of {len(x)} samples "
            f"(largest gap {float(error.max()):.1e}): give the inverse"
        )

    def _step(self, y: Tensor, x: Tensor) -> Tensor:
        jacobian, value = self._jacobian(y)
        return y - torch.linalg.solve(jacobian, (value - x).unsqueeze(-1)).squeeze(-1)

    def _jacobian(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(J (batch, d, d), phi(y)); with a graph through y where y has one."""
        keep = y.requires_grad and torch.is_grad_enabled()
        with torch.enable_grad():
            leaf = y if keep else y.detach().requires_grad_()
            value = self._differentiable(leaf)
            jacobian = _rows(value, leaf, keep)
        return (jacobian, value) if keep else (jacobian.detach(), value.detach())

    def log_det(self, y: Tensor) -> Tensor:
        """log |det J(y)|, (batch,)."""
        return torch.linalg.slogdet(self._jacobian(y)[0])[1]

    # ---- the equation

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        y, g = self._base_noise(x, t)
        jacobian, _ = self._jacobian(y)
        f = self.base.ito_drift(y, t)
        return _times(jacobian, f) + 0.5 * self._curvature(y, g)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        y, g = self._base_noise(x, t)
        return self._jacobian(y)[0] @ g

    def _base_noise(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(y, G of the base as a matrix)."""
        if x.ndim != 2:
            raise ValueError(f"expected x of shape (batch, d), got {tuple(x.shape)}")
        y = self.inverse(x)
        g = self.base.diffusion(y, t).to(x.dtype)
        return y, torch.diag_embed(g.expand(y.shape)) if self.base.noise == "diagonal" else g

    def _curvature(self, y: Tensor, g: Tensor) -> Tensor:
        """sum_ab (d_a d_b phi) D_ab = sum_k d^2/de^2 phi(y + e G_k) at e = 0, of the shape of y."""
        keep = torch.is_grad_enabled() and (y.requires_grad or g.requires_grad)
        with torch.enable_grad():
            leaf = y if y.requires_grad else y.detach().requires_grad_()
            jacobian = _rows(self._differentiable(leaf), leaf, True)
            total = torch.zeros_like(y)
            if not jacobian.requires_grad:  # phi is affine
                return total
            for column in g.unbind(-1):
                total = total + _times(_slopes(jacobian, leaf, column, keep), column)
        return total if keep else total.detach()

    # ---- the law

    def log_density(self, x: Tensor, t: Time) -> Tensor:
        """log p_t(x), (batch,).

        Raises:
            ValueError: no law of y is known.
        """
        y, t = self.inverse(x), align(t, x)
        return self._base_log_density(y, t) - self.log_det(y)

    def _base_log_density(self, y: Tensor, t: Tensor) -> Tensor:
        law = self.law if self.law is not None else getattr(self.base, "log_density", None)
        if law is None:
            raise ValueError("expected law=, the law of y, to know that of x")
        return law.log_prob(y, self.base, t) if hasattr(law, "log_prob") else law(y, t)

    def score(self, x: Tensor, t: Time) -> Tensor:
        """grad log p_t(x) = J^-T (grad log p_Y - grad_y log |det J|), of the shape of x."""
        keep = torch.is_grad_enabled() and x.requires_grad
        with torch.enable_grad():
            y = self.inverse(x)
            leaf = y if keep else y.detach().requires_grad_()
            jacobian, _ = self._jacobian(leaf)
            value = self._base_log_density(leaf, align(t, x)) - torch.linalg.slogdet(jacobian)[1]
            (slope,) = torch.autograd.grad(value.sum(), leaf, create_graph=keep)
        score = torch.linalg.solve(jacobian.mT, slope.unsqueeze(-1)).squeeze(-1)
        return score if keep else score.detach()

    def sample(self, y: Tensor) -> Tensor:
        """phi(y): draws of y as draws of x."""
        return self._image(y)

    def perturb(self, x0: Tensor, t: Time, eps: Tensor) -> Tensor:
        """x_t = phi of the base's own perturbation of phi^-1(x0) by eps: an exact draw of x_t given x_0."""
        return self._image(self._gaussian().perturb(self.inverse(x0), t, eps))

    def log_kernel(self, x: Tensor, t: Time, x0: Tensor) -> Tensor:
        """log p(x_t = x | x_0 = x0) of a Gaussian base, (batch,)."""
        y, t = self.inverse(x), align(t, x)
        mean, std = self._gaussian().marginal(self.inverse(x0), t)
        z = (y - mean) / std
        size = 0.5 * math.log(2 * math.pi) + torch.log(std).expand(y.shape)
        return -(0.5 * z**2 + size).sum(1) - self.log_det(y)

    def target(self, x: Tensor, t: Time, x0: Tensor) -> Tensor:
        """What denoising score matching regresses on: grad_x log p(x_t = x | x_0 = x0), of the shape of x."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.log_kernel(leaf, t, x0).sum(), leaf)
        return slope

    def _gaussian(self) -> GaussianSDE:
        if not isinstance(self.base, GaussianSDE):
            raise ValueError(f"this needs the kernel of a GaussianSDE as base, got {type(self.base).__name__}")
        return self.base


def _rows(value: Tensor, leaf: Tensor, keep: bool) -> Tensor:
    """The Jacobian (batch, d, d) of each sample's value in its own leaf."""
    rows = []
    for i in range(value.shape[1]):
        (row,) = torch.autograd.grad(value[:, i].sum(), leaf, create_graph=keep, retain_graph=True, allow_unused=True)
        rows.append(torch.zeros_like(leaf) if row is None else row)
    return torch.stack(rows, dim=1)


def _slopes(jacobian: Tensor, leaf: Tensor, column: Tensor, keep: bool) -> Tensor:
    """sum_a v_a d_b J_ia for a direction v that is held, (batch, i, b)."""
    rows = []
    for i in range(jacobian.shape[1]):
        (row,) = torch.autograd.grad(
            jacobian[:, i], leaf, column, create_graph=keep, retain_graph=True, allow_unused=True
        )
        rows.append(torch.zeros_like(leaf) if row is None else row)
    return torch.stack(rows, dim=1)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def additive_logistic(y: Tensor) -> Tensor:
    """x_i = exp(y_i)/(1 + sum_j exp(y_j)): R^d to the simplex {x_i > 0, sum_i x_i < 1}, the last share left out."""
    return torch.softmax(torch.cat([y, torch.zeros_like(y[:, :1])], dim=1), dim=1)[:, :-1]


def additive_logratio(x: Tensor) -> Tensor:
    """The inverse of `additive_logistic`: y_i = log x_i - log(1 - sum_j x_j)."""
    return torch.log(x) - torch.log1p(-x.sum(1, keepdim=True))
