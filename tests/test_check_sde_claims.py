"""`check_sde`: what is claimed of Gaussian, linear and image processes, and a score that is claimed alone."""

import math

import pytest
import torch

import sdeflow as sf
from sdeflow.known import GBM
from sdeflow.linear import LinearSDE
from sdeflow.problems import Gaussian, GaussianMixture
from sdeflow.structure import probe_points
from sdeflow.testing import check_sde
from sdeflow.testing import sde as sde_checks
from sdeflow.testing.claimed_score import score_identities
from sdeflow.testing.claims import own
from sdeflow.testing.fields import Flat, trial_density
from sdeflow.testing.report import Finding, Report
from sdeflow.testing.reversal import Setting
from tests.check_sde_cases import OU, SCALAR_WARNING, ou_density, ou_score
from tests.exact import F64

pytestmark = pytest.mark.filterwarnings(SCALAR_WARNING)


@pytest.fixture
def brief(monkeypatch):
    """Without what no claim touches and what takes long: kernels, lines, grids and the flow's integration."""
    for name in ("kernel_identities", "scalar_identities", "line_identities"):
        monkeypatch.setattr(sde_checks, name, lambda *a: [])
    monkeypatch.setattr(sde_checks, "_grid", lambda *a: Finding.skipped("grid", "", "for speed"))
    monkeypatch.setattr("sdeflow.testing.known_density.along_the_flow", lambda *a: [])


def verdicts(report: Report, *names: str) -> list[str]:
    return [report[name].verdict for name in names]


# ---- Gaussian and linear classes

CLAIMS = ("hand-written reverse drift", "hand-written flow drift", "Fokker-Planck", "score", "claimed marginal")


class Right(sf.GaussianSDE):
    """dx = -x dt + sqrt(2) dW with data N(0, 1/2), and all that follows, written by hand."""

    t0, t1, t_min, event = 0.0, 1.0, 1e-3, (2,)

    def alpha(self, t):
        return torch.exp(-t)

    def sigma(self, t):
        return torch.sqrt(-torch.expm1(-2 * t))

    def reverse_drift(self, x, t, score):
        return -x - 2 * score

    def flow_drift(self, x, t, score):
        return -x - score

    def marginal(self, x0, t):
        return x0 * math.exp(-t), math.sqrt(-math.expm1(-2 * t))

    def variance(self, t):
        return 1 - 0.5 * torch.exp(-2 * t)

    def log_density(self, x, t):
        return (-0.5 * x**2 / self.variance(t) - 0.5 * torch.log(2 * math.pi * self.variance(t))).sum(1)

    def score(self, x, t):
        return -x / self.variance(t)


class Wrong(Right):
    def reverse_drift(self, x, t, score):
        return -x + 100 * score

    def flow_drift(self, x, t, score):
        return 7 * x

    def marginal(self, x0, t):
        return x0 * math.exp(-t), -math.expm1(-2 * t)

    def log_density(self, x, t):
        return 3 * x.sum(-1)

    def score(self, x, t):
        return 0 * x + 5


def test_claims_of_a_gaussian_class_are_checked(brief):
    assert verdicts(check_sde(Right(), points=4).verify(), *CLAIMS) == ["pass"] * 5
    assert verdicts(check_sde(Wrong(), points=4), *CLAIMS) == ["fail"] * 5


class Rotated(LinearSDE):
    """With its own drifts and factor, times `by`."""

    def __init__(self, by=1.0):
        super().__init__([[-1.0, 2.0], [-0.5, -0.3]], [[0.7, 0.1], [0.0, 0.4]])
        self.by = by

    def reverse_drift(self, x, t, score):
        g = self.diffusion(x[:1], t[:1])[0]
        return self.drift(x, t) - self.by * score @ (g @ g.T)

    def flow_drift(self, x, t, score):
        g = self.diffusion(x[:1], t[:1])[0]
        return self.drift(x, t) - 0.5 * self.by * score @ (g @ g.T)

    def marginal(self, x0, t):
        mean, factor = super().marginal(x0, t)
        return mean, self.by * factor


