"""Samplers by one-step kernels: DDPM with its variances, Euler ancestral, reverse diffusion; one call a step.

For a step from t0 down to t1 the forward kernel x_0 = r x_1 + sqrt(v) z has

    r = alpha_0/alpha_1,   v = sigma_0^2 - r^2 sigma_1^2 = sigma_0^2 (1 - exp(-2h)),   h = lam_1 - lam_0,

beta_t = v in a VP process, and the posterior of x_1 given x_0 and the data has the variance v sigma_1^2/sigma_0^2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sdeflow.checked import LARGEST, checked, checked_class
from sdeflow.gaussian import GaussianSDE
from sdeflow.noise import Noise
from sdeflow.plan import Plan, eta_key
from sdeflow.sde import Problem
from sdeflow.solvers.base import LinearSolver, Solver, Stepper, View, semilinear
from sdeflow.solvers.exponential import DDIM, ExponentialMultistep
from sdeflow.times import Each

Variance = Literal["posterior", "forward"] | Callable[[Tensor, Tensor], Tensor]


@checked
def DDPM(variance: Variance = "posterior") -> Solver:
    """DDPM's ancestral sampler, x_0 frozen over a step: the posterior's mean, and a variance of choice; brings eta = 1.

    (Ho et al. 2020, DDPM, equations 6 and 7.) No noise enters a step to sigma = 0, as in their algorithm 2.

    Args:
        variance: "posterior", beta-tilde = v sigma_1^2/sigma_0^2 (right for data at a point); "forward", beta = v
            ("fixedlarge", right for N(0, I) under VP); or a function v(x, t) -> (batch, *event), or what broadcasts to
            it, in [0, 1], of the state and time at a step's start: a learned variance, elementwise
            exp(v log beta + (1 - v) log beta-tilde) (Nichol and Dhariwal 2021, Improved DDPM, equation 15). Its calls
            are not counted as the model's.

    Raises:
        ValueError: another variance.
    """
    if callable(variance):
        return LearnedVariance(variance)
    if variance == "posterior":
        return ExponentialMultistep(order=1, eta=1.0, name="DDPM")
    if variance == "forward":
        return _ForwardVariance(order=1, eta=1.0, name="DDPM(forward)")
    raise ValueError(f'DDPM: expected variance "posterior", "forward" or a function v(x, t), got {variance!r}')


def _kernel_variance(process: GaussianSDE, grid: Tensor) -> Tensor:
    """v of each step, (steps,)."""
    return -(process.sigma(grid[:-1]) ** 2) * torch.expm1(-2 * torch.diff(process.lam(grid)))


class _ForwardVariance(ExponentialMultistep):
    """DDPM with the variance of the forward kernel."""

    def plan(self, problem: Problem, grid: Tensor) -> Plan:
        process = semilinear(self.name, problem).gaussian
        std = torch.sqrt(_kernel_variance(process, grid))
        return dataclasses.replace(
            super().plan(problem, grid), noise=torch.where(process.sigma(grid[1:]) > 0, std, 0.0)
        )


@dataclass(frozen=True)
class LearnedVariance(Solver):
    """DDPM with a variance that depends on the state; see `DDPM`."""

    v: Callable[[Tensor, Tensor], Tensor]
    name = "DDPM(learned)"
    view: View = "transition"

    @property
    def _fixed(self) -> ExponentialMultistep:
        return ExponentialMultistep(order=1, eta=1.0, name=self.name)

    def check(self, problem: Problem) -> None:
        self._fixed.check(problem)

    def draws_noise(self, problem: Problem) -> bool:
        return True

    def stepper(self, problem: Problem, x: Tensor, grid: Tensor, noise: Noise | None) -> Stepper:
        assert noise is not None
        return _LearnedRun(self, self._fixed.plan(problem, grid), problem, x, noise)


class _LearnedRun:
    """The steps of the posterior's mean, each with sigma_1/sigma_0 (sigma_0/sigma_1)^v sqrt(v_step) z added."""

    def __init__(self, solver: LearnedVariance, plan: Plan, problem: Problem, x: Tensor, noise: Noise) -> None:
        process, grid = semilinear(solver.name, problem).gaussian, plan.grid
        self._v, self._times = solver.v, Each(grid)
        self._mean = dataclasses.replace(plan, noise=torch.zeros_like(plan.noise)).stepper(problem, x, grid, None)
        work = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        # the path of the posterior's variance: v = 0 is DDPM() on the same seed
        self._walk = noise.walk(grid, x.shape[1:], work, lengths=plan.lengths)
        lengths = self._walk.lengths
        low, high = torch.log(plan.noise), 0.5 * torch.log(_kernel_variance(process, grid))
        # log beta-tilde of a step to sigma = 0 is clipped by leaving its noise out, as the step's z = 0
        self._noisy = ((plan.noise > 0) & (lengths > 0)).tolist()
        self._low = (low - 0.5 * torch.log(lengths)).tolist()
        self._rise = (high - low).tolist()

    @property
    def calls(self) -> int:
        return self._mean.calls

    def step(self, i: int, x: Tensor) -> Tensor:
        y = self._mean.step(i, x)
        if not self._noisy[i]:
            return y
        v = self._v(x, self._times[i])
        if not isinstance(v, Tensor) or not _fits(v, x):
            got = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ValueError(f"DDPM: expected v(x, t) to broadcast to x, {tuple(x.shape)}, got {got}")
        w = self._walk(i).w
        return y + (torch.exp(self._low[i] + self._rise[i] * v.to(w.dtype)) * w).to(y.dtype)


