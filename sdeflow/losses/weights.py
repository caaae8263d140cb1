"""Weights of losses as functions of time, and the exact relation between the losses of two predictions.

With (a, b) the row of a prediction in the table of `sdeflow.model`, det = alpha b - sigma a, its loss is

    L = det^2 D,
    det = -sigma (x0), alpha (eps), -alpha/sigma (score), alpha^2 + sigma^2 (v), -alpha sigma lam' (velocity),

where D depends on the model's posterior mean alone. A weight is a function w(t) of the loss in one named prediction;
the same objective in another prediction has the weight w(t) times the ratio of the two losses. SNR = alpha^2/sigma^2
= exp(2 lam) throughout. Weights that the papers give for alpha = 1 are taken at sigma/alpha.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.checked import checked
from sdeflow.gaussian import GaussianSDE
from sdeflow.model import check_prediction, conversion, row_of
from sdeflow.sde import SDE
from sdeflow.times import Time, as_time

WeightFunction = Callable[[GaussianSDE, Tensor], Tensor]


@checked
def loss_ratio(process: GaussianSDE, t: Time, given: str, wanted: str) -> Tensor:
    """r(t) with L_wanted = r L_given, sample by sample: q^2 of `sdeflow.model.conversion`, float64 of the shape of t.

    In particular flow matching is noise prediction weighted by ((alpha sigma' - sigma alpha')/alpha)^2 =
    (sigma lam')^2, which is 1/(1 - t)^2 for rectified flow. Infinite where `given` does not determine `wanted`
    (noise at alpha = 0, data at sigma = 0).

    Raises:
        ValueError: unknown prediction.
    """
    check_prediction(given)
    check_prediction(wanted)
    t = as_time(t)
    if given == wanted:
        return torch.ones_like(t)
    return conversion(process, t, row_of(given, process, t), row_of(wanted, process, t))[1] ** 2


@dataclass(frozen=True)
class Weight:
    """A weight w(t) of the loss in one prediction.

    Attributes:
        function: (process, float64 tensor of times) -> w, of the shape of the times, finite and >= 0.
        prediction: whose loss it multiplies: "x0", "eps", "score", "v" or "velocity".
        name: for messages.

    Raises:
        ValueError: unknown prediction.
    """

    function: WeightFunction
    prediction: str
    name: str = "weight"

    def __post_init__(self) -> None:
        check_prediction(self.prediction)

    def of(self, process: GaussianSDE, t: Time, prediction: str) -> Tensor:
        """The weight that gives the same objective with the loss in `prediction`, float64 of the shape of t.

        Raises:
            ValueError: unknown prediction, or a weight that is negative or not finite at a time (as where a prediction
                says nothing about what the weight was made for).
        """
        t = as_time(t)
        value = torch.as_tensor(self.function(process, t), dtype=torch.float64, device=t.device)
        value = _shaped(value, t, self.name)
        if prediction != self.prediction:
            value = value * loss_ratio(process, t, prediction, self.prediction)
        check_prediction(prediction)
        return _checked(value, t, f"{self.name} of the {prediction} loss")


def weight_at(weight: Weight | WeightFunction, sde: SDE, t: Tensor, prediction: str) -> Tensor:
    """What multiplies the loss in `prediction` at aligned times t: a `Weight` converted, a function as it is."""
    if isinstance(weight, Weight):
        if not isinstance(sde, GaussianSDE):
            raise ValueError(f"a Weight needs a GaussianSDE, got {sde!r}: pass a function weight(process, t)")
        return weight.of(sde, t, prediction)
    if not callable(weight):
        raise TypeError(f"expected a Weight or a function weight(process, t), got {type(weight).__name__}")
    # the function's author knows the process: a weight of a loss that any SDE has may be of any SDE
    value = torch.as_tensor(weight(sde, t), dtype=torch.float64, device=t.device)  # type: ignore[arg-type]
    return _checked(_shaped(value, t, "weight"), t, f"weight of the {prediction} loss")


def _shaped(value: Tensor, t: Tensor, what: str) -> Tensor:
    try:
        return value.expand(t.shape)
    except RuntimeError:
        raise ValueError(
            f"{what}: expected one value a time, shape {tuple(t.shape)}, got {tuple(value.shape)}"
        ) from None


def _checked(value: Tensor, t: Tensor, what: str) -> Tensor:
    if value.device.type != "cpu":  # not read back from an accelerator for this
        return value
    bad = ~(torch.isfinite(value) & (value >= 0))
    if bool(bad.any()):
        raise ValueError(
            f"{what}: expected finite values >= 0, got {float(value[bad][0]):g} at t = {float(t[bad][0]):g}"
        )
    return value


def _positive(what: str, value: float) -> float:
    if isinstance(value, bool) or not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise ValueError(f"expected a finite {what} > 0, got {value!r}")
    return float(value)


# ---- the named weights


def _snr(process: GaussianSDE, t: Tensor) -> Tensor:
    return torch.exp(2 * process.lam(t))


def uniform(prediction: str) -> Weight:
    """1 for the loss in `prediction`; "eps" is the simple loss (Ho et al. 2020, DDPM, equation 14)."""
    return Weight(lambda process, t: torch.ones_like(t), prediction, f"uniform({prediction})")


def snr() -> Weight:
    """SNR for x0: noise prediction without a weight (Salimans and Ho 2022, Progressive distillation, section 4)."""
    # as what it is for eps: 1 also where alpha = 0, and 0 for x0 and v
    return Weight(lambda process, t: torch.ones_like(t), "eps", "snr")


def truncated_snr() -> Weight:
    """max(SNR, 1) for x0 (Salimans and Ho 2022, Progressive distillation, section 4)."""
    return Weight(lambda process, t: _snr(process, t).clamp(min=1.0), "x0", "truncated_snr")


@checked
def min_snr(gamma: float = 5.0) -> Weight:
    """min(SNR, gamma) for x0 (Hang et al. 2023, Min-SNR weighting, section 3).

    For eps it is min(SNR, gamma)/SNR, and for v in a variance-preserving process min(SNR, gamma)/(SNR + 1).

    Raises:
        ValueError: gamma is not positive.
    """
    gamma = _positive("gamma", gamma)
    return Weight(lambda process, t: _snr(process, t).clamp(max=gamma), "x0", f"min_snr({gamma:g})")


def noise_variance() -> Weight:
    """sigma^2 for the score: one over the kernel's mean squared score, which is noise prediction without a weight.

    (Song et al. 2021, Score-based generative modeling through SDEs, section 3.3.)
    """
    return Weight(lambda process, t: process.sigma(t) ** 2, "score", "noise_variance")


def likelihood() -> Weight:
    """g^2 for the score: half its integral bounds a KL divergence (Song et al. 2021, Maximum likelihood training of
    score-based diffusion models, theorem 1). It is 2 `elbo`."""
    return Weight(lambda process, t: process.diffusion_coeff(t) ** 2, "score", "likelihood")


@checked
def edm(sigma_data: float = 0.5) -> Weight:
    """(u^2 + sigma_data^2)/(u sigma_data)^2 = SNR + sigma_data^-2 for x0, u = sigma/alpha (Karras et al. 2022, EDM,
    table 1): one over c_out^2 of their preconditioning.

    Raises:
        ValueError: sigma_data is not positive.
    """
    sigma_data = _positive("sigma_data", sigma_data)
    return Weight(lambda process, t: _snr(process, t) + sigma_data**-2, "x0", f"edm({sigma_data:g})")


def by_lam(function: Callable[[Tensor], Tensor], name: str = "by_lam") -> Weight:
    """w(lam) of the variational bound: -lam'(t) w(lam(t)) for eps (Kingma and Gao 2023, Understanding diffusion
    objectives as the ELBO, section 3, with their lambda = 2 lam).

    With times uniform in t the objective is the integral of w(lam) |eps - eps_hat|^2 over lam, whatever the schedule.
    Their loss is 1/2 w dlambda, which is w dlam.
    """

    def value(process: GaussianSDE, t: Tensor) -> Tensor:
        # -lam' = g^2/(2 sigma^2)
        speed = 0.5 * (process.diffusion_coeff(t) / process.sigma(t)) ** 2
        return speed * function(process.lam(t))

    return Weight(value, "eps", name)


def elbo() -> Weight:
    """w = 1 in `by_lam`: the mean over t uniform in [t0, t1], times the span, is the bound in nats a component."""
    return by_lam(torch.ones_like, "elbo")


@checked
def sigmoid(bias: float = 0.0) -> Weight:
    """w = sigmoid(bias - 2 lam) in `by_lam` (Kingma and Gao 2023; Hoogeboom et al. 2024, Simpler diffusion).

    Raises:
        ValueError: bias is not finite.
    """
    if not math.isfinite(bias):
        raise ValueError(f"expected a finite bias, got {bias!r}")
    return by_lam(lambda lam: torch.sigmoid(bias - 2 * lam), f"sigmoid({bias:g})")


def cosine() -> Weight:
    """w = sech(lam) in `by_lam`: noise prediction on the cosine schedule alpha = cos(pi t/2), on any schedule.

    (Kingma and Gao 2023, appendix on the weightings of earlier work.) That schedule has -lam' sech(lam) = pi.
    """
    # 1/cosh overflows nowhere in this form
    return by_lam(lambda lam: 2 * torch.exp(-lam.abs()) / (1 + torch.exp(-2 * lam.abs())), "cosine")
