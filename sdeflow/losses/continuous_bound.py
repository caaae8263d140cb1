"""The variational bound in continuous time, for any GaussianSDE, in bits per dimension.

    -log p(x_0) <= prior + integral over [t_s, t1] of -1/2 SNR'(t) E |x_0 - x0_hat(x_t, t)|^2 dt + reconstruction at t_s

(Kingma et al. 2021, Variational diffusion models, sections 3.5 and 5), the limit of many steps of `bound`. With
the exact model and continuous data the first two are the information that x_{t_s} holds about x_0 (Guo et al. 2005,
Mutual information and minimum mean-square error in Gaussian channels, theorem 1), plus what the prior misses at t1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdeflow.checked import checked
from sdeflow.gaussian import GaussianSDE
from sdeflow.losses.matching import denoising
from sdeflow.losses.pixels import check_levels
from sdeflow.losses.weights import elbo
from sdeflow.model import Model
from sdeflow.times import Time, align


@checked
def diffusion_rate(model: Model, x0: Tensor, t: Time, eps: Tensor) -> Tensor:
    """-1/2 SNR'(t) |x_0 - x0_hat|^2 of each sample (batch,), in bits a dimension and unit of time.

    The integral over [t_s, t1] is t1 - t_s times the mean over t uniform on it; with times of another density p(t),
    the mean of rate/p. It is `denoising` with the weight `elbo`, in the model's own prediction. Arguments and errors
    as `denoising`; sigma = 0 is an error, where SNR' is infinite.
    """
    return denoising(model, x0, t, eps, weight=elbo()) / math.log(2)


@checked
def reconstruction_bits(process: GaussianSDE, x0: Tensor, t: Time, eps: Tensor, *, levels: int | None = 256) -> Tensor:
    """-log p(x_0 | x_t) of each sample (batch,), in bits a dimension, at x_t = alpha x_0 + sigma eps.

    Discrete data: p(x_0 | x_t) proportional to q(x_t | x_0) over the grid of `levels` values on [-1, 1], component by
    component (Kingma et al. 2021, Variational diffusion models, section 3.3). Continuous data, `levels` None: the
    density N(x_t/alpha, (sigma/alpha)^2), the same for a flat measure; its bits may be negative.

    Args:
        x0: data (batch, *event).
        t: the end of the integral next to the data, one time or one a sample.
        eps: standard normals of the shape of x0.

    Raises:
        ValueError: shapes that do not fit, data off the grid, or a time where alpha or sigma is 0.
    """
    if levels is not None:
        check_levels(x0, levels)
    if eps.shape != x0.shape:
        raise ValueError(f"expected eps of the shape of x0, {tuple(x0.shape)}, got {tuple(eps.shape)}")
    time = align(t, x0)
    noise = process.sigma(time) / process.alpha(time)
    if noise.device.type == "cpu" and not bool(((noise > 0) & torch.isfinite(noise)).all()):
        raise ValueError(f"expected times where alpha > 0 and sigma > 0, got t = {float(time.min()):g}")
    # x_t/alpha = x_0 + noise eps; float64, where differences of grid values in units of the noise keep their digits
    data, error = x0.to(torch.float64), eps.to(torch.float64)
    if levels is None:
        nats = 0.5 * (error.square() + math.log(2 * math.pi)) + torch.log(noise)
    else:
        grid = torch.linspace(-1, 1, levels, dtype=torch.float64, device=x0.device)
        gaps = (data.unsqueeze(-1) - grid) / noise.unsqueeze(-1) + error.unsqueeze(-1)
        nats = torch.logsumexp(-0.5 * gaps.square(), dim=-1) + 0.5 * error.square()
    return (nats.flatten(1).mean(1) / math.log(2)).to(x0.dtype)
