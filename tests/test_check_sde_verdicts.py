"""`check_sde`: verdicts without a density, and on user functions that are wrong, fail or lose the graph."""

import contextlib
import math

import numpy as np
import pytest
import torch

import sdeflow as sf
from sdeflow.gaussian import GaussianSDE
from sdeflow.testing import check_sde
from tests.check_sde_cases import (
    OU,
    SCALAR_WARNING,
    Multiplicative,
    Rounded,
    hand,
    matrix_sde,
    moments,
    ou_density,
    ou_marginal,
)
from tests.exact import F64

pytestmark = pytest.mark.filterwarnings(SCALAR_WARNING)


# ---- no density


def test_without_a_density_what_is_not_tested_says_why():
    report = check_sde(SinhLike()).verify()
    law = report["Fokker-Planck of the law"]
    assert law.verdict == "not tested"
    assert "give log_density" in law.note
    assert report["Fokker-Planck on a grid"].verdict == "pass"
    polynomial = check_sde(OU()).verify()
    assert polynomial["Fokker-Planck of the law"].verdict == "not tested"


def test_beyond_two_dimensions_there_is_no_grid():
    report = check_sde(matrix_sde(), points=4).verify()
    assert report["Fokker-Planck on a grid"].verdict == "not tested"
    assert "needs 1 or 2 dimensions, the event has 3" in report["Fokker-Planck on a grid"].note


def test_a_marginal_without_moment_equations_is_not_tested():
    report = check_sde(SinhLike(), marginal=ou_marginal)
    assert report["claimed marginal"].verdict == "not tested"
    assert "no closed equations" in report["claimed marginal"].note


def test_events_that_are_no_vectors_skip_the_images():
    report = check_sde(OU(), event=(2, 2), points=4).verify()
    assert report["naturality"].verdict == "not tested"
    assert "states (batch, d)" in report["naturality"].note


class SinhLike(sf.SDE):
    """A user's class with no law."""

    event = (1,)

    def drift(self, x, t):
        return -torch.sin(x)

    def diffusion(self, x, t):
        return 1 + 0.3 * torch.cos(x)


class Claims(Multiplicative):
    """A user's class with its own, wrong, reversals and a wrong declaration."""

    additive = True

    def reverse_drift(self, x, t, s):
        return -x - (1 + 0.25 * x**2) ** 2 * s

    def flow_drift(self, x, t, s):
        return hand(0.5)(x, t, s)


def test_a_wrong_class_without_a_density_is_caught():
    report = check_sde(Claims())
    assert not report.ok
    failed = {f.identity for f in report.findings if f.verdict == "fail"}
    assert {"declared additive", "hand-written reverse drift"} <= failed
    assert report["hand-written flow drift"].verdict == "pass"
    text = report.failures()
    assert "look for div D" in text
    assert "the probes say False" in text


# ---- user functions that fail


class Failing(OU):
    """Works on what structure asks of it, and fails with a graph."""

    def __init__(self, how):
        self.how = how

    def diffusion(self, x, t):
        if x.requires_grad:
            return self.how(x)
        return torch.ones_like(x)


def raises(x):
    raise KeyError("beta_schedule")


