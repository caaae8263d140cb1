"""Latents of data and back, along the probability flow, and paths between latents.

The flow x' = f - (div D + D s)/2 maps p_t0 to p_t1 one to one (Song et al. 2021, Score-based generative modeling,
section 4.3 and appendix D): integrated up it encodes, down it decodes. Both are `solve` on
`sde.probability_flow(model)`, so what they return is only as invertible as the solver is accurate:

- to a tolerance, the round trip errs by about the tolerance times how much the flow stretches;
- `solver=sf.solvers.DDIM()` with `steps` is DDIM inversion (Song et al. 2021, DDIM, section 4.3): each step takes
  eps at its own start, going up as going down, so the two are not inverse to each other. Both, and the round trip,
  err by O(1/steps); a solver of order p, by O(steps^-p);
- exact at any number of steps: `sdeflow.solvers.reversible`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sdeflow.checked import checked
from sdeflow.gaussian import GaussianSDE
from sdeflow.model import Model, conversion, row_of
from sdeflow.reverse import ReverseSDE
from sdeflow.solution import Solution
from sdeflow.solve import solve
from sdeflow.solve_input import Grid
from sdeflow.solvers.base import Solver
from sdeflow.solvers.runge_kutta import DOP853, RK4

TOLERANCE = 1e-5
"""The tolerance without one given: that of score_sde's likelihoods."""


@checked
def encode(
    model: Model | ReverseSDE,
    x: Tensor,
    *,
    t0: float | None = None,
    t1: float | None = None,
    solver: Solver | None = None,
    steps: int | None = None,
    grid: Grid | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    throw: bool = True,
) -> Solution:
    """The latents of data: `solve` on the probability flow from x at t0 up to t1; they are the solution's x.

    Records no gradients.

    Args:
        model: a `Model`, or `sde.probability_flow(score)` of any SDE.
        x: data (batch, *event), taken to be at t0.
        t0: the time of the data; the process's t_min unless given.
        t1: the time of the latents; the end of the process unless given.
        solver: DOP853 to a tolerance (1e-5 unless given), RK4 on a grid, unless given.
        steps, grid, rtol, atol, throw: as in `solve`; a grid of times runs up, and replaces t0 and t1.

    Raises:
        ValueError, TypeError, SolveError: as `solve`.
    """
    return _along(model, x, t0, t1, True, solver, steps, grid, rtol, atol, throw)


@checked
def decode(
    model: Model | ReverseSDE,
    z: Tensor,
    *,
    t0: float | None = None,
    t1: float | None = None,
    solver: Solver | None = None,
    steps: int | None = None,
    grid: Grid | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    throw: bool = True,
) -> Solution:
    """The data of latents z (batch, *event) at t1: the probability flow down to t0. Arguments as in `encode`."""
    return _along(model, z, t0, t1, False, solver, steps, grid, rtol, atol, throw)


@checked
def interpolate(a: Tensor, b: Tensor, n: int, mode: Literal["spherical", "linear"] = "spherical") -> Tensor:
    """`n` states from a to b, both included: (n, batch, *event) of a and b (batch, *event), each sample by itself.

    Spherical (Shoemake 1985; White 2016, Sampling generative networks), w the angle of the two vectors:

        x_s = [sin((1 - s) w) a + sin(s w) b]/sin w,   s = 0, 1/(n - 1), ..., 1,

    which keeps the norm where |a| = |b|, as nearly is so for Gaussian latents; (1 - s) a + s b where w = 0.

    Raises:
        ValueError: shapes that differ, n < 2, an unknown mode, or opposite vectors, between which there is no
            one great circle.
        TypeError: n is no integer, or the states are no floating-point tensors.
    """
    if not 2 <= n <= 1_000_000:
        raise ValueError(f"expected n >= 2 states, the two ends included, got {n} (at most a million)")
    if mode not in ("spherical", "linear"):
        raise ValueError(f'expected mode "spherical" or "linear", got {mode!r}')
    for name, v in (("a", a), ("b", b)):
        if not isinstance(v, Tensor) or not v.is_floating_point():
            raise TypeError(f"expected {name} as a floating-point tensor, got {v!r}")
    if a.shape != b.shape or a.dtype != b.dtype or a.ndim < 1 or a.numel() == 0:
        raise ValueError(
            f"expected a and b of one shape (batch, *event) and dtype, got {tuple(a.shape)} {a.dtype} and "
            f"{tuple(b.shape)} {b.dtype}"
        )
    share = torch.linspace(0, 1, n, dtype=torch.float64, device=a.device)[:, None]
    before, after = share.flip(0), share  # not 1 - share: the path from b to a has the same bits, turned round
    if mode == "spherical":
        angle = _angle(a, b)
        # sin(s w)/sin w = s sinc(s w)/sinc(w), without a division by 0 at w = 0
        before, after = (s * torch.sinc(s * angle / torch.pi) / torch.sinc(angle / torch.pi) for s in (before, after))
    else:
        before, after = (s.expand(n, len(a)) for s in (before, after))
    shape = (n, len(a), *[1] * (a.ndim - 1))
    wide = torch.promote_types(a.dtype, torch.float32)
    return (before.reshape(shape).to(wide) * a + after.reshape(shape).to(wide) * b).to(a.dtype)


