"""The process of a table of betas, as DDPM and its kin are trained with."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from sdeflow.checked import checked_class, numbers
from sdeflow.processes import VariancePreserving
from sdeflow.times import Time, as_time


@checked_class
class DiscreteVP(VariancePreserving):
    """A DDPM table of N betas, continuous by linear interpolation of log alpha.

    Entry n (0-based) sits at t = (n + 1)/N, where alpha^2 = prod_{m <= n} (1 - beta_m); t = 0 is
    data. Between entries beta(t) = -N log(1 - beta_n): the VP process with that piecewise-constant
    rate has exactly the table's marginals. Sampling ends at the first entry, t = 1/N.
    `index_of_time` gives the (fractional) index N t - 1 that a network trained on 0..N-1 expects.

    With `zero_terminal_snr`, alpha goes to 0 at t = 1, linearly over the last interval. Sampling starts there exactly
    with networks that predict x0 or v; where alpha = 0 a prediction of noise says nothing about the data.

    Args:
        betas: the N noise variances, each in (0, 1), as numbers or a 1-d tensor.
        zero_terminal_snr: use the table of `rescale_zero_terminal_snr`, whose last beta is 1.
    """

    def __init__(self, betas: Any, *, zero_terminal_snr: bool = False) -> None:
        self.betas = rescale_zero_terminal_snr(betas) if zero_terminal_snr else _table(betas)
        self._to_zero = zero_terminal_snr
        log_alphas = 0.5 * torch.log1p(-self.betas).cumsum(0)
        self._log_alphas = torch.cat([torch.zeros(1, dtype=torch.float64), log_alphas])
        self._hash = hash(self.betas.numpy().tobytes())

    immutable = True
    """For `sdeflow.kept`: the table is a copy that nothing changes."""

    def __repr__(self) -> str:
        b = self.betas
        table = zlib.crc32(b.numpy().tobytes())
        return f"DiscreteVP({b.numel()} betas, {float(b[0]):g} to {float(b[-1]):g}, crc {table:08x})"

    def __eq__(self, other: object) -> bool:
        return other is self or (isinstance(other, DiscreteVP) and torch.equal(self.betas, other.betas))

    def __hash__(self) -> int:
        return self._hash

    @property
    def t_min(self) -> float:
        return 1 / self.betas.numel()

    @property
    def smooth_window(self) -> tuple[float, float]:
        """The middle one of the intervals in which the rate is constant."""
        n, count = (self.betas.numel() - 1) // 2, self.betas.numel()
        return (n + 1e-3) / count, (n + 1 - 1e-3) / count

    def index_of_time(self, t: Time) -> Tensor:
        """The table's index at time t: N t - 1, not below 0; a whole number at every entry, rounding aside."""
        index = torch.clamp(as_time(t) * self.betas.numel() - 1, min=0.0)
        return torch.where((index - index.round()).abs() < 1e-9, index.round(), index)

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(index of the interval of t, position in it), an entry itself closing its interval."""
        position = t * self.betas.numel()
        # an entry that is a rounding error off (t = (n + 1)/N in float64) still belongs to its interval
        n = torch.clamp(torch.ceil(position - 1e-9).long() - 1, 0, self.betas.numel() - 1)
        return n, position - n

    def _falls_to_zero(self, n: Tensor) -> Tensor:
        """Which of the intervals n is the one over which alpha goes to 0."""
        return (n == self.betas.numel() - 1) & self._to_zero

    def log_alpha(self, t: Tensor) -> Tensor:
        n, part = self._segment(t)
        table, falls = self._log_alphas.to(t.device), self._falls_to_zero(n)
        straight = part * torch.where(falls, 0.0, table[n + 1] - table[n])
        return table[n] + torch.where(falls, torch.log1p(-torch.where(falls, part, 0.0).clamp(max=1.0)), straight)

    def beta(self, t: Tensor) -> Tensor:
        n, part = self._segment(t)
        constant = -self.betas.numel() * torch.log1p(-self.betas.to(t.device))[n]
        return torch.where(self._falls_to_zero(n), 2 * self.betas.numel() / (1 - part), constant)

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        n, _ = self._segment(t)
        alpha, fall = self.alpha(t), -self.betas.numel() * torch.exp(self._log_alphas.to(t.device)[n])
        d_alpha = torch.where(self._falls_to_zero(n), fall, -0.5 * self.beta(t) * alpha)
        return d_alpha, -alpha * d_alpha / self.sigma(t)

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        table = self._log_alphas.to(log_alpha.device)
        n = torch.clamp(torch.searchsorted(-table, -log_alpha) - 1, 0, self.betas.numel() - 1)
        below = log_alpha - table[n]
        part = torch.where(self._falls_to_zero(n), -torch.expm1(below), below / (table[n + 1] - table[n]))
        return (n + part) / self.betas.numel()


def _table(betas: Any) -> Tensor:
    betas = numbers(betas, "betas").detach().cpu().clone()
    if betas.ndim != 1 or betas.numel() < 2:
        raise ValueError(f"expected a 1-d table of at least 2 betas, got shape {tuple(betas.shape)}")
    if not bool(((betas > 0) & (betas < 1)).all()):
        hint = "; for a last beta of 1, pass zero_terminal_snr=True" if betas[-1] == 1 else ""
        raise ValueError(f"expected every beta in (0, 1), got {float(betas.min()):g} to {float(betas.max()):g}{hint}")
    return betas


def rescale_zero_terminal_snr(betas: Any) -> Tensor:
    """The table of betas with alpha shifted and scaled to be 0 at its last entry and unchanged at its first.

    alpha_n <- alpha_0 (alpha_n - alpha_N)/(alpha_0 - alpha_N), so that the last beta is 1 (Lin et al. 2024, Common
    diffusion noise schedules and sample steps are flawed, algorithm 1). A table of that kind is returned as it is.

    Args:
        betas: the noise variances, each in (0, 1), as numbers or a 1-d tensor; the last may be 1.
    """
    betas = numbers(betas, "betas").detach().cpu()
    if betas.ndim == 1 and betas.numel() > 2 and betas[-1] == 1:
        return torch.cat([_table(betas[:-1]), betas[-1:]])
    alphas = torch.exp(0.5 * torch.log1p(-_table(betas)).cumsum(0))
    squares = (alphas[0] * (alphas - alphas[-1]) / (alphas[0] - alphas[-1])) ** 2
    return 1 - torch.cat([squares[:1], squares[1:] / squares[:-1]])
