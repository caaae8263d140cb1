"""azula: its samplers, on a schedule whose time is minus the log-SNR's half, so that any grid can be given."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.problem import Run, Sample, Sampling


def _sampler(kind: str, p: Sampling, grid: str, **options: Any) -> Any:
    """A sampler of that class on that grid."""
    from azula import sample
    from azula.denoise import Denoiser, DiracPosterior
    from azula.noise import Schedule

    class LogRho(Schedule):
        def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
            return torch.sigmoid(-2 * t).sqrt(), torch.sigmoid(2 * t).sqrt()

    class Network(Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = LogRho()

        def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> Any:
            alpha, sigma = self.schedule(t)
            return DiracPosterior((x_t - sigma * p.net(x_t, sigma)) / alpha)

    times = p.rhos(grid).log()

    class OnGrid(getattr(sample, kind)):  # type: ignore[misc]  # the base is chosen by name, which no checker follows
        @property
        def timesteps(self) -> Tensor:
            return times

    return OnGrid(Network(), steps=p.steps, silent=True, **options)


def _run(sampler: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        end: Tensor = sampler(x)
    return end


KINDS: dict[str, tuple[str, dict[str, Any], int]] = {
    "DDIM": ("DDIMSampler", {}, 1),
    "Euler": ("EulerSampler", {}, 1),
    "Heun": ("HeunSampler", {}, 2),
    "DPM++2M": ("xEABSampler", {"order": 2}, 1),
    "DDPM": ("DDPMSampler", {}, 1),
}
NOTES = {"DPM++2M": "xEAB(2), its exact weights", "DDIM": "draws noise at eta = 0 too"}


def samplers(p: Sampling) -> dict[str, Run]:
    """On the trailing grid."""
    from azula import sample

    found = {}
    for name, (kind, options, calls) in KINDS.items():
        if hasattr(sample, kind):
            made = _sampler(kind, p, "trailing", **options)
            found[name] = Run(partial(_run, made, p.x), calls * p.steps, NOTES.get(name, ""))
    return found


def precise(p: Sampling) -> dict[str, Sample]:
    """Methods and grids among which the best is taken."""
    from azula import sample

    found = {}
    kinds: list[tuple[str, dict[str, Any], int]] = [
        ("DDIMSampler", {}, 1), ("HeunSampler", {}, 2),
        *((kind, {"order": order}, 1) for kind in ("xEABSampler", "zEABSampler", "zABSampler", "vABSampler")
          for order in (2, 3)),
        ("REABSampler", {}, 1),
    ]  # fmt: skip
    for grid in ("trailing", "logsnr", "karras"):
        for kind, options, calls in kinds:
            if p.steps % calls or not hasattr(sample, kind):
                continue
            made = _sampler(kind, Sampling(p.net, p.x, p.steps // calls), grid, **options)
            name = " ".join([kind.removesuffix("Sampler"), *map(str, options.values()), grid])
            found[name] = Sample(partial(_run, made, p.x), p.steps)
    return found
