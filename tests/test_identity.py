"""A folder is gone on with by the run that began it, whatever process asks, and by no other."""

import dataclasses
import functools
import json
import math
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import sdeflow as sf
from sdeflow.dataset import Dataset
from sdeflow.files import alone_in
from sdeflow.identity import of_model, of_problem, said, same
from sdeflow.statistics import Covariance, Functional, Histogram, Moments
from tests.exact import F64

X = torch.linspace(-1, 1, 6, dtype=F64).reshape(3, 2)


class Well(sf.SDE):
    t0, t1, noise = 0.0, 1.0, "diagonal"

    def __init__(self, k=1.0, seen=0.5):
        self._k, self.seen = k, seen

    def drift(self, x, t):
        return self._k * (x - x**3)

    def diffusion(self, x, t):
        return self.seen * torch.ones_like(x)


class Deeper(Well):
    pass


def end(solution):
    return solution.x


def scaled(factor):
    return lambda x: factor * x


def mixture(*means):
    return sf.problems.GaussianMixture(means, 0.1).model(sf.VP())


def network(first=1.0, **how):
    net = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(net.weight, first)
    torch.nn.init.zeros_(net.bias)
    return sf.Model(lambda_free(net), sf.VP(), **how)


def lambda_free(net):
    class Told(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t):
            return self.net(x) * t[:, None]

    return Told()


# ---- settings


class Given:
    def __init__(self, value):
        self.value = value


@dataclasses.dataclass
class Setting:
    value: object


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor([1.23451]), torch.tensor([1.23449])),  # prints the same
        (torch.ones(2000), torch.cat([torch.ones(1000), torch.full((1,), 2.0), torch.ones(999)])),
        (torch.ones(2), torch.ones(2, dtype=F64)),
        (torch.ones(2), torch.ones(1, 2)),
        (np.ones(2), np.zeros(2)),
        ([torch.ones(1)], [torch.zeros(1)]),
        ({"a": torch.ones(1)}, {"a": torch.zeros(1)}),
        (scaled(2.0), scaled(3.0)),
        (types.SimpleNamespace(a=1), types.SimpleNamespace(a=2)),
        (Given(1), Given(2)),
        (lambda x: x.amax(0), lambda x: x.amin(0)),
        (functools.partial(max, 1), functools.partial(max, 2)),
        (sf.grids.karras, sf.grids.uniform),
        (sf.solvers.GaussianSplit(3, variance=torch.tensor(1.23451)), sf.solvers.GaussianSplit(3, variance=1.23449)),
        (sf.VP(0.1, 20.0), sf.VP(0.1, 20.5)),
        (sf.DiscreteVP(torch.linspace(1e-4, 0.02, 100)), sf.DiscreteVP(torch.linspace(1e-4, 0.021, 100))),
        (network(1.0), network(1.5)),
        (network(), network(time=lambda t: 1000 * t)),
        (network(), network().bind(t=torch.ones(2))),
    ],
)  # fmt: skip
def test_settings_are_told_apart_wherever_they_are(one, other):
    for wrap in (lambda v: v, lambda v: [v], lambda v: {"v": v}, Setting):
        assert json.dumps(said(wrap(one))) == json.dumps(said(wrap(one)))
        assert said(wrap(one)) != said(wrap(other))


def test_a_tensor_without_values_is_refused():
    with pytest.raises(ValueError, match="expected numbers, got a tensor of"):
        said({"a": torch.ones(2, device="meta")})


def test_what_a_process_keeps_for_itself_is_no_setting():
    process = sf.VE()
    before = said(process)
    sf.sample(sf.problems.TwoMoons().model(process), 2, shape=(2,), solver=sf.solvers.DDIM(), steps=3, seed=0)
    assert said(process) == before
    linear = sf.LinearSDE([[-1.0]], [0.5])
    before = said(linear)
    linear.prior_sample((2, 1), seed=0)
    assert said(linear) == before


def test_another_process_says_the_same():
    """Hashes of strings differ from process to process; what is said does not."""
    code = (
        "import json, sdeflow as sf, torch; from tests import test_identity as t; said, of_model = t.said, t.of_model; "
        "print(json.dumps([said([t.scaled(2.0), t.mixture, sf.grids.karras, sf.solvers.UniPC(2), t.Well(2.0)]), "
        "of_model(t.mixture([0.0, 1.0], [1.0, 2.0]), t.X)]))"
    )
    here = [
        said([scaled(2.0), mixture, sf.grids.karras, sf.solvers.UniPC(2), Well(2.0)]),
        of_model(mixture([0.0, 1.0], [1.0, 2.0]), X),
    ]
    there = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
    assert said(mixture)["function"] == "mixture"
    assert same(there, json.loads(json.dumps(here)))


