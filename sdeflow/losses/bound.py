"""The variational bound of DDPM in bits per dimension, term by term, and the hybrid loss that learns variances.

Entry n = 0..N-1 of a `DiscreteVP` is the state at t = (n + 1)/N; s = n/N is the one before. With beta its variance,

    q(x_s | x_t, x_0) = N(c_0 x_0 + c_1 x_t, beta~),
    p(x_s | x_t)      = N(c_0 x0_hat + c_1 x_t, exp(v log beta + (1 - v) log beta~)),
    c_0 = alpha_s beta/sigma_t^2,   c_1 = sqrt(1 - beta) sigma_s^2/sigma_t^2,   beta~ = beta sigma_s^2/sigma_t^2

(Ho et al. 2020, DDPM, equations 6, 7 and 11; the variance: Nichol and Dhariwal 2021, Improved DDPM, equation 15). The
fixed variances are v = 1, "forward", and v = 0, "posterior". At n = 0, where beta~ = 0, that of n = 1 stands for it, as
in their code. The terms (Ho et al. 2020, equation 5) are

    L_N = KL(q(x_N | x_0) | N(0, I)),   L_n = KL(q(x_s | x_t, x_0) | p(x_s | x_t)),   L_0 = -log p(x_0 | x_1),

and -log p(x_0) <= their expected sum. All in means over components, divided by log 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdeflow.checked import checked, described, tensor
from sdeflow.discrete import DiscreteVP
from sdeflow.gaussian import GaussianSDE
from sdeflow.losses.pixels import check_levels, discretised_log_likelihood
from sdeflow.model import Model, row_of
from sdeflow.solvers.ancestral import Variance
from sdeflow.times import align


@checked
def prior_bits(process: GaussianSDE, x0: Tensor) -> Tensor:
    """L_N = KL(N(alpha x_0, sigma^2 I) | N(0, prior_std^2 I)) at t1, (batch,): bits a dimension; of any GaussianSDE."""
    if x0.ndim < 2 or x0.numel() == 0:
        raise ValueError(f"expected x0 (batch, *event) with at least one sample, got shape {tuple(x0.shape)}")
    alpha, sigma = float(process.alpha(process.t1)), float(process.sigma(process.t1))
    std = process.prior_std
    gap = 2 * math.log(sigma / std)  # the log ratio of the variances
    nats = 0.5 * (math.expm1(gap) - gap + (alpha / std) ** 2 * x0.square())
    return nats.flatten(1).mean(1) / math.log(2)


@checked
def step_bits(
    model: Model,
    x0: Tensor,
    n: int | Tensor,
    eps: Tensor,
    variance: Variance = "posterior",
    *,
    levels: int | None = 256,
) -> Tensor:
    """L_n of each sample (batch,), in bits a dimension, at x_t = alpha x_0 + sigma eps: its mean over eps is the term.

    Args:
        model: a `Model` of a DiscreteVP; evaluated once.
        x0: data (batch, *event); on the grid of `levels` values on [-1, 1] unless that is None.
        n: the entry, 0..N-1, one or one a sample (batch,); at n = 0 the term is the decoder's, -log p(x_0 | x_1).
        eps: standard normals of the shape of x0.
        variance: "posterior" (beta~), "forward" (beta), or a function v(x_t, t) that broadcasts to x0, as that of the
            solver `DDPM`. It is called after the model with the same x_t, so that a network with two heads can keep
            its second output for it.
        levels: the number of values that data take (`discretised_log_likelihood`); None for a density, whose bits
            may be negative.

    Raises:
        TypeError, ValueError: not the model of a DiscreteVP, an entry outside the table, shapes that do not fit, data
            off the grid, or noise prediction at an entry where alpha = 0.
    """
    process, n, t, x = _state(model, x0, n, eps, levels)
    mean = model(x, t, "x0")
    return _bits(process, x0, mean, n, _share(variance, x, t), levels)


@checked
def bound_bits(
    model: Model,
    x0: Tensor,
    variance: Variance = "posterior",
    *,
    levels: int | None = 256,
    generator: torch.Generator | None = None,
) -> Tensor:
    """All terms L_0, ..., L_N (batch, N + 1), one draw of noise each; their sum over dim 1 estimates the bound.

    Args:
        generator: of the noise, on the device of x0; None for torch's global one.
        The rest as `step_bits`, which is called N times.
    """
    process = _table(model)
    if x0.ndim < 2 or x0.numel() == 0 or not x0.is_floating_point():
        raise ValueError(f"expected x0 as floating-point numbers (batch, *event), got {described(x0)}")
    terms = []
    for n in range(process.betas.numel()):
        eps = torch.randn(x0.shape, dtype=x0.dtype, device=x0.device, generator=generator)
        terms.append(step_bits(model, x0, n, eps, variance, levels=levels))
    return torch.stack([*terms, prior_bits(process, x0)], dim=1)


@checked
def hybrid(
    model: Model,
    x0: Tensor,
    n: int | Tensor,
    eps: Tensor,
    variance: Variance,
    *,
    vlb_weight: float = 1e-3,
    levels: int | None = 256,
) -> Tensor:
    """L_simple + vlb_weight N L_n, (batch,): trains a mean by the first and a variance by the second term alone.

    (Nichol and Dhariwal 2021, Improved DDPM, equation 16.) L_simple is `denoising` in the model's own prediction. No
    gradient flows from L_n into x0_hat. With n uniform on 0..N-1, N L_n estimates the sum L_0 + ... + L_{N-1}.

    Args:
        variance: the function v(x_t, t), differentiable; a fixed variance leaves nothing to train in L_n.
        vlb_weight: >= 0.
        The rest as `step_bits`. The model is evaluated once.

    Raises:
        TypeError, ValueError: as `step_bits`, a variance that is not a function, or a negative weight.
    """
    if not callable(variance):
        raise TypeError(f"expected the variance as a function v(x, t) to be learned, got {variance!r}")
    if not (math.isfinite(vlb_weight) and vlb_weight >= 0):
        raise ValueError(f"expected a finite vlb_weight >= 0, got {vlb_weight!r}")
    process, n, t, x = _state(model, x0, n, eps, levels)
    value = model(x, t, model.prediction)
    a, b = (v.to(x0.dtype) for v in row_of(model.prediction, process, t))
    simple = (value - (a * x0 + b * eps)).square().flatten(1).mean(1)
    mean = model.convert(x, t, value.detach(), row_of("x0", process, t))
    bits = _bits(process, x0, mean, n, _share(variance, x, t), levels)
    return simple + vlb_weight * process.betas.numel() * bits


def _table(model: Model) -> DiscreteVP:
    if not isinstance(model, Model) or not isinstance(model.sde, DiscreteVP):
        raise TypeError(f"expected a Model of a DiscreteVP, got {model!r}")
    return model.sde


def _state(
    model: Model, x0: Tensor, n: int | Tensor, eps: Tensor, levels: int | None
) -> tuple[DiscreteVP, Tensor, Tensor, Tensor]:
    """(process, n, t, x_t), n and t 0-d or (batch, 1, ..., 1)."""
    process = _table(model)
    if x0.ndim < 2 or x0.numel() == 0 or not x0.is_floating_point():
        raise ValueError(f"expected x0 as floating-point numbers (batch, *event), got {described(x0)}")
    if levels is not None:
        check_levels(x0, levels)
    entries = torch.as_tensor(n)
    if entries.is_floating_point() or not tensor(entries) or entries.dtype == torch.bool:
        raise TypeError(f"expected n as integers, got {described(entries)}")
    entries = entries.to(torch.int64)  # bytes would be a mask
    number = process.betas.numel()
    if entries.device.type == "cpu" and entries.numel() > 0:
        low, high = int(entries.min()), int(entries.max())
        if low < 0 or high >= number:
            raise ValueError(f"expected n in 0..{number - 1}, got {low}" + (f" to {high}" if high != low else ""))
    t = align((entries.to(torch.float64) + 1) / number, x0)
    if model.prediction in ("eps", "score") and t.device.type == "cpu" and not bool((process.alpha(t) > 0).all()):
        raise ValueError(
            "a prediction of noise says nothing about x_0 where alpha = 0: predict x0 or v, or leave n out"
        )
    # t has the shape that align gave it; the entries follow
    return process, entries.reshape(t.shape), t, process.perturb(x0, t, eps)


def _share(variance: Variance, x: Tensor, t: Tensor) -> Tensor:
    """v, of a shape that broadcasts to x, in its dtype."""
    if variance == "posterior":
        return torch.zeros((), dtype=x.dtype, device=x.device)
    if variance == "forward":
        return torch.ones((), dtype=x.dtype, device=x.device)
    if not callable(variance):
        raise ValueError(f'expected variance "posterior", "forward" or a function v(x, t), got {variance!r}')
    v = variance(x, t)
    if not tensor(v):
        raise ValueError(f"expected v(x, t) as a tensor of real numbers, got {described(v)}")
    try:
        v = v.expand(x.shape)
    except (AttributeError, RuntimeError):
        got = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
        raise ValueError(f"expected v(x, t) to broadcast to x, {tuple(x.shape)}, got {got}") from None
    return v.to(x.dtype)


def _bits(process: DiscreteVP, x0: Tensor, mean: Tensor, n: Tensor, share: Tensor, levels: int | None) -> Tensor:
    """L_n from the model's x0_hat `mean` and the share v of log beta, (batch,)."""
    number = process.betas.numel()
    n = n.to(x0.device)
    betas = process.betas.to(x0.device)

    def at(k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(beta, sigma_s^2/sigma_t^2, c_0) of entry k."""
        beta, before = betas[k], k.to(torch.float64) / number
        here = process.sigma(before + 1 / number) ** 2
        return beta, process.sigma(before) ** 2 / here, process.alpha(before) * beta / here

    beta, _, c0 = at(n)
    clipped_beta, clipped_ratio, _ = at(n.clamp(min=1))
    low = torch.log(clipped_beta * clipped_ratio)  # log beta~
    rise = share * (torch.log(beta) - low).to(x0.dtype)  # log of p's variance over beta~
    log_variance = low.to(x0.dtype) + rise
    # KL of two Gaussians whose means differ by c_0 (x_0 - x0_hat)
    pull = (c0.to(x0.dtype) * (x0 - mean)).square() * torch.exp(-log_variance)
    nats = 0.5 * (rise + torch.expm1(-rise) + pull)
    first = n == 0
    decoder_mean = torch.where(first, mean, x0)  # elsewhere a value whose unused likelihood is finite
    if levels is None:
        square = (x0 - decoder_mean).square() * torch.exp(-log_variance)
        decoder = 0.5 * (square + log_variance + math.log(2 * math.pi))
    else:
        decoder = -discretised_log_likelihood(x0, decoder_mean, log_variance, levels)
    return torch.where(first, decoder, nats).flatten(1).mean(1) / math.log(2)
