"""The grids of diffusers schedulers, as times of the process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdeflow.grids import GRIDS
from sdeflow.integrations.diffusers_config import Config, kind_of, needed, process_of, read_config, table_of

# How the schedulers visit their table. "meet not" steps from an entry to that minus N // steps.
_STEP_BACK = ("DDIMScheduler", "DDIMParallelScheduler")
_TO_DATA = ("DDPMScheduler", "DDPMParallelScheduler")
_BY_SIGMA = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler")
_MULTISTEP = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
_MULTISTEP_TO_ENTRY_0 = ("DEISMultistepScheduler", "SASolverScheduler")
_OWN_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def diffusers_grid(scheduler_config: Any, steps: int, *, mu: float | None = None) -> Tensor:
    """The times (steps + 1,), float64, that the diffusers scheduler of that configuration visits in `steps` steps.

    Entry n of a table is the time (n + 1)/N; the last time is 0 (data), or 1/N (entry 0) where the scheduler ends there
    (`set_alpha_to_one=False`, `final_sigmas_type="sigma_min"`). Flow matching: the shifted sigmas, then 0. EDM: its
    sigmas, then 0.

    Args:
        scheduler_config: as in `read_config`; its class must be known, as classes read `timestep_spacing` differently.
        mu: the shift of a configuration with `use_dynamic_shifting`.

    Raises:
        ValueError: the scheduler visits no grid: its steps do not meet, have no length, or use other noise levels than
            those of the times it tells the network.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"expected steps >= 1, got {steps!r}")
    config = read_config(scheduler_config)
    kind = kind_of(config)
    used = [key for key in _OWN_SIGMAS if config.get(key)]
    if used:
        raise ValueError(
            f"{used[0]}=True takes noise levels between the table's entries and tells the network rounded times: give "
            "a grid of your own, such as sf.grids.karras(process, steps)"
        )
    if mu is not None and not config.get("use_dynamic_shifting"):
        raise ValueError("mu is for a configuration with use_dynamic_shifting=True")
    if kind == "edm":
        grid = _edm_grid(config, steps)
    elif kind == "flow":
        grid = _flow_grid(config, steps, mu)
    else:
        grid = _table_grid(config, steps)
    if not bool((torch.diff(grid) < 0).all()):
        raise ValueError(
            f"{config.get('_class_name')} takes steps of no length here, through the times {_short(grid)}: expected "
            "fewer steps, or another end (final_sigmas_type, set_alpha_to_one)"
        )
    return grid


def _short(grid: Tensor) -> str:
    values = [f"{t:g}" for t in grid.tolist()]
    return ", ".join(values if len(values) < 9 else [*values[:3], "...", *values[-3:]])


def _table_grid(config: Config, steps: int) -> Tensor:
    name, size = needed(config, "_class_name"), table_of(config).betas.numel()
    known = (*_STEP_BACK, *_TO_DATA, *_BY_SIGMA, *_MULTISTEP, *_MULTISTEP_TO_ENTRY_0)
    if name not in known:
        raise ValueError(
            f"the grid of {name} is not known: expected one of {', '.join(known)}, or give a grid of times"
        )
    if steps > size:
        raise ValueError(f"expected at most {size} steps, one an entry of the table, got {steps}")
    if config.get("lambda_min_clipped", -math.inf) > -math.inf:
        raise ValueError("lambda_min_clipped cuts the table: expected -inf, or give a grid of times")
    if config.get("interpolation_type", "linear") != "linear":
        raise ValueError(f'expected interpolation_type "linear", got {config["interpolation_type"]!r}')
    entries = _entries(config, steps, size, multistep=name in (*_MULTISTEP, *_MULTISTEP_TO_ENTRY_0))
    if name not in _BY_SIGMA:
        entries = torch.round(entries)
    if name in _STEP_BACK:
        reached = entries - size // steps
        if not torch.equal(reached[:-1], entries[1:]) or reached[-1] >= 0:
            raise ValueError(
                f"{name} steps {size // steps} entries back whatever the spacing, so that its {steps} steps do not "
                f"meet with {config['timestep_spacing']!r}: use the spacing 'leading', a divisor of {size} as steps, "
                "or a grid of sdeflow"
            )
        to_data = bool(config.get("set_alpha_to_one", True))
    elif name in _MULTISTEP_TO_ENTRY_0:
        to_data = False
    else:
        to_data = name in _TO_DATA or config.get("final_sigmas_type", "zero") == "zero"
    return torch.cat([entries + 1, entries.new_tensor([0.0 if to_data else 1.0])]) / size


