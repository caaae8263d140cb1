"""Valid calls of the rest: losses, metrics, guidance, inverse problems, checks, the benchmark."""

from __future__ import annotations

from typing import Any

import torch

import sdeflow as sf
from benchmarks.fuzzing.target import FREE_TEXT, Target, allow
from benchmarks.fuzzing.targets_constructors import data, net
from benchmarks.fuzzing.targets_solvers import MODEL, Spring
from sdeflow import bench, guidance, inverse, losses, metrics, solvers, testing

NETWORK = sf.Model(net, sf.VP(), "eps")
TIMES = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
TABLE = sf.Model(net, sf.DiscreteVP([0.05] * 10), "eps")
GRID = torch.tensor([1.0, 0.6, 0.3, 0.05], dtype=torch.float64)


def _loss(**more: Any) -> dict[str, Any]:
    return {"model": NETWORK, "x0": data(), "t": TIMES, "eps": data(), **more}


def _guided(model: sf.Model) -> Any:
    return model.score(data(), 0.5)


def _observation(noise_std: float = 0.2) -> inverse.LinearObservation:
    return inverse.LinearObservation.from_matrix(torch.tensor([[1.0, 0.0]]), noise_std)


def pixels() -> torch.Tensor:
    """Black and white."""
    return (data() > 0) * 2.0 - 1


LOSSES: tuple[Target, ...] = (
    Target("losses.denoising", losses.denoising, lambda: _loss(as_="eps"), allows=allow(as_="None")),
    Target("losses.flow_matching", losses.flow_matching, _loss),
    Target("losses.diffusion_rate", losses.diffusion_rate, _loss),
    Target("losses.implicit", losses.implicit, lambda: {"model": NETWORK, "x": data(), "t": TIMES}),
    Target("losses.sliced", losses.sliced,
           lambda: {"model": NETWORK, "x": data(), "t": TIMES, "directions": data(), "reduce_variance": True}),
    Target("losses.kernel_matching", losses.kernel_matching,
           lambda: {"model": NETWORK, "x": data(), "t": TIMES, "target": data()}),
    Target("losses.kernel_score", losses.kernel_score,
           lambda: {"process": sf.VP(), "x": data(), "t": TIMES, "x0": data()}),
    Target("losses.step_bits", losses.step_bits,
           lambda: {"model": TABLE, "x0": pixels(), "n": 3, "eps": data(), "variance": "posterior", "levels": 256},
           allows=allow(levels="None")),
    Target("losses.hybrid", losses.hybrid,
           lambda: {"model": TABLE, "x0": pixels(), "n": 3, "eps": data(),
                    "variance": lambda x, t: 0.5 + 0 * x, "vlb_weight": 0.001,
                    "levels": 256}, allows=allow(levels="None")),
    Target("losses.bound_bits", losses.bound_bits,
           lambda: {"model": TABLE, "x0": pixels(), "variance": "posterior", "levels": 256},
           allows=allow(levels="None")),
    Target("losses.prior_bits", losses.prior_bits, lambda: {"process": sf.VP(), "x0": data()}),
    Target("losses.reconstruction_bits", losses.reconstruction_bits,
           lambda: {"process": sf.VP(), "x0": pixels(), "t": 0.001, "eps": data(), "levels": 256},
           allows=allow(levels="None", t="a vector")),
    Target("losses.discretised_log_likelihood", losses.discretised_log_likelihood,
           lambda: {"x": pixels(), "mean": data(), "log_variance": data(), "levels": 256}),
    *(
        Target(f"losses.{make.__name__}", make, lambda: {"process": sf.VP(), "n": 4, "t_min": 0.01},
               allows=allow(t_min="None"))
        for make in (losses.uniform_times, losses.stratified_times, losses.offset_times)
    ),
    *(
        Target(f"losses.{make.__name__}", make,
               lambda: {"process": sf.VP(), "n": 4, "t_min": 0.01, "mean": 0.0, "std": 1.0}, allows=allow(t_min="None"))
        for make in (losses.log_normal_times, losses.logit_normal_times)
    ),
    Target("losses.grid_times", losses.grid_times, lambda: {"grid": GRID}, lambda draw: draw(sf.VP(), 4)),
    Target("losses.consistency", losses.consistency, lambda: {"grid": GRID, "order": 1, "huber": 0.1},
           lambda loss: loss(NETWORK, data(), GRID[:3], data()), allow(huber="None")),
    Target("losses.LossHistory", losses.LossHistory, lambda: {"bins": 4, "history": 3, "uniform": 0.01}, repr),
    Target("losses.loss_ratio", losses.loss_ratio,
           lambda: {"process": sf.VP(), "t": TIMES, "given": "eps", "wanted": "x0"}, allows=allow(t="no rows")),
    Target("losses.weights.truncated_snr", losses.weights.truncated_snr, dict,
           lambda weight: losses.denoising(NETWORK, data(), TIMES, data(), weight=weight)),
)  # fmt: skip

