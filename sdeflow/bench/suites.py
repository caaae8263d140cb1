"""Suites as data: problems, methods, grids and budgets that belong together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sdeflow.bench.methods import METHODS
from sdeflow.bench.problem import Problem
from sdeflow.checkpoints import load_model
from sdeflow.data import digits
from sdeflow.problems import EightGaussians, Empirical, GaussianMixture
from sdeflow.processes import EDM, VP


@dataclass(frozen=True)
class Suite:
    """What a run covers.

    Attributes:
        problems: functions that make them, called as the run reaches them.
        methods: names in `METHODS`.
        grids: names in `GRIDS`.
        nfe: budgets of model calls.
        tolerances: of adaptive methods, rtol = atol.
    """

    problems: tuple[Callable[[], Problem], ...]
    methods: tuple[str, ...]
    grids: tuple[str, ...]
    nfe: tuple[int, ...]
    tolerances: tuple[float, ...]


def mixture() -> Problem:
    """Eight Gaussians on a circle in the plane, with weights 1 to 8, under VP."""
    circle = EightGaussians()
    data = GaussianMixture(circle.means, circle.variances, weights=range(1, 9))
    return Problem(
        data.model(VP()),
        shape=data.event,
        name="mixture-2d",
        title="Eight Gaussians in the plane with weights 1 to 8, exact score, under VP",
        sample=data.sample,
        centres=circle.means,
        tolerance=1e-8,
        samples=256,
        draws=2000,
    )


def digits_exact() -> Problem:
    """The handwritten digits, each blurred by 0.2, with their exact score, under EDM."""
    images = digits()[0].to(torch.float64)
    data = Empirical(images, bandwidth=0.2)
    return Problem(
        data.model(EDM()),
        shape=data.event,
        name="digits-exact",
        title="All 1,797 handwritten digits (8x8), each blurred by 0.2: exact score, under EDM",
        sample=data.sample,
        centres=images,
        tolerance=1e-8,
        samples=96,
        draws=256,
    )


def digits_network() -> Problem:
    """The network for digits that ships with the package, under VP."""
    return Problem(
        load_model("digits"),
        shape=(1, 8, 8),
        name="digits-network",
        title="The digits network that ships with sdeflow, under VP",
        tolerance=1e-8,
        samples=64,
        draws=256,
        target_tolerance=1e-5,
    )


QUICK = Suite(
    problems=(mixture, digits_exact, digits_network),
    methods=(
        "Euler",
        "Heun",
        "RK4",
        "RK45",
        "RK45 adaptive",
        "DDIM",
        "DPMSolverPP(1)",
        "DPMSolverPP(2)",
        "DPMSolverPP(3)",
        "UniPC(3)",
        "GaussianSplit(3)",
        "EulerMaruyama eta=1",
        "DDPM",
        "DPMSolverPP(2) eta=1",
        "EulerMaruyama+Langevin",
    ),
    grids=("uniform", "quadratic", "power", "logsnr", "karras", "logistic"),
    nfe=(5, 8, 10, 15, 20, 30, 50),
    tolerances=(1e-1, 1e-2, 1e-3, 1e-4, 1e-5),
)


def mixture_8d() -> Problem:
    """Five Gaussians with full covariances in eight dimensions, under VP."""
    generator = torch.Generator().manual_seed(0)
    means = 1.5 * torch.randn(5, 8, generator=generator, dtype=torch.float64)
    roots = torch.randn(5, 8, 8, generator=generator, dtype=torch.float64)
    covariances = 0.05 * roots @ roots.mT + 0.02 * torch.eye(8, dtype=torch.float64)
    return _exact("mixture-8d", "Five Gaussians with full covariances in 8-D", GaussianMixture(means, covariances))


def power_law() -> Problem:
    """Twenty Gaussians with a spectrum like that of images, a tenth of the variance in the means, under VP."""
    size = 48
    spectrum = 1 / (1.0 + torch.arange(size, dtype=torch.float64)) ** 1.5
    spectrum = 0.25 * size * spectrum / spectrum.sum()
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(20, size, generator=generator, dtype=torch.float64) * (0.1 * spectrum).sqrt()
    data = GaussianMixture(means, (0.9 * spectrum).expand(20, size))
    return _exact("power-law-48d", "Twenty Gaussians with a power-law spectrum in 48-D, nearly one Gaussian", data)


def _exact(name: str, title: str, data: GaussianMixture) -> Problem:
    return Problem(
        data.model(VP()),
        shape=data.event,
        name=name,
        title=f"{title}, exact score, under VP",
        sample=data.sample,
        centres=data.means,
        tolerance=1e-9,
        samples=128,
        draws=256,
    )


ZOO = Suite(
    problems=(mixture, mixture_8d, power_law, digits_exact),
    # without the methods for stiff drifts, which cost a Jacobian a step that flows do not need
    methods=tuple(
        name
        for name, method in METHODS.items()
        if method.eta == 0 and not method.adaptive and not name.startswith("ROS")
    ),
    grids=("uniform", "quadratic", "power", "logsnr", "karras"),
    nfe=(5, 8, 10, 15, 20, 30, 50, 100),
    tolerances=(),
)

SUITES: dict[str, Suite] = {"quick": QUICK, "zoo": ZOO}
"""Every suite by name."""
