"""The exponential multistep family: one rule, of which the field's samplers are points.

In lam = log(alpha/sigma) the reversal of a Gaussian process has an exact linear part (see
`ReverseSDE.transition`); what is left is the integral of the prediction N along the path. N is
interpolated through its last k evaluations (Lagrange, in lam) and the interpolant integrated
against the exponential kernel: order k with one call a step. Data prediction with eta = 0 is
DPM-Solver++ (order 1: DDIM), with eta = 1 SDE-DPM-Solver++ (order 1: DDPM's posterior).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sdeflow.plan import Plan, eta_key
from sdeflow.quadrature import gauss_legendre
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import Problem
from sdeflow.solvers.base import LinearSolver, View, semilinear

_STAGES = {1: (0.0,), 2: (0.0, 1 / 2), 3: (0.0, 1 / 3, 2 / 3)}
"""Positions in lam of a single step's evaluations (Lu et al. 2022, DPM-Solver, algorithms 1 and 2)."""

_REACH, _POINTS = 40.0, 32
"""The kernel exp(-u) is integrated over u < 40, below which lies all but 4e-18 of it."""


@dataclass(frozen=True)
class ExponentialMultistep(LinearSolver):
    """Exponential Adams-Bashforth of order 1 to 3 in lam, on the flow or with noise.

    (Lu et al. 2022, DPM-Solver++, equations 8 and 12; Gonzalez et al. 2023, SEEDS; Xue et al. 2023,
    SA-Solver, theorem 4.1. The weights integrate the interpolating polynomial exactly; the published
    third-order multistep takes half its second difference and is of order 2.)

    Args:
        order: evaluations interpolated, 1 to 3.
        prediction: what is interpolated, "x0" or "eps".
        multistep: False makes every step a single step of `order` calls; needs eta = 0.
        start: "ramp" begins with orders 1, 2, ..., one call a step; "singlestep" begins with one
            single step of full order (order - 1 calls more), which keeps the order as steps
            shrink; needs eta = 0.
        lower_order_final: end with orders ..., 2, 1, for stability when the last steps are long.
        eta: a stochasticity of the method's own; None reads the problem's.
    """

    order: int = 2
    prediction: Literal["x0", "eps"] = "x0"
    multistep: bool = True
    start: Literal["ramp", "singlestep"] = "ramp"
    lower_order_final: bool = False
    eta: float | None = None
    name: str = "ExponentialMultistep"
    view: View = "transition"

    def __post_init__(self) -> None:
        if self.order not in _STAGES:
            raise ValueError(f"{self.name}: expected order 1, 2 or 3, got {self.order!r}")
        if self.prediction not in ("x0", "eps"):
            raise ValueError(f'{self.name}: expected prediction "x0" or "eps", got {self.prediction!r}')
        if self.start not in ("ramp", "singlestep"):
            raise ValueError(f'{self.name}: expected start "ramp" or "singlestep", got {self.start!r}')

    def check(self, problem: Problem) -> None:
        reverse = semilinear(self.name, problem)
        if self.eta is not None and (callable(reverse.eta) or reverse.eta not in (0, self.eta)):
            raise ValueError(
                f"{self.name} brings its own eta = {self.eta:g}: expected a problem of eta 0 or {self.eta:g}, "
                f"got {reverse.eta!r}"
            )
        if self._single_steps and self.draws_noise(problem):
            raise ValueError(
                f"{self.name}: single steps are for the flow (eta = 0); with noise use multistep=True and start='ramp'"
            )

    def draws_noise(self, problem: Problem) -> bool:
        return problem.stochastic if self.eta is None else self.eta != 0

    @property
    def _single_steps(self) -> bool:
        return self.order > 1 and (not self.multistep or self.start == "singlestep")

    def plan(self, problem: Problem, grid: Tensor) -> Plan:
        reverse = semilinear(self.name, problem)
        if self.eta is not None:
            reverse = reverse.process.reverse(reverse.model, self.eta)
        layout = self._layout(reverse, grid)
        base, target, orders = grid[layout.step], layout.target, layout.order
        ratio, _, _, std = reverse.transition(base, target, self.prediction)
        ends_step = torch.cat([torch.diff(layout.step) > 0, torch.ones(1, dtype=torch.bool)])
        return Plan(
            name=self.name,
            view="transition",
            target=self.prediction,
            grid=grid,
            times=layout.times,
            step_of_row=layout.step,
            ratio=ratio,
            weights=interpolation_weights(reverse, base, target, layout.times, orders, self.prediction),
            noise=torch.where(ends_step, std, torch.zeros_like(std)),
            process=repr(reverse.process),
            eta=eta_key(semilinear(self.name, problem).eta),
        )

    def _layout(self, reverse: ReverseSDE, grid: Tensor) -> _Layout:
        """When each row evaluates, where its combination leads, and through how many evaluations."""
        process, steps = reverse.gaussian, grid.numel() - 1
        lam = process.lam(grid)
        single = range(steps) if not self.multistep else range(1 if self._single_steps else 0)
        times: list[Tensor] = []
        targets: list[Tensor] = []
        step: list[int] = []
        order: list[int] = []
        for i in range(steps):
            final = steps - i if self.lower_order_final else self.order
            if i not in single:
                calls = len(times) + 1
                times.append(grid[i])
                targets.append(grid[i + 1])
                order.append(min(self.order, calls, final))
                step.append(i)
                continue
            stages = _STAGES[min(self.order, final)]
            if len(stages) > 1 and not bool(torch.isfinite(lam[i : i + 2]).all()):
                raise ValueError(
                    f"{self.name}: a single step of order {len(stages)} needs a finite lam at both ends; "
                    f"lam is {float(lam[i]):g} and {float(lam[i + 1]):g} on step {i}"
                )
            inner = [process.time_of_lam(lam[i] + r * (lam[i + 1] - lam[i])) for r in stages[1:]]
            points = [grid[i], *inner, grid[i + 1]]
            times += points[:-1]
            targets += points[1:]
            order += range(1, len(stages) + 1)
            step += [i] * len(stages)
        return _Layout(torch.stack(times), torch.stack(targets), torch.tensor(step), torch.tensor(order))