def test_claims_of_a_linear_class_are_checked(brief):
    names = (*CLAIMS[:2], CLAIMS[4])
    assert verdicts(check_sde(Rotated(), points=4).verify(), *names) == ["pass"] * 3
    assert verdicts(check_sde(Rotated(1.1), points=4), *names) == ["fail"] * 3


def test_a_score_of_a_gaussian_class_is_not_held_against_other_data(brief):
    """The trial data of the library have another one."""
    data = GaussianMixture([[-1.0, 0.5], [0.6, -0.4]], 0.2)
    report = check_sde(sf.VP(), score=data.model(sf.VP()).score, points=4).verify()
    assert verdicts(report, "score: Fokker-Planck", "score: a gradient") == ["pass", "pass"]


@pytest.mark.parametrize("process", [sf.VP(), sf.CLD(), LinearSDE([[-1.0]], [1.0])], ids=lambda p: type(p).__name__)
def test_what_the_library_derives_is_no_claim(process):
    assert [own(process, name) for name in ("marginal", "log_density", "score", "reverse_drift")] == [None] * 4


# ---- a score alone


class Plain(sf.SDE):
    """Drift and diffusion of a process of known law, and no more."""

    def __init__(self, known):
        self.known, self.noise = known, known.noise
        self.domain, self.t0, self.t1, self.event = known.domain, known.t0, known.t1, known.event

    def drift(self, x, t):
        return self.known.drift(x, t)

    def diffusion(self, x, t):
        return self.known.diffusion(x, t)


MIXTURE = GaussianMixture([[-1.0, 0.5], [0.6, -0.4]], [[[0.3, 0.1], [0.1, 0.2]]] * 2)
LINEAR = LinearSDE([[-0.5, 0.3], [-0.2, -0.4]], [[0.8, 0.2], [0.1, 0.7]])
SHEARED = sf.Pushforward(
    lambda y: torch.stack([y[:, 0] + 0.5 * torch.sin(y[:, 1]), y[:, 1]], 1),
    LINEAR,
    inverse=lambda x: torch.stack([x[:, 0] - 0.5 * torch.sin(x[:, 1]), x[:, 1]], 1),
    law=MIXTURE,
)
SCORES = {
    "OU": (OU(), ou_score),
    "VP": (sf.VP(), MIXTURE.model(sf.VP()).score),
    "EDM": (sf.EDM(), MIXTURE.model(sf.EDM()).score),  # from narrow laws to wide ones
    "lognormal": (GBM(0.3, 0.5), GBM(0.3, 0.5).score),
    "matrix": (Plain(SHEARED), SHEARED.score),
}


def alone(process, score):
    event = process.event or (2,)
    x, t = probe_points(process, event, 12, tails=False)
    flat = Flat(process, event)
    return score_identities(Setting(flat, x, t, trial_density(flat.d, process.domain)), score)


@pytest.mark.parametrize("name", SCORES)
def test_a_true_score_alone_passes_and_nearly_true_ones_fail(name):
    process, score = SCORES[name]
    right = alone(process, score)
    assert [f.verdict for f in right] == ["pass"] * (2 if process.event == (1,) else 3)
    assert max(f.residual for f in right) < 1e-11
    for wrong in (lambda x, t: 1.001 * score(x, t), lambda x, t: score(x, 1.01 * t)):
        assert alone(process, wrong)[0].verdict == "fail"
    for wrong in (lambda x, t: 0 * x, lambda x, t: 0 * x + 5, lambda x, t: x):
        assert "fail" in {f.verdict for f in alone(process, wrong)}


@pytest.mark.parametrize("name", ["OU", "EDM", "lognormal"])
def test_a_score_without_a_graph_is_differentiated_by_differences(name):
    process, score = SCORES[name]
    for factor, verdict in ((1.0, "pass"), (1.001, "fail")):
        found = alone(process, lambda x, t, by=factor: by * score(x.detach(), t.detach()).detach())
        assert found[0].verdict == verdict, found[0]


def test_a_score_may_be_a_gradient_by_torch():
    def score(x, t, rate=1.0):
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(ou_density(leaf, t.detach(), rate=rate).sum(), leaf)[0]

    assert [f.verdict for f in alone(OU(), score)] == ["pass", "pass"]
    assert [f.verdict for f in alone(OU(), lambda x, t: score(x, t, 0.9))] == ["fail", "pass"]


