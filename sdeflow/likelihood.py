"""Log-likelihoods: exact along the probability flow, bounded by the reverse SDE, and in bits per dimension.

Along the flow x' = v(x, t) the log-density changes by -div v, so that (Chen et al. 2018, Neural ODEs, theorem 1;
Song et al. 2021, Score-based generative modeling, equation 39)

    log p_t0(x) = log prior(z) + int_t0^t1 div v(x_t, t) dt,   z = x_t1,

for any SDE: v holds the divergence of D = G G^T where the diffusion depends on the state. x and the integral are one
augmented ODE, in float64 (the model is called in the dtype of x), that any solver of the drift view integrates.

All are densities at t0 of what the model generates there, in the units of x; none is defined at t0 = 0 where the data
lie on points or surfaces. t0 is the process's t_min unless given; score_sde's published figures use 1e-5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sdeflow.checked import checked
from sdeflow.coding import checked_states, chosen, flow_of, span_of, times_of
from sdeflow.divergence import DivergenceName, FlowWithDivergence, divergence_of
from sdeflow.gaussian import GaussianSDE
from sdeflow.model import Model
from sdeflow.noise import Noise, checked_index, checked_seed
from sdeflow.reverse import ReverseSDE
from sdeflow.solve import solve
from sdeflow.solve_input import Grid
from sdeflow.solvers.base import Solver

LogDensity = Callable[[Tensor], Tensor]

BOUND, DEQUANTISE = 102, 103
"""Streams of the bound's noise and times, and of dequantisation; clear of those of `sdeflow.noise`."""

_STRIDE = 0x9E3779B97F4A7C15
"""Between the seeds of a bit count's draws: far from those that people choose."""


@dataclass(frozen=True)
class LogProb:
    """The result of `log_prob`.

    Attributes:
        log_prob: float64 (batch,); NaN for a sample whose solve failed.
        stderr: its standard error from the spread of the probes, float64 (batch,): 0 for the exact divergence, NaN
            for one probe. It does not hold the error of the solver.
        nfe: model calls that each sample took part in, as in `Stats`.
        products: vector-Jacobian products of the model on top of them, likewise.
        latent: z at t1, (batch, *event), in the dtype of x.
        prior_log_prob: log prior(z), float64 (batch,).
        status: int64 (batch,), values of `Status`.
    """

    log_prob: Tensor
    stderr: Tensor
    nfe: int | Tensor
    products: int | Tensor
    latent: Tensor
    prior_log_prob: Tensor
    status: Tensor


@dataclass(frozen=True)
class Bound:
    """The result of `elbo`.

    Attributes:
        elbo: the estimate of the bound, float64 (batch,).
        stderr: its standard error, float64 (batch,).
        nfe: model calls that each sample took part in.
    """

    elbo: Tensor
    stderr: Tensor
    nfe: int


@dataclass(frozen=True)
class BitsPerDim:
    """The result of `bits_per_dim`.

    Attributes:
        bits: bits per dimension, float64 (batch,).
        stderr: its standard error from the spread of the draws, NaN for one draw; without dequantisation from that of
            the probes.
        offset: -log2 of the width of a cell: what the density's bits were raised by.
        nfe: model calls that each sample took part in, over all draws.
    """

    bits: Tensor
    stderr: Tensor
    offset: float
    nfe: int | Tensor


