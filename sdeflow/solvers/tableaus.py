"""Butcher tableaus, data only; `RungeKutta` derives what follows from them and checks their sums.

`b_error` are the weights of the error estimate, b - b_hat; with a second one of lower order, `b_error_low`,
the estimate is |e|^2/sqrt(|e|^2 + 0.01 |e_low|^2). `dense` row i holds the coefficients of theta, theta^2, ...
of the weight of stage i at x(t + theta h), over the stages and the `extra_` ones, which only dense output needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction as F
from functools import cached_property
from typing import NamedTuple

import numpy as np

from sdeflow.solvers import dop853

Coefficient = float | F


def _sum(row: tuple[Coefficient, ...]) -> float:
    return math.fsum(float(v) for v in row)


@dataclass(frozen=True)
class Tableau:
    """Stages c_i, a_ij (strictly lower rows) and weights b of an explicit Runge-Kutta method.

    Args:
        name: for tables and messages.
        order: of convergence, as declared; `check_solver` fits it.
        c, a, b: the stages' times, rows and weights, as floats or fractions.
        b_error, b_error_low: weights of the error estimates, as the module says; None for a method without.
        dense: coefficients of the interpolant a stage, as the module says.
        extra_c, extra_a: stages that only dense output needs.
        reference: where it comes from.

    Raises:
        ValueError: the rows do not have the sizes of an explicit method, or break
            sum(b) = 1, sum_j a_ij = c_i, sum(b_error) = 0.
    """

    name: str
    order: int
    c: tuple[Coefficient, ...]
    a: tuple[tuple[Coefficient, ...], ...]
    b: tuple[Coefficient, ...]
    b_error: tuple[Coefficient, ...] | None = None
    b_error_low: tuple[Coefficient, ...] | None = None
    dense: tuple[tuple[Coefficient, ...], ...] | None = None
    extra_c: tuple[Coefficient, ...] = ()
    extra_a: tuple[tuple[Coefficient, ...], ...] = ()
    reference: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or not isinstance(self.reference, str):
            raise TypeError(f"expected name and reference as text, got {self.name!r:.60} and {self.reference!r:.60}")
        if isinstance(self.order, bool) or not isinstance(self.order, int) or self.order < 1:
            raise ValueError(f"{self.name}: expected order as an integer >= 1, got {self.order!r:.60}")
        if len(self.a) != len(self.c) or any(len(row) != i for i, row in enumerate(self.a)):
            raise ValueError(f"{self.name}: expected row i of a to have i entries, one row a stage")
        rows = (*self.a, self.b, self.c, *self.extra_a, self.extra_c)
        if not all(math.isfinite(float(v)) for row in rows for v in row):
            raise ValueError(f"{self.name}: expected finite coefficients")
        if len(self.b) != len(self.c):
            raise ValueError(f"{self.name}: expected {len(self.c)} weights b, got {len(self.b)}")
        if abs(_sum(self.b) - 1) > 1e-14:
            raise ValueError(f"{self.name}: expected sum(b) = 1, got {_sum(self.b)}")
        for c, row in zip(self.c, self.a, strict=True):
            if abs(_sum(row) - float(c)) > 1e-14:
                raise ValueError(f"{self.name}: expected sum_j a_ij = c_i = {float(c)}, got {_sum(row)}")
        for error in (self.b_error, self.b_error_low):
            if error is not None and abs(_sum(error)) > 1e-14:
                raise ValueError(f"{self.name}: expected sum(b_error) = 0, got {_sum(error)}")

    def __hash__(self) -> int:
        return hash((self.name, self.order))  # not of a hundred fractions, at every solve

    @cached_property
    def first_same_as_last(self) -> bool:
        """Whether the last stage is evaluated at the step's result, to open the next step."""
        return len(self.b) > 1 and self.c[-1] == 1 and self.b[-1] == 0 and self.a[-1] == self.b[:-1]

    @cached_property
    def sparse(self) -> Sparse:
        """The coefficients as floats, the zeros left out: a hundred fractions are not converted at every step."""
        error = tuple(sparse_row(row) for row in (self.b_error, self.b_error_low) if row is not None)
        return Sparse(
            c=tuple(float(c) for c in self.c),
            a=tuple(sparse_row(row) for row in self.a),
            b=sparse_row(self.b),
            error=error,
            dense=None if self.dense is None else tuple(sparse_row(row) for row in self.dense),
            extra_c=tuple(float(c) for c in self.extra_c),
            extra_a=tuple(sparse_row(row) for row in self.extra_a),
        )


SparseRow = tuple[tuple[int, float], ...]
"""(place, coefficient) of those that are not 0."""