def test_a_field_that_is_no_gradient_fails():
    def turned(x, t):
        return -x + 0.1 * torch.stack([x[:, 1], -x[:, 0]], 1)

    class Plane(sf.SDE):
        event = (2,)

        def drift(self, x, t):
            return -x

        def diffusion(self, x, t):
            return math.sqrt(2) * torch.ones_like(x)

    assert [f.verdict for f in alone(Plane(), turned)] == ["fail", "fail", "pass"]
    assert [f.verdict for f in alone(Plane(), lambda x, t: -x)] == ["pass", "pass", "pass"]
    assert [f.verdict for f in alone(Plane(), lambda x, t: -2 * x)] == ["fail", "pass", "pass"]


def test_the_score_of_a_solution_that_is_no_law_fails():
    """exp(5 x + 25 t/2) solves the heat equation, and Cauchy's tails are those of a law."""

    class Heat(OU):
        def drift(self, x, t):
            return 0 * x

    assert [f.verdict for f in alone(Heat(), lambda x, t: 0 * x + 5)] == ["pass", "fail"]
    assert alone(Heat(), lambda x, t: -2 * x / (1 + x**2))[1].verdict == "pass"
    assert alone(Heat(), lambda x, t: x * math.nan)[1].verdict == "not tested"


class ScoreOnly(OU):
    def score(self, x, t):
        return -4 * x


def test_a_score_alone_is_in_the_report(brief):
    report = check_sde(ScoreOnly(), points=4)
    assert report["score: Fokker-Planck"].verdict == "fail"
    assert check_sde(OU(), score=ou_score, points=4).verify()["score: Fokker-Planck"].verdict == "pass"
    report = check_sde(OU(), score=ou_score, log_density=ou_density, points=4).verify()
    assert "score: Fokker-Planck" not in {f.identity for f in report.findings}  # the density tells all
    report = check_sde(OU(), score=lambda x, t: x.sum(1), points=4)
    assert "the score returned (4,) for x of shape (4, 1)" in report["score: evaluation"].note


# ---- images


def sinh_of(base, **options):
    return sf.Pushforward(torch.sinh, base, inverse=torch.asinh, **options)


@pytest.mark.parametrize("base", [OU(), sinh_of(OU())], ids=["process", "image"])
def test_an_image_without_a_law_is_checked_for_the_rest(brief, base):
    report = check_sde(sinh_of(base), event=(1,), points=2).verify()
    assert report["Fokker-Planck of the law"].verdict == "not tested"
    assert "law= to the Pushforward" in report["Fokker-Planck of the law"].note


def test_an_image_takes_its_event_from_its_law(brief):
    """VP takes states of any shape, the law those of one component."""
    report = check_sde(sinh_of(sf.VP(), law=Gaussian(0.3, 1.0)), points=2).verify()
    assert report.facts["event"] == "(1,)"
    assert report["Fokker-Planck"].verdict == "pass"


def test_a_density_of_another_event_says_what_was_probed(brief):
    class Free(OU):
        event = None

    report = check_sde(Free(), log_density=lambda x, t: -(x**2), points=4)
    note = report["law: evaluation"].note
    assert "expected log_density of shape (4,) for x of shape (4, 2), got (4, 2)" in note
    assert "no event is declared or given: (2,) was tried" in note
    assert "was tried" not in check_sde(Free(), event=(1,), log_density=lambda x, t: -(x**2), points=4).failures()


def test_an_image_of_a_claimed_law_keeps_it():
    class Known(OU):
        def log_density(self, x, t):
            return ou_density(x, t)

    image = sinh_of(Known())
    assert own(image, "log_density") is not None
    assert own(image, "score") is not None
    x = torch.tensor([[0.4]], dtype=F64)
    y = torch.asinh(x)
    want = ou_density(y, torch.tensor(0.5, dtype=F64)) - torch.log(torch.cosh(y)).sum(1)
    assert torch.allclose(image.log_density(x, 0.5), want)
