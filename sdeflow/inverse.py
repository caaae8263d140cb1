"""Linear inverse problems: samples of p(x_0 | y) for y = A x_0 + s n, from a model of p(x_0).

The exact score of p_t(x | y) is s(x, t) + grad log p_t(y | x), where p_t(y | x) averages N(y; A x_0, s^2 I) over
p(x_0 | x_t = x). With D = E[x_0 | x_t], J = dD/dx:

    exact_gaussian   N(y; A D, A C_t A^T + s^2 I)    C_t = Cov[x_0 | x_t], exact for Gaussian data
    pigdm            N(y; A D, r_t^2 A A^T + s^2 I)  one variance for C_t
    dps              N(y; A D, s^2 I)                none

and the two below are not in the form of a score: they act on the state after each step of a solver.

    Replacement      the part of x_t that y determines, drawn from y noised to t
    DPSStep          x - zeta grad |y - A D|, the published form of DPS

Outside the cases named, all but the first are biased, also with an exact model and infinitely many steps;
`posterior` is the closed form to measure them against. Measured, in posterior standard deviations off the mean, on
four correlated Gaussian components of which two are seen with s = 0.2 (flow/reverse SDE): pigdm 0.85/0.41,
dps 1.80/0.92; with s = 0, Replacement 1.30/0.97 (0.30 for the latter with each step taken five times).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdeflow.guidance import Guided, Scale, WithScore, _check, _usable
from sdeflow.model import Model, row_of
from sdeflow.noise import Noise
from sdeflow.plan import Plan
from sdeflow.problems import Gaussian, GaussianMixture
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import Problem
from sdeflow.solvers.base import LinearSolver, Solver, Stepper, semilinear
from sdeflow.times import as_time

OBSERVED = 8
"""The stream of the noise added to observations, after those of `sdeflow.noise`."""

_GOLDEN, _WORD = 0x9E3779B97F4A7C15, (1 << 63) - 1

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LinearObservation:
    """y = A x + noise_std n, A linear and given by functions of batches.

    Args:
        forward: A, from (batch, *event) to (batch, *observed).
        adjoint: A^T, back: <A x, y> = <x, A^T y> for each sample.
        noise_std: s >= 0.
        gram_solve: `gram_solve(v, a, b)` = (a A A^T + b I)^-1 v for v (batch, *observed) and a, b >= 0, each 0-d or
            (batch, 1, ..., 1); None solves by conjugate gradients, which takes as many products with A and A^T as
            A A^T has distinct eigenvalues.

    Raises:
        TypeError, ValueError: not functions, or noise_std negative or not finite.
    """

    forward: Map
    adjoint: Map
    noise_std: float
    gram_solve: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if not callable(self.forward) or not callable(self.adjoint):
            raise TypeError("expected forward and adjoint as functions of a batch")
        if not (isinstance(self.noise_std, (int, float)) and math.isfinite(self.noise_std) and self.noise_std >= 0):
            raise ValueError(f"expected noise_std >= 0, got {self.noise_std!r}")

    def solve(self, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """(a A A^T + b I)^-1 v, for a and b of one element or one a sample."""
        a, b = (_rows(w, v) for w in (a, b))
        if self.gram_solve is not None:
            return self.gram_solve(v, a, b)
        return _conjugate_gradients(lambda u: a * self.forward(self.adjoint(u)) + b * u, v)

    # ---- operators

    @staticmethod
    def from_matrix(matrix: Any, noise_std: float, event: tuple[int, ...] | None = None) -> LinearObservation:
        """A as a matrix (m, D) on samples of shape `event` with D components, (D,) unless given.

        Raises:
            ValueError: not a finite matrix, or another number of components.
        """
        matrix = torch.as_tensor(matrix, dtype=torch.float64)
        if matrix.ndim != 2 or not bool(torch.isfinite(matrix).all()):
            raise ValueError(f"expected a finite matrix (m, D), got shape {tuple(matrix.shape)}")
        shape = (matrix.shape[1],) if event is None else tuple(event)
        if math.prod(shape) != matrix.shape[1]:
            raise ValueError(f"expected an event of {matrix.shape[1]} components, got {shape}")
        values, axes = torch.linalg.eigh(matrix @ matrix.T)
        values = values.clamp(min=0)

        def like(v: Tensor, x: Tensor) -> Tensor:
            return v.to(device=x.device, dtype=x.dtype)

        def solve(v: Tensor, a: Tensor, b: Tensor) -> Tensor:
            q = like(axes, v)
            return (v @ q / (a * like(values, v) + b)) @ q.T

        return LinearObservation(
            lambda x: _of_event(x, shape).flatten(1) @ like(matrix, x).T,
            lambda y: (y @ like(matrix, y)).reshape(-1, *shape),
            noise_std,
            solve,
        )

    @staticmethod
    def inpainting(mask: Tensor, noise_std: float) -> LinearObservation:
        """The components where `mask` (*event), bool, is True: y = x[:, mask], (batch, number of them).

        Raises:
            ValueError: not a mask of bools, or nothing observed.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or not bool(mask.any()):
            raise ValueError("expected mask as a tensor of bools of the shape of a sample, with at least one True")
        shape = tuple(mask.shape)
        places = torch.nonzero(mask.flatten()).flatten()

        def adjoint(y: Tensor) -> Tensor:
            full = y.new_zeros(y.shape[0], mask.numel())
            return full.index_copy(1, places.to(y.device), y).reshape(-1, *shape)

        return LinearObservation(
            lambda x: _of_event(x, shape).flatten(1)[:, places.to(x.device)],
            adjoint,
            noise_std,
            lambda v, a, b: v / (a + b),
        )

    @staticmethod
    def super_resolution(factor: int, noise_std: float) -> LinearObservation:
        """Means over blocks of factor x factor pixels: (batch, ..., H, W) to (batch, ..., H/factor, W/factor).

        Raises:
            ValueError: not factor >= 1; at a call, sides that it does not divide.
        """
        if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
            raise ValueError(f"expected factor >= 1, got {factor!r}")

        def forward(x: Tensor) -> Tensor:
            if x.ndim < 3 or x.shape[-1] % factor or x.shape[-2] % factor:
                raise ValueError(
                    f"expected x (batch, ..., H, W) with sides in blocks of {factor}, got {tuple(x.shape)}"
                )
            rows, columns = x.shape[-2] // factor, x.shape[-1] // factor
            return x.reshape(*x.shape[:-2], rows, factor, columns, factor).mean(dim=(-3, -1))

        def adjoint(y: Tensor) -> Tensor:
            return y.repeat_interleave(factor, -2).repeat_interleave(factor, -1) / factor**2

        return LinearObservation(forward, adjoint, noise_std, lambda v, a, b: v / (a / factor**2 + b))

    @staticmethod
    def blur(kernel: Any, noise_std: float) -> LinearObservation:
        """Periodic convolution over the last two dimensions with `kernel` (odd, odd), centred; by FFT.

        Raises:
            ValueError: not a finite kernel of odd sides; at a call, images smaller than it.
        """
        kernel = torch.as_tensor(kernel, dtype=torch.float64)
        if kernel.ndim != 2 or not all(n % 2 for n in kernel.shape) or not bool(torch.isfinite(kernel).all()):
            raise ValueError(f"expected a finite kernel with two odd sides, got shape {tuple(kernel.shape)}")

        def spectrum(x: Tensor) -> Tensor:
            h, w = x.shape[-2:]
            if x.ndim < 3 or h < kernel.shape[0] or w < kernel.shape[1]:
                raise ValueError(
                    f"expected x (batch, ..., H, W) no smaller than the kernel {tuple(kernel.shape)}, "
                    f"got {tuple(x.shape)}"
                )
            padded = nn.functional.pad(kernel, (0, w - kernel.shape[1], 0, h - kernel.shape[0]))
            centred = padded.roll((-(kernel.shape[0] // 2), -(kernel.shape[1] // 2)), (0, 1))
            return torch.fft.rfft2(centred).to(
                x.device, torch.complex128 if x.dtype == torch.float64 else torch.complex64
            )

        def filtered(x: Tensor, response: Tensor) -> Tensor:
            wide = x if x.dtype in (torch.float32, torch.float64) else x.float()  # all that the FFT takes
            return torch.fft.irfft2(torch.fft.rfft2(wide) * response, s=tuple(x.shape[-2:])).to(x.dtype)

        return LinearObservation(
            lambda x: filtered(x, spectrum(x)),
            lambda y: filtered(y, spectrum(y).conj()),
            noise_std,
            lambda v, a, b: filtered(v, 1 / (a * spectrum(v).abs().square() + b)),
        )


# ---- terms of the score


class _Likelihood(WithScore):
    """The term J^T A^T (r^2 A A^T + s^2 I)^-1 (y - A D): the network is called once, and differentiated."""

    def __init__(self, model: Model, observation: LinearObservation, y: Tensor, scale: Scale, variance: float) -> None:
        super().__init__(model, scale)
        self.observed, self.variance = _Observed(observation, y), variance

    def both(self, x: Tensor, t: Tensor, conditions: dict[str, Any]) -> tuple[Tensor, Tensor]:
        model, y, observation = self.model("model", conditions), self.observed(x, conditions), self.observed.observation
        process = model.gaussian
        alpha, sigma = process.alpha(t), process.sigma(t)
        spread = (self.variance * sigma**2 / (self.variance * alpha**2 + sigma**2)).to(x.dtype)
        noise = torch.full_like(spread, observation.noise_std**2)
        trained = isinstance(model.net, nn.Module) and any(p.requires_grad for p in model.net.parameters())
        keep = torch.is_grad_enabled() and (x.requires_grad or trained)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = x if keep and x.requires_grad else x.detach().clone().requires_grad_()
            time = _usable(t)
            value = self.ask("model", leaf, time, model.prediction, conditions)
            x0 = model.convert(leaf, time, value, row_of("x0", process, time))
            seen = observation.forward(x0 if keep else x0.detach())
            pull = observation.adjoint(observation.solve(y - seen, spread, noise))
            (term,) = torch.autograd.grad(x0, leaf, pull, create_graph=keep)
        return (value if keep else value.detach()), term


class _ExactGaussian(WithScore):
    def __init__(self, model: Model, prior: Gaussian, observation: LinearObservation, y: Tensor) -> None:
        super().__init__(model, 1.0)
        self.observed = _Observed(observation, y)
        self.mean, self.noise = prior.mean.flatten(), observation.noise_std**2
        self.variances, self.axes = torch.linalg.eigh(prior.covariance)
        self.matrix = _matrix(observation, prior.event) @ self.axes

    def both(self, x: Tensor, t: Tensor, conditions: dict[str, Any]) -> tuple[Tensor, Tensor]:
        process = self.model("model", conditions).gaussian
        y = self.observed(x, conditions).flatten(1).to(torch.float64)
        alpha, sigma = (v.reshape(-1, 1).to(x.device) for v in (process.alpha(t), process.sigma(t)))
        axes, matrix, variances, mean = (v.to(x.device) for v in (self.axes, self.matrix, self.variances, self.mean))
        centred = (x.flatten(1).to(torch.float64) - alpha * mean) @ axes
        share = variances / (alpha**2 * variances + sigma**2)
        residual = y - (mean @ axes + alpha * share * centred) @ matrix.T
        gram = (matrix * (sigma**2 * share).unsqueeze(1)) @ matrix.T  # (1 or batch, m, m)
        gram = gram + self.noise * torch.eye(matrix.shape[0], dtype=torch.float64, device=x.device)
        pull = torch.linalg.solve(gram, residual.unsqueeze(-1)).squeeze(-1)
        term = (alpha * share * (pull @ matrix)) @ axes.T
        return self.ask("model", x, t, self.prediction, conditions), term.reshape(x.shape).to(x.dtype)


def dps(model: Model, observation: LinearObservation, y: Tensor, scale: Scale = 1.0) -> Model:
    """Diffusion posterior sampling as a score: s(x, t) - scale/(2 s^2) grad_x |y - A E[x_0 | x_t = x]|^2.

    (Chung et al. 2023, Diffusion posterior sampling for general noisy inverse problems, section 3.2.) The likelihood
    of the posterior mean for that of x_0: too sure at early times, by the factor (A C_t A^T + s^2)/s^2. The term is
    stiff, of order alpha^2/s^2: take steps by `rtol`, or many. The step size of the published code, per step and
    divided by |y - A D|, is `DPSStep`.

    Args:
        model: of a GaussianSDE, its network differentiable in x.
        observation: with noise_std > 0.
        y: observations, one row a sample, or one row (1, *observed) for all.
        scale: a number or a function of t.

    Raises:
        TypeError, ValueError: not these; at a call, y that does not fit A x.
    """
    _check_inputs(model, observation, y, scale)
    if observation.noise_std == 0:
        raise ValueError("dps divides by the variance of the observation's noise: expected noise_std > 0")
    return _guided(_Likelihood(model, observation, y, scale, 0.0), model, y)


def pigdm(
    model: Model, observation: LinearObservation, y: Tensor, scale: Scale = 1.0, *, variance: float = 1.0
) -> Model:
    """Pseudo-inverse guidance: s(x, t) + scale J^T A^T (r^2 A A^T + s^2 I)^-1 (y - A E[x_0 | x_t = x]).

        r^2 = variance sigma^2/(variance alpha^2 + sigma^2)

    (Song et al. 2023, Pseudoinverse-guided diffusion models, section 3.) r^2 is Var[x_0 | x_t] of data N(m, variance
    I), for which this is exact: sigma^2/(alpha^2 + sigma^2) at variance 1, the paper's choice (1 - alpha^2 for VP).
    This is the term itself; a weight of the paper's or your own, a function of t, is `scale`.

    Args:
        model, y, scale: as `dps`.
        observation: noise_std may be 0 where A A^T is invertible.
        variance: of a component of the data, > 0.

    Raises:
        TypeError, ValueError: as `dps`; variance not positive.
    """
    _check_inputs(model, observation, y, scale)
    if not (math.isfinite(variance) and variance > 0):
        raise ValueError(f"expected variance > 0, got {variance!r}")
    return _guided(_Likelihood(model, observation, y, scale, float(variance)), model, y)


def exact_gaussian(model: Model, prior: Gaussian, observation: LinearObservation, y: Tensor) -> Model:
    """s(x, t) + grad log p_t(y | x) in closed form for data of the law `prior`, a Gaussian; in float64 inside.

    With C the prior's covariance, D = m + alpha C (alpha^2 C + sigma^2)^-1 (x - alpha m) and
    C_t = sigma^2 C (alpha^2 C + sigma^2)^-1, the term is alpha/sigma^2 C_t A^T (A C_t A^T + s^2 I)^-1 (y - A D).

    Raises:
        TypeError, ValueError: not a Gaussian, or as `dps`.
    """
    if not isinstance(prior, GaussianMixture) or prior.means.shape[0] != 1:
        raise TypeError(f"expected prior as a problems.Gaussian, got {prior!r}")
    _check_inputs(model, observation, y, 1.0)
    return _guided(_ExactGaussian(model, prior, observation, y), model, y)


def posterior(prior: GaussianMixture, observation: LinearObservation, y: Tensor) -> GaussianMixture:
    """p(x_0 | y) for one observation y (1, *observed): a mixture again, exact; its `.model(process)` samples it.

    Component k has S = A C_k A^T + s^2 I, K = C_k A^T S^-1, mean m_k + K (y - A m_k), covariance C_k - K A C_k, and
    weight proportional to w_k N(y; A m_k, S).

    Raises:
        ValueError: more than one observation, or S is singular.
    """
    if y.shape[0] != 1:
        raise ValueError(f"expected one observation, (1, *observed), got {tuple(y.shape)}")
    a = _matrix(observation, prior.event)
    axes = prior._full_axes()
    covariances = axes @ torch.diag_embed(prior.variances) @ axes.mT
    gram = a @ covariances @ a.T + observation.noise_std**2 * torch.eye(len(a), dtype=torch.float64)
    gain = torch.linalg.solve(gram, a @ covariances).mT  # (K, D, m)
    residual = y.flatten().to(torch.float64) - prior.means @ a.T
    means = prior.means + (gain @ residual.unsqueeze(-1)).squeeze(-1)
    left = covariances - gain @ a @ covariances
    white = torch.linalg.solve(gram, residual.unsqueeze(-1)).squeeze(-1)
    logits = torch.log(prior.weights) - 0.5 * ((residual * white).sum(-1) + torch.logdet(gram))
    weights = torch.softmax(logits, 0).clamp(min=torch.finfo(torch.float64).tiny)
    return GaussianMixture(means.reshape(-1, *prior.event), 0.5 * (left + left.mT), weights)


# ---- solvers that act on the state after each step


@dataclass(frozen=True, eq=False)
class _AfterStep(Solver):
    """A one-step solver and the observation."""

    solver: Solver
    observation: LinearObservation
    y: Tensor
    view = "transition"

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver) or isinstance(self.solver, _AfterStep):
            raise TypeError(f"{self.name}: expected a solver such as DDIM(), got {self.solver!r}")
        _check_observation(self.observation, self.y)

    def check(self, problem: Problem) -> None:
        semilinear(self.name, problem)
        self.solver.check(problem)

    def steppers(self, problem: Problem, x: Tensor, grid: Tensor, noises: list[Noise | None]) -> list[Stepper]:
        """The solver's steppers, one for each noise; refused if a step reads evaluations of an earlier one."""
        _check_fit(self.observation, self.y, x)
        if isinstance(self.solver, LinearSolver) and _remembers(self.solver.plan(problem, grid)):
            raise ValueError(
                f"{self.name}: {self.solver.name} uses evaluations of earlier steps, whose states this changes: "
                "expected a one-step solver, such as DDIM(), DDPM() or EDMHeun()"
            )
        return [self.solver.stepper(problem, x, grid, noise) for noise in noises]


def _remembers(plan: Plan) -> bool:
    """Whether a row of the plan weighs an evaluation of an earlier step (weights are newest first)."""
    rows = torch.arange(plan.nfe)
    return any(
        bool((plan.weights[j:, j] != 0)[plan.step_of_row[rows[j:]] != plan.step_of_row[rows[j:] - j]].any())
        for j in range(1, plan.weights.shape[1])
    )


@dataclass(frozen=True, eq=False)
class Replacement(_AfterStep):
    """`solver`, and after each step to time t the observed part of x drawn from the observation noised to t:

        x <- x + A^T (A A^T)^-1 (alpha y + sigma A z - A x),   z ~ N(0, I)

    (Song et al. 2021, Score-based generative modeling, appendix I.2; with `resample` > 1 Lugmayr et al. 2022,
    RePaint, algorithm 1: the step is taken `resample` times, noised back up in between by the process's kernel.)
    Biased: the rest of x is moved by the score of p_t given an observed part redrawn at each level, not by that of
    p_t(x | y). Resampling lessens it at resample times the calls. For exact observations and A A^T invertible.

    Args:
        solver: a one-step solver.
        observation: with noise_std = 0.
        y: observations, one row a sample, or one row for all.
        resample: times each step is taken, >= 1.
    """

    resample: int = 1
    name = "Replacement"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.resample, bool) or not isinstance(self.resample, int) or self.resample < 1:
            raise ValueError(f"Replacement: expected resample >= 1, got {self.resample!r}")
        if self.observation.noise_std != 0:
            raise ValueError(
                f"Replacement: takes y as exact: expected noise_std = 0, got {self.observation.noise_std:g}; "
                "build the observation with 0, or use pigdm"
            )

    def draws_noise(self, problem: Problem) -> bool:
        return True

    def stepper(self, problem: Problem, x: Tensor, grid: Tensor, noise: Noise | None) -> Stepper:
        assert noise is not None
        return _ReplacementRun(self, semilinear(self.name, problem), x, grid, noise)


class _ReplacementRun:
    def __init__(self, solver: Replacement, problem: ReverseSDE, x: Tensor, grid: Tensor, noise: Noise) -> None:
        process, again = problem.gaussian, solver.resample
        # a repeated step needs a path of its own: that of another seed for the same samples
        if again > 1 and (type(noise) is not Noise or noise.one_path or noise._sign is not None):
            raise ValueError("Replacement: resample > 1 draws paths of its own: expected seed, not noise=")
        seeds = [(noise.seed + j * _GOLDEN) & _WORD for j in range(1, again)]
        others = [Noise(s, x.shape[0], index=noise.index, device=x.device) for s in seeds]
        self._steppers = solver.steppers(problem, x, grid, [noise, *others])
        self._alpha, self._sigma = process.alpha(grid[1:]).tolist(), process.sigma(grid[1:]).tolist()
        ratio, std = process.transition_kernel(grid[1:], grid[:-1])
        self._up = list(zip(ratio.tolist(), std.tolist(), strict=True))
        self._observation, self._y = solver.observation, solver.y.to(x)
        self._draw = noise.sequence(OBSERVED, 2 * again * (grid.numel() - 1), x.shape[1:], x.dtype)
        self._drawn = 0

    @property
    def calls(self) -> int:
        return sum(stepper.calls for stepper in self._steppers)

    def step(self, i: int, x: Tensor) -> Tensor:
        one = torch.ones((), dtype=x.dtype)
        for j, stepper in enumerate(self._steppers):
            if j > 0:
                ratio, std = self._up[i]
                x = ratio * x + std * self._next()
            x = stepper.step(i, x)
            seen = self._alpha[i] * self._y - self._observation.forward(x - self._sigma[i] * self._next())
            x = x + self._observation.adjoint(self._observation.solve(seen, one, 0 * one))
        return x

    def _next(self) -> Tensor:
        self._drawn += 1
        return self._draw(self._drawn - 1)


@dataclass(frozen=True, eq=False)
class DPSStep(_AfterStep):
    """`solver`, and after each step from x at t the published DPS correction, x_next - zeta grad_x |y - A D(x, t)|.

    (Chung et al. 2023, Diffusion posterior sampling, algorithm 1, with step sizes zeta'/|y - A D|: the gradient of
    the square over the norm is twice that of the norm, so zeta = 2 zeta'. The norm is of each sample.) The strength
    is per step: twice as many steps guide twice as hard, and no limit of small steps is the posterior. Near the data
    the gradient keeps its length as the residual goes to 0, so that x ends within about zeta of A x = y, whatever the
    noise of y. `dps` is the form that has a limit. One more call a step, differentiated.

    Args:
        solver: a one-step solver.
        observation: its noise_std is not used: |y - A D| knows no scale.
        y: observations, one row a sample, or one row for all.
        zeta: > 0.
    """

    zeta: float = 1.0
    name = "DPSStep"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.zeta) and self.zeta > 0):
            raise ValueError(f"DPSStep: expected zeta > 0, got {self.zeta!r}")

    def draws_noise(self, problem: Problem) -> bool:
        return self.solver.draws_noise(problem)

    def stepper(self, problem: Problem, x: Tensor, grid: Tensor, noise: Noise | None) -> Stepper:
        return _DPSRun(self, semilinear(self.name, problem), x, grid, noise)


