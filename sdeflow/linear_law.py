"""The law of a mixture of Gaussians under a LinearSDE: its density and score in closed form."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdeflow.linear import LinearSDE
from sdeflow.matrix_kernel import factor_of, inverse_factor, multiply

if TYPE_CHECKING:
    from sdeflow.problems import GaussianMixture


class LinearLaw:
    """A mixture under a LinearSDE, p_t = sum_k w_k N(Phi m_k + c, Phi C_k Phi^T + Q), in float64.

    The process acts on the first dimension of the event (k, *rest): on flat samples by Phi x I and Q x I.
    """

    _ROWS = 64

    def __init__(self, mixture: GaussianMixture, process: LinearSDE) -> None:
        event = mixture.event
        if event[0] != process.k or (process.event is not None and event != process.event):
            want = f"({process.k}{',' if process.event else ', *rest'})"
            raise ValueError(f"expected data of event shape {want} for {process!r}, got {event}")
        self._mixture, self._process = mixture, process
        axes = mixture._full_axes()
        self._covariances = axes @ torch.diag_embed(mixture.variances) @ axes.mT
        self._kept: tuple[float, tuple[Tensor, Tensor, Tensor]] | None = None

    def _parts(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(means (n, K, D), inverse Cholesky factors (n, K, D, D), log w_k - log normaliser (n, K)) at times (n,)."""
        m, (matrix, shift, covariance) = self._mixture, self._process.kernels(self._process.t0, t)
        d = m.means.shape[1]
        one = torch.eye(d // self._process.k, dtype=torch.float64)
        phi, noise = (torch.einsum("nij,ab->niajb", v, one).reshape(-1, 1, d, d) for v in (matrix, covariance))
        means = (phi @ m.means.unsqueeze(-1)).squeeze(-1) + shift.repeat_interleave(len(one), dim=1)[:, None]
        factor = factor_of(phi @ self._covariances @ phi.mT + noise)
        inverse = inverse_factor(factor, f"the law of the data at t = {float(t.detach().min()):g}")
        diagonal = torch.diagonal(inverse, dim1=-2, dim2=-1)
        return means, inverse, torch.log(m.weights) + torch.log(diagonal).sum(-1) - 0.5 * d * math.log(2 * math.pi)

    def _at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if t.ndim > 0:
            times, place = torch.unique(t.flatten().cpu(), return_inverse=True)
            means, inverse, norm = self._parts(times)
            return means[place], inverse[place], norm[place]
        if self._kept is None or self._kept[0] != float(t):
            self._kept = float(t), self._parts(t.reshape(1).cpu())
        return self._kept[1]

    def _white(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(L^-1 (x - mean) (K * rows, D), log w_k N_k (rows, K), L^-1), rows padded as `Distribution._block` says."""
        flat = x.flatten(1).to(torch.float64)
        extra = -len(flat) % self._ROWS
        flat = torch.cat([flat, flat[-1:].expand(extra, -1)])
        means, inverse, norm = (v.to(x.device) for v in self._at(t))
        if len(means) > 1:
            means, inverse, norm = (torch.cat([v, v[-1:].expand(extra, *v.shape[1:])]) for v in (means, inverse, norm))
        y = flat[:, None] - means
        inverse = inverse.expand(len(flat), *inverse.shape[1:]).flatten(0, 1)
        white = multiply(inverse, y.flatten(0, 1))
        return white, norm - 0.5 * white.square().sum(-1).reshape(len(flat), -1), inverse

    def log_density(self, x: Tensor, t: Tensor) -> Tensor:
        """log p_t of x (batch, *event), (batch,) in the dtype of x."""
        return torch.logsumexp(self._white(x, t)[1], dim=1)[: len(x)].to(x.dtype)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """-sum_k r_k P_k^-1 (x - mean_k), r_k the responsibilities, in the dtype of x."""
        self._mixture._check_event(x)
        white, logits, inverse = self._white(x, t)
        pull = multiply(inverse.mT, white).reshape(*logits.shape, -1)
        share = torch.softmax(logits, dim=1).unsqueeze(-1)
        return -(share * pull).sum(1)[: len(x)].reshape(x.shape).to(x.dtype)
