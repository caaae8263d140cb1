"""Grids from a few pilot trajectories of a model, without fitting: what `tune` has to beat.

Each function here runs the flow from a few noises once and returns a grid function, `(process, steps, t_start, t_end)`,
for `grid=`. With D = E[x_0 | x_t] along a trajectory, s = sigma/alpha, h a step in lam = -log s, and
w = sqrt(v/(v + s^2)) the share of an error in x/alpha that a Gaussian of the data's variance v would keep until t = 0:

- `equal_local_error`: the local error of an exponential method of order p is about h^(p+1) |D^(p)(lam)|; steps where
  it is the same share the work, so that the density of steps is (w |D^(p)|)^(1/(p+1));
- `score_change`: a bound of the KL divergence of a first-order sampler from the reversed process,
  int e^(2 lam) E|D(lam) - D(lam_i)|^2 dlam, is smallest at the density (e^(2 lam) E|D'|^2)^(1/3) (Sabour et al. 2024,
  Align your steps, section 3: the bound; the density is its minimiser for short steps);
- `shortest_path`: of all grids through a fine one, that whose first-order steps, each begun on the trajectory, have the
  smallest sum of errors w |x_j - step(x_i)|, by dynamic programming (Chen et al. 2024, On the trajectory regularity of
  ODE-based diffusion sampling, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sdeflow import grids
from sdeflow.checked import checked
from sdeflow.gaussian import GaussianSDE
from sdeflow.grids import GridFunction
from sdeflow.grids.shared import ends, finish
from sdeflow.model import Model
from sdeflow.solve import solve
from sdeflow.solvers.gaussian_split import GaussianSplit

_NODES = 192
_APART = 1 << 41


@dataclass(frozen=True)
class _Pilot:
    """Trajectories at nodes of equal steps in lam.

    Attributes:
        process: of the model.
        lam: (nodes,), rising.
        y, x0: x/alpha and E[x_0 | x] there, (nodes, batch, components) float64.
        keep: w, (nodes,).
    """

    process: GaussianSDE
    lam: Tensor
    y: Tensor
    x0: Tensor
    keep: Tensor


def _pilot(model: Model, shape: tuple[int, ...] | None, pilots: int, seed: int) -> _Pilot:
    if pilots < 1:
        raise ValueError(f"expected pilots >= 1, got {pilots!r}")
    process, net = model.gaussian, model.net
    event: Any = getattr(net, "shape", None) if shape is None else shape
    if event is None:
        raise ValueError("expected the shape of one sample: shape=(3, 32, 32)")
    like = next(net.parameters(), torch.empty(0)) if isinstance(net, nn.Module) else torch.empty(0)
    problem = process.reverse(model, 0.0)
    times = grids.logsnr(problem, _NODES)
    with torch.no_grad():
        x = process.prior_sample((pilots, *event), seed, index=_APART, dtype=like.dtype, device=like.device)
        states = solve(problem, x, GaussianSplit(3), grid=times, save=True).xs
        assert states is not None
        x0 = torch.stack([model.x0(state, t) for state, t in zip(states, times, strict=True)])
    flat = [v.flatten(2).to("cpu", torch.float64) for v in (states, x0)]
    spread = flat[1][-1].var(0, unbiased=False).mean() if pilots > 1 else flat[1][-1].square().mean()
    lam = process.lam(times)
    keep = torch.sqrt(spread / (spread + torch.exp(-2 * lam)))
    return _Pilot(process, lam, flat[0] / process.alpha(times)[:, None, None], flat[1], keep)


@checked
def equal_local_error(
    model: Model, *, shape: tuple[int, ...] | None = None, order: int = 2, pilots: int = 16, seed: int = 0
) -> GridFunction:
    """Steps of equal local error of an exponential method of `order`.

    Args:
        model: of a GaussianSDE with alpha > 0 on its span.
        shape: of one sample; the network's own unless given.
        order: p, 1 to 3.
        pilots: trajectories.
        seed: of their noises.

    Raises:
        ValueError: arguments that do not fit.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"expected order 1, 2 or 3, got {order!r}")
    pilot = _pilot(model, shape, pilots, seed)
    slope = pilot.x0
    for _ in range(order):
        slope = torch.gradient(slope, spacing=float(pilot.lam[1] - pilot.lam[0]), dim=0)[0]
    size = slope.square().mean((1, 2)).sqrt()
    return _of_density(pilot, (pilot.keep * size) ** (1 / (order + 1)), "equal_local_error")


@checked
def score_change(
    model: Model, *, shape: tuple[int, ...] | None = None, pilots: int = 16, seed: int = 0
) -> GridFunction:
    """Steps that make a bound of the KL divergence of a first-order sampler small; arguments as `equal_local_error`."""
    pilot = _pilot(model, shape, pilots, seed)
    slope = torch.gradient(pilot.x0, spacing=float(pilot.lam[1] - pilot.lam[0]), dim=0)[0]
    return _of_density(pilot, (torch.exp(2 * pilot.lam) * slope.square().mean((1, 2))) ** (1 / 3), "score_change")


@checked
def shortest_path(
    model: Model, *, shape: tuple[int, ...] | None = None, pilots: int = 16, seed: int = 0
) -> GridFunction:
    """The grid of least summed first-order errors on the pilots; arguments as `equal_local_error`."""
    pilot = _pilot(model, shape, pilots, seed)
    nodes = len(pilot.lam)
    cost = np.full((nodes, nodes), np.inf)
    for i in range(nodes - 1):
        shrink = torch.exp(pilot.lam[i] - pilot.lam[i + 1 :])[:, None, None]
        reached = shrink * pilot.y[i] + (1 - shrink) * pilot.x0[i]
        error = (reached - pilot.y[i + 1 :]).square().mean(2).sqrt().mean(1)
        cost[i, i + 1 :] = (pilot.keep[i + 1 :] * error).numpy()

    def grid(process: Any, steps: int, t_start: float | None = None, t_end: float | None = None) -> Tensor:
        start, end = ends(process, steps, t_start, t_end)
        first, last = sorted(_nearest(pilot, t) for t in (start, end))
        if last - first < steps:
            raise ValueError(
                f"grids.shortest_path chooses among {last - first} nodes: expected fewer steps, got {steps}"
            )
        part = cost[first : last + 1, first : last + 1]
        best, came = part[0], []
        for _ in range(steps - 1):
            through = best[:, None] + part
            came.append(through.argmin(0))
            best = through.min(0)
        path = [last - first]
        for back in reversed(came):
            path.append(int(back[path[-1]]))
        lam = pilot.lam[torch.tensor([0, *reversed(path)]) + first]
        return finish("shortest_path", pilot.process.time_of_lam(lam), start, end)

    return grid


def _nearest(pilot: _Pilot, t: float) -> int:
    return int((pilot.lam - pilot.process.lam(t)).abs().argmin())


def _of_density(pilot: _Pilot, density: Tensor, name: str) -> GridFunction:
    """The grid function whose steps in lam have this density."""
    middle = 0.5 * (density[1:] + density[:-1])
    share = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumsum(middle, 0)]).numpy()
    lams = pilot.lam.numpy()

    def grid(process: Any, steps: int, t_start: float | None = None, t_end: float | None = None) -> Tensor:
        start, end = ends(process, steps, t_start, t_end)
        high, low = max(start, end), min(start, end)
        inside = np.interp([float(pilot.process.lam(t)) for t in (high, low)], lams, share)
        lam = np.interp(np.linspace(inside[0], inside[1], steps + 1), share, lams)
        return finish(name, pilot.process.time_of_lam(torch.from_numpy(lam)), start, end)

    return grid
