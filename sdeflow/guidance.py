"""Guidance: models made of models, each a `Model` of the same process that any solver and sampler takes.

    classifier guidance     score + w grad_x log p(y | x, t)
    classifier-free         u + w (c - u), the same combination in every prediction, as its weights sum to 1
    thresholding            x_0 clipped, and every other prediction derived from that x_0

A change ds of the score is a change of the row (a, b), value = a x_0 + b eps (`sdeflow.model`), by

    (a sigma^2/alpha - b sigma) ds,

so that guidance is added in the prediction the network was trained for.

Conditions stay with the part they belong to: a guided model holds them as "model.label", "unconditional.label", ...,
with one row a sample, and `take` and `check_batch` treat them as those of any model. `nfe` counts calls of networks,
so a classifier-free evaluation counts 2 where both networks are called. In the statistics of a solve `nfe` and `calls`
count evaluations of the guided model, one however many networks it asks, and `network_calls` what it asked. A function
that is no `Model`, such as a classifier, is not counted.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from sdeflow.checked import checked, described, tensor
from sdeflow.combined import Combination, Guided, select, usable_time
from sdeflow.gaussian import GaussianSDE
from sdeflow.model import Model, row_of
from sdeflow.sde import checked_shape

_LARGEST = 1e30
"""Of numbers that multiply or bound float32 states."""

Scale = float | Callable[[Tensor], Any]
"""A strength: a number, or a function of a float64 tensor of times (its shape kept, or a number)."""

LogLikelihood = Callable[..., Tensor]
"""`log_likelihood(x, t, **conditions)`: (batch,) for x (batch, *event), t (batch,) in the dtype of x."""


# ---- terms of the score


class WithScore(Combination):
    """A model whose score has a term added: value + (a sigma^2/alpha - b sigma) w term, in its own row (a, b)."""

    def __init__(self, model: Model, scale: Scale, **others: Callable[..., Tensor]) -> None:
        super().__init__({"model": model, **others})
        self.prediction, self.process, self.scale = model.prediction, model.sde, scale

    @abstractmethod
    def both(self, x: Tensor, t: Tensor, conditions: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(the model's own prediction, the term), both of the shape of x."""

    def forward(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        factor = self._factor(t)
        value, term = self.both(x, t, conditions)
        return value + factor.to(x.dtype) * term

    def _factor(self, t: Tensor) -> Tensor:
        scale = strength(self.scale, t)
        if self.prediction == "score" or not isinstance(self.process, GaussianSDE):
            return scale
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        a, b = row_of(self.prediction, self.process, t)
        if t.device.type == "cpu" and bool(((alpha == 0) & (a != 0)).any()):
            raise ValueError(
                f"at alpha = 0 (t = {float(t.max()):g}) a term of the score says nothing about x_0, and the model "
                f"predicts {self.prediction}: start short of it, t_span=(t_start, t_min)"
            )
        return scale * (torch.where(a == 0, 0.0, a * sigma**2 / alpha) - b * sigma)


class _Term(WithScore):
    """A term that is given, or the gradient of a log-likelihood that is."""

    def __init__(self, model: Model, term: Callable[..., Tensor], scale: Scale, name: str, gradient: bool) -> None:
        super().__init__(model, scale, **{name: term})
        self.name, self.gradient = name, gradient

    def both(self, x: Tensor, t: Tensor, conditions: dict[str, Any]) -> tuple[Tensor, Tensor]:
        times = usable_time(t.to(device=x.device, dtype=x.dtype).flatten().expand(x.shape[0]))
        own = {key: usable_time(value) for key, value in select(self.name, conditions).items()}
        function = self.parts[self.name]
        if self.gradient:  # before the model: what is wrong with the user's function costs no call
            term = _gradient(lambda leaf: function(leaf, times, **own), x, self.name)
        else:
            term = checked_shape(function(x, times, **own), x, f"the term {self.name}")
        return self.ask("model", x, t, self.prediction, conditions), term


@checked
def add_score(model: Model, term: Callable[..., Tensor], scale: Scale = 1.0) -> Model:
    """The model with score s(x, t) + scale term(x, t, **conditions).

    Args:
        model: of any process.
        term: of the shape of x (batch, *event); t is (batch,) in the dtype of x.
        scale: a number or a function of t.

    Raises:
        TypeError, ValueError: not a model, not a function, a scale that is not finite; at a call, a term of another
            shape, or a time where alpha = 0 and the model predicts x_0, v or the velocity.
    """
    check_guidance(model, scale, term=term)
    return Guided(_Term(model, term, scale, "term", gradient=False), model.sde, model.prediction)


@checked
def add_term(model: Model, log_likelihood: LogLikelihood, scale: Scale = 1.0) -> Model:
    """The model with score s(x, t) + scale grad_x log_likelihood(x, t, **conditions), by reverse-mode autodiff.

    Row i of the log-likelihood must depend on row i of x alone. Exact when it is log p_t(y | x_t), the likelihood
    smoothed by the process, and scale = 1; a likelihood of x_0 used in its place is an approximation.

    Args:
        log_likelihood: (batch,) for x (batch, *event) and t (batch,) in the dtype of x; made of torch operations.

    Raises:
        TypeError, ValueError: as `add_score`; at a call, a value that is not (batch,) or does not depend on x.
    """
    check_guidance(model, scale, log_likelihood=log_likelihood)
    return Guided(_Term(model, log_likelihood, scale, "log_likelihood", gradient=True), model.sde, model.prediction)


@checked
def classifier_guidance(model: Model, log_prob: LogLikelihood, scale: Scale = 1.0) -> Model:
    """The model with score s(x, t) + scale grad_x log p(y | x, t) of a classifier of noisy states.

    (Dhariwal and Nichol 2021, Diffusion models beat GANs, section 4; Song et al. 2021, Score-based generative
    modeling, appendix I.) With scale = 1 and the exact classifier the score is that of p_t(x | y). With another
    scale it is that of p_t(x) p_t(y | x)^scale at each t, which no process noises into another: what is sampled is
    not p(x) p(y | x)^scale.

    Args:
        log_prob: `log_prob(x, t, **conditions)`, (batch,): log p(y | x, t), the label y among its conditions
            (`.bind(label=...)`, one row a sample) or fixed inside.

    Raises:
        TypeError, ValueError: as `add_term`.
    """
    check_guidance(model, scale, log_prob=log_prob)
    return Guided(_Term(model, log_prob, scale, "log_prob", gradient=True), model.sde, model.prediction)


def _gradient(function: Callable[[Tensor], Tensor], x: Tensor, name: str) -> Tensor:
    """grad_x of the sum of function(x), inside no_grad and inference mode too."""
    # a graph only where the caller differentiates: through x, or through parameters of the function
    keep = torch.is_grad_enabled() and (x.requires_grad or _per_sample(function(x), x, name).requires_grad)
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x if keep and x.requires_grad else x.detach().clone().requires_grad_()
        value = _per_sample(function(leaf), x, name)
        gradient = None
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value.sum(), leaf, create_graph=keep, allow_unused=True)
        if gradient is None:
            raise ValueError(f"{name} does not depend on x by torch operations: it has no gradient")
    return gradient


