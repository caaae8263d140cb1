"""What `sf.expect` covers, costs and saves: `python -m benchmarks.expectation [--threads N] [--repetitions N]`.

Three tables. Coverage: the share of runs of other seeds whose interval holds the exact value, beside the band in which
that share lies in all but one case in a hundred if the stated rate is right. Complexity: model calls against the
tolerance, with the fitted slope; plain Monte Carlo takes the steps whose bias is a quarter of the tolerance. Variance
reduction: what plain Monte Carlo costs over each method, at equal error, and what the pilot takes.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from scipy.stats import binom, norm
from torch import Tensor

import sdeflow as sf
from benchmarks.timing import show
from sdeflow.expectation import Expectation
from sdeflow.metrics import fitted_order
from sdeflow.problems import GaussianMixture
from sdeflow.solvers import DPMSolverPP, EulerMaruyama, Milstein

F64 = torch.float64
MU, SIGMA = 0.5, 0.5
ONE = torch.ones(1, dtype=F64)
Asked = Literal["auto", "plain", "antithetic", "sobol", "control", "multilevel"]


def call_payoff(x: Tensor) -> Tensor:
    """(x_1 - 1)^+."""
    return (x[:, 0] - 1.0).clamp(min=0)


def square(x: Tensor) -> Tensor:
    """x_1^2."""
    return x[:, 0].square()


def linear(x: Tensor) -> Tensor:
    """x_1."""
    return x[:, 0]


def sigmoid(x: Tensor) -> Tensor:
    """sigmoid(x_1)."""
    return torch.sigmoid(x[:, 0])


def energy(x: Tensor) -> Tensor:
    """|x|^2."""
    return x.flatten(1).square().sum(1)


def share(x: Tensor) -> Tensor:
    """1 where x_1 > 0."""
    return (x[:, 0] > 0).to(F64)


def black_scholes() -> float:
    """E (X_1 - 1)^+ of dX = mu X dt + sigma X dW from 1, not discounted (Black and Scholes 1973)."""
    above = (MU + 0.5 * SIGMA**2) / SIGMA
    return float(math.exp(MU) * norm.cdf(above) - norm.cdf(above - SIGMA))


def euler_square(steps: int) -> float:
    """E X_h^2 after Euler-Maruyama's own steps: (1 + 2 mu h + mu^2 h^2 + sigma^2 h)^steps."""
    h = 1.0 / steps
    return float((1 + 2 * MU * h + MU**2 * h**2 + SIGMA**2 * h) ** steps)


def euler_mean(steps: int) -> float:
    """E X_h after Euler-Maruyama's own steps: (1 + mu h)^steps."""
    return float((1 + MU / steps) ** steps)


def geometric() -> sf.GBM:
    return sf.GBM(mu=MU, sigma=SIGMA)


def line_mixture() -> GaussianMixture:
    """Two Gaussians on a line, weights 1 and 2."""
    return GaussianMixture([[-1.0], [0.8]], [0.05, 0.1], weights=[1, 2])


def line_square() -> float:
    """E X^2 of that mixture after the probability flow of VP from its prior, at t_min, to seven digits.

    One component: the flow is a map of one normal, solved to 1e-9 on 2001 nodes. The prior is not quite the law at t1,
    so this is not quite the mixture's own moment (0.84332 for 0.84333): no number of steps or samples removes that.
    """
    process = sf.VP()
    with torch.no_grad():
        flow = process.probability_flow(line_mixture().model(process))
        z = torch.linspace(-8.0, 8.0, 2001, dtype=F64)
        ends = sf.solve(flow, process.prior_std * z[:, None], sf.solvers.DOP853(), rtol=1e-9, atol=1e-11).x[:, 0]
    # the trapezoidal rule of a smooth function times a Gaussian: error below 1e-10 at this spacing
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    return float((ends.square() * density).sum() * (z[1] - z[0]))


# ---- coverage


@dataclass(frozen=True)
class Covered:
    """How many of the runs hold the exact value, and at which mean half-width and cost."""

    hits: int
    runs: int
    half: float
    calls: float


def coverage(run: Callable[[int], Expectation], exact: float, repetitions: int, *, shrink: float = 1.0) -> Covered:
    """Of runs with seeds 0, 1, ...; `shrink` makes the intervals shorter, which a test of coverage must notice."""
    hits, half, calls = 0, 0.0, 0.0
    for seed in range(repetitions):
        found = run(seed)
        hits += abs(float(found.mean) - exact) <= shrink * found.half_width
        half, calls = half + found.half_width / repetitions, calls + found.nfe / repetitions
    return Covered(hits, repetitions, half, calls)


def band(repetitions: int, rate: float = 0.95, failure: float = 0.01) -> tuple[int, int]:
    """Hits that a binomial of this rate leaves with probability `failure`, half on either side."""
    low, high = binom.ppf([failure / 2, 1 - failure / 2], repetitions, rate)
    return int(low), int(high)


