"""What the configuration of a diffusers scheduler says: the process, the prediction, clipping.

A scheduler of that package is a process, a sampler and a grid in one record. The process and the prediction belong to
the network and are read here; its grid in `diffusers_grids`. Its sampler is not read: any solver takes its place.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sdeflow.checked import described, numbers
from sdeflow.discrete import DiscreteVP
from sdeflow.gaussian import GaussianSDE
from sdeflow.model import Prediction
from sdeflow.processes import EDM, RectifiedFlow

Config = dict[str, Any]
Kind = Literal["table", "flow", "edm"]

_PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "eps",
    "sample": "x0",
    "original_sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "velocity",
}
_OTHER_TABLES = {
    "snr_shift_scale": "a shift of its noise levels",
    "scaler": "a continuous cosine schedule",
}


def read_config(scheduler_config: Any) -> Config:
    """The entries of a scheduler, of its `.config`, a dictionary, or a saved `scheduler_config.json`.

    Entries that are None are left out; those that are missing are its class's defaults, where `_class_name` is known.

    Args:
        scheduler_config: a scheduler object, a mapping, or the path of such a file or of a folder with one, also of a
            pipeline's folder.

    Raises:
        TypeError: none of these.
        ValueError: no such file, or one that is no JSON object.
    """
    if isinstance(scheduler_config, (str, Path)):
        config = _from_file(Path(scheduler_config))
    elif isinstance(scheduler_config, Mapping):
        config = dict(scheduler_config)
    elif isinstance(getattr(scheduler_config, "config", None), Mapping):
        config = {**scheduler_config.config, "_class_name": type(scheduler_config).__name__}
    else:
        raise TypeError(
            "expected a diffusers scheduler, its config, a dictionary or the path of a scheduler_config.json, got "
            f"{type(scheduler_config).__name__}"
        )
    if config.get("_class_name") == "PlanScheduler":  # ours: what it stands in for
        config["_class_name"] = config.get("source")
    config = {key: value for key, value in config.items() if value is not None}
    _check(config)
    return {**_class_defaults(config.get("_class_name")), **config}


_POSITIVE = (
    "beta_start", "beta_end", "clip_sample_range", "sigma_min", "sigma_max", "sigma_data", "rho", "shift",
    "sample_max_value", "dynamic_thresholding_ratio",
)  # fmt: skip
_TEXT = ("_class_name", "prediction_type", "beta_schedule", "timestep_spacing", "final_sigmas_type", "sigma_schedule")
_FLAGS = (
    "clip_sample", "thresholding", "rescale_betas_zero_snr", "use_flow_sigmas", "invert_sigmas", "use_karras_sigmas",
    "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_dynamic_shifting", "set_alpha_to_one",
)  # fmt: skip
_LONGEST = 1_000_000
_LARGEST = 1e30
"""A number whose square float32 may not hold, but no more than that."""


def _check(config: Config) -> None:
    """Refuse entries of another kind than theirs."""
    for key in _TEXT:
        if not isinstance(config.get(key, ""), str):
            raise ValueError(f"expected {key} as text, got {config[key]!r}")
    for key in _POSITIVE:
        value = config.get(key, 1.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _LARGEST:
            raise ValueError(f"expected a finite {key} > 0, got {described(value)} (at most {_LARGEST:g})")
    if config.get("dynamic_thresholding_ratio", 1.0) > 1:
        raise ValueError(f"expected dynamic_thresholding_ratio in (0, 1], got {config['dynamic_thresholding_ratio']!r}")
    for key in _FLAGS:
        if not isinstance(config.get(key, False), bool):
            raise ValueError(f"expected {key} as true or false, got {config[key]!r:.60}")
    size = config.get("num_train_timesteps", 2)
    if isinstance(size, bool) or not isinstance(size, int) or not 2 <= size <= _LONGEST:
        raise ValueError(f"expected num_train_timesteps from 2 to {_LONGEST}, got {size!r}")
    if isinstance(config.get("trained_betas"), str):
        raise ValueError(f"expected trained_betas as numbers, got {config['trained_betas']!r}")


def _from_file(path: Path) -> Config:
    tried = [path] if path.is_file() else [path / "scheduler_config.json", path / "scheduler" / "scheduler_config.json"]
    for file in tried:
        if file.is_file():
            try:
                config = json.loads(file.read_text(encoding="utf-8"))
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise ValueError(f"{file}: expected a scheduler's configuration as JSON, got {error}") from error
            if not isinstance(config, dict):
                raise ValueError(f"{file}: expected a JSON object, got {type(config).__name__}")
            return config
    raise ValueError(f"expected the path of a scheduler_config.json or of a folder with one, got {str(path)!r}")


def _class_defaults(name: str | None) -> Config:
    """The defaults of a scheduler's class, which saved configurations may leave out."""
    if name is None:
        return {}
    try:
        import diffusers
    except ImportError:
        return {}
    made = getattr(diffusers, name, None)
    if not isinstance(made, type):
        return {}
    parameters = inspect.signature(made).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty and p.default is not None}