def _per_sample(value: object, x: Tensor, name: str) -> Tensor:
    """What a function of a batch returned, if it is one real number a sample."""
    if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"expected {name} to return one number a sample, ({x.shape[0]},), got {got}")
    if not tensor(value):
        raise ValueError(f"expected {name} to return real numbers, got {described(value)}")
    return value


# ---- classifier-free guidance


class _ClassifierFree(Combination):
    def __init__(
        self,
        model: Model,
        unconditional: Model,
        scale: Scale,
        interval: tuple[float, float] | None,
        interval_in: str,
        rescale: float,
    ) -> None:
        super().__init__({"model": model, "unconditional": unconditional})
        self.process, self.scale, self.interval, self.interval_in = model.sde, scale, interval, interval_in
        self.rescale = rescale
        self.prediction = "x0" if rescale else model.prediction

    def forward(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        if self.rescale and x[0].numel() < 2:
            raise ValueError(f"rescale needs samples of two or more components, got x of shape {tuple(x.shape)}")
        weight = self._weight(t)
        known = weight.ndim == 0 or weight.device.type == "cpu"  # no synchronisation to save a call
        if known and bool((weight == 1).all()):
            return self.ask("model", x, t, self.prediction, conditions)
        if known and not self.rescale and bool((weight == 0).all()):
            return self.ask("unconditional", x, t, self.prediction, conditions)
        c = self.ask("model", x, t, self.prediction, conditions)
        u = self.ask("unconditional", x, t, self.prediction, conditions)
        # lerp is exact at weights 0 and 1: samples outside the interval see the conditional model alone
        guided = torch.lerp(u, c, float(weight) if weight.ndim == 0 else weight.to(x.dtype))
        if not self.rescale:
            return guided
        ratio = _std(c) / _std(guided)
        return guided * (1 + self.rescale * (torch.where(torch.isfinite(ratio), ratio, 1.0) - 1))

    def _weight(self, t: Tensor) -> Tensor:
        weight = strength(self.scale, t)
        if self.interval is None:
            return weight
        level = t
        if self.interval_in == "sigma":
            assert isinstance(self.process, GaussianSDE)
            level = self.process.sigma(t) / self.process.alpha(t)
        low, high = self.interval
        return torch.where((level > low) & (level <= high), weight, 1.0)


@checked
def classifier_free(
    model: Model,
    unconditional: Model,
    scale: Scale,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
    *,
    interval_in: Literal["sigma", "t"] = "sigma",
) -> Model:
    """The model u + scale (c - u) of a conditional model c and an unconditional model u, in any prediction.

    (Ho and Salimans 2022, Classifier-free diffusion guidance, equation 6.) scale = 1 is the conditional model,
    scale = 0 the unconditional, each with one call; the paper's own strength is w = scale - 1, (1 + w) c - w u.
    The score is that of p_t(x) p_t(y | x)^scale at each t. For scale other than 0 and 1 these are not the laws of
    one process, and what is sampled is not p(x) p(y | x)^scale.

    Args:
        model: bound to its condition, `net_model.bind(label=labels)`, or to be bound later.
        unconditional: the same with its null condition, or another model of the process (a worse one for
            autoguidance, Karras et al. 2024).
        scale: a number or a function of t.
        interval: (low, high]: guide there, and use the conditional model alone, with one call, elsewhere
            (Kynkaanniemi et al. 2024, Applying guidance in a limited interval). The model then jumps at its ends:
            put them on the grid of a method of high order.
        rescale: phi in [0, 1]: the guided x_0 times phi std(c)/std(guided) + 1 - phi, standard deviations over the
            components of a sample (Lin et al. 2024, Common diffusion noise schedules, section 3.4, on the network's
            output; here on x_0, whatever the network predicts, which for v is the same at low signal).
        interval_in: what the interval is in: "sigma", the level sigma(t)/alpha(t), EDM's sigma; or the time "t".

    Raises:
        TypeError, ValueError: not models, models of two processes, a scale that is not finite, an empty interval,
            rescale outside [0, 1].
    """
    check_guidance(model, scale)
    if not isinstance(unconditional, Model):
        raise TypeError(f"expected unconditional as a Model, got {type(unconditional).__name__}")
    if unconditional.sde is not model.sde and unconditional.sde != model.sde:
        raise ValueError(f"expected two models of one process, got {model.sde!r} and {unconditional.sde!r}")
    if interval_in not in ("sigma", "t"):
        raise ValueError(f'expected interval_in "sigma" or "t", got {interval_in!r}')
    if interval is not None:
        if not isinstance(interval, (tuple, list)) or len(interval) != 2 or not _increase(*interval):
            raise ValueError(f"expected interval as (low, high) with low < high, got {interval!r}")
        if interval_in == "sigma":
            _ = model.gaussian
    if not 0 <= rescale <= 1:
        raise ValueError(f"expected rescale in [0, 1], got {rescale!r}")
    if rescale:
        _ = model.gaussian
    net = _ClassifierFree(model, unconditional, scale, interval, interval_in, float(rescale))
    return Guided(net, model.sde, net.prediction)


def _std(x: Tensor) -> Tensor:
    """The standard deviation over the components of each sample, (batch, 1, ..., 1)."""
    return x.flatten(1).std(dim=1).reshape(-1, *[1] * (x.ndim - 1))


# ---- thresholding


class _Threshold(Combination):
    def __init__(self, model: Model, clip: Callable[[Tensor], Tensor]) -> None:
        super().__init__({"model": model})
        self.clip = clip

    def forward(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        return self.clip(self.ask("model", x, t, "x0", conditions))


@checked
def clip_x0(model: Model, low: float = -1.0, high: float = 1.0) -> Model:
    """The model with its x_0 clipped to [low, high] (static thresholding); other predictions follow from it.

    Right for data known to lie there, such as pixels; the exact E[x_0 | x_t] of such data is never outside.

    Raises:
        TypeError, ValueError: not a model of a GaussianSDE, or not low < high.
    """
    check_guidance(model, 1.0)
    _ = model.gaussian
    if not _increase(low, high):
        raise ValueError(f"expected low < high, got {low!r} and {high!r}")
    low, high = max(low, -_LARGEST), min(high, _LARGEST)  # infinite ones do not clip, and do so in every dtype
    return Guided(_Threshold(model, lambda x0: x0.clamp(low, high)), model.sde, "x0")


@checked
def dynamic_threshold(model: Model, quantile: float = 0.995, floor: float = 1.0) -> Model:
    """The model with x_0 clipped to [-s, s] and times floor/s, s = max(floor, the quantile of |x_0| of the sample).

    (Saharia et al. 2022, Imagen, section 2.3, with floor = 1, the range of the data.) Each sample has its own s;
    where the quantile is below `floor` this is `clip_x0(model, -floor, floor)`.

    Raises:
        TypeError, ValueError: not a model of a GaussianSDE, a quantile outside (0, 1], or floor not positive.
    """
    check_guidance(model, 1.0)
    _ = model.gaussian
    if not 0 < quantile <= 1:
        raise ValueError(f"expected quantile in (0, 1], got {quantile!r}")
    if not 0 < floor <= _LARGEST:
        raise ValueError(f"expected floor > 0, got {floor!r} (at most {_LARGEST:g})")

    def clip(x0: Tensor) -> Tensor:
        # by sorting: torch.quantile refuses more than 2^24 numbers, a batch of images
        size = x0.abs().reshape(len(x0), -1).sort(dim=1).values
        place = quantile * (size.shape[1] - 1)
        low, high = math.floor(place), math.ceil(place)
        s = torch.lerp(size[:, low], size[:, high], place - low).clamp(min=floor)
        s = s.reshape(-1, *[1] * (x0.ndim - 1))
        return torch.clamp(x0, -s, s) * (floor / s)

    return Guided(_Threshold(model, clip), model.sde, "x0")


# ---- checks


def strength(scale: Scale, t: Tensor) -> Tensor:
    """The scale at aligned times t, float64, 0-d or of the shape of t."""
    value = torch.as_tensor(scale(t) if callable(scale) else scale, dtype=torch.float64)
    if value.ndim > 0 and value.shape != t.shape:
        raise ValueError(
            f"expected scale(t) of the shape of t, {tuple(t.shape)}, or a number; got {tuple(value.shape)}"
        )
    return value


def _increase(low: object, high: object) -> bool:
    """Whether these are two numbers, the first below the second."""
    return isinstance(low, (int, float)) and isinstance(high, (int, float)) and low < high


def check_guidance(model: object, scale: object, **functions: object) -> None:
    """Refuse what cannot be guided: the checks that every guidance here makes.

    Raises:
        TypeError: `model` is no Model, or one of `functions` is none.
        ValueError: `scale` is neither a finite number nor a function of t.
    """
    if not isinstance(model, Model):
        raise TypeError(f"expected a Model, got {type(model).__name__}; wrap the network: sf.Model(net, sde, ...)")
    for name, function in functions.items():
        if isinstance(function, Model) or not callable(function):
            raise TypeError(f"expected {name} as a function of (x, t), got {type(function).__name__}")
    if callable(scale):
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) <= _LARGEST:
        raise ValueError(f"expected scale as a finite number (at most {_LARGEST:g}) or a function of t, got {scale!r}")
