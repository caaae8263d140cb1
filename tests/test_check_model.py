"""`check_model`: exact models and a network pass, and planted faults are caught by the identity named for them.

Only "Stein" is a statistic: within 5.5 standard errors over 5 times and 4 comparisons each, 1e-6 a report, fixed seeds.
"""

import math

import pytest
import torch

import sdeflow as sf
from sdeflow.testing.models import check_model

F64 = torch.float64
LAW = sf.problems.GaussianMixture([[1.0, 0.0, 0.5], [-1.0, 0.4, 0.0]], [[0.3, 0.2, 0.5], [0.2, 0.6, 0.4]])
VP = sf.VP()
TABLE = sf.DiscreteVP(torch.linspace(1e-3, 0.2, 100, dtype=F64))
PROCESSES = [
    VP, sf.SubVP(), sf.VE(), sf.EDM(), sf.RectifiedFlow(), sf.CosineVP(), TABLE,
]  # fmt: skip


def density(process):
    return lambda x, t: LAW.log_prob(x, process, t)


# ---- what is sound


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_exact_models_pass(process):
    model = LAW.model(process)
    report = check_model(model, log_density=density(process), event=(3,), exact=True, samples=LAW.sample(4000, 0))
    report.verify()
    assert [f.identity for f in report.findings if f.verdict == "not tested"] == ["conditions"]


@pytest.mark.parametrize("prediction", ["x0", "eps", "score", "v", "velocity"])
def test_every_prediction_passes(prediction):
    exact = LAW.model(VP)
    model = sf.Model(lambda x, t: exact(x, t, as_=prediction), VP, prediction, expand=False)
    check_model(model, log_density=density(VP), event=(3,), exact=True).verify()


def test_a_callable_score_passes():
    exact = LAW.model(VP)
    report = check_model(lambda x, t: exact.score(x, t), process=VP, event=(3,), log_density=density(VP)).verify()
    assert report["gradient field"].verdict == "not tested"
    assert report.warnings == ()


def test_a_process_of_ones_own_has_a_score_alone():
    class Ornstein(sf.SDE):
        """dX = -X dt + sqrt(2) dW in equilibrium."""

        event = (2,)

        def drift(self, x, t):
            return -x

        def diffusion(self, x, t):
            return math.sqrt(2) * torch.ones_like(x)

    report = check_model(lambda x, t: -x, process=Ornstein(), log_density=lambda x, t: -0.5 * (x**2).sum(1), exact=True)
    report.verify()
    for name in ("v from x0 and eps", "noise end", "Stein"):
        assert report[name].verdict == "not tested"


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.SiLU(), torch.nn.Linear(32, 3))

    def forward(self, x, t, label=None):
        shift = 0.0 if label is None else 0.1 * label[:, None].to(x.dtype)
        return x + 0.1 * self.layers(torch.cat([x, t[:, None]], 1)) + shift


def test_a_network_passes_in_its_own_precision():
    report = check_model(sf.Model(Network(), VP), event=(3,)).verify()
    assert report.facts["evaluated in"] == "float32"
    assert report["float32"].verdict == "not tested"
    assert report.warnings[0].startswith("gradient field: the score's Jacobian is asymmetric")
    assert check_model(sf.Model(Network(), VP), event=(3,), exact=True)["gradient field"].verdict == "fail"
    assert check_model(sf.Model(Network().double(), VP), event=(3,)).facts["evaluated in"] == "float64"


def test_conditions_follow_their_samples():
    model = sf.Model(Network().double(), VP).bind(label=torch.arange(10))
    assert check_model(model, event=(3,)).verify()["conditions"].verdict == "pass"


# ---- planted faults


def net(change, prediction="score", process=VP):
    """A model of the exact reading at (x, t), through `change(value, x, t)`."""
    exact = LAW.model(process)
    return sf.Model(lambda x, t: change(exact(x, t, as_=prediction), x, t), process, prediction, expand=False)


def next_index(x, t):
    """The exact eps of the next entry of the table."""
    return LAW.model(TABLE).eps(x, torch.clamp(t + 0.01, max=1.0))


