"""Butcher tableaus, data only; `RungeKutta` derives what follows from them and checks their sums.

`b_error` are the weights of the error estimate, b - b_hat; `dense` row i holds the coefficients of
theta, theta^2, ... of the weight of stage i at x(t + theta h).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction as F

Coefficient = float | F


def _sum(row: tuple[Coefficient, ...]) -> float:
    return math.fsum(float(v) for v in row)


@dataclass(frozen=True)
class Tableau:
    """Stages c_i, a_ij (strictly lower rows) and weights b of an explicit Runge-Kutta method.

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
    dense: tuple[tuple[Coefficient, ...], ...] | None = None
    reference: str = ""

    def __post_init__(self) -> None:
        if len(self.a) != len(self.c) or any(len(row) != i for i, row in enumerate(self.a)):
            raise ValueError(f"{self.name}: expected row i of a to have i entries, one row a stage")
        if len(self.b) != len(self.c):
            raise ValueError(f"{self.name}: expected {len(self.c)} weights b, got {len(self.b)}")
        if abs(_sum(self.b) - 1) > 1e-14:
            raise ValueError(f"{self.name}: expected sum(b) = 1, got {_sum(self.b)}")
        for c, row in zip(self.c, self.a, strict=True):
            if abs(_sum(row) - float(c)) > 1e-14:
                raise ValueError(f"{self.name}: expected sum_j a_ij = c_i = {float(c)}, got {_sum(row)}")
        if self.b_error is not None and abs(_sum(self.b_error)) > 1e-14:
            raise ValueError(f"{self.name}: expected sum(b_error) = 0, got {_sum(self.b_error)}")

    @property
    def first_same_as_last(self) -> bool:
        """Whether the last stage is evaluated at the step's result, to open the next step."""
        return len(self.b) > 1 and self.c[-1] == 1 and self.b[-1] == 0 and self.a[-1] == self.b[:-1]


EULER = Tableau("Euler", 1, (0,), ((),), (1,), reference="Hairer, Norsett, Wanner 1993, Solving ODEs I, II.1")

HEUN = Tableau(
    "Heun", 2, (0, 1), ((), (1,)), (F(1, 2), F(1, 2)),
    reference="Hairer, Norsett, Wanner 1993, Solving ODEs I, II.1 (improved Euler)",
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
