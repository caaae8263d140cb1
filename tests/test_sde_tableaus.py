"""Tableaus for SDEs by exact conditions of order, and SRIW1 written out against its tableau."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import sdeflow as sf
from sdeflow.solvers import SRIW1
from sdeflow.solvers.stochastic_rk import SRA1_TABLEAU, SRA3_TABLEAU
from tests.exact import F64


@dataclasses.dataclass(frozen=True)
class DiagonalTableau:
    """A method SRI of Rossler 2010, section 5, as printed there."""

    alpha: tuple
    a0: tuple
    b0: tuple
    c0: tuple
    a1: tuple
    b1: tuple
    c1: tuple
    beta1: tuple
    beta2: tuple
    beta3: tuple
    beta4: tuple


# table 5.2, which `SRIW1` has written out; X_3 = X_4 = x have no weight in x' and stand for X_1 in Y_4
SRI1W1_TABLEAU = DiagonalTableau(
    alpha=(1 / 3, 2 / 3), a0=((), (3 / 4,)), b0=((), (3 / 2,)), c0=(0, 3 / 4),
    a1=((), (1 / 4,), (1,), (1 / 4,)), b1=((), (1 / 2,), (-1,), (-5, 3, 1 / 2)), c1=(0, 1 / 4, 1, 1 / 4),
    beta1=(-1, 4 / 3, 2 / 3, 0), beta2=(-1, 4 / 3, -1 / 3, 0),
    beta3=(2, -4 / 3, -2 / 3, 0), beta4=(-2, 5 / 3, -2 / 3, 1),
)  # fmt: skip


def exactly(rows, width):
    """Rows of floats as an array of fractions."""
    return np.array(
        [[Fraction(v).limit_denominator(1000) for v in (*row, *[0] * (width - len(row)))] for row in rows], dtype=object
    )


def vector(values):
    return exactly([values], len(values))[0]


def additive_conditions(table):
    """Rossler 2010, theorem of section 6: the residuals of strong order 1.5."""
    alpha, beta1, beta2 = map(vector, (table.alpha, table.beta1, table.beta2))
    c0, c1 = vector(table.c0), vector(table.c1)
    n = len(alpha)
    a0, b0 = exactly(table.a0, n).sum(1), exactly(table.b0, n).sum(1)
    half, three_halves = Fraction(1, 2), Fraction(3, 2)
    return [
        alpha.sum() - 1, beta1.sum() - 1, beta2.sum(), alpha @ b0 - 1, alpha @ a0 - half,
        alpha @ b0**2 - three_halves, beta1 @ c1 - 1, beta2 @ c1 + 1, *(c0 - a0),
    ]  # fmt: skip


def diagonal_conditions(table):
    """Rossler 2010, theorem of section 5: the residuals of strong order 1.5 for diagonal and scalar noise."""
    alpha = vector(table.alpha)
    c0, c1 = vector(table.c0), vector(table.c1)
    n, m = len(alpha), len(c1)
    a0, b0 = exactly(table.a0, n).sum(1), exactly(table.b0, n).sum(1)
    a1, b1 = exactly(table.a1, n), exactly(table.b1, m)
    once, twice, drift = b1.sum(1), b1 @ b1.sum(1), a1.sum(1)
    wanted = {  # beta . 1, beta . B1 1, beta . A1 1, beta . (B1 1)^2, beta . B1 B1 1
        "beta1": (1, 0, 1, 1, 0), "beta2": (0, 1, 0, 0, 0), "beta3": (0, 0, -1, -1, 0), "beta4": (0, 0, 0, 2, 1),
    }  # fmt: skip
    out = [alpha.sum() - 1, alpha @ a0 - Fraction(1, 2), alpha @ b0 - 1, alpha @ b0**2 - Fraction(3, 2)]
    ones = vector([1] * m)
    for name, values in wanted.items():
        beta = vector(getattr(table, name))
        trees = (ones, once, drift, once**2, twice)
        out += [beta @ tree - value for tree, value in zip(trees, values, strict=True)]
    beta1, beta3 = vector(table.beta1), vector(table.beta3)
    out.append(Fraction(1, 2) * (beta1 @ (a1 @ b0)) + Fraction(1, 3) * (beta3 @ (a1 @ b0)))
    return [*out, *(c0 - a0), *(c1 - drift)]


@pytest.mark.parametrize("table", [SRA1_TABLEAU, SRA3_TABLEAU], ids=["SRA1", "SRA3"])
def test_the_tableaus_for_additive_noise_meet_the_conditions_of_order_one_and_a_half(table):
    assert additive_conditions(table) == [0] * len(additive_conditions(table))
    alpha, c0 = vector(table.alpha), vector(table.c0)
    order = 3 if len(alpha) == 3 else 2
    assert [alpha @ c0**k - Fraction(1, k + 1) for k in range(order)] == [0] * order
    if order == 3:  # alpha A0 c0 = 1/6
        assert alpha @ (exactly(table.a0, 3) @ c0) == Fraction(1, 6)


def test_the_tableau_for_diagonal_noise_meets_the_conditions_of_order_one_and_a_half():
    got = diagonal_conditions(SRI1W1_TABLEAU)
    assert got == [0] * len(got)


def perturbed(table):
    """The tableau with one entry moved by 1/16, entry after entry."""
    for field in dataclasses.fields(table):
        value = getattr(table, field.name)
        if isinstance(value[0], tuple):
            for i, row in enumerate(value):
                for j in range(len(row)):
                    new = (*row[:j], row[j] + 1 / 16, *row[j + 1 :])
                    yield (
                        f"{field.name}[{i}][{j}]",
                        dataclasses.replace(table, **{field.name: (*value[:i], new, *value[i + 1 :])}),
                    )
        else:
            for j in range(len(value)):
                yield (
                    f"{field.name}[{j}]",
                    dataclasses.replace(table, **{field.name: (*value[:j], value[j] + 1 / 16, *value[j + 1 :])}),
                )


@pytest.mark.parametrize(
    ("table", "conditions"),
    [(SRA1_TABLEAU, additive_conditions), (SRA3_TABLEAU, additive_conditions), (SRI1W1_TABLEAU, diagonal_conditions)],
    ids=["SRA1", "SRA3", "SRI1W1"],
)
def test_every_entry_of_a_tableau_is_in_a_condition(table, conditions):
    """The control: no entry can be mistyped unseen, but for the node of a diffusion that SRA3 does not use."""
    for name, wrong in perturbed(table):
        if (table, name) == (SRA3_TABLEAU, "c1[2]"):
            continue
        assert any(residual != 0 for residual in conditions(wrong)), name


def tableau_step(table, f, g, x, t, h, w, area):
    """A step of the method SRI of a tableau, term by term."""
    r, j = math.sqrt(h), 0.5 * w + area
    integrals = (w, (w * w - h) / (2 * r), j, (w**3 - 3 * h * w) / (6 * h))
    drift = f(x, t)
    values = []
    for a, b, c in zip(table.a1, table.b1, table.c1, strict=True):
        y = x + h * sum(a) * drift + r * sum((v * u for v, u in zip(b, values, strict=False)), torch.zeros_like(x))
        values.append(g(y, t + c * h))
    stage = x + h * table.a0[1][0] * drift + table.b0[1][0] * values[0] * j
    new = x + h * (table.alpha[0] * drift + table.alpha[1] * f(stage, t + table.c0[1] * h))
    for beta, integral in zip((table.beta1, table.beta2, table.beta3, table.beta4), integrals, strict=True):
        new = new + sum(v * u for v, u in zip(beta, values, strict=True)) * integral
    return new


def test_sriw1_written_out_is_its_tableau():
    """The step's combinations share terms; the tableau, term by term, does not. A changed entry is seen."""

    class Wave(sf.SDE):
        def drift(self, x, t):
            return torch.sin(x) * (1 + t)

        def diffusion(self, x, t):
            return 0.4 * torch.cos(x) + 0.2 * t

    sde, x, h = Wave(), torch.linspace(-1, 1, 5, dtype=F64)[:, None], 0.25
    walk = sf.Noise(1, 5).walk(torch.tensor([0.0, h], dtype=F64), (1,), F64, areas=True)
    w, area = walk(0)
    got = sf.solve(sde, x, SRIW1(), grid=[0.0, h], seed=1).x
    t = torch.tensor(0.0, dtype=F64)
    torch.testing.assert_close(
        got, tableau_step(SRI1W1_TABLEAU, sde.drift, sde.diffusion, x, t, h, w, area), rtol=0, atol=1e-14
    )
    wrong = dataclasses.replace(SRI1W1_TABLEAU, b1=((), (1 / 2,), (-1,), (-5, 3, 0.49)))
    assert float((got - tableau_step(wrong, sde.drift, sde.diffusion, x, t, h, w, area)).abs().max()) > 1e-5
