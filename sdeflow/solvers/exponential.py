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

from sdeflow.plan import Plan, corrected_weights
from sdeflow.quadrature import gauss_legendre
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import Problem
from sdeflow.solvers.adams import lagrange_basis
from sdeflow.solvers.base import LinearSolver, View, semilinear

Coordinate = Literal["lam", "t", "rho"]
Second = Literal["exact", "bh1", "bh2"]

_STAGES: dict[int, tuple[tuple[float, ...], tuple[tuple[int, ...], ...]]] = {
    1: ((0.0,), ((0,),)),
    2: ((0.0, 1 / 2), ((0,), (0, 1))),
    3: ((0.0, 1 / 3, 2 / 3), ((0,), (0, 1), (0, 2))),
}
"""Of a single step: positions of its evaluations in lam, and which of the newest ones each row interpolates.

(Lu et al. 2022, DPM-Solver, algorithms 1 and 2: r1 = 1/2; r1 = 1/3, r2 = 2/3.)"""

_REACH, _POINTS = 40.0, 32
"""The kernel exp(-u) is integrated over u < 40, below which lies all but 4e-18 of it."""


@dataclass(frozen=True)
class ExponentialMultistep(LinearSolver):
    """Exponential Adams methods of order 1 to 4, on the flow or with noise.

    (Lu et al. 2022, DPM-Solver++, equations 8 and 12; Zhang and Chen 2023, DEIS, section 3.3; Zhao et al. 2023,
    UniPC, section 3; Xue et al. 2023, SA-Solver, theorems 4.1 and 4.2. The weights integrate the interpolating
    polynomial exactly; the published third-order multistep takes half its second difference and is of order 2.)

    Args:
        order: evaluations interpolated, 1 to 4.
        prediction: what is interpolated, "x0" or "eps".
        coordinate: in what the interpolant is a polynomial: "lam", "t", or "rho" = sigma/alpha.
        corrector: past evaluations of a corrector that also takes the new one; 0 for none. It corrects each
            step when the next one evaluates, at no further call; the last step is predicted only.
        multistep: False makes every step a single step of `order` calls (order <= 3; needs eta = 0).
        start: "ramp" begins with orders 1, 2, ..., one call a step; "singlestep" begins with one
            single step of full order (order - 1 calls more; order <= 3), which keeps the order as steps
            shrink; needs eta = 0.
        lower_order_final: end with orders ..., 2, 1, for stability when the last steps are long.
        final_orders: orders of the last steps, instead.
        second: how two evaluations are combined. "exact" integrates their line; "bh1" and "bh2" are UniPC's
            hard-wired 1/2 B(h) times the difference quotient, B = h and B = e^h - 1 (bh2 is also the
            midpoint form of DPM-Solver++(2M)). All are of order 2.
        eta: a stochasticity of the method's own; None reads the problem's.
    """

    order: int = 2
    prediction: Literal["x0", "eps"] = "x0"
    multistep: bool = True
    start: Literal["ramp", "singlestep"] = "ramp"
    lower_order_final: bool = False
    eta: float | None = None
    coordinate: Coordinate = "lam"
    corrector: int = 0
    final_orders: tuple[int, ...] = ()
    second: Second = "exact"
    name: str = "ExponentialMultistep"
    view: View = "transition"

    def __post_init__(self) -> None:
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices or isinstance(getattr(self, field), bool):
                wanted = ", ".join(map(repr, choices))
                raise ValueError(f"{self.name}: expected {field} one of {wanted}, got {getattr(self, field)!r}")
        if self._single_steps and self.order not in _STAGES:
            raise ValueError(f"{self.name}: single steps have order 1 to 3, got {self.order}")
        if self.corrector and self._single_steps:
            raise ValueError(f"{self.name}: a corrector goes with multistep=True and start='ramp'")

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
        base, target = grid[layout.step], layout.target
        ratio, _, _, std = reverse.transition(base, target, self.prediction)
        weights = self._weights(reverse, base, target, _back(layout.times, layout.used.shape[1]), layout.used)
        if self.corrector and grid.numel() > 2:
            weights = self._corrected(reverse, grid, ratio, weights)
        ends_step = torch.cat([torch.diff(layout.step) > 0, torch.ones(1, dtype=torch.bool)])
        return Plan(
            name=self.name,
            view="transition",
            target=self.prediction,
            grid=grid,
            times=layout.times,
            step_of_row=layout.step,
            ratio=ratio,
            weights=weights,
            noise=torch.where(ends_step, std, torch.zeros_like(std)),
            process=repr(reverse.process),
            eta=repr(semilinear(self.name, problem).eta),
        )

    def _weights(self, reverse: ReverseSDE, t0: Tensor, t1: Tensor, nodes: Tensor, used: Tensor) -> Tensor:
        return interpolation_weights(reverse, t0, t1, nodes, used, self.prediction, self.coordinate, self.second)

    def _corrected(self, reverse: ReverseSDE, grid: Tensor, ratio: Tensor, predict: Tensor) -> Tensor:
        """The weights with the correction of each step entered in the next; see `corrected_weights`."""
        steps = grid.numel() - 1
        past = min(self.corrector, steps)
        nodes = torch.cat([grid[1:-1, None], _back(grid[:-2], past)], dim=1)
        count = torch.clamp(torch.arange(steps - 1) + 1, max=past)
        used = torch.arange(past + 1) <= count[:, None]
        return corrected_weights(ratio, predict, self._weights(reverse, grid[:-2], grid[1:-1], nodes, used))

    def _layout(self, reverse: ReverseSDE, grid: Tensor) -> _Layout:
        """When each row evaluates, where its combination leads, and which of the newest evaluations it takes."""
        process, steps = reverse.gaussian, grid.numel() - 1
        lam = process.lam(grid)
        single = range(steps) if not self.multistep else range(1 if self._single_steps else 0)
        orders = self.final_orders or (range(self.order, 0, -1) if self.lower_order_final else ())
        finals = {len(orders) - n: order for n, order in enumerate(orders)}  # by steps left
        times: list[Tensor] = []
        targets: list[Tensor] = []
        step: list[int] = []
        ages: list[tuple[int, ...]] = []
        for i in range(steps):
            final = finals.get(steps - i, self.order)
            if i not in single:
                times.append(grid[i])
                targets.append(grid[i + 1])
                ages.append(tuple(range(min(self.order, len(times), final))))
                step.append(i)
                continue
            stages, rows = _STAGES[min(self.order, final)]
            if len(stages) > 1 and not bool(torch.isfinite(lam[i : i + 2]).all()):
                raise ValueError(
                    f"{self.name}: a single step of order {len(stages)} needs a finite lam at both ends; "
                    f"lam is {float(lam[i]):g} and {float(lam[i + 1]):g} on step {i}"
                )
            inner = [process.time_of_lam(lam[i] + r * (lam[i + 1] - lam[i])) for r in stages[1:]]
            points = [grid[i], *inner, grid[i + 1]]
            times += points[:-1]
            targets += points[1:]
            ages += rows
            step += [i] * len(stages)
        used = torch.zeros(len(times), max(max(row) for row in ages) + 1, dtype=torch.bool)
        for k, row in enumerate(ages):
            used[k, list(row)] = True
        return _Layout(torch.stack(times), torch.stack(targets), torch.tensor(step), used)


