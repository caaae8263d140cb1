"""SDEs that the tests of `check_sde` share, with what a user may claim of them."""

import importlib
import math
from collections.abc import Callable

import torch

import sdeflow as sf
from sdeflow.linear import LinearSDE
from sdeflow.structure import probe_points
from sdeflow.testing.fields import Flat, Terms, divergence, dot, trial_density
from sdeflow.testing.known_density import reverse_law, time_slope
from sdeflow.testing.report import Finding
from sdeflow.testing.reversal import Setting
from sdeflow.testing.strategies import TanhImage, WaveSDE
from tests.exact import F64

moments = importlib.import_module("sdeflow.moments")  # the package exports the function under this name
# torch says so once a process, where LinearSDE's law is differentiated in time (sdeflow/linear_law.py)
SCALAR_WARNING = "ignore:Converting a tensor with requires_grad=True to a scalar:UserWarning"


def setting(sde, n=6, seed=0, density=None) -> Setting:
    event = sde.event or (len(sde.b),)
    x, t = probe_points(sde, event, n, tails=False, seed=seed)
    flat = Flat(sde, event)
    density = density or trial_density(flat.d, sde.domain, seed)
    return Setting(flat, x.flatten(1), t.reshape(-1, 1), density)


def law_identities(at: Setting, sde) -> list[Finding]:
    """Those of a known law that need no integration along the flow, for speed."""
    rate, _ = time_slope(at.flat, at.density, at.points, at.clock)
    v = at.reversed(0.0).drift(at.x, at.clock)
    claimed = sde.score(at.points, at.clock)
    return [
        at.finding("law: Fokker-Planck", "", Terms.of(rate, *(-f for f in at.forward))),
        at.finding("law: continuity", "", Terms.of(rate, divergence(v, at.x), dot(v, at.s), inside=at.forward)),
        at.finding("law: score", "", Terms.of(claimed, -at.s)),
        reverse_law(at),
    ]


def rotating(t):
    t = torch.as_tensor(t, dtype=F64)
    w = 3 * torch.cos(2 * t)
    rows = [[-1 - t, w], [-w - 1, -2 + torch.sin(3 * t)]]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


A = torch.tensor([[-1.0, 2.0], [-0.5, -0.3]], dtype=F64)


def matrix_sde() -> WaveSDE:
    return WaveSDE(
        [[-1, 0.5, 0], [0.2, -0.6, 0.3], [0, 0.4, -1]], [0.3, -0.2, 0.1],
        [[1, 0.3, -0.2], [0.1, 0.9, 0.2], [-0.3, 0.2, 1.1]], wave=0.5, speed=0.4,
        bend=[[0.3, -0.2, 0.1], [0.2, 0.3, -0.1], [-0.2, 0.1, 0.3]],
        W=[[0.7, 0.2, -0.4], [-0.3, 0.8, 0.5], [0.4, -0.5, 0.9]],
    )  # fmt: skip


def stratonovich_sde() -> WaveSDE:
    sde = matrix_sde()
    sde.interpretation = "stratonovich"
    return sde


def crossed_sde() -> WaveSDE:
    """Diagonal noise whose components depend on the other coordinates."""
    return WaveSDE([[-1, 0.5], [0.2, -0.6]], [0.3, -0.2], [1, 0.8], bend=[0.4, 0.3], W=[[0.7, 0.6], [-0.3, 0.8]])


def image_sde() -> TanhImage:
    return TanhImage(
        [[-0.5, 0.3], [-0.2, -0.4]], [0.1, 0.2], [[0.8, 0.2], [0.1, 0.7]], [[0.6, -0.5], [0.3, 0.8]], [0.1, -0.2],
        [[-1.0, 0.5], [0.6, -0.4]],
    )  # fmt: skip


class OU(sf.SDE):
    """dx = -x dt + dW, with what a user may claim of it."""

    event = (1,)

    def drift(self, x, t):
        return -x

    def diffusion(self, x, t):
        return torch.ones_like(x)


def spread(t):
    return -0.5 * torch.expm1(-2 * torch.as_tensor(t, dtype=F64))


def ou_marginal(x0, t):
    return x0 * math.exp(-t), torch.sqrt(spread(t))


def ou_density(x, t, factor=1.0, scale=1.0, rate=1.0):
    """From N(0.5, 0.3)."""
    mean, variance = 0.5 * torch.exp(-rate * t), scale * (0.3 * torch.exp(-2 * t) + spread(t))
    z = (x - mean) ** 2 / variance + torch.log(2 * math.pi * variance)
    return -0.5 * z.squeeze(1) + math.log(factor)


def ou_score(x, t, factor=1.0):
    return -factor * (x - 0.5 * torch.exp(-t)) / (0.3 * torch.exp(-2 * t) + spread(t))


class Multiplicative(sf.SDE):
    """dx = -x dt + (1 + x^2/4) dW, one coordinate."""

    event = (1,)

    def drift(self, x, t):
        return -x

    def diffusion(self, x, t):
        return 1 + 0.25 * x**2


def hand(weight: float, div: float = 1.0, sign: float = 1.0) -> Callable[..., torch.Tensor]:
    def drift(x, t, s):
        g = 1 + 0.25 * x**2
        return sign * (-x - weight * (div * x * g + g**2 * s))

    return drift


class Rounded(OU):
    """The drift by way of float32."""

    def drift(self, x, t):
        return -(x.float() * 1.1).to(x.dtype) / 1.1


def linear_sde() -> LinearSDE:
    return LinearSDE(A, [[0.7, 0.1], [0.0, 0.4]], offset=[1.0, -2.0])