class _DPSRun:
    def __init__(self, solver: DPSStep, problem: ReverseSDE, x: Tensor, grid: Tensor, noise: Noise | None) -> None:
        (self._stepper,) = solver.steppers(problem, x, grid, [noise])
        self._model, self._grid = problem.model, grid
        self._observation, self._y, self._zeta = solver.observation, solver.y.to(x), solver.zeta
        self._own = 0

    @property
    def calls(self) -> int:
        return self._stepper.calls + self._own

    def step(self, i: int, x: Tensor) -> Tensor:
        keep = torch.is_grad_enabled() and x.requires_grad
        with torch.inference_mode(False), torch.enable_grad():
            leaf = x if keep else x.detach().clone().requires_grad_()
            residual = self._y - self._observation.forward(self._model.x0(leaf, _usable(self._grid[i])))
            self._own += 1
            distance = torch.linalg.vector_norm(residual.flatten(1), dim=1).sum()
            (gradient,) = torch.autograd.grad(distance, leaf, create_graph=keep)
        return self._stepper.step(i, x) - self._zeta * gradient


# ---- helpers


def _rows(w: Tensor, v: Tensor) -> Tensor:
    """One value, or one a sample, shaped to broadcast against v (batch, *observed)."""
    w = as_time(w).to(device=v.device, dtype=v.dtype)
    return w.reshape(()) if w.numel() == 1 else w.reshape(-1, *[1] * (v.ndim - 1))