FAILURES = {
    "raises": (raises, "KeyError"),
    "wrong shape": (lambda x: torch.ones(len(x), 3, dtype=x.dtype), ""),
    "numpy": (lambda x: torch.from_numpy(np.ones_like(x.numpy())), "requires grad"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_functions_that_fail_are_verdicts_with_the_reason(name):
    how, words = FAILURES[name]
    report = check_sde(Failing(how), points=4)
    assert not report.ok
    failed = [f for f in report.findings if f.verdict == "fail"]
    assert failed
    assert any("evaluation" in f.identity for f in failed)
    assert words in report.failures()
    report.to_json()


def test_a_claimed_density_that_fails_is_a_verdict():
    def log_density(x, t):
        raise ZeroDivisionError("no such law")

    report = check_sde(OU(), log_density=log_density, points=4)
    assert report["reversal keeps the marginals"].verdict == "pass"
    assert "ZeroDivisionError: no such law" in report.failures()


@pytest.mark.parametrize("claim", ["reverse_drift", "flow_drift"])
def test_a_hand_written_drift_that_fails_is_a_verdict(claim):
    report = check_sde(OU(), points=4, **{claim: lambda x, t, s: 1 / 0})
    assert not report.ok
    assert "ZeroDivisionError" in report.failures()


def test_nan_is_a_failure():
    def log_density(x, t):
        return ou_density(x, t) * math.nan

    report = check_sde(OU(), log_density=log_density, points=4)
    assert not report.ok

    report = check_sde(OU(), points=4, flow_drift=lambda x, t, s: x * math.nan)
    assert report["hand-written flow drift"].verdict == "fail"
    assert report["hand-written flow drift"].residual == math.inf


def test_float32_says_so():
    report = check_sde(Rounded(), points=200, flow_drift=lambda x, t, s: -x - 0.5 * s)
    found = report["hand-written flow drift"]
    assert found.verdict == "fail"
    assert "float32" in found.note
    assert 1e-8 < found.residual < 1e-4


def test_float32_is_seen_without_a_law():
    assert "float32" in str(check_sde(Rounded(), points=4))


class DetachedDrift(OU):
    """A drift that autograd does not see through."""

    event = (3,)

    def drift(self, x, t):
        return torch.from_numpy(-(x.detach().numpy() ** 3))


class DetachedNoise(OU):
    """A diffusion that autograd does not see through: the library's div D is 0, and wrong."""

    event = (3,)

    def diffusion(self, x, t):
        return 1 + 0.25 * x.detach() ** 2 + 0.1 * x.detach().flip(1)


@pytest.mark.parametrize("make", [DetachedDrift, DetachedNoise])
def test_coefficients_without_a_graph_are_a_failure(make):
    assert not check_sde(make(), points=4).ok


def test_detached_noise_is_caught_by_the_grid_on_a_line():
    class Line(OU):
        def diffusion(self, x, t):
            return 1 + 0.25 * x.detach() ** 2

    assert check_sde(Line(), points=4)["Fokker-Planck on a grid"].verdict == "fail"


class Driftless(OU):
    """dX = 50 (1 + sin(X)/2) o dW, written as Ito's equation: its Stratonovich drift is 0."""

    def drift(self, x, t):
        return 0.25 * 2500 * (1 + 0.5 * torch.sin(x)) * torch.cos(x)

    def diffusion(self, x, t):
        return 50 * (1 + 0.5 * torch.sin(x))


def test_a_stratonovich_drift_of_zero_is_no_failure():
    assert check_sde(Driftless(), points=12)["Ito and Stratonovich drifts"].verdict == "pass"


def test_a_kernel_with_a_root_at_the_data():
    """sigma'(t0) is infinite and g is not: moments from t0 are exact, and from inside."""
    process = GaussianSDE.from_kernel(lambda t: torch.exp(-t), lambda t: torch.sqrt(1 - torch.exp(-2 * t)), 0.0, 3.0)
    x0 = torch.ones(1, 1, dtype=F64)
    for s in (0.0, 0.25):
        _, values = moments.moments(process, x0, 1.0, s=s)
        mean = math.exp(s - 1)
        assert abs(float(values[0, 1]) - mean) < 1e-9
        assert abs(float(values[0, 2]) - mean**2 - (1 - mean**2)) < 1e-7
    with pytest.raises(ValueError, match="singular at this time"):
        moments.moments(sf.RectifiedFlow(), x0, 1.0)  # f is infinite at t1
    assert check_sde(process, points=2)["kernel and moments"].verdict == "pass"


def returns_list(x):
    return [1.0] * len(x)


BROKEN = {
    "NaN": (lambda x: x * math.nan, True),
    "too few components": (lambda x: x[:, :0], True),
    "a list": (returns_list, False),
    "numpy": (lambda x: (-x).numpy(), False),
    "None": (lambda x: None, False),
    "raises": (raises, False),
}


@pytest.mark.parametrize(
    "name",
    list(BROKEN),
)
def test_a_drift_that_never_works_is_a_verdict_or_a_clear_error(name):
    how, _ = BROKEN[name]

    class Never(OU):
        def drift(self, x, t):
            return how(x)

    with contextlib.suppress(TypeError, ValueError):  # the documented errors of what cannot be evaluated anywhere
        assert not check_sde(Never(), points=4).ok


def test_arguments_that_are_no_sde():
    with pytest.raises(TypeError, match="sde as an SDE, got 'VP'"):
        check_sde("VP")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sde as an SDE, got the class VP; call it to make one"):
        check_sde(sf.VP)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1 point"):
        check_sde(OU(), points=0)

    class Never(OU):
        event = None

        def drift(self, x, t):
            raise RuntimeError("no luck")

    with pytest.raises(ValueError, match="no luck"):
        check_sde(Never())