@checked
def interpolate_data(
    model: Model | ReverseSDE,
    a: Tensor,
    b: Tensor,
    n: int,
    *,
    mode: Literal["spherical", "linear"] = "spherical",
    t0: float | None = None,
    t1: float | None = None,
    solver: Solver | None = None,
    steps: int | None = None,
    grid: Grid | None = None,
    rtol: float | None = None,
    atol: float | None = None,
) -> Tensor:
    """`n` samples on the way from data a to data b: encoded, interpolated as latents, decoded; (n, batch, *event).

    The ends are the round trips of a and b. Conditions bound to the model are those of the pairs.

    Args:
        mode: as in `interpolate`.
        t0, t1, solver, steps, grid, rtol, atol: as in `encode`; the grid must be a function or a number of steps, as
            it is run both ways.
    """
    if grid is not None and not callable(grid):
        raise ValueError("the grid is run up and down: expected a grid function with steps, got times")
    flow = flow_of(model)
    # checks a and b before the first model call, as it will check the latents
    interpolate(a, b, n, "linear")
    flow.check_batch(len(a))
    rows = torch.arange(len(a), device=a.device)
    ends = encode(
        flow.take(rows.repeat(2)),
        torch.cat([a, b]),
        t0=t0,
        t1=t1,
        solver=solver,
        steps=steps,
        grid=grid,
        rtol=rtol,
        atol=atol,
    ).x
    latents = interpolate(ends[: len(a)], ends[len(a) :], n, mode).flatten(0, 1)
    back = decode(
        flow.take(rows.repeat(n)), latents, t0=t0, t1=t1, solver=solver, steps=steps, grid=grid, rtol=rtol, atol=atol
    ).x
    return back.reshape(n, *a.shape)


# ---- what likelihoods share


def flow_of(model: object) -> ReverseSDE:
    """The probability flow of a model, or the one that is given.

    Raises:
        TypeError, ValueError: neither a `Model` nor a `ReverseSDE` without noise.
    """
    if isinstance(model, Model):
        return model.sde.probability_flow(model)
    if not isinstance(model, ReverseSDE):
        raise TypeError(
            f"expected a Model, or sde.probability_flow(score), got {type(model).__name__}; wrap the network: "
            "sf.Model(net, sde, ...)"
        )
    if model.stochastic:
        raise ValueError(f"expected the probability flow (eta = 0), got eta = {model.eta!r}")
    return model