def _of_event(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(x.shape[1:]) != shape:
        raise ValueError(f"expected x of shape (batch, {', '.join(map(str, shape))}), got {tuple(x.shape)}")
    return x


def _matrix(observation: LinearObservation, event: tuple[int, ...]) -> Tensor:
    """A as a matrix (m, D), float64."""
    size = math.prod(event)
    return observation.forward(torch.eye(size, dtype=torch.float64).reshape(size, *event)).flatten(1).T


def _conjugate_gradients(product: Map, v: Tensor) -> Tensor:
    """M^-1 v for a symmetric positive definite M, each sample on its own, to the rounding of v's dtype."""
    inner = range(1, v.ndim)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dim=tuple(inner), keepdim=True)

    u, r, p = torch.zeros_like(v), v, v
    square = start = dot(v, v)
    limit = (4 * torch.finfo(v.dtype).eps) ** 2
    for _ in range(2 * v[0].numel()):
        if bool((square <= limit * start).all()):
            break
        m = product(p)
        step = torch.where(square > 0, square / dot(p, m), 0.0)
        u, r = u + step * p, r - step * m
        fresh = dot(r, r)
        p = r + torch.where(square > 0, fresh / square, 0.0) * p
        square = fresh
    return u


class _Observed:
    """The observations of a batch: shared by all samples, or among the conditions, and fitting A x."""

    def __init__(self, observation: LinearObservation, y: Tensor) -> None:
        self.observation, self.shared = observation, y if y.shape[0] == 1 else None
        self._fitted: torch.Size | None = None

    def __call__(self, x: Tensor, conditions: dict[str, Any]) -> Tensor:
        y = conditions["observed"] if self.shared is None else self.shared
        if x.shape[1:] != self._fitted:
            _check_fit(self.observation, y, x)
            self._fitted = x.shape[1:]
        return y.to(device=x.device, dtype=x.dtype)