_CHOICES: dict[str, tuple[object, ...]] = {
    "order": (1, 2, 3, 4),
    "prediction": ("x0", "eps"),
    "coordinate": ("lam", "t", "rho"),
    "corrector": (0, 1, 2, 3, 4),
    "start": ("ramp", "singlestep"),
    "second": ("exact", "bh1", "bh2"),
}


@dataclass(frozen=True)
class _Layout:
    times: Tensor
    target: Tensor
    step: Tensor
    used: Tensor


def _back(times: Tensor, count: int) -> Tensor:
    """The newest `count` of the evaluations up to each row, (rows, count); the first repeats where none is."""
    return times[(torch.arange(times.numel())[:, None] - torch.arange(count)).clamp(min=0)]


def interpolation_weights(
    reverse: ReverseSDE,
    t0: Tensor,
    t1: Tensor,
    nodes: Tensor,
    used: Tensor,
    prediction: str,
    coordinate: Coordinate = "lam",
    second: Second = "exact",
) -> Tensor:
    """Weights (rows, count) of evaluations at times `nodes` (rows, count) in steps from t0 to t1 (rows,).

    W_j = amp int_{lam0}^{lam1} c exp(-c (lam1 - v)) l_j(v) dv, with l_j the Lagrange polynomials, in the
    coordinate, through the `used` nodes. The substitution to the distance u >= 0 from the kernel's heavy end
    makes every integrand smooth and positive: no cancellation for short steps, no overflow for long ones.
    Evaluations at an infinite lam get no weight unless they are the only one; a step to lam = infinity
    extrapolates no further than constantly.
    """
    process = reverse.gaussian
    lam0, lam1, lam = process.lam(t0), process.lam(t1), process.lam(nodes)
    used = used & torch.isfinite(lam)
    newest = torch.zeros_like(used)
    newest[:, 0] = True
    alone = ~used.any(1) | ~torch.isfinite(lam1) | ~torch.isfinite(lam0)
    used = torch.where(alone[:, None], newest, used)

    _, amp, c, _ = reverse.transition(t0, t1, prediction)
    h = lam1 - lam0
    points, rule = gauss_legendre(_POINTS)
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
    kernel = front[:, None] * reach[:, None] * rule * torch.exp(-u)

    if coordinate == "lam":
        at, places = v, lam
    elif coordinate == "rho":
        at, places = torch.exp(-v), torch.exp(-lam)
    else:
        at, places = process.time_of_lam(torch.where(torch.isfinite(v), v, lam0[:, None])), nodes
    weights = torch.stack([(kernel * b).sum(1) for b in lagrange_basis(at, places, used)], dim=1)
    if second == "exact":
        return weights
    return _hard_wired(weights, kernel.sum(1), front, h, lam, lam0, used, second, prediction)


