"""Valid calls of what solves: solve, iterate, sample, encode, likelihoods, plans, tuning."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

import sdeflow as sf
from benchmarks.fuzzing.target import Target, allow
from benchmarks.fuzzing.targets_constructors import data, net
from benchmarks.fuzzing.targets_solvers import MODEL, Spring, flow, reverse
from sdeflow import grids, solvers

NETWORK = sf.Model(net, sf.VP(), "eps")
GRID = torch.tensor([1.0, 0.7, 0.3, 0.01], dtype=torch.float64)
ANY_TIME = "a vector; NaN; a tensor of NaN"
"""Times of a function of time: one a sample or element, and NaN gives NaN there."""
NO_ROWS = "no rows"
"""A batch of none is a batch to a function of states."""
OPTIONAL = {
    name: frozenset({"None"}) for name in ("solver", "t0", "t1", "t_span", "index", "seed", "prior", "save", "noise")
}


def _last(states: Any) -> Any:
    return [state.x for state in states][-1]


def _coded(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "t0": 0.01, "t1": 1.0, "solver": solvers.Heun(), "steps": 2, **more}


def _grid(row: grids.GridRow) -> dict[str, Any]:
    """Arguments of a grid function, its options with their defaults."""
    process = sf.DiscreteVP([0.02] * 20) if row.needs == "table" else sf.VP()
    options = getattr(row.make, "__wrapped__", row.make).__kwdefaults__ or {}
    return {"process": process, "steps": 4, "t_start": 1.0, "t_end": 0.05, **options}


TARGETS: tuple[Target, ...] = (
    Target("solve, steps", sf.solve,
           lambda: {"problem": reverse(), "x": data(), "solver": solvers.EulerMaruyama(), "steps": 3,
                    "t_span": (1.0, 0.1), "seed": 1, "index": 4, "save": True, "progress": False, "throw": False,
                    "max_steps": 100, "gradient": "direct", "compiled": False}, allows=OPTIONAL),
    Target("solve, grid", sf.solve,
           lambda: {"problem": flow(), "x": data(), "solver": solvers.DPMSolverPP(2), "grid": GRID,
                    "save": (1.0, 0.3), "throw": False}, allows=OPTIONAL),
    Target("solve, grid with noise", sf.solve,
           lambda: {"problem": reverse(), "x": data(), "solver": solvers.DPMSolverPP(2), "grid": GRID,
                    "noise": sf.SamePath(3), "index": torch.arange(3), "throw": False}, allows=OPTIONAL),
    Target("solve, grid function", sf.solve,
           lambda: {"problem": flow(), "x": data(), "solver": solvers.Heun(), "grid": grids.uniform, "steps": 3,
                    "throw": False}, allows=allow(grid="None") | OPTIONAL),
    Target("solve, tolerance", sf.solve,
           lambda: {"problem": flow(), "x": data(), "solver": solvers.Tsit5(), "rtol": 1e-2, "atol": 1e-3,
                    "t_span": (1.0, 0.2), "save": (0.9, 0.5), "throw": False, "max_steps": 1000},
           allows=OPTIONAL | allow(rtol="None", atol="None", solver="None")),
    Target("solve, ODE", sf.solve,
           lambda: {"problem": Spring(), "x": data(), "solver": solvers.RK4(), "steps": 2, "t_span": (0.0, 0.5)},
           allows=OPTIONAL),
    Target("solve, adjoint", sf.solve,
           lambda: {"problem": flow(), "x": data().requires_grad_(), "solver": solvers.Heun(), "steps": 2,
                    "gradient": "adjoint"}),
    Target("iterate", lambda **given: _last(sf.iterate(**given)),
           lambda: {"problem": reverse(), "x": data(), "solver": solvers.EulerMaruyama(), "steps": 3,
                    "t_span": (1.0, 0.1), "seed": 1, "index": 4, "max_steps": 100}, allows=OPTIONAL),
    Target("SDE.simulate", sf.VP().simulate,
           lambda: {"x0": data(), "steps": 3, "seed": 1}, allows=OPTIONAL),
    Target("SDE.reverse", sf.VP().reverse,
           lambda: {"model": MODEL, "eta": 0.5},
           lambda problem: sf.solve(problem, data(), solvers.EulerMaruyama(), steps=2, seed=0, throw=False),
           allow(model="a function")),
    Target("sample", sf.sample,
           lambda: {"model": MODEL, "num": 3, "shape": (2,), "solver": solvers.EulerMaruyama(), "steps": 3,
                    "eta": 1.0, "t_span": (1.0, 0.1), "seed": 1, "index": 4, "final": "stay",
                    "dtype": torch.float32, "device": "cpu", "throw": False},
           allows=OPTIONAL | allow(dtype="None", device="None")),
    Target("sample, auto", sf.sample,
           lambda: {"model": MODEL, "num": 3, "shape": (2,), "solver": "auto", "steps": 5, "eta": 0.0,
                    "final": "denoise", "throw": False}),
    Target("encode", sf.encode, lambda: _coded(x=data(), throw=False), allows=OPTIONAL),
    Target("decode", sf.decode, lambda: _coded(z=data(), throw=False), allows=OPTIONAL),
    Target("interpolate", sf.interpolate, lambda: {"a": data(), "b": data() + 1, "n": 3, "mode": "spherical"}),
    Target("interpolate_data", sf.interpolate_data, lambda: _coded(a=data(), b=data() + 1, n=3, mode="linear"),
           allows=OPTIONAL),
    Target("log_prob", sf.log_prob,
           lambda: _coded(x=data(), divergence="hutchinson", probes=1, seed=0, index=2, throw=False),
           lambda found: found.log_prob, allows=OPTIONAL),
    Target("bits_per_dim", sf.bits_per_dim,
           lambda: _coded(x=(data() > 0) * 2.0 - 1, levels=256, cells="around", dequantise=True, draws=1,
                          divergence="exact", probes=1, seed=0), lambda found: found.bits,
           allows=OPTIONAL),
    Target("elbo", sf.elbo, lambda: {"model": MODEL, "x": data(), "t0": 0.01, "t1": 1.0, "draws": 4, "seed": 0,
                                     "index": 2}, lambda found: found.__dict__, allows=OPTIONAL),
    Target("recommend", sf.recommend, lambda: {"process": sf.VP(), "nfe": 5, "stochastic": False},
           lambda found: found.grid(sf.VP(), found.steps)),
    Target("tune", sf.tune,
           lambda: {"model": MODEL, "solver": solvers.DPMSolverPP(2), "steps": 2, "shape": (2,), "calibration": 4,
                    "seed": 0, "coefficients": False, "starts": {"uniform": grids.uniform}, "iterations": 1,
                    "t_span": (1.0, 0.05), "dtype": torch.float64, "device": "cpu"},
           lambda plan: plan.grid, OPTIONAL | allow(dtype="None", device="None", starts="None")),
    Target("solver.plan", solvers.DPMSolverPP(2).plan,
           lambda: {"problem": flow(), "grid": GRID}, lambda plan: plan.weights),
    Target("moments", sf.moments, lambda: {"sde": sf.GBM(), "x0": torch.tensor([[0.5], [0.7]]), "t": 0.5, "degree": 2},
           lambda found: found[1]),
    Target("process.marginal", sf.VP().marginal, lambda: {"x0": data(), "t": 0.5},
           allows=allow(t=ANY_TIME, x0=NO_ROWS)),
    Target("process.marginal, times", sf.VP().marginal, lambda: {"x0": data(), "t": torch.tensor([0.1, 0.5, 0.9])},
           allows=allow(x0=NO_ROWS)),
    Target("process.perturb", sf.VP().perturb, lambda: {"x0": data(), "t": 0.5, "eps": data()},
           allows=allow(t=ANY_TIME)),
    Target("process.transition_kernel", sf.VP().transition_kernel, lambda: {"s": 0.2, "t": 0.5},
           allows=allow(s="a vector", t="a vector")),
    Target("process.prior_sample", sf.VP().prior_sample,
           lambda: {"shape": (3, 2), "seed": 1, "index": 2, "dtype": torch.float32, "device": "cpu"}, allows=OPTIONAL),
    Target("process.alpha", lambda t: sf.VP().alpha(t), lambda: {"t": 0.5}, allows=allow(t=ANY_TIME)),
    Target("process.time_of_lam", lambda lam: sf.CosineVP().time_of_lam(lam), lambda: {"lam": 0.5},
           allows=allow(lam=ANY_TIME)),
    Target("model()", NETWORK, lambda: {"x": data(), "t": 0.5, "as_": "score"},
           allows=allow(t=ANY_TIME, x=NO_ROWS)),
    Target("model(), times", NETWORK, lambda: {"x": data(), "t": torch.tensor([0.1, 0.5, 0.9]), "as_": "x0"},
           allows=allow(t="NaN")),
    Target("model.bind", NETWORK.bind, lambda: {"label": torch.tensor([1, 2, 3])},
           lambda model: model.score(data(), 0.5),
           allow(label="*")),  # a network of the user's own is given what it is bound to, as it is
    *(
        Target(f"grids.{name}", row.make, partial(_grid, row), allows=allow(t_start="None", t_end="None"))
        for name, row in grids.GRIDS.items()
    ),
)  # fmt: skip
"""What takes a problem or a model and integrates it, and the parts of that."""