def _euler_run(seed: int, *, method: Asked, functional: Callable[[Tensor], Tensor], tol: float) -> Expectation:
    return sf.expect(
        functional, geometric(), ONE, EulerMaruyama(), steps=8, tol=tol, method=method, seed=seed, pilot=512,
    )  # fmt: skip


def _number_run(seed: int) -> Expectation:
    return sf.expect(linear, geometric(), ONE, EulerMaruyama(), steps=8, num=512, method="plain", seed=seed)


def _exact_run(seed: int) -> Expectation:
    return sf.expect(call_payoff, geometric(), ONE, EulerMaruyama(), tol=0.05, seed=seed, pilot=512)


def stays_above(xs: Tensor, ts: Tensor) -> Tensor:
    """1 where a path of saved states stays above 0.8."""
    return (xs.amin(0)[:, 0] > 0.8).to(F64)


def stays_above_exact() -> float:
    """Its mean for the path itself, from 1 over [0, 1]: log X is a Brownian motion with drift (its reflection)."""
    drift, low = MU - 0.5 * SIGMA**2, math.log(0.8)
    mirrored = math.exp(2 * drift * low / SIGMA**2) * norm.cdf((low + drift) / SIGMA)
    return float(norm.cdf((drift - low) / SIGMA) - mirrored)


def _barrier_run(seed: int) -> Expectation:
    return sf.expect(stays_above, geometric(), ONE, EulerMaruyama(), save=True, tol=0.1, seed=seed, pilot=512)


def _flow_run(seed: int, *, method: Asked, model: sf.Model) -> Expectation:
    return sf.expect(
        square, model, solver=DPMSolverPP(2), shape=(1,), tol=0.02, method=method, seed=seed, pilot=512, dtype=F64,
    )  # fmt: skip


def coverage_runs() -> dict[str, tuple[Callable[[int], Expectation], float]]:
    """Runs with known answers, by name."""
    found: dict[str, tuple[Callable[[int], Expectation], float]] = {
        "GBM, x, 512 samples: plain": (_number_run, euler_mean(8))
    }
    methods: tuple[Asked, ...] = ("plain", "antithetic", "control", "sobol", "multilevel", "auto")
    for method in methods:
        run = partial(_euler_run, method=method, functional=square, tol=0.12)
        found[f"GBM, x^2, 8 Euler steps: {method}"] = run, euler_square(8)
    found["GBM, call, exact law: multilevel"] = _exact_run, black_scholes()
    found["GBM, stays above 0.8, exact law: multilevel"] = _barrier_run, stays_above_exact()
    model = line_mixture().model(sf.VP())
    found["mixture, x^2, exact law: multilevel"] = partial(_flow_run, method="auto", model=model), line_square()
    return found


def print_coverage(repetitions: int) -> None:
    low, high = band(repetitions)
    rows = []
    for name, (run, exact) in coverage_runs().items():
        start = time.perf_counter()
        got = coverage(run, exact, repetitions)
        inside = "yes" if low <= got.hits <= high else ("above" if got.hits > high else "BELOW")
        seconds = time.perf_counter() - start
        rows.append(
            [name, f"{got.hits / got.runs:.3f}", inside, f"{got.half:.4f}", f"{got.calls:.3g}", f"{seconds:.0f}"]
        )
    title = f"coverage of 95% intervals, {repetitions} runs; band [{low / repetitions:.3f}, {high / repetitions:.3f}]"
    show(title, ["problem: method", "coverage", "in band", "mean half-width", "calls", "s"], rows)


# ---- complexity


def plain_cost(found: Expectation, tol: float, variance: float) -> tuple[int, float]:
    """(steps, calls) of plain Monte Carlo for the tolerance of a multilevel run, from the run's own figures.

    Steps whose bias, extrapolated as 2^(-alpha l), is a quarter of the tolerance; samples for the rest, of a variance
    that hardly depends on the steps.
    """
    assert found.rates is not None
    alpha = found.rates[0]
    resolved = [l for l in found.levels[1:] if abs(float(l.mean)) > 3 * math.sqrt(l.variance / l.num)][-1]
    steps = float(resolved.name.split(" ")[0])
    bias = abs(float(resolved.mean)) / (2**alpha - 1)
    steps = max(2.0, steps * (bias / (0.25 * tol)) ** (1 / alpha))
    samples = (1.96 / (0.75 * tol)) ** 2 * variance
    return math.ceil(steps), samples * math.ceil(steps)


_RUN_BELOW = 2e7
"""Calls up to which plain Monte Carlo is run, and not only reckoned."""


def plain(problem: sf.GBM | sf.Model, steps: int, *, tol: float | None = None, num: int | None = None) -> Expectation:
    """Plain Monte Carlo at so many steps: Euler-Maruyama for GBM, whose weak order is Milstein's, else DPM++(2M)."""
    if isinstance(problem, sf.Model):
        return sf.expect(
            square, problem, solver=DPMSolverPP(2), shape=(1,), steps=steps, tol=tol, num=num, method="plain", dtype=F64
        )
    return sf.expect(call_payoff, problem, ONE, EulerMaruyama(), steps=steps, tol=tol, num=num, method="plain")