def _entries(config: Config, steps: int, size: int, *, multistep: bool) -> Tensor:
    """The entries (steps,) visited, as the spacing says; multistep schedulers divide by one more."""
    spacing, offset = needed(config, "timestep_spacing"), config.get("steps_offset", 0)
    if spacing == "linspace":
        return (
            torch.linspace(size - 1, 0, steps + multistep, dtype=torch.float64)[:steps]
            if steps + multistep > 1
            else (torch.zeros(1, dtype=torch.float64))
        )
    if spacing == "leading":
        stride = size // (steps + multistep)
        return torch.arange(steps + multistep - 1, multistep - 1, -1, dtype=torch.float64) * stride + offset
    if spacing == "trailing":
        return torch.round(size - torch.arange(steps, dtype=torch.float64) * (size / steps)) - 1
    raise ValueError(f"expected timestep_spacing leading, trailing or linspace, got {spacing!r}")


def shifted(config: Config, sigmas: Tensor, mu: float | None) -> Tensor:
    """Sigmas of a flow after the configuration's shift: s sigma/(1 + (s - 1) sigma)."""
    if config.get("use_dynamic_shifting"):
        if mu is None:
            raise ValueError("use_dynamic_shifting=True shifts by the size of the image: expected mu")
        strength = math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu
    else:
        strength = config.get("shift", 1.0)
    sigmas = strength * sigmas / (1 + (strength - 1) * sigmas)
    if config.get("shift_terminal"):
        sigmas = 1 - (1 - sigmas) * (1 - config["shift_terminal"]) / (1 - sigmas[-1])
    return sigmas


def _flow_grid(config: Config, steps: int, mu: float | None) -> Tensor:
    if config.get("_class_name") != "FlowMatchEulerDiscreteScheduler":
        raise ValueError(
            f"the grid of {config.get('_class_name')} with a flow is not known (its times are cut to whole numbers): "
            "use that of a FlowMatchEulerDiscreteScheduler, or sf.grids.flow_shift"
        )
    _ = process_of(config)
    last = 1 / needed(config, "num_train_timesteps")
    if not config.get("use_dynamic_shifting"):
        last = float(shifted({"shift": config.get("shift", 1.0)}, torch.tensor(last, dtype=torch.float64), None))
    sigmas = torch.linspace(1.0, last, steps, dtype=torch.float64)
    return torch.cat([shifted(config, sigmas, mu), sigmas.new_zeros(1)])


def _edm_grid(config: Config, steps: int) -> Tensor:
    low, high = float(config["sigma_min"]), float(config["sigma_max"])
    if config.get("sigma_schedule", "karras") == "exponential":
        sigmas = torch.exp(torch.linspace(math.log(high), math.log(low), steps, dtype=torch.float64))
    else:
        rho = float(config.get("rho", 7.0))
        sigmas = torch.linspace(high ** (1 / rho), low ** (1 / rho), steps, dtype=torch.float64) ** rho
    end = 0.0 if config.get("final_sigmas_type", "zero") == "zero" else low
    sigmas[0] = high  # but for rounding
    return torch.cat([sigmas, sigmas.new_tensor([end])])


def time_of_told(config: dict[str, Any], told: Tensor) -> Tensor:
    """The process's time, float64, of what diffusers calls a timestep: its index, N t, or log(sigma)/4."""
    told = told.to(torch.float64)
    kind = kind_of(config)
    if kind == "edm":
        return torch.exp(4 * told)
    if kind == "flow":
        return told / float(needed(config, "num_train_timesteps"))
    return (told + 1) / table_of(config).betas.numel()


def chosen_grid(
    config: Config,
    named: str | None,
    steps: int | None,
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
) -> Tensor:
    """The grid that `PlanScheduler.set_timesteps` is asked for: that of the configuration, or of `sf.grids` by name."""
    kind, process = kind_of(config), process_of(config)
    if timesteps is not None or sigmas is not None:
        if named is not None or (kind, sigmas is None) not in (("table", True), ("flow", False)):
            raise ValueError("expected timesteps with a table of betas, sigmas with a flow, and no other grid")
        values = torch.tensor([float(v) for v in timesteps or sigmas or ()], dtype=torch.float64)
        if steps is not None and steps != values.numel():
            raise ValueError(f"expected num_inference_steps={values.numel()}, one a time given, got {steps}")
        times = time_of_told(config, values) if sigmas is None else shifted(config, values, mu)
        return torch.cat([times, times.new_zeros(1)])
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"expected num_inference_steps >= 1, got {steps!r}")
    if named is None:
        return diffusers_grid(config, steps, mu=mu)
    if mu is not None:
        raise ValueError("mu belongs to a flow's own grid: expected none with sf.grids")
    return GRIDS[named].make(process, steps, process.t1, process.t_min)
