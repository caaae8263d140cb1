"""Valid calls of the constructors: processes, distributions, networks, noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import sdeflow as sf
from benchmarks.fuzzing.target import Target, allow

ANY_SCORE = "a function"


def data(rows: int = 3, columns: int = 2) -> Tensor:
    """A start for anything, of moderate values."""
    return torch.linspace(-0.7, 0.9, rows * columns).reshape(rows, columns)


def _gaussian(process: sf.GaussianSDE) -> Any:
    """Levels, a marginal and two steps of a Gaussian process."""
    middle = 0.5 * (process.t0 + process.t1)
    ts = torch.tensor([process.t_min, middle, process.t1], dtype=torch.float64)
    x, std = process.marginal(data(), middle)
    end = sf.solve(process, data(), sf.solvers.EulerMaruyama(), steps=2, seed=0, throw=False)
    return process.alpha(ts), process.sigma(ts), process.drift_coeff(ts), process.diffusion_coeff(ts), x, std, end


def _sde(event: tuple[int, ...]) -> Callable[[sf.SDE], Any]:
    def use(process: sf.SDE) -> Any:
        x = 0.3 + 0.1 * torch.ones(3, *event, dtype=torch.float64)
        end = sf.solve(process, x, sf.solvers.EulerMaruyama(), steps=2, seed=0, throw=False)
        t = torch.tensor(0.5 * (process.t0 + process.t1), dtype=torch.float64)
        return process.drift(x, t), process.diffusion(x, t), end

    return use


def _known(process: Any) -> Any:
    x = torch.full((3, *process.event), 0.4, dtype=torch.float64)
    if isinstance(process, sf.Sphere):
        x = x / x.norm(dim=-1, keepdim=True)
    t = torch.tensor(0.5 * process.t1, dtype=torch.float64)
    end = sf.solve(process, x, sf.solvers.EulerMaruyama(), steps=2, seed=0, throw=False)
    return process.drift(x, t), process.diffusion(x, t), end


def _drawn(distribution: Any) -> Any:
    x = distribution.sample(4, 0)
    model = distribution.model(sf.VP())
    return x, distribution.log_prob(x), model.score(x, 0.5)


def _network(net: Any) -> Any:
    x = torch.zeros(2, *net.shape)
    return net(x, torch.tensor([0.1, 0.2])).shape


def _scores(model: sf.Model) -> Any:
    return model.score(data(), 0.5), model(data(), torch.tensor([0.2, 0.5, 0.7]), as_="x0")


def _increments(path: Any) -> Any:
    return path(0.1, 0.4), path.integral(0.2, 0.9)


def _noise(noise: sf.Noise) -> Any:
    return noise.normal(1, 0, (2,), torch.float32)


def _source(source: Any) -> Any:
    return sf.solve(sf.VP(), data(2), sf.solvers.EulerMaruyama(), steps=2, noise=source, throw=False)


def net(x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
    """A network for any shape."""
    return -0.5 * x


TARGETS: tuple[Target, ...] = (
    Target("VP", sf.VP, lambda: {"beta_min": 0.1, "beta_max": 20.0}, _gaussian),
    Target("SubVP", sf.SubVP, lambda: {"beta_min": 0.1, "beta_max": 20.0}, _gaussian),
    Target("VE", sf.VE, lambda: {"sigma_min": 0.01, "sigma_max": 50.0}, _gaussian),
    Target("EDM", sf.EDM, lambda: {"sigma_min": 0.002, "sigma_max": 80.0}, _gaussian),
    Target("CosineVP", sf.CosineVP, lambda: {"s": 0.008, "t1": 0.9946}, _gaussian),
    Target("DiscreteVP", sf.DiscreteVP,
           lambda: {"betas": torch.linspace(0.01, 0.2, 10, dtype=torch.float64), "zero_terminal_snr": False},
           _gaussian),
    Target("LinearSDE", sf.LinearSDE,
           lambda: {"F": torch.tensor([[-1.0, 0.5], [0.0, -2.0]]), "G": torch.eye(2), "t0": 0.0, "t1": 1.0,
                    "offset": torch.ones(2), "t_min": 0.01}, _sde((2,)), allow(offset="None", t_min="None")),
    Target("CLD", sf.CLD, lambda: {"beta": 4.0, "gamma": 1.0, "mass": 0.25, "t0": 0.0, "t1": 1.0, "gamma0": 0.04,
                                   "t_min": 0.01}, _sde((2, 2)), allow(gamma="None", t_min="None")),
    Target("GaussianSDE.from_kernel", sf.GaussianSDE.from_kernel,
           lambda: {"alpha": lambda t: torch.exp(-t), "sigma": lambda t: 0.1 + t,
                    "t0": 0.0, "t1": 1.0, "t_min": 0.01}, _gaussian, allow(t_min="None")),
    Target("GaussianSDE.from_coefficients", sf.GaussianSDE.from_coefficients,
           lambda: {"drift_coeff": lambda t: -torch.ones_like(t), "diffusion_coeff": lambda t: 1 + t,
                    "t0": 0.0, "t1": 1.0, "t_min": 0.01}, _gaussian, allow(t_min="None")),
    Target("Pushforward", sf.Pushforward,
           lambda: {"phi": torch.sinh, "base": sf.VP(), "inverse": torch.asinh, "domain": (-math.inf, math.inf)},
           _sde((2,)), allow(inverse="None")),
    Target("GBM", sf.GBM, lambda: {"mu": 0.1, "sigma": 1.0, "start": ((1.0,),), "weights": (1.0,), "t1": 1.0}, _known,
           allow(weights="None")),
    Target("CIR", sf.CIR, lambda: {"kappa": 1.0, "theta": 1.0, "sigma": 1.0, "t1": 1.0}, _known),
    Target("Jacobi", sf.Jacobi, lambda: {"a": 2.0, "b": 2.0, "t1": 1.0}, _known),
    Target("Sphere", sf.Sphere, lambda: {"dim": 3, "t1": 1.0}, _known),
    Target("SquaredBessel", sf.SquaredBessel, lambda: {"delta": 3.0, "start": ((1.0,),), "t1": 1.0}, _known),
    Target("Student", sf.Student, lambda: {"theta": 1.0, "a": 0.25, "dim": 1, "t1": 1.0}, _known),
    Target("SinhOU", sf.SinhOU, lambda: {"rate": 1.0, "scale": 1.0, "start": ((0.0,),), "t1": 1.0}, _known),
    Target("SigmoidOU", sf.SigmoidOU, lambda: {"rate": 1.0, "scale": 1.0, "start": ((0.5,),), "t1": 1.0}, _known),
    Target("RotationGBM", sf.RotationGBM,
           lambda: {"mu": 0.0, "omega": 1.0, "sigma": 0.5, "rho": 0.5, "start": ((1.0, 0.0),), "t1": 1.0}, _known),
    Target("ReverseSDE", sf.ReverseSDE, lambda: {"process": sf.VP(), "model": lambda x, t: -x, "eta": 1.0},
           lambda reverse: sf.solve(reverse, data(), sf.solvers.EulerMaruyama(), steps=2, seed=0, throw=False),
           allow(model=ANY_SCORE)),
    Target("Model", sf.Model, lambda: {"net": net, "sde": sf.VP(), "prediction": "eps", "time": "lam", "expand": True},
           _scores, allow(time="None", net="a function"), finite=False),
    Target("BrownianPath", sf.BrownianPath,
           lambda: {"seed": 3, "shape": (2, 2), "span": (0.0, 1.0), "index": 5, "dtype": torch.float64,
                    "device": "cpu", "antithetic": False}, _increments, allow(index="None")),
    Target("Noise", sf.Noise, lambda: {"seed": 3, "batch": 2, "index": 5, "device": "cpu"}, _noise,
           allow(index="None")),
    Target("SamePath", sf.SamePath, lambda: {"seed": 3}, _source),
    Target("Antithetic", sf.Antithetic, lambda: {"seed": 3, "same_path": False}, _source),
    Target("RecordedPath", sf.RecordedPath,
           lambda: {"times": torch.linspace(0, 1, 3, dtype=torch.float64),
                    "values": torch.tensor([0.0, 0.3, -0.2]).reshape(3, 1, 1).expand(3, 2, 2).clone(), "seed": 3},
           lambda noise: sf.solve(sf.VP(), data(2), sf.solvers.EulerMaruyama(), grid=[0, 0.5, 1.0], noise=noise,
                                  throw=False)),
    Target("problems.Gaussian", sf.problems.Gaussian,
           lambda: {"mean": torch.zeros(2, dtype=torch.float64), "covariance": torch.eye(2, dtype=torch.float64)},
           _drawn),
    Target("problems.GaussianMixture", sf.problems.GaussianMixture,
           lambda: {"means": data(3, 2).double(), "covariances": torch.eye(2).expand(3, 2, 2).double().clone(),
                    "weights": torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)}, _drawn, allow(weights="None")),
    Target("problems.Empirical", sf.problems.Empirical, lambda: {"data": data(6, 2).double(), "bandwidth": 0.1},
           _drawn),
    Target("problems.TwoMoons", sf.problems.TwoMoons, lambda: {"std": 0.1, "components": 4}, _drawn),
    Target("problems.EightGaussians", sf.problems.EightGaussians, lambda: {"radius": 2.0, "std": 0.15}, _drawn),
    Target("nets.MLP", sf.nets.MLP,
           lambda: {"shape": (2,), "width": 8, "depth": 2, "embedding": 8, "harmonics": 2, "classes": 0,
                    "learned_variance": False}, _network),
    Target("nets.UNet", sf.nets.UNet,
           lambda: {"shape": (1, 8, 8), "width": 8, "multipliers": (1, 2), "blocks": 1, "attention": False,
                    "embedding": 8, "harmonics": 2, "classes": 0, "learned_variance": False}, _network),
    Target("nets.EDMPreconditioned", sf.nets.EDMPreconditioned,
           lambda: {"net": sf.nets.MLP((2,), width=8, depth=1), "sigma_data": 0.5}, _network),
    Target("nets.time_features", sf.nets.time_features, lambda: {"lam": torch.tensor([0.1, 0.5]), "harmonics": 2},
           allows=allow(lam="no rows")),
)  # fmt: skip
"""The constructors that are no solver's."""
