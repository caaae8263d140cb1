"""Valid calls of what runs many samples, keeps statistics of them, or reads what others have written."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sdeflow as sf
from benchmarks.fuzzing.target import FREE_TEXT, Target, allow
from benchmarks.fuzzing.targets_constructors import data
from benchmarks.fuzzing.targets_solvers import MODEL
from sdeflow import engine, statistics
from sdeflow.dataset import Dataset
from sdeflow.ensemble import ensemble
from sdeflow.integrations import diffusers_config, hub
from sdeflow.sample_run import sample_to
from sdeflow.solvers import EulerMaruyama, Heun


def filled(statistic: Any) -> Any:
    """A statistic of some values, twice, merged."""
    other = statistic.empty()
    statistic.add(data(6).double())
    other.add(data(4).double())
    statistic.merge(other)
    return tuple(statistic.arrays().values()), statistic.count


def square(solution: sf.Solution) -> Tensor:
    """A functional of ends."""
    return solution.x.square().sum(1)


def value(x: Tensor) -> Tensor:
    """A functional of end states."""
    return x.square().sum(1)


def plus_one(block: Tensor) -> Tensor:
    """Features."""
    return block.flatten(1) + 1


def _sampled(**given: Any) -> Any:
    """`sample_to` in a new folder, its samples; a call that is refused leaves no file there."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        try:
            file = sample_to(out, **given)
        except Exception:
            left = [path for path in out.rglob("*") if path.is_file() and ".part" in path.name]
            assert not left, f"a part of a file is left: {left}"
            raise
        return Dataset(out).columns(Dataset(out).shards[0])["samples"] if file.name.startswith("samples") else None


def _kept(found: Any) -> Any:
    return tuple(found["end"].arrays().values())


def _worked(made: engine.Engine) -> Any:
    return sorted(made.map(abs, [3, -1])) if made.workers == 1 else made.workers  # no pool of processes here


def _table(**config: Any) -> dict[str, Any]:
    return {
        "num_train_timesteps": 10, "beta_start": 0.01, "beta_end": 0.2, "beta_schedule": "linear",
        "prediction_type": "epsilon", "clip_sample": True, "clip_sample_range": 1.0, "rescale_betas_zero_snr": False,
        "thresholding": False, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5, **config,
    }  # fmt: skip


OPTIONAL_ENTRIES = {name: frozenset({"None"}) for name in (*_table(), "trained_betas", "grid", "seed", "_class_name")}
"""An entry that is None is as good as none: diffusers writes them so."""


def _from_config(**config: Any) -> Any:
    model = sf.Model.from_diffusers(lambda x, t: 0.1 * x, config)
    return model.score(data(), 0.5)


def _read(**config: Any) -> Any:
    found = diffusers_config.read_config(config)
    return diffusers_config.process_of(found).alpha(0.5), diffusers_config.prediction_of(found)


def _scheduler(**given: Any) -> Any:
    from sdeflow.integrations.diffusers_scheduler import PlanScheduler

    made = PlanScheduler(**given)
    made.set_timesteps(3)
    return made.timesteps


