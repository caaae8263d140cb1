"""Problems that the tests of torchsde behind `solve` share, and steps written by hand."""

import itertools

import numpy as np
import torch

import sdeflow as sf
from sdeflow.pid import PID
from tests.exact import F64

ITO = ["euler", "milstein", "srk"]
STRATONOVICH = ["euler_heun", "heun", "midpoint", "milstein", "reversible_heun", "log_ode"]
METHODS = [*ITO, *[m for m in STRATONOVICH if m not in ITO]]
GENERAL = ["euler", "euler_heun", "heun", "midpoint", "reversible_heun", "log_ode"]
CALLS = {"heun": 2, "midpoint": 2, "log_ode": 2, "srk": 10}
RATE, VOLATILITY = 0.3, 0.5


class Geometric(sf.SDE):
    """dX = a X dt + b X dW: X = x exp((a - b^2/2) t + b W), or x exp(a t + b W) where it is Stratonovich's."""

    def __init__(self, interpretation="ito", t1=1.0):
        self.interpretation, self.t1 = interpretation, t1

    def drift(self, x, t):
        return RATE * x

    def diffusion(self, x, t):
        return VOLATILITY * x

    def exact(self, x, w, t):
        return x * torch.exp((RATE - 0.5 * VOLATILITY**2 * (self.interpretation == "ito")) * t + VOLATILITY * w)


class Wavering(sf.SDE):
    """Multiplicative noise that depends on time, on a span that does not begin at 0."""

    t0, t1 = 0.5, 2.0

    def __init__(self, interpretation="ito"):
        self.interpretation = interpretation

    def drift(self, x, t):
        return torch.sin(3 * t) - x * t

    def diffusion(self, x, t):
        return (1 + t) * torch.cos(x) * 0.3


class Mixed(sf.SDE):
    """Three noises for two components, which do not commute."""

    noise = "general"

    def __init__(self, interpretation="ito"):
        self.interpretation = interpretation

    def drift(self, x, t):
        return -x * t

    def diffusion(self, x, t):
        a, b = x.unbind(-1)
        one = torch.ones_like(a)
        return torch.stack([torch.stack([one, b, 0.1 * one], -1), torch.stack([0.3 * a, one, t * a], -1)], -2)


class Recording(sf.SDE):
    """Another SDE, recording how it is called."""

    def __init__(self, inner):
        self.inner, self.noise, self.direction = inner, inner.noise, inner.direction
        self.t0, self.t1 = inner.t0, inner.t1
        self.interpretation = inner.interpretation
        self.times, self.kinds, self.noise_times = [], set(), []

    @property
    def t_min(self):
        return self.inner.t_min

    def drift(self, x, t):
        self.times.append(float(t))
        self.kinds.add((x.dtype, tuple(x.shape), t.dtype, t.ndim))
        return self.inner.drift(x, t)

    def diffusion(self, x, t):
        self.noise_times.append(float(t))
        return self.inner.diffusion(x, t)

    def scalar_diffusion(self, times):
        return self.inner.scalar_diffusion(times)


class Plain:
    """An SDE written for torchsde."""

    def __init__(self, f, g, noise_type="diagonal", sde_type="ito"):
        self.f, self.g, self.noise_type, self.sde_type = f, g, noise_type, sde_type


def kind(method):
    return "ito" if method in ITO else "stratonovich"


def reversal(eta=1.0):
    process = sf.VP()
    return process.reverse(sf.problems.EightGaussians().model(process), eta)


def start(batch=6, dim=2, seed=0):
    return torch.tensor(np.random.default_rng(seed).normal(size=(batch, dim)), dtype=F64)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def assert_law(x, mean, variance):
    """The sample mean and variance of x (n, ...) within 5 standard errors of the law's, component by component."""
    x, n = x.reshape(x.shape[0], -1), x.shape[0]
    fourth = ((x - x.mean(0)) ** 4).mean(0)
    spread = x.var(0)
    assert float(((x.mean(0) - mean).abs() / (spread / n).sqrt()).max()) < 5
    assert float(((spread - variance).abs() / ((fourth - spread**2) / n).sqrt()).max()) < 5


def by_hand(step, x, times, bm, sign=1.0):
    """The states of the one-step method `step(x, t, h, dw)` along times, on the increments of bm (clock sign * t)."""
    xs = [x]
    for a, b in itertools.pairwise(times):
        dw = bm(sign * a, sign * b)
        xs.append(step(xs[-1], torch.tensor(a, dtype=F64), b - a, dw.reshape(x.shape[0], *dw.shape[1:])))
    return torch.stack(xs)


def euler_step(problem):
    def step(x, t, h, dw):
        g = problem.diffusion(x, t)
        return x + h * problem.drift(x, t) + ((g @ dw.unsqueeze(-1))[..., 0] if problem.noise == "general" else g * dw)

    return step


def tolerant(problem, x, solver, tolerance, seed=0, save=None, max_steps=100_000, span=None):
    """`solve` to a tolerance with the noise of a seed."""
    march = solver.march(
        problem, x, span or problem.span, PID(tolerance, tolerance, max_steps),
        None if save is None else torch.tensor(save, dtype=F64), sf.Noise(seed, x.shape[0]),
    )  # fmt: skip
    while not march.done:
        march.advance()
    return march.solution()