@dataclass(frozen=True)
class _Layout:
    times: Tensor
    target: Tensor
    step: Tensor
    order: Tensor


def interpolation_weights(
    reverse: ReverseSDE, t0: Tensor, t1: Tensor, times: Tensor, orders: Tensor, prediction: str
) -> Tensor:
    """Weights (rows, max order) of the last evaluations in each row's step from t0 to t1.

    W_j = amp int_{lam0}^{lam1} c exp(-c (lam1 - v)) l_j(v) dv, with l_j the Lagrange polynomial of
    the evaluation j rows back through the newest `orders` of them. The substitution to the distance
    u >= 0 from the kernel's heavy end makes every integrand smooth and positive: no cancellation
    for short steps, no overflow for long ones. Evaluations at an infinite lam get no weight unless
    they are the only one; a step to lam = infinity extrapolates no further than constantly.
    """
    process, history = reverse.gaussian, int(orders.max())
    lam0, lam1, lam = process.lam(t0), process.lam(t1), process.lam(times)
    rows = torch.arange(times.numel())
    nodes = lam[(rows[:, None] - torch.arange(history)).clamp(min=0)]
    used = (torch.arange(history) < orders[:, None]) & torch.isfinite(nodes)
    alone = ~used.any(1) | ~torch.isfinite(lam1) | ~torch.isfinite(lam0)
    used[alone] = False
    used[alone, 0] = True

    _, amp, c, _ = reverse.transition(t0, t1, prediction)
    h = lam1 - lam0
    points, weights = gauss_legendre(_POINTS)
    if prediction == "x0":
        reach = torch.clamp(c * h, max=_REACH)
        u = reach[:, None] * points
        v, front = lam1[:, None] - u / c[:, None], amp
    else:  # -amp e^(lam1 - v) dv from lam0 on; amp e^(lam1 - lam0) = (1 + eta^2) a1 s0/a0 stays finite
        reach = torch.clamp(h, max=_REACH)
        u = reach[:, None] * points
        eta2 = reverse.mean_eta2(t0, t1)
        front = -(1 + eta2) * process.alpha(t1) * process.sigma(t0) / process.alpha(t0)
        v = lam0[:, None] + u
    kernel = front[:, None] * reach[:, None] * weights * torch.exp(-u)

    columns = []
    for j in range(history):
        basis = used[:, j, None].to(torch.float64).expand_as(v)
        for i in range(history):
            if i != j:
                factor = (v - nodes[:, i, None]) / (nodes[:, j] - nodes[:, i])[:, None]
                basis = torch.where((used[:, i] & used[:, j])[:, None], basis * factor, basis)
        columns.append((kernel * torch.where(used[:, j, None], basis, 0.0)).sum(1))
    return torch.stack(columns, dim=1)