def _check_fit(observation: LinearObservation, y: Tensor, x: Tensor) -> None:
    """Refuse observations that are not A x of such x."""
    seen = tuple(observation.forward(torch.zeros_like(x[:1])).shape[1:])
    if tuple(y.shape[1:]) != seen or y.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"expected y of shape ({x.shape[0]}, {', '.join(map(str, seen))}), or one row for all; "
                         f"got {tuple(y.shape)}")  # fmt: skip


def _guided(net: WithScore, model: Model, y: Tensor) -> Model:
    """The guided model; observations of its samples are conditions, which follow them."""
    return Guided(net, model.sde, model.prediction, {} if y.shape[0] == 1 else {"observed": y})


def _check_inputs(model: Model, observation: LinearObservation, y: Tensor, scale: Scale) -> None:
    _check(model, scale)
    _ = model.gaussian
    _check_observation(observation, y)


def _check_observation(observation: object, y: object) -> None:
    if not isinstance(observation, LinearObservation):
        raise TypeError(f"expected a LinearObservation, got {type(observation).__name__}")
    if not isinstance(y, Tensor) or not y.is_floating_point() or y.ndim < 2:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"expected y as a floating-point tensor (batch, *observed), got {got}")
    if not bool(torch.isfinite(y).all()):
        raise ValueError("expected finite y, got NaN or infinity")
