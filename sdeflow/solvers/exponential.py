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

from sdeflow.checked import checked, checked_class
from sdeflow.plan import Plan, corrected_weights, eta_key, spliced
from sdeflow.quadrature import gauss_legendre
from sdeflow.reverse import Eta, ReverseSDE
from sdeflow.sde import Problem
from sdeflow.solvers.adams import lagrange_basis
from sdeflow.solvers.base import LinearSolver, View, semilinear
from sdeflow.solvers.exponential_rk import ExponentialRK
from sdeflow.solvers.own_eta import OwnEta, check_falling, with_eta

Coordinate = Literal["lam", "t", "rho"]
Second = Literal["exact", "bh1", "bh2"]

_REACH, _POINTS = 40.0, 32
"""The kernel exp(-u) is integrated over u < 40, below which lies all but 4e-18 of it."""


@checked_class
@dataclass(frozen=True)
class ExponentialMultistep(LinearSolver):
    """Exponential Adams methods of order 1 to 4, on the flow or with noise.

    (Lu et al. 2022, DPM-Solver++, equations 8 and 12; Zhang and Chen 2023, DEIS, section 3.3; Zhao et al. 2023,
    UniPC, section 3; Xue et al. 2023, SA-Solver, section 4. The weights integrate the interpolating
    polynomial exactly; the published third-order multistep takes half its second difference and is of order 2.)

    Args:
        order: evaluations interpolated, 1 to 4.
        prediction: what is interpolated, "x0" or "eps".
        coordinate: in what the interpolant is a polynomial: "lam", "t", or "rho" = sigma/alpha.
        corrector: past evaluations of a corrector that also takes the new one; 0 for none. It corrects each
            step when the next one evaluates, at no further call; the last step is predicted only.
        start: "ramp" begins with orders 1, 2, ..., one call a step, which caps the order at 2 as steps shrink (the
            first steps matter little where the data prediction hardly moves); "singlestep" makes the first order - 1
            steps with the exponential Runge-Kutta method of that order (`ExponentialRK`), which keeps it;
            needs eta = 0.
        lower_order_final: end with orders ..., 2, 1, for stability when the last steps are long.
        second: how two evaluations are combined. "exact" integrates their line; "bh1" and "bh2" are UniPC's
            hard-wired 1/2 B(h) times the difference quotient, B = h and B = e^h - 1 (bh2 is also the
            midpoint form of DPM-Solver++(2M)). All are of order 2.
        eta: a stochasticity of the method's own, a number, a function of t or an `OwnEta`; None reads the problem's.
    """

    order: int = 2
    prediction: Literal["x0", "eps"] = "x0"
    start: Literal["ramp", "singlestep"] = "ramp"
    lower_order_final: bool = False
    eta: Eta | OwnEta | None = None
    coordinate: Coordinate = "lam"
    corrector: int = 0
    second: Second = "exact"
    name: str = "ExponentialMultistep"
    view: View = "transition"

    def __post_init__(self) -> None:
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices or isinstance(getattr(self, field), bool):
                wanted = ", ".join(map(repr, choices))
                raise ValueError(f"{self.name}: expected {field} one of {wanted}, got {getattr(self, field)!r}")

    def check(self, problem: Problem) -> None:
        reverse = semilinear(self.name, problem)
        if self.eta is not None and reverse.eta is not self.eta and reverse.eta not in (0, self.eta):
            own = f"{self.eta:g}" if isinstance(self.eta, (int, float)) else repr(self.eta)
            raise ValueError(
                f"{self.name} brings its own eta = {own}: expected a problem without noise (eta = 0)"
                f"{' or of that eta' if self.eta else ''}, got eta = {reverse.eta!r}"
            )
        if self.start == "singlestep" and self.draws_noise(problem):
            raise ValueError(f"{self.name}: start='singlestep' is for the flow (eta = 0); with noise use start='ramp'")

    def draws_noise(self, problem: Problem) -> bool:
        return problem.stochastic if self.eta is None else self.eta != 0

    def plan(self, problem: Problem, grid: Tensor) -> Plan:
        reverse = semilinear(self.name, problem)
        if self.eta is not None:
            if self.draws_noise(problem):
                check_falling(self.name, grid)
            reverse = with_eta(reverse, self.eta)
        steps = grid.numel() - 1
        ratio, _, _, std = reverse.transition(grid[:-1], grid[1:], self.prediction)
        left = steps - torch.arange(steps)
        count = torch.clamp(torch.arange(steps) + 1, max=self.order)
        count = torch.minimum(count, left) if self.lower_order_final else count
        used = torch.arange(self.order) < count[:, None]
        weights = self._weights(reverse, grid[:-1], grid[1:], _back(grid[:-1], self.order), used)
        ready = min(self.order - 1, steps) if self.start == "singlestep" else 0
        if self.corrector and steps > 1:
            weights = self._corrected(reverse, grid, ratio, weights, ready)
        multistep = Plan(
            name=self.name,
            view="transition",
            target=self.prediction,
            grid=grid,
            times=grid[:-1].clone(),
            step_of_row=torch.arange(steps),
            ratio=ratio,
            weights=weights,
            noise=std,
            process=repr(reverse.process),
            eta=eta_key(semilinear(self.name, problem).eta),
        )
        if ready == 0:
            return multistep
        return spliced(ExponentialRK(self.order, self.prediction, self.name).plan(problem, grid), multistep, ready)

    def _weights(self, reverse: ReverseSDE, t0: Tensor, t1: Tensor, nodes: Tensor, used: Tensor) -> Tensor:
        return interpolation_weights(reverse, t0, t1, nodes, used, self.prediction, self.coordinate, self.second)

    def _corrected(self, reverse: ReverseSDE, grid: Tensor, ratio: Tensor, predict: Tensor, ready: int) -> Tensor:
        """The weights with the correction of each step after the first `ready` entered in the next step's."""
        past = min(self.corrector, grid.numel() - 1)
        nodes = torch.cat([grid[1:-1, None], _back(grid[:-2], past)], dim=1)
        count = torch.clamp(torch.arange(grid.numel() - 2) + 1, max=past)
        used = torch.arange(past + 1) <= count[:, None]
        correct = self._weights(reverse, grid[:-2], grid[1:-1], nodes, used)
        width = max(correct.shape[1], predict.shape[1] + 1)
        correct = torch.nn.functional.pad(correct, (0, width - correct.shape[1]))
        correct[:ready, 0] = 0.0
        correct[:ready, 1 : predict.shape[1] + 1] = predict[:ready]
        return corrected_weights(ratio, predict, correct)