@checked
def log_prob(
    model: Model | ReverseSDE,
    x: Tensor,
    *,
    prior: LogDensity | None = None,
    t0: float | None = None,
    t1: float | None = None,
    solver: Solver | None = None,
    steps: int | None = None,
    grid: Grid | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    divergence: DivergenceName = "exact",
    probes: int = 1,
    seed: int = 0,
    index: int | Tensor | None = None,
    throw: bool = True,
) -> LogProb:
    """log p_t0(x) (batch,) along the probability flow, in nats. Records no gradients.

    One evaluation is one model call and its vector-Jacobian products, each about the cost of a call: D for "exact",
    the number of probes for "hutchinson" (random signs) and "hutchinson-gaussian", three times it for "hutch++". The
    estimates are unbiased for what the solver integrates; sample i's probes depend on (seed, index i) alone.

    The tolerance is one for the root mean square over x and the sums.

    Args:
        model: a `Model`, or `sde.probability_flow(score)` of any SDE.
        x: states (batch, *event) at t0.
        prior: log density of latents (batch, *event), (batch,). None for a GaussianSDE is N(0, s^2), s the process's
            prior_std at its end, sigma(t1) elsewhere: not exactly the law of the noised data.
        t0, t1: the times of the data and of the prior; the process's t_min and end unless given.
        solver, steps, grid, rtol, atol, throw: as in `encode`; solvers of the drift view.
        divergence: "exact", "hutchinson", "hutchinson-gaussian" or "hutch++" (`sdeflow.divergence`).
        probes: independent probes, whose spread gives the standard error; 1 for "exact", which has none.
        seed, index: of the probes.

    Raises:
        ValueError, TypeError: input that makes no sense, before the first model call.
        SolveError: a sample failed and `throw` is set.
    """
    flow, estimator = flow_of(model), divergence_of(divergence, probes)
    event = checked_states(flow, x)
    noise = _noise(seed, x, index)
    times = times_of(grid)
    if times is not None and (t0 is not None or t1 is not None):
        raise ValueError("expected a grid of times, or t0 and t1, not both")
    if times is not None and times.ndim == 1 and times.numel() > 1:  # `solve` refuses others
        t0, t1 = float(times[0]), float(times[-1])
    start, end = span_of(flow, t0, t1)
    log_prior = _prior(flow, end, prior)
    solver, rtol, atol = chosen(solver, steps, grid, rtol, atol)
    dim = math.prod(event)
    with torch.no_grad():
        augmented = FlowWithDivergence(flow, event, estimator, estimator.draw(noise, dim), x.dtype)
        begin = torch.cat([x.reshape(len(x), dim).double(), x.new_zeros(len(x), estimator.columns).double()], dim=1)
        solution = solve(
            augmented, begin, solver, steps=steps, grid=grid if times is None else times, rtol=rtol, atol=atol,
            t_span=None if times is not None else (start, end), throw=throw,
        )  # fmt: skip
        latent, sums = solution.x[:, :dim].reshape(-1, *event), solution.x[:, dim:]
        at_prior = _values(log_prior, latent)
    ok, nan = solution.ok.to(x.device), torch.full_like(at_prior, math.nan)
    spread = sums.std(1) / math.sqrt(estimator.columns) if estimator.columns > 1 else nan
    return LogProb(
        log_prob=torch.where(ok, at_prior + sums.mean(1), nan),
        stderr=torch.where(ok, 0.0 if divergence == "exact" else spread, nan),
        nfe=solution.stats.nfe,
        products=solution.stats.nfe * estimator.products(dim),
        latent=latent.to(x.dtype),
        prior_log_prob=torch.where(ok, at_prior, nan),
        status=solution.status,
    )