class Sparse(NamedTuple):
    """The coefficients of a `Tableau`, under the same names; `error` has a row for each estimate."""

    c: tuple[float, ...]
    a: tuple[SparseRow, ...]
    b: SparseRow
    error: tuple[SparseRow, ...]
    dense: tuple[SparseRow, ...] | None
    extra_c: tuple[float, ...]
    extra_a: tuple[SparseRow, ...]


def sparse_row(row: Sequence[Coefficient]) -> SparseRow:
    """A row without its zeros."""
    return tuple((j, float(v)) for j, v in enumerate(row) if v != 0)


EULER = Tableau("Euler", 1, (0,), ((),), (1,), reference="Hairer, Norsett, Wanner 1993, Solving ODEs I, II.1")

HEUN = Tableau(
    "Heun", 2, (0, 1), ((), (1,)), (F(1, 2), F(1, 2)),
    reference="Hairer, Norsett, Wanner 1993, Solving ODEs I, II.1 (improved Euler)",
)  # fmt: skip

MIDPOINT = Tableau(
    "Midpoint", 2, (0, F(1, 2)), ((), (F(1, 2),)), (0, 1),
    reference="Hairer, Norsett, Wanner 1993, Solving ODEs I, II.1 (Runge's method)",
)  # fmt: skip

RALSTON = Tableau(
    "Ralston", 2, (0, F(2, 3)), ((), (F(2, 3),)), (F(1, 4), F(3, 4)),
    reference="Ralston 1962, Runge-Kutta methods with minimum error bounds",
)  # fmt: skip

KUTTA3 = Tableau(
    "Kutta3", 3, (0, F(1, 2), 1), ((), (F(1, 2),), (-1, 2)), (F(1, 6), F(2, 3), F(1, 6)),
    reference="Kutta 1901; Hairer, Norsett, Wanner 1993, Solving ODEs I, II.1",
)  # fmt: skip

RK38 = Tableau(
    "RK38", 4, (0, F(1, 3), F(2, 3), 1), ((), (F(1, 3),), (F(-1, 3), 1), (1, -1, 1)),
    (F(1, 8), F(3, 8), F(3, 8), F(1, 8)),
    reference="Hairer, Norsett, Wanner 1993, Solving ODEs I, table 1.2 (3/8 rule)",
)  # fmt: skip

BOGACKI_SHAMPINE = Tableau(
    "BogackiShampine", 3, (0, F(1, 2), F(3, 4), 1),
    ((), (F(1, 2),), (0, F(3, 4)), (F(2, 9), F(1, 3), F(4, 9))),
    (F(2, 9), F(1, 3), F(4, 9), 0),
    b_error=(F(-5, 72), F(1, 12), F(1, 9), F(-1, 8)),
    dense=((1, F(-4, 3), F(5, 9)), (0, 1, F(-2, 3)), (0, F(4, 3), F(-8, 9)), (0, -1, 1)),
    reference="Bogacki and Shampine 1989, A 3(2) pair of Runge-Kutta formulas",
)  # fmt: skip

RK4 = Tableau(
    "RK4", 4, (0, F(1, 2), F(1, 2), 1), ((), (F(1, 2),), (0, F(1, 2)), (0, 0, 1)),
    (F(1, 6), F(1, 3), F(1, 3), F(1, 6)),
    reference="Hairer, Norsett, Wanner 1993, Solving ODEs I, table 1.2",
)  # fmt: skip

DORMAND_PRINCE = Tableau(
    "RK45", 5, (0, F(1, 5), F(3, 10), F(4, 5), F(8, 9), 1, 1),
    (
        (),
        (F(1, 5),),
        (F(3, 40), F(9, 40)),
        (F(44, 45), F(-56, 15), F(32, 9)),
        (F(19372, 6561), F(-25360, 2187), F(64448, 6561), F(-212, 729)),
        (F(9017, 3168), F(-355, 33), F(46732, 5247), F(49, 176), F(-5103, 18656)),
        (F(35, 384), 0, F(500, 1113), F(125, 192), F(-2187, 6784), F(11, 84)),
    ),
    (F(35, 384), 0, F(500, 1113), F(125, 192), F(-2187, 6784), F(11, 84), 0),
    b_error=(F(71, 57600), 0, F(-71, 16695), F(71, 1920), F(-17253, 339200), F(22, 525), F(-1, 40)),
    # Shampine 1986, Some practical Runge-Kutta formulas: order 4, continuous first derivative
    dense=(
        (1, F(-8048581381, 2820520608), F(8663915743, 2820520608), F(-12715105075, 11282082432)),
        (0, 0, 0, 0),
        (0, F(131558114200, 32700410799), F(-68118460800, 10900136933), F(87487479700, 32700410799)),
        (0, F(-1754552775, 470086768), F(14199869525, 1410260304), F(-10690763975, 1880347072)),
        (0, F(127303824393, 49829197408), F(-318862633887, 49829197408), F(701980252875, 199316789632)),
        (0, F(-282668133, 205662961), F(2019193451, 616988883), F(-1453857185, 822651844)),
        (0, F(40617522, 29380423), F(-110615467, 29380423), F(69997945, 29380423)),
    ),
    reference="Dormand and Prince 1980, A family of embedded Runge-Kutta formulae, table 2",
)  # fmt: skip