def checked_states(flow: ReverseSDE, x: Tensor) -> tuple[int, ...]:
    """The event shape of states that a likelihood may be asked of."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"expected x as a floating-point tensor, got {x.dtype if isinstance(x, Tensor) else type(x)}")
    if x.ndim < 1 or x.numel() == 0:
        raise ValueError(f"expected x of shape (batch, *event) with at least one sample, got {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("expected finite x, got NaN or infinity")
    event = tuple(x.shape[1:])
    if flow.event is not None and event != tuple(flow.event):
        raise ValueError(f"expected x of shape (batch, {', '.join(map(str, flow.event))}), got {tuple(x.shape)}")
    return event


def span_of(flow: ReverseSDE, t0: float | None, t1: float | None) -> tuple[float, float]:
    """(t0, t1), checked to rise within the process and to leave the flow finite at both ends."""
    low = float(flow.t_min if t0 is None else t0)
    high = float(flow.t1 if t1 is None else t1)
    if not flow.t0 <= low < high <= flow.t1:
        raise ValueError(f"expected t0 < t1 in [{flow.t0:g}, {flow.t1:g}], got t0 = {low:g} and t1 = {high:g}")
    check_finite_at(flow, (low, high))
    return low, high


def check_finite_at(flow: ReverseSDE, times: tuple[float, ...]) -> None:
    """Refuse times of a Gaussian process at which the model's prediction does not give the flow's drift."""
    process, model = flow.process, flow.model
    if not isinstance(process, GaussianSDE):
        return
    for t in times:
        at = torch.tensor(t, dtype=torch.float64)
        rows = row_of(model.prediction, process, at), row_of("velocity", process, at)
        if not all(bool(torch.isfinite(v)) for v in conversion(process, at, *rows)):
            raise ValueError(
                f"the prediction {model.prediction!r} does not give the flow at t = {t:g}, where alpha = "
                f"{float(process.alpha(at)):g} and sigma = {float(process.sigma(at)):g}: set t0 or t1 short of it"
            )


def times_of(grid: Grid | None) -> Tensor | None:
    """The grid as a tensor, if it is one of times; `solve` checks what is in it."""
    if grid is None or callable(grid):
        return None
    return grid if isinstance(grid, Tensor) else torch.tensor(grid, dtype=torch.float64)


def chosen(
    solver: Solver | None, steps: int | None, grid: Grid | None, rtol: float | None, atol: float | None
) -> tuple[Solver, float | None, float | None]:
    """(solver, rtol, atol) with what is not given filled in: a tolerance unless there is a grid."""
    on_grid = steps is not None or grid is not None
    if solver is None:
        solver = RK4() if on_grid else DOP853()
    if not on_grid and rtol is None and atol is None:
        rtol = atol = TOLERANCE
    return solver, rtol, atol


def _along(
    model: Model | ReverseSDE,
    x: Tensor,
    t0: float | None,
    t1: float | None,
    up: bool,
    solver: Solver | None,
    steps: int | None,
    grid: Grid | None,
    rtol: float | None,
    atol: float | None,
    throw: bool,
) -> Solution:
    flow = flow_of(model)
    times = times_of(grid)
    if times is not None:
        if t0 is not None or t1 is not None:
            raise ValueError("expected a grid of times, or t0 and t1, not both")
        if times.ndim == 1 and times.numel() > 1 and bool((torch.diff(times) > 0).all()) != up:
            raise ValueError(f"expected a grid that runs {'up to the latents' if up else 'down to the data'}")
        span = None
    else:
        low, high = span_of(flow, t0, t1)
        span = (low, high) if up else (high, low)
    solver, rtol, atol = chosen(solver, steps, grid, rtol, atol)
    with torch.no_grad():
        return solve(
            flow, x, solver, steps=steps, grid=grid if times is None else times, rtol=rtol, atol=atol,
            t_span=span, throw=throw,
        )  # fmt: skip


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """The angle (batch,) of each two vectors, float64; 0 where one of them is 0. Accurate at small and large angles."""
    flat = [v.reshape(len(v), -1).to(torch.float64) for v in (a, b)]
    norms = [torch.linalg.vector_norm(v, dim=1, keepdim=True) for v in flat]
    u, v = (f / torch.where(norm > 0, norm, 1.0) for f, norm in zip(flat, norms, strict=True))
    far, near = (torch.linalg.vector_norm(w, dim=1) for w in (u - v, u + v))
    zero = (norms[0] == 0).squeeze(1) | (norms[1] == 0).squeeze(1)
    angle = torch.where(zero, 0.0, 2 * torch.atan2(far, near))
    opposite = torch.nonzero(angle > torch.pi * (1 - 1e-9)).flatten().tolist()
    if opposite:
        raise ValueError(
            f"opposite vectors in {len(opposite)} samples (first: {opposite[0]}): no one great circle joins them; "
            'use mode="linear"'
        )
    return angle
