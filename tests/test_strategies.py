"""Hypothesis strategies: what they draw is valid, prints as Python that makes it again, and shrinks to little."""

import builtins
import importlib
import sys

import pytest
import torch
from hypothesis import find, given, settings

import sdeflow as sf
from sdeflow.calculus import NOISE_KINDS
from sdeflow.discrete import DiscreteVP
from sdeflow.gaussian import GaussianSDE
from sdeflow.grids import GRIDS
from sdeflow.linear import LinearSDE
from sdeflow.problems import Distribution
from sdeflow.processes import EDM, VE, VP, CosineVP, RectifiedFlow, SubVP
from sdeflow.solvers import CATALOGUE
from sdeflow.solvers.base import Solver
from sdeflow.structure import probe_event, probe_points, structure
from sdeflow.testing import strategies
from sdeflow.testing.strategies import (
    Mixture,
    PointMasses,
    PowerSDE,
    TanhImage,
    WaveSDE,
    distributions,
    gaussian_sdes,
    grids,
    sdes,
    solvers,
    times,
)

F64 = torch.float64
NAMES = {c.__name__: c for c in (
    CosineVP, EDM, Mixture, PointMasses, PowerSDE, RectifiedFlow, SubVP, TanhImage, VE, VP, WaveSDE,
)}  # fmt: skip


def pasted(text):
    """The object that a repr makes."""
    return eval(text, dict(NAMES))


@settings(max_examples=40)
@given(sdes())
def test_sdes_are_valid_and_print_as_python(sde):
    event = probe_event(sde)
    assert event == (len(sde.b),)
    assert 1 <= event[0] <= 4
    x, t = probe_points(sde, event, 3, tails=False)
    f, g = sde.drift(x, t), sde.diffusion(x, t)
    assert f.shape == x.shape
    assert g.shape[:2] == x.shape
    assert bool(torch.isfinite(f).all() and torch.isfinite(g).all())
    again = pasted(repr(sde))
    assert again == sde
    assert hash(again) == hash(sde)
    torch.testing.assert_close(again.drift(x, t), f, rtol=0, atol=0)


@settings(max_examples=20)
@given(sdes(dims=(2, 2)))
def test_dims_are_kept(sde):
    assert len(sde.b) == 2


def test_no_dims():
    for dims in ((0, 2), (3, 2)):
        with pytest.raises(ValueError, match="1 <= least <= most"):
            sdes(dims)


def bends(sde):
    return any(v != 0 for v in torch.tensor(sde.bend).flatten().tolist()) if isinstance(sde, WaveSDE) else False


KINDS = {
    "linear": lambda s: isinstance(s, WaveSDE) and s.wave == 0 == s.cubic and not bends(s),
    "image": lambda s: isinstance(s, TanhImage),
    "stratonovich": lambda s: s.interpretation == "stratonovich" and bends(s),
    "time-dependent": lambda s: isinstance(s, WaveSDE) and s.speed != 0,
    "full matrix of the state": lambda s: s.noise == "general" and bends(s) and len(s.b) > 1,
    "diagonal noise of the state": lambda s: s.noise == "diagonal" and bends(s),
    "polynomial drift": lambda s: isinstance(s, WaveSDE) and s.cubic != 0,
    "trigonometric drift": lambda s: isinstance(s, WaveSDE) and s.wave != 0,
    "one dimension": lambda s: len(s.b) == 1,
    "four dimensions": lambda s: len(s.b) == 4,
    "fewer components of noise": lambda s: s.noise == "general" and len(s.L[0]) < len(s.b),
    "more components of noise": lambda s: s.noise == "general" and len(s.L[0]) > len(s.b),
}  # fmt: skip


def test_every_kind_is_drawn():
    seen = set()

    @settings(max_examples=200)
    @given(sdes())
    def run(sde):
        seen.update(kind for kind, is_so in KINDS.items() if is_so(sde))

    run()
    assert seen == set(KINDS)


def moved(sde):
    """Whether the noise depends on the state, by its values."""
    x, t = probe_points(sde, (len(sde.b),), 4, tails=False)
    g = sde.diffusion(x, t[:1].reshape(()))
    return bool((g - g[:1]).abs().max() > 1e-9)


def smallest(fails):
    """In up to two dimensions: in four it takes a minute."""
    return find(sdes((1, 2)), fails, settings=settings(max_examples=100, derandomize=True, database=None))


@pytest.mark.slow
def test_shrinking_ends_in_little_python():
    """A property that fails for state-dependent noise: the counterexample is of dimension 1, one line of Python."""
    found = smallest(moved)
    print(f"\n  {found}")
    assert len(found.b) == 1
    assert len(repr(found)) < 75
    again = pasted(repr(found))
    assert again == found
    assert not structure(again).additive
    assert repr(found) == "WaveSDE(A=[[0]], b=[0], L=[1], bend=[0.5], W=[[0.5]])"