def DPMSolverPP(
    order: int = 2,
    multistep: bool = True,
    *,
    start: Literal["ramp", "singlestep"] = "ramp",
    lower_order_final: bool = False,
) -> ExponentialMultistep:
    """DPM-Solver++ of order 1 to 3 in data prediction; reads the problem's eta (SDE-DPM-Solver++ for 1).

    (Lu et al. 2022, DPM-Solver++.) Arguments as in `ExponentialMultistep`.
    """
    return ExponentialMultistep(
        order=order, prediction="x0", multistep=multistep, start=start,
        lower_order_final=lower_order_final, name=f"DPMSolverPP({order}{'M' if multistep else 'S'})",
    )  # fmt: skip


def DDPM() -> ExponentialMultistep:
    """DDPM's ancestral sampler: the exact posterior with x_0 frozen; brings eta = 1.

    (Ho et al. 2020, DDPM, equations 6 and 7: the posterior variance beta-tilde.)
    """
    return ExponentialMultistep(order=1, eta=1.0, name="DDPM")


@dataclass(frozen=True)
class DDIM(LinearSolver):
    """DDIM with the paper's eta, on the flow: 0 is deterministic, 1 is DDPM. Order 1, one call a step.

    x' = alpha' x_0 + sqrt(sigma'^2 - s^2) eps + s xi,   s = eta sigma' sqrt(1 - exp(-2h)), h = lam' - lam,

    (Song et al. 2021, DDIM, equations 12 and 16). Between 0 and 1 this eta is not the eta of
    `reverse`: it scales the standard deviation of each step, and grows with the step.
    """

    eta: float = 0.0
    name = "DDIM"
    view: View = "transition"

    def __post_init__(self) -> None:
        if not (isinstance(self.eta, (int, float)) and 0 <= self.eta <= 1):
            raise ValueError(f"DDIM: expected eta in [0, 1], got {self.eta!r}")

    def check(self, problem: Problem) -> None:
        if semilinear(self.name, problem).stochastic:
            raise ValueError(
                "DDIM takes its stochasticity as DDIM(eta=...): solve the probability flow "
                "(sde.probability_flow(model), or eta=0), not a problem with its own noise"
            )

    def draws_noise(self, problem: Problem) -> bool:
        return self.eta != 0

    def plan(self, problem: Problem, grid: Tensor) -> Plan:
        reverse = semilinear(self.name, problem)
        process, steps = reverse.gaussian, grid.numel() - 1
        alpha, sigma, lam = process.alpha(grid), process.sigma(grid), process.lam(grid)
        fresh = -torch.expm1(-2 * torch.diff(lam))
        ratio = sigma[1:] / sigma[:-1] * torch.sqrt(1 - self.eta**2 * fresh)
        zero = torch.zeros(steps, dtype=torch.float64)
        return Plan(
            name=self.name,
            view="transition",
            target="x0",
            grid=grid,
            times=grid[:-1].clone(),
            step_of_row=torch.arange(steps),
            ratio=ratio,
            weights=(alpha[1:] - alpha[:-1] * ratio)[:, None],
            noise=self.eta * sigma[1:] * torch.sqrt(fresh) if self.eta else zero,
            process=repr(process),
            eta=eta_key(reverse.eta),
        )