def _hard_wired(
    weights: Tensor, total: Tensor, front: Tensor, h: Tensor, lam: Tensor, lam0: Tensor, used: Tensor, second: str,
    prediction: str,
) -> Tensor:  # fmt: skip
    """UniPC's two-point rows: N_0 total + 1/2 B(h) (N_1 - N_0)/r, N_0 at the step's start, r = (lam_1 - lam_0)/h.

    (Zhao et al. 2023, UniPC, section 3.3: rho = 1/2 for the predictor of order 2 and the corrector of order 1.)
    """
    rows = used.sum(1) == 2
    start = used & (lam == lam0[:, None])  # the evaluation at the step's start
    other = used & ~start
    r = (torch.where(other, lam, 0.0).sum(1) - lam0) / h
    if second == "bh2":
        slope = 0.5 * total / r
    else:  # B = h: alpha h in data prediction, -sigma h in noise prediction
        scale = front if prediction == "x0" else front * torch.exp(-h)
        slope = 0.5 * scale * h / r
    line = start * (total - slope)[:, None] + other * slope[:, None]
    return torch.where(rows[:, None], line, weights)


def DPMSolver(
    order: int = 2,
    multistep: bool = False,
    *,
    start: Literal["ramp", "singlestep"] = "ramp",
    lower_order_final: bool = False,
    second: Second = "exact",
) -> ExponentialMultistep:
    """DPM-Solver of order 1 to 3 in noise prediction, single steps unless `multistep` (Lu et al. 2022, DPM-Solver).

    Arguments as in `ExponentialMultistep`.
    """
    return ExponentialMultistep(
        order=order, prediction="eps", multistep=multistep, start=start, second=second,
        lower_order_final=lower_order_final, name=f"DPMSolver({order}{'M' if multistep else 'S'})",
    )  # fmt: skip


def DPMSolverFast(nfe: int) -> ExponentialMultistep:
    """DPM-Solver-fast: single steps of order 3 and one or two of lower order, `nfe` calls in `nfe // 3 + 1` steps.

    (Lu et al. 2022, DPM-Solver, section 3.4.) Solve with `steps = nfe // 3 + 1`.
    """
    if isinstance(nfe, bool) or not isinstance(nfe, int) or nfe < 3:
        raise ValueError(f"DPMSolverFast: expected nfe >= 3, got {nfe!r}")
    return ExponentialMultistep(
        order=3, prediction="eps", multistep=False, final_orders=((2, 1), (1,), (2,))[nfe % 3], name="DPMSolverFast"
    )


def DPMSolverPP(
    order: int = 2,
    multistep: bool = True,
    *,
    start: Literal["ramp", "singlestep"] = "ramp",
    lower_order_final: bool = False,
    second: Second = "exact",
) -> ExponentialMultistep:
    """DPM-Solver++ of order 1 to 3 in data prediction; reads the problem's eta (SDE-DPM-Solver++ for 1).

    (Lu et al. 2022, DPM-Solver++; `second="bh2"` is its 2M and 2S as published.) Arguments as in
    `ExponentialMultistep`.
    """
    return ExponentialMultistep(
        order=order, prediction="x0", multistep=multistep, start=start, second=second,
        lower_order_final=lower_order_final, name=f"DPMSolverPP({order}{'M' if multistep else 'S'})",
    )  # fmt: skip


def DEIS(order: int = 3, *, coordinate: Coordinate = "t", lower_order_final: bool = False) -> ExponentialMultistep:
    """DEIS of order 1 to 4: noise prediction interpolated in t (tAB) or in rho = sigma/alpha (rhoAB).

    (Zhang and Chen 2023, Fast sampling of diffusion models with exponential integrator, section 3.3.)
    """
    kind = {"t": "tAB", "rho": "rhoAB", "lam": "lamAB"}.get(coordinate, coordinate)
    return ExponentialMultistep(
        order=order, prediction="eps", coordinate=coordinate, lower_order_final=lower_order_final,
        name=f"DEIS-{kind}({order})",
    )  # fmt: skip


def UniPC(
    order: int = 3,
    variant: Literal["exact", "bh1", "bh2"] = "bh2",
    prediction: Literal["x0", "eps"] = "x0",
    *,
    corrector: bool = True,
    lower_order_final: bool = False,
) -> ExponentialMultistep:
    """UniPC of order 1 to 4: the predictor UniP of `order` and the corrector UniC of order + 1, one call a step.

    (Zhao et al. 2023, UniPC, equations 3 and 9; `variant` is its B(h), which enters where two evaluations meet.)
    """
    return ExponentialMultistep(
        order=order, prediction=prediction, corrector=order if corrector else 0, second=variant,
        lower_order_final=lower_order_final, name=f"UniP{'C' if corrector else ''}({order})",
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
            eta=repr(reverse.eta),
        )