_TSIT5_B = (
    0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774,
)  # fmt: skip


def _monomials(*factors: tuple[float, ...]) -> tuple[float, ...]:
    """The coefficients of theta, theta^2, ... of a product of polynomials without constant term."""
    product = np.polynomial.polynomial.Polynomial([1.0])
    for factor in factors:
        product = product * np.polynomial.polynomial.Polynomial(factor)
    return tuple(product.coef[1:].tolist())


_SQUARE = (0.0, 0.0, 1.0)

TSITOURAS = Tableau(
    "Tsit5", 5, (0, 0.161, 0.327, 0.9, 0.9800255409045097, 1, 1),
    (
        (),
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
        _TSIT5_B,
    ),
    (*_TSIT5_B, 0),
    b_error=(
        -0.00178001105222577714, -0.0008164344596567469, 0.007880878010261995, -0.1447110071732629,
        0.5823571654525552, -0.45808210592918697, F(1, 66),
    ),
    dense=(
        _monomials((-1.0530884977290216,), (0.0, 1.0), (-1.3299890189751412, 1.0),
                   (0.7139816917074209, -1.4364028541716351, 1.0)),
        _monomials((0.1017,), _SQUARE, (1.2949852507374631, -2.1966568338249754, 1.0)),
        _monomials((2.490627285651252793,), _SQUARE, (1.57803468208092486, -2.38535645472061657, 1.0)),
        _monomials((-16.54810288924490272,), _SQUARE, (-1.21712927295533244, 1.0), (-0.61620406037800089, 1.0)),
        _monomials((47.37952196281928122,), _SQUARE, (-1.203071208372362603, 1.0), (-0.658047292653547382, 1.0)),
        _monomials((-34.87065786149660974,), _SQUARE, (-1.2, 1.0), (-0.666666666666666667, 1.0)),
        _monomials((2.5,), _SQUARE, (-1.0, 1.0), (-0.6, 1.0)),
    ),
    reference="Tsitouras 2011, Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying assumption",
)  # fmt: skip


def _full(row: dict[int, float], size: int) -> tuple[float, ...]:
    return tuple(row.get(j, 0.0) for j in range(size))


def _dop853_dense() -> tuple[tuple[float, ...], ...]:
    """The interpolant y + sum_p F_p B_p(theta), B = theta, theta (1 - theta), theta^2 (1 - theta), ..., by stage.

    F_0 = dy, F_1 = h k_0 - dy, F_2 = 2 dy - h (k_0 + k_12), F_3.. = h DENSE k, with dy = h sum b k.
    """
    b, first, last = (np.array(_full(row, 16)) for row in (dop853.STAGES[12], {0: 1.0}, {12: 1.0}))
    by_power = [b, first - b, 2 * b - first - last, *(np.array(_full(row, 16)) for row in dop853.DENSE)]
    basis = np.polynomial.polynomial.Polynomial([1.0])
    total = np.zeros((16, 7))
    for p, row in enumerate(by_power):
        basis = basis * np.polynomial.polynomial.Polynomial([0.0, 1.0] if p % 2 == 0 else [1.0, -1.0])
        total[:, : basis.coef.size - 1] += np.outer(row, basis.coef[1:])
    return tuple(tuple(row) for row in total.tolist())


DORMAND_PRINCE_8 = Tableau(
    "DOP853", 8, dop853.NODES[:13],
    tuple(_full(row, i) for i, row in enumerate(dop853.STAGES[:13])),
    _full(dop853.STAGES[12], 13),
    b_error=_full(dop853.ERROR_5, 13),
    b_error_low=_full(dop853.ERROR_3, 13),
    dense=_dop853_dense(),
    extra_c=dop853.NODES[13:],
    extra_a=tuple(_full(dop853.STAGES[i], i) for i in range(13, 16)),
    reference="Hairer, Norsett, Wanner 1993, Solving ODEs I, II.10",
)  # fmt: skip
