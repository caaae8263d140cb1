"""Problems as other packages' solvers call them: `torchdiffeq.odeint(problem, x, ts)`, `torchsde.sdeint(sde, x, ts)`.

`Problem` derives from `OdeCallable` and `SDE` from `SdeCallable`. These calls are raw: times are not clamped to the
span and nothing is counted, as it is under `sf.solvers.Torchdiffeq` and `sf.solvers.Torchsde`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sdeflow.sde import SDE


class _HasDrift(Protocol):
    direction: int

    def drift(self, x: Tensor, t: Tensor) -> Tensor: ...


class _HasDiffusion(_HasDrift, Protocol):
    noise: Literal["diagonal", "general"]
    interpretation: Literal["ito", "stratonovich"]

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor: ...


class OdeCallable:
    """A problem is the `func(t, y)` of `torchdiffeq.odeint`."""

    def __call__(self: _HasDrift, t: Any, x: Tensor) -> Tensor:
        """The drift f(x, t), of the shape and dtype of x, on the problem's own clock in either direction.

        Args:
            t: 0-d tensor of any dtype, or a number.
            x: states (batch, *event).

        Raises:
            ValueError: the drift has not the shape of x.
        """
        return _drift(self, x, _time(t))


class SdeCallable:
    """An SDE is the `sde` of `torchsde.sdeint`, for states (batch, channels).

    torchsde's time ascends. A problem that runs down (direction -1, such as a `ReverseSDE`) has `f` and `g` on the
    clock s = -t, dX = -f(X, -s) ds + G(X, -s) dW: from t = 1 to 0.001 is `ts = [-1.0, -0.001]`. Give `ts` in float64:
    torchsde adds up time in its dtype. States of other shapes: `sf.solvers.Torchsde`.
    """

    @property
    def sde_type(self: _HasDiffusion) -> str:
        """The problem's `interpretation`: "ito" or "stratonovich"."""
        return self.interpretation

    @property
    def noise_type(self: _HasDiffusion) -> str:
        """The problem's `noise`: "diagonal" or "general"."""
        return self.noise

    def f(self: _HasDiffusion, t: Any, y: Tensor) -> Tensor:
        """The drift on torchsde's clock, (batch, channels); t and y as for `__call__`."""
        return self.direction * _drift(self, y, self.direction * _time(t))

    def g(self: _HasDiffusion, t: Any, y: Tensor) -> Tensor:
        """The diffusion on torchsde's clock: (batch, channels) for diagonal noise, (batch, channels, m) for general.

        Raises:
            ValueError: `diffusion` returns a shape that its declared noise does not allow.
        """
        return flat_diffusion(self, y, self.direction * _time(t))


def _time(t: Any) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64)


def _drift(problem: _HasDrift, x: Tensor, t: Tensor) -> Tensor:
    from sdeflow.sde import checked_shape  # which imports this module

    return checked_shape(problem.drift(x, t), x, "the drift")


def flat_diffusion(problem: SDE | _HasDiffusion, x: Tensor, t: Tensor) -> Tensor:
    """G(x, t) in the dtype of x for flattened events: (batch, d), broadcast, or (batch, d, m) for general noise.

    Raises:
        ValueError: `diffusion` returns a shape that its declared noise does not allow.
    """
    g = torch.as_tensor(problem.diffusion(x, t)).to(x.dtype)
    if problem.noise == "diagonal":
        try:
            return g.expand(x.shape).reshape(x.shape[0], -1)
        except RuntimeError as error:
            raise _misfit(problem, x, g) from error
    if g.shape[:-1] != x.shape:
        raise _misfit(problem, x, g)
    return g.reshape(x.shape[0], -1, g.shape[-1])


def _misfit(problem: SDE | _HasDiffusion, x: Tensor, g: Tensor) -> ValueError:
    return ValueError(
        f"{type(problem).__name__}.diffusion with {problem.noise} noise returned {tuple(g.shape)} for x of shape "
        f"{tuple(x.shape)}: expected a shape that broadcasts against x, or (*x.shape, m) for general noise"
    )
