"""How far methods for inverse problems are from the posterior: `python -m benchmarks.inverse_bias [--threads N]`.

The prior is a Gaussian, so that the posterior is known, and the score of every method is affine in x, so that the law
that its reversal ends in is a Gaussian whose moments follow from linear equations: no samples and no step size enter.
Only `Replacement`, which is no score, is sampled. Compared at t_min, with the posterior noised to t_min.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import sdeflow as sf
from benchmarks.timing import show
from sdeflow.data import digits
from sdeflow.inverse import LinearObservation, Replacement, dps, exact_gaussian, pigdm, posterior
from sdeflow.problems import Gaussian
from sdeflow.reverse import ReverseSDE

F64 = torch.float64
METHODS: dict[str, Callable[[sf.Model, Gaussian, LinearObservation, Tensor], sf.Model]] = {
    "exact_gaussian": exact_gaussian,
    "pigdm": lambda model, prior, seen, y: pigdm(model, seen, y),
    "dps": lambda model, prior, seen, y: dps(model, seen, y),
}
COLUMNS = ["method", "flow: mean, worst", "mean, rms", "deviations", "SDE: mean, worst", "mean, rms", "deviations"]


@dataclass(frozen=True)
class Law:
    """Mean (D,) and covariance (D, D)."""

    mean: Tensor
    covariance: Tensor


def target(prior: Gaussian, seen: LinearObservation, y: Tensor, process: sf.GaussianSDE) -> Law:
    """The posterior noised to t_min."""
    exact = posterior(prior, seen, y)
    alpha, sigma = process.alpha(process.t_min), process.sigma(process.t_min)
    eye = torch.eye(exact.covariance.shape[0], dtype=F64)
    return Law(alpha * exact.mean.flatten(), alpha**2 * exact.covariance + sigma**2 * eye)


def law(problem: ReverseSDE, event: tuple[int, ...], steps: int = 400) -> Law:
    """Where an affine reversal ends from the prior, by the exponential midpoint rule on a grid in log(alpha/sigma).

    With drift M x + b over a step h < 0, M symmetric as is the Jacobian of a score, every eigenvalue l of M has
    x <- exp(l h) x + (exp(l h) - 1)/l b, and variance from noise eta^2 g^2 (exp(2 l h) - 1)/(2 l).
    """
    process = problem.gaussian
    grid = sf.grids.logsnr(problem, steps, process.t1, process.t_min)
    size = torch.Size(event).numel()
    basis = torch.cat([torch.zeros(1, size, dtype=F64), torch.eye(size, dtype=F64)]).reshape(-1, *event)
    mean, covariance = torch.zeros(size, dtype=F64), process.prior_std**2 * torch.eye(size, dtype=F64)
    for t, h in zip((grid[:-1] + grid[1:]) / 2, torch.diff(grid), strict=True):
        value = problem.drift(basis, t).flatten(1)
        matrix = value[1:] - value[0]
        if float((matrix - matrix.T).abs().max()) > 1e-6 * float(matrix.abs().max()):
            raise ValueError(f"the drift's Jacobian is not symmetric at t = {float(t):g}")
        rates, axes = torch.linalg.eigh((matrix + matrix.T) / 2)
        noise = -h * problem.eta_at(t) ** 2 * process.diffusion_coeff(t) ** 2
        growth = torch.exp(rates * h)
        mean = axes @ (growth * (axes.T @ mean) + _over(rates * h) * h * (axes.T @ value[0]))
        inside = growth[:, None] * (axes.T @ covariance @ axes) * growth
        covariance = axes @ (inside + torch.diag(noise * _over(2 * rates * h))) @ axes.T
    return Law(mean, covariance)


def _over(z: Tensor) -> Tensor:
    """(exp(z) - 1)/z."""
    return torch.where(z == 0, 1.0, torch.expm1(z) / torch.where(z == 0, 1.0, z))


def distance(found: Law, want: Law) -> list[str]:
    """Error of the mean in posterior deviations, the largest and root mean square; the ratios of the deviations."""
    std = want.covariance.diagonal().sqrt()
    off, ratio = (found.mean - want.mean).abs() / std, found.covariance.diagonal().sqrt() / std
    rms = off.square().mean().sqrt()
    return [f"{float(off.max()):.3f}", f"{float(rms):.3f}", f"{float(ratio.min()):.2f}-{float(ratio.max()):.2f}"]


def rows(prior: Gaussian, seen: LinearObservation, y: Tensor) -> list[list[str]]:
    """One row a method, under VP."""
    process: sf.GaussianSDE = sf.VP()
    model, want = prior.model(process), target(prior, seen, y, process)
    found = []
    with torch.no_grad():
        for name, method in METHODS.items():
            guided = method(model, prior, seen, y)
            ends = [law(process.reverse(guided, eta), prior.event) for eta in (0.0, 1.0)]
            found.append([name, *distance(ends[0], want), *distance(ends[1], want)])
    return found


def replacement(prior: Gaussian, seen: LinearObservation, y: Tensor, resample: int, samples: int) -> list[str]:
    """A row for the components that are not seen exactly, from `samples` samples in 50 steps of DDIM and of DDPM."""
    process: sf.GaussianSDE = sf.VP()
    model, want = prior.model(process), target(prior, seen, y, process)
    free = want.covariance.diagonal() > 2 * process.sigma(process.t_min) ** 2
    cells: list[str] = []
    for base in (sf.solvers.DDIM(), sf.solvers.DDPM()):
        solver = Replacement(base, seen, y, resample)
        x = sf.sample(model, samples, shape=prior.event, solver=solver, steps=50, dtype=F64, seed=1).x.flatten(1)
        found = Law(x.mean(0)[free], torch.cov(x[:, free].T))
        cells += distance(found, Law(want.mean[free], want.covariance[free][:, free]))
    return [f"Replacement, {resample}x" if resample > 1 else "Replacement", *cells]


def chain() -> tuple[Gaussian, Tensor, Tensor]:
    """(prior, mask, y): four components with correlations 0.8^|i - j|, the first and the third seen."""
    place = torch.arange(4)
    prior = Gaussian(torch.tensor([1.0, -0.5, 0.5, 0.0]), 0.8 ** (place[:, None] - place).abs().to(F64))
    return prior, torch.tensor([True, False, True, False]), torch.tensor([[1.5, -1.0]], dtype=F64)


def digits_prior(ridge: float = 0.01) -> Gaussian:
    """The mean and covariance of the digits; `ridge` is added to the variances, some of which are 0."""
    images = digits()[0].to(F64)
    covariance = torch.cov(images.flatten(1).T) + ridge * torch.eye(64, dtype=F64)
    return Gaussian(images.mean(0), covariance)


def digits_operators(noise_std: float) -> dict[str, LinearObservation]:
    """The upper half, means of 2 x 2 pixels, and a blur of 3 x 3."""
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :4] = True
    kernel = torch.outer(*[torch.tensor([0.25, 0.5, 0.25], dtype=F64)] * 2)
    return {
        "inpainting": LinearObservation.inpainting(mask, noise_std),
        "super-resolution": LinearObservation.super_resolution(2, noise_std),
        "deblurring": LinearObservation.blur(kernel, noise_std),
    }


def digits_observation(seen: LinearObservation) -> Tensor:
    """A digit, the first of the data, observed with noise."""
    clean = seen.forward(digits()[0][:1].to(F64))
    return clean + seen.noise_std * torch.randn(clean.shape, dtype=F64, generator=torch.Generator().manual_seed(0))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=20000, help="of Replacement")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prior, mask, y = chain()
    for noise in (0.5, 0.05):
        table = rows(prior, LinearObservation.inpainting(mask, noise), y)
        show(f"Four components, two seen with noise {noise}", COLUMNS, table)
    exact = LinearObservation.inpainting(mask, 0.0)
    table = [replacement(prior, exact, y, again, arguments.samples) for again in (1, 10)]
    show("Four components, two seen exactly; DDIM and DDPM, 50 steps", COLUMNS, table)
    images = digits_prior()
    for name, seen in digits_operators(0.1).items():
        show(f"A digit: {name}, noise 0.1", COLUMNS, rows(images, seen, digits_observation(seen)))
    for name, seen in digits_operators(0.0).items():
        if name != "deblurring":  # A A^T is close to singular
            found = replacement(images, seen, digits_observation(seen), 1, arguments.samples // 4)
            show(f"A digit: {name}, exact; DDIM and DDPM, 50 steps", COLUMNS, [found])


if __name__ == "__main__":
    main()