def own_entries(made: Callable[..., Any], scheduler_config: Any, but: tuple[str, ...]) -> Config:
    """The entries of a configuration that `made` takes by name, without those of `but`, and its class as `source`."""
    config = read_config(scheduler_config)
    names = set(inspect.signature(made).parameters) - set(but)
    entries = {key: value for key, value in config.items() if key in names}
    if hasattr(entries.get("trained_betas"), "tolist"):  # an array or a tensor, which JSON does not hold
        entries["trained_betas"] = entries["trained_betas"].tolist()
    return {**entries, "source": config.get("_class_name")}


def needed(config: Config, key: str) -> Any:
    """An entry that must be there."""
    if key not in config:
        raise ValueError(
            f"the scheduler's configuration has no {key!r}: pass the scheduler itself, or its saved file, which also "
            f"name its class; got {', '.join(sorted(config)) or 'nothing'}"
        )
    return config[key]


def kind_of(config: Config) -> Kind:
    """ "edm" for a network in EDM's preconditioning, "flow" for the straight path, "table" for betas.

    Raises:
        ValueError: none of these.
    """
    name = config.get("_class_name", "")
    if name in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"):
        return "edm"
    if not name and "sigma_data" in config and ("thresholding" in config or "solver_order" not in config):
        return "edm"  # CosineDPMSolver, whose network is told another time, has an order and no thresholding
    betas = "beta_schedule" in config or "trained_betas" in config
    if config.get("use_flow_sigmas") or (not betas and "shift" in config):
        return "flow"
    for key, what in _OTHER_TABLES.items():
        if key in config:
            raise ValueError(
                f"{name or 'this scheduler'} has {what} ({key}), which is not a table of betas: {_BY_HAND}"
            )
    if betas:
        return "table"
    needed_one = "beta_schedule or trained_betas, shift (flow matching) or sigma_data (EDM)"
    raise ValueError(f"{name or 'the configuration'}: expected {needed_one}: {_BY_HAND}")


_BY_HAND = "build the process yourself, sf.Model(net, process, prediction, time)"


def process_of(config: Config) -> GaussianSDE:
    """The process that the network was trained on: `DiscreteVP`, `RectifiedFlow` or `EDM`."""
    kind = kind_of(config)
    if kind == "edm":
        return EDM(float(needed(config, "sigma_min")), float(needed(config, "sigma_max")))
    if kind == "flow":
        if config.get("invert_sigmas"):
            raise ValueError(
                "invert_sigmas=True runs the flow's clock from data to noise: expected invert_sigmas=False"
            )
        return RectifiedFlow()
    return table_of(config)


def table_of(config: Config) -> DiscreteVP:
    """The process of a config whose betas are a table."""
    return DiscreteVP(betas_of(config), zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)))


