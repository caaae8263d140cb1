"""Samplers by the names of their papers that are points of the families here: each a line of data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from sdeflow.checked import LARGEST, checked
from sdeflow.reverse import Eta
from sdeflow.solvers.adams import Adams
from sdeflow.solvers.exponential import ExponentialMultistep
from sdeflow.solvers.exponential_rk import ExponentialRK
from sdeflow.solvers.in_variable import InVariable
from sdeflow.solvers.own_eta import NoiseScale, OwnEta, Window
from sdeflow.solvers.runge_kutta import RK4, Heun, RungeKutta
from sdeflow.solvers.tableaus import KUTTA3

Start = Literal["ramp", "runge-kutta"]
"""How a multistep method begins; see `Adams`."""


@checked
def IPNDM(order: int = 4, *, start: Start = "ramp") -> InVariable:
    """iPNDM of order 1 to 4: Adams-Bashforth on eps in x/alpha (Zhang and Chen 2023, DEIS, appendix H).

    With the weights of the grid: the published constants (3/2, -1/2; 23, -16, 5; ...) are those of equal steps, and
    of order 2 at most on any other grid.
    """
    return InVariable(Adams(order, start=start), "x/alpha", label=f"IPNDM({order})")


def PNDM() -> InVariable:
    """PNDM: Adams-Bashforth of order 4 on eps in x/alpha, its first three steps by Runge-Kutta, 3 calls more each.

    (Liu et al. 2022, PNDM, equations 11 and 12; with the weights of the grid.)
    """
    return InVariable(Adams(4, start="runge-kutta"), "x/alpha", label="PNDM")


@checked
def LMS(order: int = 4, *, start: Start = "ramp") -> InVariable:
    """The linear multistep sampler of k-diffusion: Adams-Bashforth in the clock sigma/alpha, integrated exactly."""
    return InVariable(Adams(order, start=start), "x/alpha", label=f"LMS({order})")


def DPM2() -> ExponentialRK:
    """DPM-2: the midpoint in lam, one step of DPM-Solver-2 as published (Lu et al. 2022, DPM-Solver, algorithm 1)."""
    return ExponentialRK(2, "eps", "DPM2", "midpoint")


@checked
def RhoRK(order: int = 2) -> InVariable:
    """DEIS's rho-RK: Runge-Kutta in x/alpha; 2 is Heun (EDM's), 3 Kutta's, 4 the classical method.

    (Zhang and Chen 2023, DEIS, section 3.3 and appendix B.2.)
    """
    methods = {2: Heun, 3: lambda: RungeKutta(KUTTA3), 4: RK4}
    if order not in methods:
        raise ValueError(f"RhoRK: expected order 2, 3 or 4, got {order!r}")
    return InVariable(methods[order](), "x/alpha", label=f"RhoRK({order})")


@checked
def StraightABM(order: int = 4, *, start: Start = "ramp") -> InVariable:
    """Adams-Bashforth-Moulton in the straight variable x/(alpha + sigma): predictor of `order`, corrector above it."""
    return InVariable(Adams(order, corrector=True, start=start), "straight", label=f"StraightABM({order})")


@checked
def SASolver(predictor: int = 3, corrector: int = 4, tau: Eta | OwnEta | None = None) -> ExponentialMultistep:
    """SA-Solver: exponential Adams in data prediction with a stochasticity of its own, on the flow; one call a step.

    (Xue et al. 2023, SA-Solver, section 4, algorithm 1, as predict-evaluate-correct: the new evaluation
    corrects its own step, with the same noise, and predicts the next. tau is the eta of `reverse`.) The weights
    integrate the polynomials exactly for a tau held at its root mean square over the step.

    Args:
        predictor: evaluations the predictor uses, 1 to 4.
        corrector: evaluations the corrector uses, the new one among them, 2 to 5; 0 for none.
        tau: a number, a function of t or an `OwnEta`; None is the paper's 1 on [0.2, 0.8] of the time range, else 0.

    Raises:
        ValueError: other numbers of evaluations, or a negative tau.
    """
    if corrector not in (0, 2, 3, 4, 5):
        raise ValueError(f"SASolver: expected a corrector of 2 to 5 evaluations, or 0 for none, got {corrector!r}")
    if isinstance(tau, (int, float)) and not 0 <= tau <= LARGEST:
        raise ValueError(f"SASolver: expected tau >= 0, got {tau!r} (at most {LARGEST:g})")
    return ExponentialMultistep(
        predictor, corrector=max(corrector - 1, 0), eta=Window() if tau is None else tau,
        name=f"SASolver({predictor}, {corrector})",
    )  # fmt: skip


@checked
def ERSDE(order: int = 3, phi: Callable[[Tensor], Tensor] | None = None) -> ExponentialMultistep:
    """ER-SDE-Solver of order 1 to 3: data prediction interpolated in sigma/alpha, with a noise scale of its own.

    In y = x/alpha at levels u = sigma/alpha, with the interpolant of the last evaluations,

        y' = phi(u')/phi(u) y + phi(u') int_u'^u x_0(s) dphi(s)/phi(s)^2 + sqrt(u'^2 - u^2 (phi(u')/phi(u))^2) z

    (Cui et al. 2023, Elucidating the solution space of extended reverse-time SDE, section 3), eta^2 being
    d log phi/d log u - 1. The first and last terms are exact. In the integral phi is the power of s through its
    values at the step's two ends, so that the weight of the evaluations together is exact and their differences'
    are off by a relative O(h); the published code sums 1/phi at 100 to 200 left ends instead. It also takes the
    last difference quotient for the derivative at u in its order 3, without the second difference's share of it;
    the interpolant here is the parabola.

    Args:
        order: evaluations interpolated.
        phi: of a float64 tensor of levels, phi(u)/u not decreasing; None is the paper's u (exp(u^0.3) + 10). u itself
            is the flow, u^2 the reverse SDE (eta = 1).
    """
    if order not in (1, 2, 3):
        raise ValueError(f"ERSDE: expected order 1, 2 or 3, got {order!r}")
    return ExponentialMultistep(order, coordinate="rho", eta=NoiseScale(phi), name=f"ERSDE({order})")