@checked
def elbo(
    model: Model,
    x: Tensor,
    *,
    prior: LogDensity | None = None,
    t0: float | None = None,
    t1: float | None = None,
    draws: int = 64,
    seed: int = 0,
    index: int | Tensor | None = None,
) -> Bound:
    """A bound, per sample, below the log-density log p_t0(x) of the reverse SDE (eta = 1) of `model`.

    (Song et al. 2021, Maximum likelihood training of score-based diffusion models, theorem 3; Huang et al. 2021, A
    variational perspective.) With x_t = r x + std eps the process from x at t0, s the model's score:

        L(x) = E log prior(x_t1) + D log(alpha_t1/alpha_t0) - int_t0^t1 g^2/2 E[|s|^2 + 2 s . eps/std] dt

    where |s|^2 + 2 s . eps/std = |s + eps/std|^2 - |eps|^2/std^2 is the denoising loss less what no model removes.
    The gap is int g^2/2 E|s - s*|^2 dt, s* the score of what the model's SDE generates from the prior: 0 for an exact
    score with the exact law at t1 as prior.

    Times are uniform in lam = log(alpha/sigma), where g^2/2 dt = -sigma^2 dlam, two in each of draws/2 strata; noise
    comes as pairs +-eps, without which s . eps/std has no finite variance near t0. The standard error is that of the
    two in each stratum. Records no gradients.

    Args:
        model: a `Model` of a GaussianSDE.
        x: states (batch, *event) at t0.
        prior, t0, t1: as in `log_prob`; lam must be finite at both times.
        draws: times a sample, even; two model calls each.
        seed, index: sample i's draws depend on (seed, index i) alone.

    Raises:
        ValueError, TypeError: as `log_prob`, or lam is infinite at t0 or t1.
    """
    if not isinstance(model, Model):
        raise TypeError(f"expected a Model, got {type(model).__name__}; wrap the network: sf.Model(net, sde, ...)")
    process, flow = model.gaussian, flow_of(model)
    event = checked_states(flow, x)
    _check_count(draws, "draws", 2)
    if draws % 2:
        raise ValueError(f"expected an even number of draws, two in each stratum, got {draws}")
    noise = _noise(seed, x, index)
    start, end = span_of(flow, t0, t1)
    log_prior = _prior(flow, end, prior)
    at = torch.tensor([start, end], dtype=torch.float64)
    high, low = process.lam(at).tolist()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(
            f"the bound needs finite lam at both times: got lam = {high:g} at t0 = {start:g} and {low:g} at "
            f"t1 = {end:g}; set t0 or t1 short of it"
        )
    data, dim, strata = x.double(), math.prod(event), draws // 2
    gain = dim * float(torch.diff(torch.log(process.alpha(at))))
    ratio, std = (float(v) for v in process.transition_kernel(start, end))
    values, slopes, excess = (torch.empty(draws, len(x), dtype=torch.float64, device=x.device) for _ in range(3))
    variance = torch.empty_like(values)
    flow.check_batch(len(x))
    with torch.no_grad():
        for k in range(draws):
            eps = noise.normal(BOUND, 2 * k, event, torch.float64)
            share = torch.special.ndtr(noise.normal(BOUND, 2 * k + 1, (), torch.float64))
            t = process.time_of_lam(high - (high - low) * (k // 2 + share) / strata).clamp(start, end)
            ends = sum(_values(log_prior, ratio * data + sign * std * eps) for sign in (1, -1)) / 2
            loss, slopes[k], variance[k] = _pair_loss(model, data, x.dtype, start, t, eps)
            values[k] = gain + ends - (high - low) * loss
            excess[k] = (eps**2).reshape(len(x), -1).sum(1) - dim
    # s = -b (x_t - m) gives the loss (b^2 std^2 - 2 b) |eps|^2 + ...: its random part is taken out, with the b of the
    # stratum's other draw, which knows nothing of this eps
    b = slopes.reshape(strata, 2, -1).flip(1).reshape(draws, -1)
    values = values + (high - low) * (b**2 * variance - 2 * b) * excess
    halves = values.reshape(strata, 2, -1)
    error = torch.sqrt(((halves[:, 0] - halves[:, 1]) ** 2).sum(0)) / draws
    return Bound(values.mean(0), error, 2 * draws)


def _pair_loss(
    model: Model, data: Tensor, dtype: torch.dtype, start: float, t: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """sigma^2 (|s|^2 + 2 s . eps/std), the mean over eps and -eps; sigma^2 times the slope of -s along eps;
    std^2/sigma^2. All (batch,)."""
    shape = (-1, *[1] * (data.ndim - 1))
    ratio, std = (v.reshape(shape) for v in model.gaussian.transition_kernel(torch.full_like(t, start), t))
    std = std.clamp(min=torch.finfo(torch.float64).tiny)
    plus, minus = (model.score((ratio * data + sign * std * eps).to(dtype), t).double() for sign in (1, -1))
    square, pull, size = (
        v.reshape(len(data), -1).sum(1) for v in (0.5 * (plus**2 + minus**2), (plus - minus) * eps / std, eps**2)
    )
    sigma2 = model.gaussian.sigma(t) ** 2
    return sigma2 * (square + pull), -0.5 * sigma2 * pull / size, std.flatten() ** 2 / sigma2


@checked
def bits_per_dim(
    model: Model | ReverseSDE,
    x: Tensor,
    *,
    levels: int = 256,
    cells: Literal["around", "inside"] = "around",
    dequantise: bool = True,
    draws: int = 1,
    prior: LogDensity | None = None,
    t0: float | None = None,
    t1: float | None = None,
    solver: Solver | None = None,
    steps: int | None = None,
    grid: Grid | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    divergence: DivergenceName = "exact",
    probes: int = 1,
    seed: int = 0,
    index: int | Tensor | None = None,
) -> BitsPerDim:
    """Bits per dimension of data of `levels` values x = -1 + 2 k/(levels - 1) in [-1, 1], (batch,).

    A density has bits only with a cell to integrate over. With u uniform on [0, 1]^D and w the width of a cell, the
    probability of the cell is P(x) = E_u p(y) w^D >= exp E_u log(p(y) w^D) (Theis et al. 2016, A note on the
    evaluation of generative models, section 3.1), so that

        bits = -E_u log p(y)/(D log 2) + offset,   offset = -log2 w,

    is no less than -log2 P(x)/D, in which a uniform law has log2(levels) bits. The cells are

        "around":  y = x + w (u - 1/2),   w = 2/(levels - 1),   for models trained on these x;
        "inside":  y = -1 + w (k + u),    w = 2/levels,         score_sde's: offset 7 for 256 levels.

    Args:
        model, prior, t0, t1, solver, steps, grid, rtol, atol, divergence, probes, seed, index: as in `log_prob`; seed
            and index also of u.
        x: data (batch, *event) at those values, or with `dequantise=False` already spread over the cells.
        levels: values a component may have: 256 for 8 bits, 17 for the digits.
        dequantise: whether to draw u.
        draws: of u, averaged; each is a solve.

    Raises:
        ValueError, TypeError: as `log_prob`, x off the levels, or draws without dequantisation.
    """
    _check_count(levels, "levels", 2)
    _check_count(draws, "draws", 1)
    if cells not in ("around", "inside"):
        raise ValueError(f'expected cells "around" or "inside", got {cells!r}')
    if not dequantise and draws != 1:
        raise ValueError(f"draws are of the dequantisation: got draws={draws} with dequantise=False")
    flow = flow_of(model)
    event = checked_states(flow, x)
    width = 2 / (levels - 1) if cells == "around" else 2 / levels
    index, at_level = checked_index(index, len(x)), _levels(x, levels) if dequantise else None
    totals: list[Tensor] = []
    nfe: int | Tensor = 0
    for j in range(draws):
        own = (checked_seed(seed) + j * _STRIDE) % (1 << 64)
        y = x
        if at_level is not None:
            u = torch.special.ndtr(_noise(own, x, index).normal(DEQUANTISE, 0, event, torch.float64))
            low = at_level - 0.5 if cells == "around" else at_level
            y = (-1 + width * (low + u)).to(x.dtype)
        found = log_prob(
            model, y, prior=prior, t0=t0, t1=t1, solver=solver, steps=steps, grid=grid, rtol=rtol, atol=atol,
            divergence=divergence, probes=probes, seed=own, index=index,
        )  # fmt: skip
        totals.append(found.log_prob)
        nfe = nfe + found.nfe
    scale = math.prod(event) * math.log(2)
    each = torch.stack(totals)
    if not dequantise:
        error = found.stderr
    else:
        error = each.std(0) / math.sqrt(draws) if draws > 1 else torch.full_like(each[0], math.nan)
    offset = -math.log2(width)
    return BitsPerDim(offset - each.mean(0) / scale, error / scale, offset, nfe)


# ---- checks and parts


def _noise(seed: int, x: Tensor, index: int | Tensor | None) -> Noise:
    return Noise(checked_seed(seed), len(x), index=checked_index(index, len(x)), device=x.device)


_MOST_DRAWS = 1_000_000
"""Of one call: each is one or two model calls, or a solve."""


def _check_count(value: int, name: str, least: int) -> None:
    if not least <= value <= _MOST_DRAWS:
        raise ValueError(f"expected {name} >= {least}, got {value} (at most {_MOST_DRAWS})")


def _prior(flow: ReverseSDE, t1: float, prior: LogDensity | None) -> LogDensity:
    if prior is not None:
        if not callable(prior):
            raise TypeError(f"expected prior as a callable log density of (batch, *event), got {prior!r}")
        return prior
    process = flow.process
    if not isinstance(process, GaussianSDE):
        raise ValueError(
            f"{type(process).__name__} has no default prior: expected prior, the log density of its law at t1 = {t1:g}"
        )
    std = process.prior_std if t1 == process.t1 else float(process.sigma(t1))

    def normal(z: Tensor) -> Tensor:
        flat = z.reshape(len(z), -1) / std
        return -0.5 * (flat**2).sum(1) - flat.shape[1] * math.log(std * math.sqrt(2 * math.pi))

    return normal


def _values(log_prior: LogDensity, z: Tensor) -> Tensor:
    value = log_prior(z)
    if not isinstance(value, Tensor) or value.shape != z.shape[:1]:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"the prior returned {got} for latents of shape {tuple(z.shape)}: expected one number a sample"
        )
    return value.double()


def _levels(x: Tensor, levels: int) -> Tensor:
    """The level k of each component, float64."""
    place = (x.double() + 1) * (levels - 1) / 2
    k = torch.round(place)
    off = max(1e-3, 4 * (levels - 1) * torch.finfo(x.dtype).eps)
    if not bool(((place - k).abs() <= off).all() & (k >= 0).all() & (k <= levels - 1).all()):
        raise ValueError(
            f"expected x at the {levels} values -1 + 2 k/{levels - 1}, got values from {float(x.min()):g} to "
            f"{float(x.max()):g} off them; for data already spread over the cells use dequantise=False"
        )
    return k