# ---- models and problems, by what they compute


def test_models_are_told_apart_by_what_they_say():
    one = of_model(mixture([-1.0, 0.5], [1.5, 0.0]), X)
    assert same(one, of_model(mixture([-1.0, 0.5], [1.5, 0.0]), X))
    assert same(one, json.loads(json.dumps(one)))
    for other in (mixture([-1.0, 0.5], [1.5, 1e-6]), mixture([-10.0, 0.5], [-15.0, 0.0])):
        assert not same(one, of_model(other, X))
    told = of_model(network(time=lambda t: t), X)
    assert not same(told, of_model(network(time=lambda t: 1000 * t), X))


@pytest.mark.parametrize(
    "other",
    [Well(1.0 + 1e-6), Well(seen=0.6), Deeper(), Well().reverse(lambda x, t: -x), sf.VP()],
    ids=["hidden", "seen", "class", "reversal", "another"],
)
def test_problems_are_told_apart_by_what_they_compute(other):
    one = of_problem(Well(), X)
    assert same(one, of_problem(Well(), X))
    assert not same(one, of_problem(other, X))


def test_reversals_are_told_apart_by_score_and_eta():
    one, other = mixture([-1.0, 0.5], [1.5, 0.0]), mixture([-1.0, 0.5], [1.5, 0.1])
    said_of = of_problem(sf.VP().reverse(one), X)
    assert same(said_of, of_problem(sf.VP().reverse(one), X))
    assert not same(said_of, of_problem(sf.VP().reverse(other), X))
    assert not same(said_of, of_problem(sf.VP().reverse(one, 0.5), X))


def test_rounding_is_no_difference():
    one = of_problem(Well(), X)
    moved = json.loads(json.dumps(one))
    moved["behaviour"]["values"] = [v * (1 + 1e-12) for v in moved["behaviour"]["values"]]
    assert same(one, moved)
    moved["behaviour"]["values"][0] += 1e-6
    assert not same(one, moved)
    moved["behaviour"]["values"][0] = math.nan
    assert not same(one, moved)


def test_a_folder_may_be_gone_on_with_on_a_machine_that_rounds_otherwise(tmp_path):
    Dataset(tmp_path, {"num": 4, **of_problem(Well(), X)})
    manifest = tmp_path / "manifest.jsonl"
    head = json.loads(manifest.read_text())
    head["about"]["behaviour"]["values"][0] *= 1 + 1e-12
    manifest.write_text(json.dumps(head) + "\n")
    assert Dataset(tmp_path, {"num": 4, **of_problem(Well(), X)}).num == 4
    head["about"]["behaviour"]["values"][0] += 1e-3
    manifest.write_text(json.dumps(head) + "\n")
    with pytest.raises(ValueError, match="with another behaviour"):
        Dataset(tmp_path, {"num": 4, **of_problem(Well(), X)})
    assert same([one := of_problem(Well(), X)], [one])
    assert not same([one], [one, one])


def test_what_cannot_be_asked_is_not_known_to_differ():
    class Picky(Well):
        def drift(self, x, t):
            raise RuntimeError("only in the run")

    assert of_problem(Picky(), X)["behaviour"] is None


# ---- folders


SAMPLES = {"shape": (2,), "steps": 3, "chunk": 16, "solver": sf.solvers.DPMSolverPP(2)}


def test_samples_of_another_model_are_refused(tmp_path):
    sf.sample_to(tmp_path, mixture([-1.0, 0.5], [1.5, 0.0]), 32, **SAMPLES)
    sf.sample_to(tmp_path, mixture([-1.0, 0.5], [1.5, 0.0]), 32, **SAMPLES)
    with pytest.raises(ValueError, match="holds another run, with another behaviour: give another folder"):
        sf.sample_to(tmp_path, mixture([-10.0, 0.5], [-15.0, 0.0]), 32, **SAMPLES)
    with pytest.raises(ValueError, match="with another kind"):
        sf.sample_to(tmp_path, mixture([-1.0, 0.5], [1.5, 0.0]), 32, kind="safetensors", **SAMPLES)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Moments(), Moments(centre=3.0)),
        (Moments(2), Moments(3)),
        (Moments(2), Covariance()),
        (Histogram([-1.0, 0.0, 1.0]), Histogram([-1.0, 0.5, 1.0])),
        (Functional(lambda s: s.x + 1, Moments()), Functional(lambda s: s.x + 2, Moments())),
        (Functional(end, Moments()), Functional(end, Moments(3))),
    ],
)
def test_other_statistics_are_refused(tmp_path, one, other):
    def run(statistic):
        return sf.ensemble(Well(), torch.zeros(1), 64, steps=4, batch=16, out=tmp_path, statistics={"a": statistic})

    run(one)
    run(one)
    with pytest.raises(ValueError, match="holds another run, with another statistics"):
        run(other)


