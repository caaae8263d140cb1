"""Problems that the tests of `solve`, `iterate` and `sample` share."""

import torch

import sdeflow as sf
from sdeflow.problems import GaussianMixture
from tests.exact import F64, random_mixture

VP = sf.VP()
LAW = random_mixture(5, 8, seed=3)
MIXTURE = GaussianMixture(*LAW)
PLANAR = GaussianMixture(*random_mixture(3, 2, seed=4))


def flow_of(problem=PLANAR):
    return VP.probability_flow(problem.model(VP))


class Pendulum(sf.ODE):
    """x'' = -sin(x) (1 + cos(2t)/2), on [0, 3]."""

    t1 = 3.0

    def drift(self, x, t):
        angle, speed = x.unbind(-1)
        return torch.stack([speed, -torch.sin(angle) * (1 + 0.5 * torch.cos(2 * t)).squeeze(-1)], dim=-1)


class Decay(sf.ODE):
    """x' = -k x, one rate for all."""

    def __init__(self, k=1.0):
        self.k = k

    def drift(self, x, t):
        return -self.k * x


class Rates(sf.ODE):
    """x' = -k x + cos(t), one rate a sample."""

    per_sample = ("k",)

    def __init__(self, k):
        self.k = torch.as_tensor(k, dtype=F64)

    def drift(self, x, t):
        return -self.k.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype) * x + torch.cos(t)


class Walk(sf.SDE):
    def drift(self, x, t):
        return -x

    def diffusion(self, x, t):
        return 0.5 + 0 * x


class Poisoned(torch.nn.Module):
    """An exact or trained network whose output turns NaN for marked samples below t = `below`."""

    def __init__(self, net, below=0.5):
        super().__init__()
        self.net, self.below = net, below

    def forward(self, x, t, marked):
        value = self.net(x, t)
        bad = marked & (t.reshape(-1) < self.below)
        return torch.where(bad.reshape(-1, *[1] * (x.ndim - 1)), torch.nan, value)


class Pointwise(sf.ODE):
    """x' = cos(t) - x^3, component by component."""

    def drift(self, x, t):
        return torch.cos(t) - x**3
