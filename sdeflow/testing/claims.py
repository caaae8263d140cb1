"""What is claimed of a process, by the arguments of `check_sde` or by its own methods, and what is put in its place."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sdeflow.gaussian import GaussianSDE
from sdeflow.linear import LinearSDE
from sdeflow.problems import GaussianMixture
from sdeflow.pushforward import Pushforward
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import SDE
from sdeflow.testing.fields import LogDensity

_NAMES = ("log_density", "score", "marginal", "reverse_drift", "flow_drift")
_DERIVED = (GaussianSDE.marginal, LinearSDE.marginal)
"""The library's, from the kernel, which has identities of its own."""
_OF_THE_LAW = (Pushforward.log_density, Pushforward.score)


class Claims:
    """What is claimed of a process: by the arguments, else by its own methods.

    Attributes:
        density: the law that identities are held against: the claimed one, or that of mixture data where the library
            knows it; None for none.
        claimed_density, score, marginal, reverse_drift, flow_drift: the claims; None for none.
        factor: the marginal is a `LinearSDE`'s own, with a factor of the covariance in place of a deviation.
        other: the law of other data, for the relative entropy.
    """

    def __init__(self, sde: SDE, event: tuple[int, ...], *given: Any) -> None:
        found = [own(sde, name) if value is None else value for name, value in zip(_NAMES, given, strict=True)]
        self.claimed_density, self.score, self.marginal, self.reverse_drift, self.flow_drift = found
        self.factor = isinstance(sde, LinearSDE) and given[_NAMES.index("marginal")] is None
        self.density: LogDensity | None = self.claimed_density
        self.other: LogDensity | None = None
        if isinstance(sde, (GaussianSDE, LinearSDE)) and len(event) == 1:
            laws = [mixture_law(sde, event[0], k) for k in (0, 1)]
            self.density, self.other = (laws[0] if self.density is None else self.density), laws[1]
        elif self.density is not None and hasattr(sde, "with_start") and hasattr(sde, "start"):
            atoms = torch.as_tensor(sde.start, dtype=torch.float64)
            if atoms.shape[-1] == 1:
                try:
                    self.other = sde.with_start(_moved(atoms, sde.domain)).log_density
                except ValueError:
                    self.other = None


def own(sde: SDE, name: str) -> Any:
    """What a process offers under this name as a claim: not what the library derives from its kernel, nor the law of
    an image whose original has none."""
    value = getattr(sde, name, None)
    function = getattr(value, "__func__", None)
    if isinstance(sde, ReverseSDE) or function in _DERIVED:
        return None
    if isinstance(sde, Pushforward) and function in _OF_THE_LAW:
        return None if sde.law is None and own(sde.base, "log_density") is None else value
    return value


def declared_event(sde: SDE) -> tuple[int, ...] | None:
    """The shape of one sample that the class declares, or that the law of an image's original has."""
    if sde.event is not None or not isinstance(sde, Pushforward):
        return sde.event
    return declared_event(sde.base) if sde.law is None else getattr(sde.law, "event", None)


def _moved(atoms: Tensor, domain: tuple[float, float]) -> Tensor:
    low, high = domain
    if math.isinf(low) and math.isinf(high):
        return atoms + 0.3
    return atoms * 1.2 if math.isinf(high) else low + (atoms - low) * 0.8


def mixture_law(sde: Any, d: int, seed: int) -> LogDensity:
    """log p_t of mixture data in d dimensions under a Gaussian or linear process."""
    generator = torch.Generator().manual_seed(50 + seed)
    means = torch.randn(3, d, generator=generator, dtype=torch.float64)
    roots = torch.eye(d, dtype=torch.float64) + 0.3 * torch.randn(3, d, d, generator=generator, dtype=torch.float64)
    law = GaussianMixture(means, 0.3 * roots @ roots.mT, [0.3, 0.5, 0.2])

    def log_density(x: Tensor, t: Tensor) -> Tensor:
        return law.log_prob(x, sde, t)

    return log_density
