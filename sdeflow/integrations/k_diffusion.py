"""k-diffusion's denoisers as models, and models as denoisers. k-diffusion itself is not imported.

A denoiser D(x, sigma) is the posterior mean E[x_0 | x] of x = x_0 + sigma eps. A process x_t = alpha x_0 + sigma eps,
divided by alpha, is that with the level u = sigma/alpha = exp(-lam), and a scaled x has the same posterior mean:

    E[x_0 | x_t = x] = D(x/alpha(t), u(t)),     D(y, u) = E[x_0 | x_t = alpha(t) y],  t = time_of_lam(-log u).

(Karras et al. 2022, EDM, equation 4 and appendix C.1, where alpha is s and u is sigma.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdeflow.gaussian import GaussianSDE
from sdeflow.model import Model
from sdeflow.processes import EDM, VE
from sdeflow.times import align


def from_denoiser(
    denoiser: Callable[..., Tensor],
    process: GaussianSDE | None = None,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Model:
    """A denoiser `D(x, sigma, **conditions)` as a data prediction, under EDM unless another process is given.

    It fits the wrappers of k-diffusion (`K.external`, `K.Denoiser`), and the preconditioned networks of EDM, whose
    `net(x, sigma, class_labels=None)` is the same thing. Conditions come by `model.bind(...)`.

    Args:
        denoiser: called with x (batch, *event) and sigma (batch,) in the dtype of x; returns the posterior mean.
        process: any GaussianSDE; sampling then runs in its own variable x_t = alpha x_0 + sigma eps.
        sigma_min, sigma_max: range of EDM(sigma_min, sigma_max). Unless given, those of the denoiser's attributes of
            these names (k-diffusion's tables have them); an attribute of 0 or infinity, "no limit" in EDM's networks,
            gives the 0.002 or the 80 of EDM.

    Raises:
        TypeError: not callable, or `process` is no GaussianSDE.
        ValueError: a range with a process, which has its own; or no range given and none on the denoiser.
    """
    if not callable(denoiser):
        raise TypeError(f"expected a denoiser, callable as D(x, sigma), got {type(denoiser).__name__}")
    if process is None:
        low = _limit(denoiser, "sigma_min", sigma_min, EDM.sigma_min)
        return Model(denoiser, EDM(low, _limit(denoiser, "sigma_max", sigma_max, EDM.sigma_max)), "x0", "sigma")
    if not isinstance(process, GaussianSDE):
        raise TypeError(f"expected process to be a GaussianSDE, got {type(process).__name__}")
    if sigma_min is not None or sigma_max is not None:
        raise ValueError(f"expected a process or sigma_min and sigma_max, got both: {process!r} has its own range")
    if isinstance(process, EDM | VE):  # alpha = 1: nothing to scale
        return Model(denoiser, process, "x0", "sigma")
    return Model(_Scaled(denoiser, process), process, "x0", expand=False)


def as_denoiser(model: Model) -> Denoiser:
    """`model` as k-diffusion's samplers call it, whatever its process: `sample_heun(as_denoiser(model), x, sigmas)`.

    Their x starts as sigmas[0] times normals and is x_t/alpha(t) of the model's process.

    Raises:
        TypeError: not a Model.
        ValueError: a model that has only a score, its process being no GaussianSDE.
    """
    if not isinstance(model, Model):
        raise TypeError(f"expected a Model, got {type(model).__name__}; wrap the network: sf.Model(net, sde, ...)")
    return Denoiser(model, model.gaussian)


@dataclass(frozen=True, eq=False)
class Denoiser:
    """D(y, u) = E[x_0 | x_t = alpha(t) y] at the time t where sigma(t)/alpha(t) = u; see `as_denoiser`.

    Attributes:
        model: the model that answers.
        process: the one it was made for, whose alpha and sigma these are.
    """

    model: Model
    process: GaussianSDE

    @property
    def sigma_min(self) -> float:
        """The level sigma/alpha where sampling ends, at the process's t_min."""
        return self._level(self.process.t_min)

    @property
    def sigma_max(self) -> float:
        """The level sigma/alpha at t1; infinite where alpha is 0, as for RectifiedFlow."""
        return self._level(self.process.t1)

    def __call__(self, x: Tensor, sigma: Tensor | float, **conditions: Any) -> Tensor:
        """The posterior mean at x (batch, *event) and levels sigma, one or (batch,), in the dtype of x.

        Args:
            conditions: k-diffusion's `extra_args`, bound to the model; tensors have one row a sample.

        Raises:
            ValueError: a level that the process does not reach, or conditions that do not fit the batch.
            TypeError: a condition that the network does not take.
        """
        model = self.model.bind(**conditions) if conditions else self.model
        model.check_batch(x.shape[0])
        t = self.time(sigma, x.dtype)
        alpha = self.process.alpha(align(t, x)).to(x)
        return model.x0(alpha * x, t)

    def time(self, sigma: Tensor | float, dtype: torch.dtype = torch.float32) -> Tensor:
        """The times t, float64, at which sigma(t)/alpha(t) is `sigma`, which was rounded to `dtype`."""
        level = torch.as_tensor(sigma).to(torch.float64)
        low, high = self._level(self.process.t0), self.sigma_max
        if level.device.type == "cpu":  # levels on an accelerator are not read back for this
            # sigma is rounded to the state's dtype, and was made in float32 as (sigma_max^(1/7))^7
            slack = torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps
            if not bool(((level >= low * (1 - slack)) & (level <= high * (1 + slack))).all()):
                raise ValueError(
                    f"expected levels sigma/alpha in [{low:g}, {high:g}] of {self.process!r}, "
                    f"got {float(level.min()):g} to {float(level.max()):g}"
                )
        t = self.process.time_of_lam(-torch.log(level))
        return torch.clamp(t, self.process.t0, self.process.t1)

    def _level(self, t: float) -> float:
        return float(torch.exp(-self.process.lam(t)))


class _Scaled(nn.Module):
    """D(x/alpha(t), sigma(t)/alpha(t)): a denoiser in the variable of a process; called with aligned float64 times."""

    def __init__(self, denoiser: Callable[..., Tensor], process: GaussianSDE) -> None:
        super().__init__()
        self.denoiser, self.process = denoiser, process

    def forward(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        alpha, level = self.process.alpha(t), torch.exp(-self.process.lam(t))
        return self.denoiser(x / alpha.to(x), level.to(x).flatten().expand(x.shape[0]), **conditions)


def _limit(denoiser: Callable[..., Tensor], name: str, given: float | None, unlimited: float) -> float:
    if given is not None:
        return given
    found = getattr(denoiser, name, None)
    if found is None:
        raise ValueError(
            f"from_denoiser: expected {name}, as {type(denoiser).__name__} has no attribute of that name: "
            "give the range of sigma that it was trained on"
        )
    value = float(found)
    return value if math.isfinite(value) and value > 0 else unlimited