def prediction_of(config: Config) -> Prediction:
    """What the network returns, as a row of `sdeflow.model`'s table; for EDM's preconditioning its own output."""
    kind = kind_of(config)
    name = config.get("prediction_type", "flow_prediction") if kind == "flow" else needed(config, "prediction_type")
    if name not in _PREDICTIONS or (name == "flow_prediction" and kind != "flow"):
        expected = [p for p in _PREDICTIONS if kind == "flow" or p != "flow_prediction"]
        raise ValueError(f"expected prediction_type one of {', '.join(expected)}, got {name!r}")
    if kind == "edm" and name not in ("epsilon", "v_prediction"):
        raise ValueError(f"expected prediction_type 'epsilon' or 'v_prediction' with sigma_data, got {name!r}")
    return _PREDICTIONS[name]


def betas_of(config: Config) -> Tensor:
    """The table of betas (N,), before any rescaling: made in float32, as the network saw it, then float64."""
    if "trained_betas" in config:
        return numbers(config["trained_betas"], "trained_betas").float().double()
    size, schedule = needed(config, "num_train_timesteps"), needed(config, "beta_schedule")
    if schedule in _ALPHA_BAR:
        bar = _ALPHA_BAR[schedule]
        betas = [min(1 - bar((i + 1) / size) / bar(i / size), 0.999) for i in range(size)]
        return torch.tensor(betas, dtype=torch.float32).double()
    if schedule not in ("linear", "scaled_linear", "sigmoid"):
        expected = ["linear", "scaled_linear", "sigmoid", *_ALPHA_BAR]
        raise ValueError(f"expected beta_schedule one of {', '.join(expected)}, got {schedule!r}")
    low, high = needed(config, "beta_start"), needed(config, "beta_end")
    if schedule == "linear":
        betas32 = torch.linspace(low, high, size, dtype=torch.float32)
    elif schedule == "scaled_linear":
        betas32 = torch.linspace(low**0.5, high**0.5, size, dtype=torch.float32) ** 2
    else:
        betas32 = torch.sigmoid(torch.linspace(-6, 6, size, dtype=torch.float32)) * (high - low) + low
    return betas32.double()


def _laplace(t: float) -> float:
    """alpha^2 whose log signal-to-noise ratio is Laplace distributed."""
    log_snr = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6)
    return math.sqrt(1 / (1 + math.exp(-log_snr)))


_ALPHA_BAR: dict[str, Callable[[float], float]] = {
    "squaredcos_cap_v2": lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2,
    "exp": lambda t: math.exp(-12.0 * t),
    "laplace": _laplace,
}
"""alpha^2 as functions on [0, 1], of which beta_n = 1 - alpha_bar((n + 1)/N)/alpha_bar(n/N), at most 0.999."""


def clipping_of(config: Config) -> Callable[[Tensor], Tensor] | None:
    """What the configuration does to every x_0 before it is used, or None.

    `thresholding` comes before `clip_sample`. Its bound of each sample is its quantile of |x_0|, between 1 and
    `sample_max_value`, by which x_0 is then divided; with the default of 1 for the latter it clips to [-1, 1].
    """
    if config.get("thresholding"):
        quantile, top = config.get("dynamic_thresholding_ratio", 0.995), config.get("sample_max_value", 1.0)
        return partial(_thresholded, quantile=quantile, top=top)
    if config.get("clip_sample"):
        return partial(_clamped, reach=config.get("clip_sample_range", 1.0))
    return None


def _thresholded(x0: Tensor, quantile: float, top: float) -> Tensor:
    size = x0.abs().reshape(len(x0), -1).double().sort(dim=1).values
    place = quantile * (size.shape[1] - 1)
    low, high = math.floor(place), math.ceil(place)
    bound = torch.lerp(size[:, low], size[:, high], place - low).clamp(min=1.0).clamp(max=top)
    bound = bound.to(x0.dtype).reshape(-1, *[1] * (x0.ndim - 1))
    return torch.clamp(x0, -bound, bound) / bound


def _clamped(x0: Tensor, reach: float) -> Tensor:
    return x0.clamp(-reach, reach)