class Normalised(torch.nn.Module):
    """Batch normalisation, as it comes: in training mode."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3, affine=False, dtype=F64)

    def forward(self, x, t):
        return x + 0.01 * self.norm(x.to(F64)).to(x.dtype)


TURN = torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=F64)


class OwnReading(sf.Model):
    """eps with alpha for sigma."""

    def __call__(self, x, t, as_="score"):
        if as_ != "eps":
            return super().__call__(x, t, as_)
        alpha, sigma = (float(v) for v in (self.gaussian.alpha(0.3), self.gaussian.sigma(0.3)))
        return super().__call__(x, t, as_) * alpha / sigma


class WrongSpeed(sf.Model):
    """A velocity whose sign is that of reversed time."""

    def __call__(self, x, t, as_="score"):
        return (-1 if as_ == "velocity" else 1) * super().__call__(x, t, as_)


class Guided(sf.Model):
    """Two calls a reading, as of a guided model that does not say so."""

    def raw(self, x, time):
        super().raw(x, time)
        return super().raw(x, time)


class Stuck(sf.Model):
    """Conditions that stay with their place."""

    def take(self, rows):
        part = super().take(rows)
        part.conditions = {k: v[: len(rows)] for k, v in self.conditions.items()}
        return part


def of_kind(kind):
    exact = LAW.model(VP)
    return kind(lambda x, t: exact(x, t, as_="v"), VP, "v", expand=False)


def first_time(x, t):
    return LAW.model(VP).score(x, t.flatten()[0])


def in_place(x, t):
    return LAW.model(VP).score(x.mul_(1.0 + 1e-9).clone(), t) if not x.requires_grad else LAW.model(VP).score(x, t)


MUTANTS = {
    "the wrong sign": (net(lambda s, x, t: -s), "score of the density"),
    "the wrong sign, without a density": (net(lambda s, x, t: -s), "noise end"),
    "the wrong sign, over samples": (net(lambda s, x, t: -s), "Stein"),
    "a factor alpha": (net(lambda s, x, t: VP.alpha(t) * s), "score of the density"),
    "a factor alpha, without a density": (net(lambda s, x, t: VP.alpha(t) * s), "noise end"),
    "eps declared as x0": (
        sf.Model(lambda x, t: LAW.model(VP).eps(x, t), VP, "x0", expand=False), "score of the density"),
    "the next index of the table": (sf.Model(next_index, TABLE, "eps", expand=False), "score of the density"),
    "batch normalisation": (sf.Model(Normalised(), VP), "batch"),
    "the batch's mean": (net(lambda s, x, t: s + 1e-6 * x.mean(0)), "batch"),
    "a field that turns": (net(lambda s, x, t: s @ TURN.T.to(s.dtype)), "gradient field"),
    "a transposed Jacobian": (net(lambda s, x, t: s + 0.1 * (x.roll(1, 1) - x.roll(-1, 1))), "gradient field"),
    "eps by another level": (of_kind(OwnReading), "x from x0 and eps"),
    "a velocity of reversed time": (of_kind(WrongSpeed), "velocity from x0 and eps"),
    "two calls a reading": (of_kind(Guided), "calls counted"),
    "one time for all": (sf.Model(first_time, VP, "score", expand=False), "time per sample"),
    "a division by zero": (net(lambda s, x, t: s / (t > 2e-3)), "finite at the ends"),
    "times in float32": (
        sf.Model(lambda x, t: LAW.model(VP).score(x, t if x.dtype == F64 else t.bfloat16()), VP, "score", expand=False),
        "float32"),
    "a write into x": (sf.Model(in_place, VP, "score", expand=False), "input untouched"),
    "conditions by place": (Stuck(Network().double(), VP).bind(label=torch.arange(10)), "conditions"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_the_fault_is_caught(name):
    model, identity = MUTANTS[name]
    given = {"log_density": density(model.sde)} if identity == "score of the density" else {}
    report = check_model(model, event=(3,), exact=True, samples=LAW.sample(4000, 0), **given)
    finding = report[identity]
    margin = finding.residual / finding.tolerance if finding.tolerance else math.inf
    failed = [f.identity for f in report.findings if f.verdict == "fail"]
    print(f"{name:34s} {identity:24s} {finding.residual:9.2e} / {finding.tolerance:7.1e} = {margin:8.3g} {failed}")
    assert finding.verdict == "fail"
    assert margin > 2


# ---- errors


def test_errors():
    with pytest.raises(TypeError, match="process="):
        check_model(lambda x, t: -x)
    with pytest.raises(ValueError, match="expected event="):
        check_model(LAW.model(VP))
    with pytest.raises(ValueError, match="points >= 4"):
        check_model(LAW.model(VP), event=(3,), points=2)
    with pytest.raises(ValueError, match="at least 100 samples"):
        check_model(LAW.model(VP), event=(3,), samples=LAW.sample(50, 0))
    with pytest.raises(ValueError, match="was made for"):
        check_model(LAW.model(VP), event=(3,), process=sf.VE())


def test_a_report_is_a_function_of_its_seed():
    first, again, other = (check_model(LAW.model(VP), event=(3,), seed=s)["gradient field"] for s in (0, 0, 1))
    assert first.note == again.note
    assert first.note != other.note