def test_a_folder_has_one_run_at_a_time(tmp_path):
    folder = tmp_path / "a"
    with alone_in(folder):
        for run in (
            lambda: sf.sample_to(folder, mixture([-1.0, 0.5], [1.5, 0.0]), 32, **SAMPLES),
            lambda: sf.ensemble(Well(), torch.zeros(1), 64, steps=4, out=folder, statistics={"a": Moments()}),
        ):
            with pytest.raises(ValueError, match="another run is at work there"):
                run()
        assert folder.exists()  # it is the other's
        assert not any(folder.iterdir())
    sf.sample_to(folder, mixture([-1.0, 0.5], [1.5, 0.0]), 32, **SAMPLES)


def test_what_is_refused_leaves_no_folder(tmp_path):
    with pytest.raises(TypeError, match="steps"):
        sf.sample_to(tmp_path / "a", mixture([-1.0, 0.5], [1.5, 0.0]), 32, **{**SAMPLES, "steps": "three"})
    with pytest.raises(ValueError, match="expected eta as a number"):
        sf.sample_to(tmp_path / "a", mixture([-1.0, 0.5], [1.5, 0.0]), 32, eta=torch.ones(2, device="meta"), **SAMPLES)
    with pytest.raises(ValueError, match="steps"):
        sf.ensemble(Well(), torch.zeros(1), 64, steps=-4, out=tmp_path / "a", statistics={"a": Moments()})
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").touch()
    with pytest.raises(ValueError, match="steps"):
        sf.ensemble(Well(), torch.zeros(1), 64, steps=-4, out=tmp_path / "a", statistics={"a": Moments()})
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]
    sf.ensemble(Well(), torch.zeros(1), 64, steps=4, out=tmp_path / "a", statistics={"a": Moments()})  # another run


class Starts:
    _bad = False

    def __call__(self, index):
        if self._bad and 32 in index:
            raise RuntimeError("a bad start")
        return torch.zeros(len(index), 1)


def test_what_was_finished_before_a_failure_is_kept(tmp_path):
    how = {"steps": 4, "batch": 16, "shard": 16, "out": tmp_path / "a", "statistics": {"a": Moments()}}
    start, seen = Starts(), []
    start._bad = True
    with pytest.raises(RuntimeError, match="a bad start"):
        sf.ensemble(Well(), start, 64, on_done=seen.append, **how)
    assert seen == [16, 32]
    start._bad = False
    assert sf.ensemble(Well(), start, 64, on_done=seen.append, **how)["a"].count == 64
    assert seen == [16, 32, 32, 48, 64]


def test_a_lost_file_is_not_counted_twice(tmp_path):
    how = {"steps": 5, "batch": 8, "shard": 16, "out": tmp_path, "store": True, "statistics": {"a": Moments()}}
    first = sf.ensemble(Well(), torch.zeros(1), 64, **how)
    want, mean = first.dataset.content, first["a"].mean
    for damage in (lambda path: path.write_bytes(b"x"), lambda path: path.unlink()):
        damage(sorted((tmp_path / "shards").iterdir())[1])
        again = sf.ensemble(Well(), torch.zeros(1), 64, **how)
        assert again["a"].count == 64
        assert torch.equal(again["a"].mean, mean)
        assert again.dataset.content == want
        assert again.dataset.complete


def test_damaged_statistics_are_computed_again(tmp_path):
    how = {"steps": 5, "batch": 8, "out": tmp_path, "statistics": {"a": Moments()}}
    want = sf.ensemble(Well(), torch.zeros(1), 64, **how)["a"].mean
    path = tmp_path / "statistics.safetensors"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1  # among the numbers, which stand after the header
    path.write_bytes(data)
    seen = []
    again = sf.ensemble(Well(), torch.zeros(1), 64, on_done=seen.append, **how)["a"]
    assert torch.equal(again.mean, want)
    assert again.count == 64
    assert seen[0] < 64  # nothing of it was believed