METRICS: tuple[Target, ...] = (
    Target("metrics.fitted_order", metrics.fitted_order, lambda: {"sizes": (0.1, 0.2, 0.4), "errors": (1.0, 2.1, 3.9)}),
    Target("metrics.frechet", metrics.frechet, lambda: {"x": data(8), "y": data(8) + 0.1}),
    Target("metrics.mmd", metrics.mmd,
           lambda: {"x": data(8), "y": data(8) + 0.1, "bandwidths": (0.5, 1.0), "bootstrap": 5, "seed": 0},
           lambda found: found.value),
    Target("metrics.sliced_w2", metrics.sliced_w2,
           lambda: {"x": data(8), "y": data(8) + 0.1, "projections": 4, "seed": 0}, lambda found: found.value),
    Target("metrics.trajectory_error", metrics.trajectory_error,
           lambda: {"x": data(8), "x_ref": data(8) + 0.1, "tau": 0.5, "centres": data(2)},
           lambda found: (found.median, found.rms), allow(tau="None", centres="None")),
    Target("metrics.w2_gaussian", metrics.w2_gaussian,
           lambda: {"mean1": torch.zeros(2), "cov1": torch.eye(2), "mean2": torch.ones(2), "cov2": torch.eye(2)}),
)  # fmt: skip

MODELS: tuple[Target, ...] = (
    Target("guidance.add_score", guidance.add_score,
           lambda: {"model": NETWORK, "term": lambda x, t: -x, "scale": 0.5}, _guided, allow(term="a function")),
    Target("guidance.add_term", guidance.add_term,
           lambda: {"model": NETWORK, "log_likelihood": lambda x, t: -(x**2).sum(1), "scale": 0.5}, _guided),
    Target("guidance.classifier_free", guidance.classifier_free,
           lambda: {"model": NETWORK, "unconditional": NETWORK, "scale": 2.0, "interval": (0.1, 5.0), "rescale": 0.5,
                    "interval_in": "sigma"}, _guided, allow(interval="None")),
    Target("guidance.classifier_guidance", guidance.classifier_guidance,
           lambda: {"model": NETWORK, "log_prob": lambda x, t: -(x**2).sum(1), "scale": 0.5}, _guided),
    Target("guidance.clip_x0", guidance.clip_x0, lambda: {"model": NETWORK, "low": -1.0, "high": 1.0}, _guided),
    Target("guidance.dynamic_threshold", guidance.dynamic_threshold,
           lambda: {"model": NETWORK, "quantile": 0.9, "floor": 1.0}, _guided),
    Target("inverse.LinearObservation.from_matrix", inverse.LinearObservation.from_matrix,
           lambda: {"matrix": torch.tensor([[1.0, 0.0]]), "noise_std": 0.2, "event": (2,)},
           lambda made: made.forward(data()), allow(event="None")),
    Target("inverse.LinearObservation.inpainting", inverse.LinearObservation.inpainting,
           lambda: {"mask": torch.tensor([True, False]), "noise_std": 0.2}, lambda made: made.forward(data())),
    Target("inverse.LinearObservation.super_resolution", inverse.LinearObservation.super_resolution,
           lambda: {"factor": 2, "noise_std": 0.2}, lambda made: made.forward(torch.zeros(2, 1, 4, 4))),
    Target("inverse.LinearObservation.blur", inverse.LinearObservation.blur,
           lambda: {"kernel": torch.ones(3, 3) / 9, "noise_std": 0.2},
           lambda made: made.forward(torch.zeros(2, 1, 4, 4))),
    Target("inverse.LinearObservation", inverse.LinearObservation,
           lambda: {"forward": lambda x: x[:, :1], "adjoint": lambda y: torch.cat([y, y * 0], 1), "noise_std": 0.2},
           lambda made: inverse.dps(MODEL, made, torch.zeros(1, 1)).score(data(), 0.5)),
    *(
        Target(f"inverse.{make.__name__}", make,
               lambda: {"model": MODEL, "observation": _observation(), "y": torch.zeros(1, 1), "scale": 0.5}, _guided)
        for make in (inverse.dps, inverse.pigdm)
    ),
    Target("inverse.Replacement", inverse.Replacement,
           lambda: {"solver": solvers.DDIM(), "observation": _observation(0.0), "y": torch.zeros(1, 1), "resample": 1},
           lambda made: sf.solve(sf.VP().probability_flow(MODEL), data(), made, steps=2, seed=0, throw=False)),
)  # fmt: skip

CHECKS: tuple[Target, ...] = (
    Target("testing.check_sde", testing.check_sde, lambda: {"sde": sf.VP(), "event": (1,), "points": 4, "seed": 0},
           lambda report: report.subject, allow(event="None")),
    Target("testing.check_model", testing.check_model, lambda: {"model": MODEL, "event": (2,), "points": 4, "seed": 0},
           lambda report: report.subject, allow(event="None; a part more")),
    Target("testing.check_noise", testing.check_noise, lambda: {"seed": 0, "samples": 512},
           lambda report: report.subject),
    Target("testing.check_solver", testing.check_solver, lambda: {"solver": solvers.Euler(), "problem": Spring()},
           lambda report: report.subject, allow(problem="None")),
    Target("bench.Problem", bench.Problem,
           lambda: {"model": MODEL, "shape": (2,), "name": "own", "tolerance": 1e-2, "samples": 4, "draws": 16},
           lambda problem: [r.status for r in bench.run(problem, solvers=["Euler"], grids=["uniform"], nfe=[3])],
           allow(name=FREE_TEXT)),
    Target("bench.run", bench.run,
           lambda: {"problem": bench.Problem(MODEL, (2,), tolerance=1e-2, samples=4), "solvers": ("Euler",),
                    "grids": ("uniform",), "nfe": (3,), "samples": 4, "draws": 16, "tolerance": 1e-2, "seed": 0},
           lambda results: [r.status for r in results],
           allow(solvers="None", grids="None", nfe="None", samples="None", draws="None", tolerance="None")),
)  # fmt: skip

TARGETS: tuple[Target, ...] = LOSSES + METRICS + MODELS + CHECKS
"""What is neither a constructor of a process or a solver nor a solve."""