def _fits(v: Tensor, x: Tensor) -> bool:
    try:
        return torch.broadcast_shapes(v.shape, x.shape) == x.shape
    except RuntimeError:
        return False


@checked_class
@dataclass(frozen=True)
class EulerAncestral(DDIM):
    """Euler's method down past the next level, and noise back up to it; its own stochasticity, on the flow.

    With y = x/alpha and u = sigma/alpha, from u to u' (k-diffusion's "euler_ancestral"):

        up = min(u', eta sqrt(u'^2 (u^2 - u'^2)/u^2)),   down = sqrt(u'^2 - up^2),   y' = y + (down - u) eps + up z.

    For eta <= 1 it is DDIM with the same eta (Song et al. 2021, DDIM, equation 16), and with 1 DDPM; above 1 long
    steps replace all of the noise.
    """

    eta: float = 1.0
    name = "EulerAncestral"

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= LARGEST:
            raise ValueError(f"EulerAncestral: expected a finite eta >= 0, got {self.eta!r} (at most {LARGEST:g})")


@dataclass(frozen=True)
class ReverseDiffusion(LinearSolver):
    """Reverse diffusion: the forward kernel's own step, turned round; reads the problem's eta.

        x' = (2 - r) x + (1 + eta^2)/2 v s(x) + eta sqrt(v) z

    (Song et al. 2021, Score-based generative modeling, appendix E, for eta = 1 and 0: r = sqrt(1 - beta), v = beta in
    VP, and r = 1, v = sigma_0^2 - sigma_1^2 in VE.) Order 1. No noise enters a step to sigma = 0, where
    the published code returns its last mean; that is E[x_0 | x] only in VE with eta = 1.
    """

    name = "ReverseDiffusion"
    view: View = "transition"

    def check(self, problem: Problem) -> None:
        semilinear(self.name, problem)

    def plan(self, problem: Problem, grid: Tensor) -> Plan:
        reverse = semilinear(self.name, problem)
        process, steps = reverse.gaussian, grid.numel() - 1
        alpha, sigma = process.alpha(grid), process.sigma(grid)
        eta2 = reverse.mean_eta2(grid[:-1], grid[1:])
        v = _kernel_variance(process, grid)
        return Plan(
            name=self.name,
            view="transition",
            target="eps",
            grid=grid,
            times=grid[:-1].clone(),
            step_of_row=torch.arange(steps),
            ratio=2 - alpha[:-1] / alpha[1:],
            weights=(-0.5 * (1 + eta2) * v / sigma[:-1])[:, None],
            noise=torch.where((eta2 > 0) & (sigma[1:] > 0), torch.sqrt(eta2 * v), 0.0),
            process=repr(process),
            eta=eta_key(reverse.eta),
        )


@dataclass(frozen=True)
class AncestralPredictor(LinearSolver):
    """The ancestral predictor of predictor-corrector sampling: DDPM with the variance its authors gave each process.

    "forward" in VP, x' = (x + beta s)/sqrt(1 - beta) + sqrt(beta) z, and "posterior" where alpha is constant (VE),
    x' = x + v s + sqrt(v) (sigma_1/sigma_0) z (Song et al. 2021, Score-based generative modeling, appendix F); they
    define no other process, and the rest takes "forward" here. Both variances have the marginals in the limit of
    short steps, with the order 1 of the method; neither is right for all data, see `DDPM`.
    """

    name = "AncestralPredictor"
    view: View = "transition"

    def check(self, problem: Problem) -> None:
        ExponentialMultistep(order=1, eta=1.0, name=self.name).check(problem)

    def draws_noise(self, problem: Problem) -> bool:
        return True

    def plan(self, problem: Problem, grid: Tensor) -> Plan:
        alpha = semilinear(self.name, problem).gaussian.alpha(grid)
        kind = ExponentialMultistep if bool((alpha == alpha[0]).all()) else _ForwardVariance
        return kind(order=1, eta=1.0, name=self.name).plan(problem, grid)
