"""diffusers: its schedulers, in the loop of its own pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.problem import BETAS, Run, Sample, Sampling, told

VP: dict[str, Any] = {
    "num_train_timesteps": len(BETAS),
    "beta_start": float(BETAS[0]),
    "beta_end": float(BETAS[-1]),
    "beta_schedule": "linear",
    "timestep_spacing": "trailing",
}
"""The table and the grid of `Sampling`."""


def _drive(scheduler: Any, p: Sampling, *, exploding: bool = False) -> tuple[Callable[[], Tensor], int]:
    """The loop of a pipeline, and its model calls. The network is told sigma from a list made beforehand.

    `exploding` schedulers hold x/alpha: their start is scaled, and their end scaled back.
    """
    scheduler.set_timesteps(p.steps)
    if hasattr(scheduler, "sigmas"):
        rho = scheduler.sigmas.double()[: len(scheduler.timesteps)]
        end = float(scheduler.sigmas[-1])
    else:
        rho, end = p.table[scheduler.timesteps], float(p.table[0])
    sigmas = told(rho)
    grow, shrink = (float((1 + rho[0] ** 2).sqrt()), (1 + end**2) ** -0.5) if exploding else (1.0, 1.0)

    def run() -> Tensor:
        with torch.inference_mode():
            scheduler.set_timesteps(p.steps)  # also forgets the steps of the last run
            y = p.x * grow if exploding else p.x
            for t, sigma in zip(scheduler.timesteps, sigmas, strict=True):
                e = p.net(scheduler.scale_model_input(y, t), sigma)
                y = scheduler.step(e, t, y, return_dict=False)[0]
            return y * shrink if exploding else y

    return run, len(sigmas)


def samplers(p: Sampling) -> dict[str, Run]:
    """On the trailing grid."""
    import diffusers as d

    end = {"final_sigmas_type": "sigma_min"}
    heun, calls = _drive(d.HeunDiscreteScheduler(**VP), p, exploding=True)
    return {
        "DDIM": Run(*_drive(d.DDIMScheduler(**VP, clip_sample=False, set_alpha_to_one=False), p)),
        "Euler": Run(*_drive(d.EulerDiscreteScheduler(**VP, **end), p, exploding=True)),
        "Heun": Run(heun, calls, "ends at sigma = 0"),
        "DPM++2M": Run(*_drive(d.DPMSolverMultistepScheduler(**VP, **end, lower_order_final=False), p)),
        "UniPC2": Run(*_drive(d.UniPCMultistepScheduler(**VP, **end, lower_order_final=False), p)),
        "flow Euler": _flow(p),
        "DDPM": Run(*_drive(d.DDPMScheduler(**VP, clip_sample=False), p), "ends at sigma = 0"),
        "DPM++2M SDE": Run(
            *_drive(
                d.DPMSolverMultistepScheduler(**VP, **end, algorithm_type="sde-dpmsolver++", lower_order_final=False), p
            )
        ),
    }


def _flow(p: Sampling) -> Run:
    import diffusers as d

    scheduler: Any = d.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    given = torch.linspace(1, 0, p.steps + 1, dtype=torch.float64)[:-1]
    sigmas = list(given.unbind())

    def run() -> Tensor:
        with torch.inference_mode():
            scheduler.set_timesteps(sigmas=given.tolist())
            y = p.x
            for t, sigma in zip(scheduler.timesteps, sigmas, strict=True):
                y = scheduler.step(p.net(y, sigma), t, y, return_dict=False)[0]
            return y

    return Run(run, p.steps)


def precise(p: Sampling) -> dict[str, Sample]:
    """Methods and grids among which the best is taken; the network is told the true sigma of a rounded time."""
    import diffusers as d

    multistep, unipc = d.DPMSolverMultistepScheduler, d.UniPCMultistepScheduler
    found = {"DDIM trailing": Sample(*_drive(d.DDIMScheduler(**VP, clip_sample=False, set_alpha_to_one=False), p))}
    grids: dict[str, dict[str, Any]] = {
        "trailing": {"final_sigmas_type": "sigma_min"},
        "linspace": {"timestep_spacing": "linspace", "final_sigmas_type": "sigma_min"},
        "karras": {"use_karras_sigmas": True},
        "exponential": {"use_exponential_sigmas": True},
    }
    for grid, options in grids.items():
        zero = "final_sigmas_type" not in options
        for order in (2, 3):
            for last in (True, False):
                how = {**VP, **options, "solver_order": order, "lower_order_final": last}
                tail = ", lower order last" if last else ""
                found[f"DPM++{order}M {grid}{tail}"] = Sample(*_drive(multistep(**how), p), zero)
                found[f"UniPC{order} {grid}{tail}"] = Sample(*_drive(unipc(**how), p), zero)
    if p.steps > 1:
        half = Sampling(p.net, p.x, (p.steps + 1) // 2)  # 2 n - 1 calls
        for grid in ("trailing", "karras", "exponential"):
            scheduler = d.HeunDiscreteScheduler(**VP, **(grids[grid] if grid != "trailing" else {}))
            found[f"Heun {grid}"] = Sample(*_drive(scheduler, half, exploding=True), True)
    return found