_CHOICES: dict[str, tuple[object, ...]] = {
    "order": (1, 2, 3, 4),
    "prediction": ("x0", "eps"),
    "coordinate": ("lam", "t", "rho"),
    "corrector": (0, 1, 2, 3, 4),
    "start": ("ramp", "singlestep"),
    "second": ("exact", "bh1", "bh2"),
}


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
    return _hard_wired(
        weights, kernel.sum(1), front * c if prediction == "x0" else front, h, lam, lam0, used, second, prediction
    )


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
    else:  # B = h, the first order of the total: alpha c h in data prediction, -(1 + eta^2) sigma h in noise prediction
        scale = front if prediction == "x0" else front * torch.exp(-h)
        slope = 0.5 * scale * h / r
    line = start * (total - slope)[:, None] + other * slope[:, None]
    return torch.where(rows[:, None], line, weights)


@checked
def DPMSolver(
    order: int = 2,
    multistep: bool = False,
    *,
    start: Literal["ramp", "singlestep"] = "ramp",
    lower_order_final: bool = False,
    second: Literal["exact", "bh1", "bh2", "midpoint"] = "exact",
) -> ExponentialMultistep | ExponentialRK:
    """DPM-Solver of order 1 to 3 in noise prediction, single steps unless `multistep` (Lu et al. 2022, DPM-Solver).

    Arguments as in `ExponentialMultistep`, and in `ExponentialRK` for single steps.
    """
    return _dpm_solver("DPMSolver", "eps", order, multistep, start, lower_order_final, second)


@checked
def DPMSolverPP(
    order: int = 2,
    multistep: bool = True,
    *,
    start: Literal["ramp", "singlestep"] = "ramp",
    lower_order_final: bool = False,
    second: Literal["exact", "bh1", "bh2", "midpoint"] = "exact",
) -> ExponentialMultistep | ExponentialRK:
    """DPM-Solver++ of order 1 to 3 in data prediction; multistep, it reads the problem's eta.

    (Lu et al. 2022, DPM-Solver++; eta = 1 is SDE-DPM-Solver++. `second="midpoint"` is its 2M and 2S as published.)
    Arguments as in `ExponentialMultistep`, and in `ExponentialRK` for single steps, which are for the flow.
    """
    return _dpm_solver("DPMSolverPP", "x0", order, multistep, start, lower_order_final, second)