def _hub(**given: Any) -> Any:
    """A load that finds nothing: only what is refused before the client is asked, or by it, ends in an error."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    with tempfile.TemporaryDirectory() as folder:
        try:
            return hub.load_model(**{**given, "cache_dir": folder, "local_files_only": True})
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            raise ValueError(str(error)) from error


def _named(name: str, address: str | None, workers: int) -> Any:
    if name == "ray":
        raise ValueError("not tried here: it would start Ray")
    return _worked(engine.named(name, address=address, workers=workers))


STATISTICS: tuple[Target, ...] = (
    Target("statistics.Moments", statistics.Moments, lambda: {"order": 2, "centre": 0.5}, filled),
    Target("statistics.Moments, centre", statistics.Moments,
           lambda: {"order": 4, "centre": torch.zeros(2, dtype=torch.float64)}, filled),
    Target("statistics.Covariance", statistics.Covariance, lambda: {"centre": 0.5}, filled),
    Target("statistics.Frechet", statistics.Frechet, lambda: {"features": plus_one}, filled,
           allow(features="None; gives NaN")),
    Target("statistics.Histogram", statistics.Histogram,
           lambda: {"edges": torch.linspace(-1, 1, 4, dtype=torch.float64)}, filled),
    Target("statistics.Quantiles", statistics.Quantiles,
           lambda: {"accuracy": 0.01, "least": 1e-6, "most": 1e6}, filled),
    Target("statistics.Functional", statistics.Functional,
           lambda: {"function": square, "statistic": statistics.Moments()},
           lambda made: ensemble(sf.VP(), data()[0], 4, steps=2, statistics={"end": made})["end"].mean),
    Target("statistics.Moments.add", lambda x: _added(statistics.Moments(), x).mean, lambda: {"x": data().double()}),
    Target("statistics.Histogram.add", lambda x: filled(_added(statistics.Histogram([-1.0, 0.0, 1.0]), x)),
           lambda: {"x": data().double()}, allows=allow(x="no rows; NaN everywhere; one NaN")),
    Target("statistics.Quantiles.quantile", lambda q: _added(statistics.Quantiles(), data().double()).quantile(q),
           lambda: {"q": 0.5}),
)  # fmt: skip


def _added(statistic: Any, x: Tensor) -> Any:
    statistic.add(x)
    return statistic


RUNS: tuple[Target, ...] = (
    Target("ensemble", ensemble,
           lambda: {"problem": sf.VP(), "start": data()[0], "num": 5, "solver": EulerMaruyama(), "steps": 2, "seed": 1,
                    "statistics": {"end": statistics.Moments()}, "batch": 4, "t_span": (0.0, 0.5), "threads": 1,
                    "shard": 4, "kind": "safetensors", "store": False},
           _kept, allow(solver="None", shard="None", t_span="None")),
    Target("ensemble, a function of indices", ensemble,
           lambda: {"problem": sf.VP(), "start": lambda index: data(len(index)), "num": 3, "steps": 2,
                    "statistics": {"end": statistics.Moments()}}, _kept, allow(start="a tensor; gives NaN")),
    Target("sample_to", _sampled,
           lambda: {"model": MODEL, "num": 3, "shape": (2,), "solver": Heun(), "chunk": 2, "seed": 1, "kind": "npz",
                    "shard": 2, "merge": True, "threads": 1, "steps": 2, "eta": 0.0, "t_span": (1.0, 0.1),
                    "dtype": torch.float32, "device": "cpu", "final": "stay"},
           allows=allow(shard="None", t_span="None", dtype="None", device="None", kind="no-such-choice")),
    Target("engine.Local", engine.Local, lambda: {"workers": 1}, _worked),
    Target("engine.named", _named, lambda: {"name": "local", "address": None, "workers": 1},
           allows=allow(address="None", workers="None")),
    Target("sf.expect", sf.expect,
           lambda: {"functional": value, "problem": MODEL, "solver": Heun(), "shape": (2,), "steps": 2, "num": 64,
                    "confidence": 0.95, "method": "plain", "seed": 0, "pilot": 64, "batch": 64, "max_num": 1000,
                    "eta": 0.0, "t_span": (1.0, 0.1), "dimension": 4, "coarsest": 2},
           lambda found: found.mean, allow(solver="None", t_span="None")),
    Target("sf.expect, an SDE", sf.expect,
           lambda: {"functional": value, "problem": sf.VP(), "x": data()[0], "solver": EulerMaruyama(),
                    "steps": 2, "tol": 0.5, "pilot": 64, "method": "antithetic"}, lambda found: found.mean),
)  # fmt: skip

BRIDGES: tuple[Target, ...] = (
    Target("Model.from_diffusers", _from_config, _table, allows=OPTIONAL_ENTRIES),
    Target("diffusers_config.read_config", _read, lambda: _table(trained_betas=torch.linspace(0.01, 0.2, 10)),
           allows=OPTIONAL_ENTRIES | allow(beta_schedule="None; " + FREE_TEXT)),  # the betas themselves come first
    Target("Model.from_diffusers, EDM", _from_config,
           lambda: {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5,
                    "prediction_type": "epsilon"},
           allows=OPTIONAL_ENTRIES | allow(_class_name="None; empty text", sigma_max="None", sigma_min="None",
                                           sigma_data="None")),
    Target("PlanScheduler", _scheduler,
           lambda: {"solver": "DPMSolverPP(2)", "grid": "karras", "eta": 0.0, "seed": 1, **_table()},
           allows=OPTIONAL_ENTRIES | allow(solver="with a blank")),
    Target("PlanScheduler, times", _scheduler,
           lambda: {"solver": "DPMSolverPP(2)", "grid": (0.9, 0.5, 0.1, 0.01), "eta": 0.0, "seed": 1, **_table()},
           allows=OPTIONAL_ENTRIES | allow(solver="with a blank")),
    Target("hub.load_model", _hub,
           lambda: {"repo_id": "owner/name", "filename": "model.safetensors", "revision": "main"},
           allows=allow(revision="None")),
)  # fmt: skip

TARGETS: tuple[Target, ...] = STATISTICS + RUNS + BRIDGES
"""What runs many samples or reads what others have written."""
