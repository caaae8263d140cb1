"""What is benchmarked: a model on its process, and what is known about the truth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdeflow.checked import checked_class
from sdeflow.gaussian import GaussianSDE
from sdeflow.model import Model
from sdeflow.noise import PATH, Noise
from sdeflow.sde import Problem as Equation
from sdeflow.user_code import find

Draw = Callable[[int, int], Tensor]
"""`draw(n, seed)`: n independent samples (n, *shape)."""


_MOST = 100_000_000
"""Samples that a machine holds."""


@checked_class
@dataclass(frozen=True, eq=False)
class Problem:
    """A model to sample from, with everything else optional.

    Deterministic solvers are compared, sample by sample, with the exact flow of the same model from
    the same start: `reference`, or RK45 at `tolerance`. Stochastic ones are compared in distribution
    with exact draws: `sample`, or the model's own flow.

    Args:
        model: an `sf.Model`; its process gives the flow, the reverse SDE, the start and the end t_min.
            A network that is a torch module is copied to the CPU, put in evaluation mode and run in
            float64, or in float32 if it refuses.
        shape: of one sample.
        name: for tables and file names.
        title: one line for the report; the name unless given.
        sample: draws of the data (at t0: they are noised to t_min here).
        reference: the exact end at t_min of the probability flow from states x (n, *shape) at t1.
        prior: start states at t1; those of the process unless given (needed if it is no GaussianSDE).
        centres: (K, *shape), places where samples end: one that ends nearest to another place than its
            reference is counted as flipped. None counts errors above half the spread of the references.
        tolerance: rtol = atol of the reference. Its error, shown as the floor, is the difference to
            ten times this tolerance.
        samples: trajectories of deterministic solvers.
        draws: samples of stochastic solvers.
        target_tolerance: rtol = atol of the flow that stands in for exact draws when `sample` is None.

    Raises:
        TypeError, ValueError: an argument of the wrong kind.
    """

    model: Model
    shape: tuple[int, ...]
    name: str = "problem"
    title: str = ""
    sample: Draw | None = None
    reference: Callable[[Tensor], Tensor] | None = None
    prior: Draw | None = None
    centres: Tensor | None = None
    tolerance: float = 1e-6
    samples: int = 128
    draws: int = 1000
    target_tolerance: float = 1e-4

    def __post_init__(self) -> None:
        if not isinstance(self.model, Model):
            raise TypeError(
                f"bench.Problem: expected an sf.Model, got {type(self.model).__name__}; "
                "wrap the network: sf.Model(net, sde, prediction)"
            )
        object.__setattr__(self, "shape", tuple(self.shape))
        if not all(isinstance(n, int) and n >= 1 for n in self.shape):
            raise ValueError(f"bench.Problem: expected shape as positive integers, got {self.shape!r}")
        if not self.name or "/" in self.name:
            raise ValueError(f"bench.Problem: expected a name without '/', got {self.name!r}")
        if not isinstance(self.model.sde, GaussianSDE) and self.prior is None:
            raise ValueError(
                f"bench.Problem: {type(self.model.sde).__name__} is no GaussianSDE, so where its reversal starts "
                "must be given: prior=draw, with draw(n, seed) -> (n, *shape) at t1"
            )
        for what in ("tolerance", "target_tolerance"):
            value = getattr(self, what)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"bench.Problem: expected {what} > 0, got {value!r}")
        for what, least in (("samples", 2), ("draws", 16)):
            value = getattr(self, what)
            if not least <= value <= _MOST:
                raise ValueError(f"bench.Problem: expected {what} >= {least}, got {value!r} (at most {_MOST})")

    def start(self, n: int, seed: int, dtype: torch.dtype) -> Tensor:
        """n start states at t1, (n, *shape) of `dtype`."""
        if self.prior is not None:
            return _checked(self.prior(n, seed), n, self.shape, "prior").to(dtype)
        return self.model.gaussian.prior_sample((n, *self.shape), seed, dtype=dtype)

    def exact_draws(self, n: int, seed: int) -> Tensor:
        """n draws of the exact law at t_min, (n, *shape) float64: data, noised."""
        assert self.sample is not None
        data = _checked(self.sample(n, seed), n, self.shape, "sample").to(torch.float64)
        process = self.model.sde
        if not isinstance(process, GaussianSDE):
            return data
        eps = Noise(seed, n).normal(PATH, 0, self.shape, torch.float64)
        return process.perturb(data, process.t_min, eps)


def _checked(x: Any, n: int, shape: tuple[int, ...], what: str) -> Tensor:
    x = torch.as_tensor(x)
    if tuple(x.shape) != (n, *shape):
        raise ValueError(f"bench.Problem: expected {what}(n, seed) of shape {(n, *shape)}, got {tuple(x.shape)}")
    return x


def as_problem(value: Any, name: str) -> Problem:
    """`value` as a Problem: one, or a function without arguments that returns one.

    Raises:
        TypeError: anything else; the message says what to write.
    """
    if isinstance(value, Problem):
        return value
    if isinstance(value, Model):
        raise TypeError(
            f"{name} is an sf.Model, which does not know the shape of a sample: "
            f"write sf.bench.Problem({name}, shape=(...))"
        )
    if callable(value) and not isinstance(value, (type, torch.nn.Module, Equation)):
        made = value()
        if isinstance(made, Problem):
            return made
        raise TypeError(f"expected {name}() to return an sf.bench.Problem, got {type(made).__name__}")
    raise TypeError(
        f"expected {name} to be an sf.bench.Problem, or a function without arguments that returns one, "
        f"got {type(value).__name__}"
    )


def load(where: str) -> Problem:
    """The problem NAME of a Python file or module, from "FILE.py:NAME" or "module:NAME". Runs that code.

    Raises:
        ValueError: not of that form, no such file, no such name, or the file raises.
        TypeError: the name is no problem.
    """
    return as_problem(find(where, Problem), where.rpartition(":")[2])