def test_the_image_has_a_law():
    sde = TanhImage([[-0.5]], [0.5], [[1]], [[1]], [0], [[-1], [1]])
    x, t = probe_points(sde, (1,), 5, tails=False)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(sde.log_density(leaf, t).sum(), leaf)
    torch.testing.assert_close(sde.score(x, t), slope)
    assert isinstance(sde.base, LinearSDE)


def test_waves_of_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"expected A \(d, d\)"):
        WaveSDE([[0, 0]], [0], [[1]])
    with pytest.raises(ValueError, match="bend like L"):
        WaveSDE([[0]], [0], [[1]], bend=[[1]])


@settings(max_examples=30)
@given(gaussian_sdes())
def test_gaussian_sdes_have_kernels(process):
    assert isinstance(process, GaussianSDE)
    ts = torch.linspace(max(process.t_min, 0.01 * process.t1), 0.95 * process.t1, 5, dtype=F64)
    alpha, sigma = process.alpha(ts), process.sigma(ts)
    assert bool((alpha > 0).all() and (sigma > 0).all())
    assert bool((torch.diff(process.lam(ts)) < 0).all())
    if not isinstance(process, DiscreteVP):
        assert pasted(repr(process)) == process


def test_every_named_gaussian_process_is_drawn():
    for cls in (VP, SubVP, VE, CosineVP, EDM, RectifiedFlow, DiscreteVP, PowerSDE):
        found = find(gaussian_sdes(), lambda p, cls=cls: type(p) is cls,
                     settings=settings(max_examples=300, derandomize=True, database=None))  # fmt: skip
        assert type(found) is cls


@settings(max_examples=30)
@given(distributions())
def test_distributions_are_valid_and_print_as_python(data):
    assert isinstance(data, Distribution)
    draws = data.sample(3, 0)
    assert draws.shape == (3, *data.event)
    assert 1 <= data.event[0] <= 4
    again = pasted(repr(data))
    torch.testing.assert_close(again.log_prob(draws, sf.VP(), 0.3), data.log_prob(draws, sf.VP(), 0.3), rtol=0, atol=0)


@settings(max_examples=10)
@given(distributions(dim=3))
def test_distributions_of_a_dimension(data):
    assert data.event == (3,)


@settings(max_examples=30)
@given(grids())
def test_grids_of_no_process(ts):
    assert ts.dtype == F64
    assert bool((torch.diff(ts) < 0).all())
    assert 0 < float(ts[-1]) < float(ts[0]) <= 1
    assert 2 <= len(ts) <= 13


@pytest.mark.parametrize("process", [sf.VP(), sf.RectifiedFlow(), sf.DiscreteVP([0.1, 0.2, 0.3, 0.4])], ids=str)
def test_grids_of_a_process(process):
    @settings(max_examples=25)
    @given(grids(process))
    def run(ts):
        assert bool((torch.diff(ts) < 0).all())
        assert float(ts[0]) == pytest.approx(process.t1)
        assert float(ts[-1]) == pytest.approx(process.t_min)

    run()


def test_only_grids_that_fit():
    assert not GRIDS["logsnr"].fits(sf.RectifiedFlow())  # what the strategy leaves out


@settings(max_examples=30)
@given(times(sf.EDM(0.5, 10.0)), times())
def test_times_are_inside(t, share):
    assert 0.5 < t < 10.0
    assert 0 < share < 1


def test_solvers_come_from_the_catalogue():
    drawn = set()

    @settings(max_examples=200)
    @given(solvers(view="drift", noise="general"))
    def run(solver):
        assert isinstance(solver, Solver)
        drawn.add(solver.name)

    run()
    want = {row.make().name for row in CATALOGUE if row.view == "drift" and "general" in row.noise}
    assert drawn == want


def test_solvers_that_do_not_exist():
    with pytest.raises(ValueError, match=r"view 'drift' and noise 'pink': expected"):
        solvers("drift", "pink")
    with pytest.raises(ValueError, match="expected a view of"):
        solvers("sideways")
    assert set(NOISE_KINDS) >= {"general"}


def test_without_hypothesis_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def no_hypothesis(name, *args, **rest):
        if name.split(".")[0] == "hypothesis":
            raise ModuleNotFoundError("No module named 'hypothesis'")
        return real(name, *args, **rest)

    monkeypatch.delitem(sys.modules, "sdeflow.testing.strategies")
    monkeypatch.setattr(builtins, "__import__", no_hypothesis)
    with pytest.raises(ImportError, match="needs Hypothesis: python -m pip install hypothesis"):
        importlib.import_module("sdeflow.testing.strategies")


def test_the_public_names():
    assert set(strategies.__all__) >= {"sdes", "gaussian_sdes", "distributions", "grids", "times", "solvers"}
    assert all(getattr(strategies, name).__doc__ for name in strategies.__all__)