def _dpm_solver(
    name: str,
    prediction: Literal["x0", "eps"],
    order: int,
    multistep: bool,
    start: Literal["ramp", "singlestep"],
    lower_order_final: bool,
    second: Literal["exact", "bh1", "bh2", "midpoint"],
) -> ExponentialMultistep | ExponentialRK:
    if order not in (1, 2, 3):
        raise ValueError(f"{name}: expected order 1, 2 or 3, got {order!r}")
    label = f"{name}({order}{'M' if multistep else 'S'})"
    if multistep:
        return ExponentialMultistep(
            order, prediction, start, lower_order_final, second="bh2" if second == "midpoint" else second, name=label
        )
    if start != "ramp" or second in ("bh1", "bh2"):
        raise ValueError(f"{label}: single steps take no start, and second as 'exact' or 'midpoint'")
    finals = tuple(range(order, 0, -1)) if lower_order_final else ()
    return ExponentialRK(order, prediction, label, "midpoint" if second == "midpoint" else "exact", finals)


@checked
def DPMSolverFast(nfe: int) -> ExponentialRK:
    """DPM-Solver-fast: single steps of order 3 and one or two of lower order, `nfe` calls in `nfe // 3 + 1` steps.

    (Lu et al. 2022, DPM-Solver, section 3.4.) Solve with `steps = nfe // 3 + 1`.
    """
    if nfe < 3:
        raise ValueError(f"DPMSolverFast: expected nfe >= 3, got {nfe!r}")
    return ExponentialRK(3, "eps", "DPMSolverFast", final_orders=((2, 1), (1,), (2,))[nfe % 3])


@checked
def DEIS(
    order: int = 3,
    *,
    coordinate: Coordinate = "t",
    start: Literal["ramp", "singlestep"] = "ramp",
    lower_order_final: bool = False,
) -> ExponentialMultistep:
    """DEIS of order 1 to 4, for the flow: noise prediction interpolated in t (tAB) or in rho = sigma/alpha (rhoAB).

    (Zhang and Chen 2023, Fast sampling of diffusion models with exponential integrator, section 3.3.)
    """
    kind = {"t": "tAB", "rho": "rhoAB", "lam": "lamAB"}.get(coordinate, coordinate)
    return ExponentialMultistep(
        order=order, prediction="eps", coordinate=coordinate, start=start, lower_order_final=lower_order_final, eta=0.0,
        name=f"DEIS-{kind}({order})",
    )  # fmt: skip


@checked
def UniPC(
    order: int = 3,
    variant: Literal["exact", "bh1", "bh2"] = "bh2",
    prediction: Literal["x0", "eps"] = "x0",
    *,
    corrector: bool = True,
    start: Literal["ramp", "singlestep"] = "ramp",
    lower_order_final: bool = False,
) -> ExponentialMultistep:
    """UniPC of order 1 to 4: the predictor UniP of `order` and the corrector UniC of order + 1, one call a step.

    (Zhao et al. 2023, UniPC, equations 3 and 9; `variant` is its B(h), which enters where two evaluations meet.)
    """
    return ExponentialMultistep(
        order=order, prediction=prediction, corrector=order if corrector else 0, second=variant, start=start,
        lower_order_final=lower_order_final, name=f"UniP{'C' if corrector else ''}({order})",
    )  # fmt: skip


@dataclass(frozen=True)
class DDIM(LinearSolver):
    """DDIM with the paper's eta, on the flow: 0 is deterministic, 1 is DDPM. Order 1, one call a step.

    x' = alpha' x_0 + sqrt(sigma'^2 - s^2) eps + s xi,   s = eta sigma' sqrt(1 - exp(-2h)), h = lam' - lam,

    (Song et al. 2021, DDIM, equations 12 and 16). Between 0 and 1 this eta is not the eta of `reverse`, which is
    sqrt(-log(1 - eta^2 (1 - exp(-2h)))/(2h)) for a step h: this eta in the limit of short steps, less in long ones.
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
                f"{self.name} takes its stochasticity as {self.name}(eta=...): solve the probability flow "
                "(sde.probability_flow(model), or eta=0), not a problem with its own noise"
            )

    def draws_noise(self, problem: Problem) -> bool:
        return self.eta != 0

    def plan(self, problem: Problem, grid: Tensor) -> Plan:
        reverse = semilinear(self.name, problem)
        if self.eta:
            check_falling(self.name, grid)
        process, steps = reverse.gaussian, grid.numel() - 1
        alpha, sigma, lam = process.alpha(grid), process.sigma(grid), process.lam(grid)
        share = torch.clamp(-(self.eta**2) * torch.expm1(-2 * torch.diff(lam)), max=1.0)  # of fresh noise
        ratio = sigma[1:] / sigma[:-1] * torch.sqrt(1 - share)
        return Plan(
            name=self.name,
            view="transition",
            target="x0",
            grid=grid,
            times=grid[:-1].clone(),
            step_of_row=torch.arange(steps),
            ratio=ratio,
            weights=(alpha[1:] - alpha[:-1] * ratio)[:, None],
            noise=sigma[1:] * torch.sqrt(share),
            process=repr(process),
            eta=eta_key(reverse.eta),
        )