def _gbm_to(tol: float) -> Expectation:
    return sf.expect(call_payoff, geometric(), ONE, EulerMaruyama(), tol=tol)


def _milstein_to(tol: float) -> Expectation:
    return sf.expect(call_payoff, geometric(), ONE, Milstein(), tol=tol)


def _mixture_to(tol: float, *, model: sf.Model) -> Expectation:
    return sf.expect(square, model, solver=DPMSolverPP(2), shape=(1,), tol=tol, dtype=F64)


def print_complexity() -> None:
    model = line_mixture().model(sf.VP())
    price, moment = black_scholes(), line_square()
    halves = [0.016, 0.008, 0.004, 0.002, 0.001]
    cases: list[tuple[str, Callable[[float], Expectation], float, list[float], str]] = [
        ("GBM call, Euler (beta 1)", _gbm_to, price, halves, "-2 (log^2), plain -3"),
        ("GBM call, Milstein (beta 2)", _milstein_to, price, [0.016, 0.008, 0.004, 0.002], "-2, plain -3"),
        (
            "mixture x^2, flow (beta 4)",
            partial(_mixture_to, model=model),
            moment,
            halves,
            "-2, plain -2.5",
        ),
    ]
    rows, slopes = [], []
    for name, run, exact, tolerances, predicted in cases:
        calls, others = [], []
        problem = model if "mixture" in name else geometric()
        variance = 20_000 * float(plain(problem, 64, num=20_000).stderr) ** 2
        for tol in tolerances:
            start = time.perf_counter()
            found = run(tol)
            seconds = time.perf_counter() - start
            steps, other = plain_cost(found, tol, variance)
            calls.append(found.nfe - found.pilot_nfe)
            others.append(other)
            error = float(found.mean) - exact
            run_cost = "-"
            if other < _RUN_BELOW:
                straight = plain(problem, steps, tol=0.75 * tol)
                run_cost = f"{straight.nfe - straight.pilot_nfe:.3g}"
            rows.append([
                name, f"{tol:g}", f"{error:+.1e}", f"{found.half_width:.1e}", f"{calls[-1]:.3g}", f"{other:.3g}",
                run_cost, f"{other / calls[-1]:.1f}", str(steps), str(len(found.levels)), f"{seconds:.1f}",
            ])  # fmt: skip
        fitted = [f"{fitted_order(tolerances, costs):.2f}" for costs in (calls, others)]
        slopes.append([name, *fitted, predicted])
    columns = ["tol", "error", "half", "calls", "plain's calls", "run", "ratio", "plain's steps", "levels", "s"]
    show("to the exact law: multilevel, and what plain Monte Carlo would take", ["problem", *columns], rows)
    show("slope of calls against tolerance", ["problem", "multilevel", "plain", "theory"], slopes)


# ---- variance reduction


def power_law(dimension: int = 16, spread: float = 0.1) -> GaussianMixture:
    """Ten Gaussians with a power-law spectrum, a share `spread` of the variance in the means."""
    spectrum = 1 / (1.0 + torch.arange(dimension, dtype=F64)) ** 1.5
    spectrum = dimension * spectrum / spectrum.sum() / 4
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(10, dimension, generator=generator, dtype=F64) * (spread * spectrum).sqrt()
    return GaussianMixture(means, ((1 - spread) * spectrum).expand(10, dimension))


def ratio_rows() -> list[list[str]]:
    """A row a problem and functional: the ratio of each method by the pilot, and what is taken."""
    rows = []
    for eta in (0.0, 1.0):
        for label, spread in (("P10", 0.1), ("P50", 0.5)):
            model = power_law(spread=spread).model(sf.VP())
            for functional in (linear, sigmoid, energy, share):
                found = sf.expect(
                    functional,
                    model,
                    solver=DPMSolverPP(2),
                    shape=(16,),
                    steps=16,
                    eta=eta,
                    tol=0.5,
                    pilot=4096,
                    dtype=F64,
                )
                rows.append([f"{label}, eta {eta:g}", functional.__name__, *_ratios(found)])
    for functional in (linear, square, call_payoff):
        found = sf.expect(functional, geometric(), ONE, EulerMaruyama(), steps=64, tol=0.05, pilot=4096)
        rows.append(["GBM, Euler 64", functional.__name__, *_ratios(found)])
    return rows


def _ratios(found: Expectation) -> list[str]:
    ratio = {row.method: row.ratio for row in found.pilot}
    shown = [f"{ratio[m]:.2f}" for m in ("antithetic", "sobol", "control", "multilevel")]
    return [*(v.replace("nan", "-") for v in shown), found.method]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Coverage, complexity and savings of sf.expect.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=500)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    print_coverage(given.repetitions)
    print_complexity()
    columns = ["antithetic", "sobol", "control", "multilevel", "taken"]
    show("cost of plain Monte Carlo over the method's, equal error", ["problem", "functional", *columns], ratio_rows())


if __name__ == "__main__":
    main()
