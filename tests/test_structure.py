"""What probing says an SDE is, against what it is by its formulas."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import sdeflow as sf
from sdeflow.cld import CLD
from sdeflow.known import GBM, RotationGBM, SinhOU, Student
from sdeflow.linear import LinearSDE
from sdeflow.special import CIR, Jacobi, Sphere
from sdeflow.structure import linear_form, probe_event, structure
from sdeflow.testing.strategies import WaveSDE

F64 = torch.float64


class Written(sf.SDE):
    """An SDE from two functions."""

    def __init__(self, drift, diffusion, noise="diagonal", event=(2,), domain=(-math.inf, math.inf)):
        self._drift, self._diffusion = drift, diffusion
        self.noise, self.event, self.domain = noise, event, domain

    def drift(self, x, t):
        return self._drift(x, t)

    def diffusion(self, x, t):
        return self._diffusion(x, t)


def rows(*values):
    return torch.stack([torch.stack(row, -1) for row in values], -2)


def spring(x, t):
    return torch.stack([x[:, 1], -x[:, 0]], -1)


@dataclass
class Case:
    sde: Any
    flags: str
    """Of affine, homogeneous, additive, own coordinate, commutative, polynomial: "+" or "-" each."""
    noise: str
    kernel: str


A = [[-1.0, 2.0], [-0.5, -0.3]]
MATRIX = [[0.7, 0.1], [0.0, 0.4]]
CASES = {
    "GBM": Case(GBM(0.3, 0.5), "++-+++", "diagonal", "polynomial moments"),
    "CIR": Case(CIR(), "++-+++", "diagonal", "polynomial moments"),
    "Jacobi": Case(Jacobi(), "++-+++", "diagonal", "polynomial moments"),
    "Student": Case(Student(), "++-+++", "diagonal", "polynomial moments"),
    "SinhOU": Case(SinhOU(), "-+-++-", "diagonal", "simulation"),
    "RotationGBM": Case(RotationGBM(), "++--++", "commutative", "polynomial moments"),
    "Sphere": Case(Sphere(3), "++----", "general", "simulation"),
    "VP": Case(sf.VP(), "+-++++", "additive", "commuting exponential"),
    "RectifiedFlow": Case(sf.RectifiedFlow(), "+-++++", "additive", "commuting exponential"),
    "constant linear": Case(LinearSDE(A, [0.7, 0.4]), "++++++", "additive", "Van Loan"),
    "correlated linear": Case(LinearSDE(A, MATRIX), "+++-++", "additive", "Van Loan"),
    "CLD of a rate": Case(CLD(lambda t: 1 + t), "+-++++", "additive", "commuting exponential"),
    "turning": Case(
        LinearSDE(lambda t: rows((-1 + 0 * t, t), (-t, -2 + 0 * t)), MATRIX), "+-+-++", "additive", "Magnus"),
    "double well": Case(
        Written(lambda x, t: x - x**3, lambda x, t: 0.5 * torch.ones_like(x)), "-+++" "+-", "additive", "simulation"),
    "quartic D": Case(
        Written(lambda x, t: -x, lambda x, t: 1 + x**2), "++-++-", "diagonal", "simulation"),
    "diagonal, of the other coordinate": Case(
        Written(lambda x, t: -x, lambda x, t: 1 + 0.3 * torch.sin(x.flip(1))), "++----", "general", "simulation"),
    "scalar noise": Case(
        Written(lambda x, t: -x, lambda x, t: (x + 1).unsqueeze(-1), "general"), "++--++", "scalar",
        "polynomial moments"),
    "Heisenberg": Case(
        Written(lambda x, t: 0 * x, lambda x, t: rows(
            (1 + 0 * x[:, 0], 0 * x[:, 0]), (0 * x[:, 0], 1 + 0 * x[:, 0]), (-x[:, 1], x[:, 0])), "general", (3,)),
        "++---+", "general", "polynomial moments"),
    "clock in the noise alone": Case(
        Written(lambda x, t: -x, lambda x, t: (1 + t) * x), "+--+++", "diagonal", "polynomial moments"),
    "clock in the drift alone": Case(
        Written(lambda x, t: spring(x, t) * (1 + t), lambda x, t: torch.ones_like(x)), "+-++++", "additive",
        "commuting exponential"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_verdicts(name):
    case = CASES[name]
    found = structure(case.sde)
    flags = (found.affine, found.homogeneous, found.additive, found.own_coordinate, found.commutative, found.polynomial)
    assert "".join("-+"[flag] for flag in flags) == case.flags
    assert found.noise == case.noise
    assert found.kernel == case.kernel
    assert (found.commuting is None) == (not found.affine)
    assert found.solvers
    assert found == case.sde.structure()


def test_solvers_fit_the_noise_best_order_first():
    from sdeflow.solvers import CATALOGUE

    by_name = {row.name: row for row in CATALOGUE}
    for name, column in (("VP", "strong_order"), ("GBM", "strong_diagonal"), ("Heisenberg", "strong_general")):
        found = structure(CASES[name].sde)
        assert all(found.noise in by_name[s].noise for s in found.solvers)
        orders = [getattr(by_name[s], column) or 0.0 for s in found.solvers]
        assert orders == sorted(orders, reverse=True)


def test_noise_components_are_counted():
    assert structure(LinearSDE(A, [[0.7], [0.1]])).noise_dim == 1
    assert structure(GBM(start=[[1.0, 2.0, 3.0]])).noise_dim == 3
    assert structure(CASES["Heisenberg"].sde).noise_dim == 2


def test_a_branch_beyond_eight_is_seen_by_tail_probes():
    """Points of the middle alone would say affine and additive."""

    def bent(x):
        return torch.where(x.abs() > 8, x**3, x)

    assert not structure(Written(lambda x, t: -bent(x), lambda x, t: torch.ones_like(x))).affine
    assert not structure(Written(lambda x, t: -x, lambda x, t: torch.where(x.abs() > 8, 2.0, 1.0 + 0 * x))).additive
    clamped = Written(lambda x, t: -x, lambda x, t: x.clamp(-8, 8))
    assert not structure(clamped).polynomial
    straight = structure(Written(lambda x, t: -x, lambda x, t: torch.ones_like(x)))
    assert straight.affine
    assert straight.additive


def test_a_tiny_nonlinearity_is_not_affine():
    assert not structure(Written(lambda x, t: -x + 1e-5 * x**3, lambda x, t: torch.ones_like(x))).affine
    assert not structure(Written(lambda x, t: -x + 1e-6 * torch.sin(t), lambda x, t: 1.0 + 0 * x)).homogeneous


def test_declarations_are_believed_and_named():
    sde = Written(lambda x, t: x - x**3, lambda x, t: 1 + 0.5 * torch.sin(x))
    sde.affine, sde.additive, sde.homogeneous = True, True, False
    found = structure(sde)
    assert found.affine
    assert found.additive
    assert not found.homogeneous
    assert found.declared == ("affine", "homogeneous", "additive")
    assert "affine, homogeneous, additive" in found.words()["declared, not probed"]
    assert "declared, not probed" not in structure(GBM()).words()


def test_commutative_may_be_declared():
    sde = Written(lambda x, t: -x, CASES["Heisenberg"].sde._diffusion, "general", (3,))
    assert not structure(sde).commutative
    sde.commutative = True
    assert structure(sde).commutative


class Pairs(sf.SDE):
    """Takes events of two components alone, and says nothing of it."""

    def drift(self, x, t):
        a, b = x.unbind(-1)
        return torch.stack([b, -a], -1)

    def diffusion(self, x, t):
        return torch.ones_like(x)


class Triples(Pairs):
    def drift(self, x, t):
        a, b, c = x.unbind(-1)
        return torch.stack([b, c, -a], -1)


class Images(Pairs):
    def drift(self, x, t):
        if x.ndim != 3:
            raise RuntimeError("expected images")
        return -x


def test_event_detection():
    assert probe_event(Pairs()) == (2,)
    assert probe_event(Triples()) == (3,)
    assert probe_event(Images()) == (2, 2)
    assert probe_event(GBM(start=[[1.0, 1.0, 1.0, 1.0]])) == (4,)
    assert probe_event(sf.VP(), (5, 5)) == (5, 5)
    assert structure(Images()).event == (2, 2)


def test_no_event_fits():
    class Never(Pairs):
        def drift(self, x, t):
            raise RuntimeError("no luck today")

    with pytest.raises(ValueError, match=r"declare `event`.*no luck today"):
        structure(Never())


def test_wrong_shapes_say_what_was_returned():
    with pytest.raises(ValueError, match=r"the drift returned \(\d+, 1\)"):
        structure(Written(lambda x, t: x[:, :1], lambda x, t: torch.ones_like(x)))
    with pytest.raises(ValueError, match=r"the diffusion returned"):
        structure(Written(lambda x, t: x, lambda x, t: torch.ones(3, 2, dtype=x.dtype), "general"))


def test_a_domain_must_be_declared_where_it_is_needed():
    def root(x, t):
        return torch.sqrt(x)

    with pytest.raises(ValueError, match="as `domain`"):
        structure(Written(lambda x, t: -x, root))
    assert structure(Written(lambda x, t: -x, root, domain=(0.0, math.inf))).polynomial
    below = Written(lambda x, t: -x, lambda x, t: torch.sqrt(-x), domain=(-math.inf, 0.0))
    assert structure(below).polynomial


def test_linear_form_has_the_kernel():
    sde = WaveSDE([[-1, 0.5], [0.2, -0.6]], [0.3, -0.2], [[1, 0.3], [0.1, 0.9]])
    form = linear_form(sde, structure(sde))
    a, b, g = (torch.tensor(v, dtype=F64) for v in (sde.A, sde.b, sde.L))
    want = LinearSDE(a, g, offset=b).transition(0.1, 0.8)
    for got, expected in zip(form.transition(0.1, 0.8), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    moving = WaveSDE([[-1, 0.5], [0.2, -0.6]], [0.3, -0.2], [[1, 0.3], [0.1, 0.9]], speed=0.5)
    assert linear_form(moving, structure(moving)).transition(0.1, 0.8).matrix.shape == (2, 2)
    with pytest.raises(ValueError, match="affine drift, additive noise"):
        linear_form(GBM(), structure(GBM()))


def test_words_tell_the_law():
    assert "one matrix exponential" in structure(LinearSDE(A, MATRIX)).words()["transition law"]
    assert "moments of any degree" in structure(GBM()).words()["transition law"]
    assert "nonlinear drift, time-homogeneous" in structure(SinhOU()).words()["coefficients"]
