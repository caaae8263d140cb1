"""Models made of models: one network that asks several, and counts all their calls."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sdeflow.model import Counter, Model, row_of
from sdeflow.network import parameters_of
from sdeflow.sde import SDE, checked_shape


class _SharedCounter(Counter):
    """A count that stays with its model when the network is copied deeply."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> _SharedCounter:
        return self


class Combination(nn.Module, ABC):
    """The network of a `Guided` model: it asks its parts, by name, and combines what they say.

    A module, so that the parameters of its parts are its own (`sample` reads dtype and device from them).
    """

    def __init__(self, parts: dict[str, Model | Callable[..., Tensor]]) -> None:
        super().__init__()
        self.parts, self.counter = parts, _SharedCounter()
        nets = [part.net if isinstance(part, Model) else part for part in parts.values()]
        unique = {id(net): net for net in nets if isinstance(net, nn.Module)}
        self.networks = nn.ModuleList(unique.values())

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """The prediction of the guided model at x (batch, *event) and aligned float64 times t."""

    def model(self, name: str, conditions: dict[str, Any]) -> Model:
        """A part that is a model, with its own of the conditions."""
        part = self.parts[name]
        assert isinstance(part, Model)
        bound = copy.copy(part)
        bound.conditions = select(name, conditions)
        return bound

    def ask(self, name: str, x: Tensor, t: Tensor, as_: str, conditions: dict[str, Any]) -> Tensor:
        """One evaluation of the model `name`, its calls of networks counted."""
        model = self.model(name, conditions)
        before = model.nfe
        value = model(x, t, as_=as_)
        self.counter.calls += model.nfe - before
        return value


def select(name: str, conditions: dict[str, Any]) -> dict[str, Any]:
    """The conditions of the part `name`, under the names it knows."""
    prefix = name + "."
    return {key.removeprefix(prefix): value for key, value in conditions.items() if key.startswith(prefix)}


class Guided(Model):
    """A model whose network combines other models; made by the functions of `guidance` and `inverse`."""

    net: Combination

    def __init__(self, net: Combination, sde: SDE, prediction: Any, conditions: dict[str, Any] | None = None) -> None:
        super().__init__(net, sde, prediction, expand=False)
        self._counter = net.counter
        self._keep_bound: tuple[str, ...] = ("unconditional",)
        for name, part in net.parts.items():
            if isinstance(part, Model):
                self.conditions.update({f"{name}.{key}": value for key, value in part.conditions.items()})
        self.conditions.update(conditions or {})

    def raw(self, x: Tensor, time: Tensor) -> Tensor:
        return checked_shape(self.net(x, time, **self.conditions), x, "the guided model")

    def bind(self, **conditions: Any) -> Model:
        """The same model with conditions passed to every part that takes them.

        The unconditional model of `classifier_free` keeps what it was bound to before: its null condition. A name that
        `conditions` has, such as "unconditional.label" or "observed", replaces that one alone.

        Raises:
            TypeError: no part takes a condition of that name.
        """
        merged = dict(self.conditions)
        for key, value in conditions.items():
            if key in self.conditions:
                merged[key] = value
                continue
            taken = [name for name in self.net.parts if self._takes(name, key)]
            if not taken:
                raise TypeError(f"no part of {self!r} takes {key}: its parts are {', '.join(self.net.parts)}")
            for name in taken:
                held = select(name, merged)
                if name in self._keep_bound and any(k.rsplit(".", 1)[-1] == key for k in held):
                    continue
                part = self.net.parts[name]
                if isinstance(part, Model):
                    held = self.net.model(name, merged).bind(**{key: value}).conditions
                else:
                    held = {**held, key: value}
                merged.update({f"{name}.{k}": v for k, v in held.items()})
        model = copy.copy(self)
        model.conditions = merged
        return model

    def _takes(self, name: str, key: str) -> bool:
        part = self.net.parts[name]
        if isinstance(part, Guided):
            return any(part._takes(inner, key) for inner in part.net.parts)
        accepted = parameters_of(part.net if isinstance(part, Model) else part)
        return accepted is None or key in accepted


def x0_of(model: Model, x: Tensor, t: Tensor, value: Tensor) -> Tensor:
    """E[x_0 | x_t = x] from the model's own prediction `value` at x and aligned t, to be differentiated in x.

    Raises:
        ValueError: `value` records no gradient. x_0 = p x + q value still does, so that it would be a wrong one.
    """
    if not value.requires_grad:
        raise ValueError(
            "the model's prediction does not depend on x by torch operations: its gradient is needed, and the network "
            "detaches x or runs under no_grad"
        )
    return model.convert(x, t, value, row_of("x0", model.gaussian, t))


def usable_time(value: Any) -> Any:
    """The value, copied if it was made in inference mode, which no gradient may pass."""
    if not isinstance(value, Tensor) or not value.is_inference():
        return value
    with torch.inference_mode(False):
        return value.clone()
