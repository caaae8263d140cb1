"""Work in shards: the same bytes whatever the engine, the shards, the deaths and the interruptions."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

import sdeflow as sf
from sdeflow.columns import added, content_of, packed, unpacked
from sdeflow.dataset import Dataset, Shard, gaps
from sdeflow.engine import Engine, EngineError, Local, Ray, local, named, on_ray
from sdeflow.ensemble import PriorStart, ensemble
from sdeflow.sample_run import sample_to
from sdeflow.statistics import Functional, Histogram, Moments, Quantiles

MODEL = sf.load_model("digits")
SAMPLES = {"shape": (1, 8, 8), "solver": sf.solvers.DPMSolverPP(2), "steps": 3, "chunk": 8, "seed": 3}
STATISTICS = {"end": Moments(4), "size": Quantiles(), "bins": Histogram([-1.0, 0.0, 1.0])}


class Pull(sf.SDE):
    """dX = -X^3 dt + (1 + X^2)^1/2 dW/2."""

    t0, t1 = 0.0, 1.0

    def drift(self, x, t):
        return -(x**3)

    def diffusion(self, x, t):
        return 0.5 * torch.sqrt(1 + x**2)


class Shuffled(Engine):
    """Computes everything twice, in a wild order, and delivers once: what a cluster may do at its worst."""

    workers = 3

    def map(self, work, items, *, memory=0):
        items = list(items)
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(len(items))).tolist()
        for k in order:
            work(items[k])
            yield items[k], work(items[k])


EXPECT = {"tol": 0.02, "method": "multilevel", "steps": 8, "pilot": 64, "batch": 256}


def square(k):
    return k * k, os.getpid()


def _first(x):
    return x[:, 0]


def die_once(item):
    """Kills its process the first time it sees the file it is given."""
    k, flag = item
    if k == 3 and not os.path.exists(flag):
        open(flag, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return k


def always_die(k):
    os.kill(os.getpid(), signal.SIGKILL)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def held(result):
    return {f"{name}/{key}": value for name, s in result.statistics.items() for key, value in s.arrays().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- engines


def test_work_in_this_process_is_lazy_and_complete():
    taken = []
    items = (taken.append(k) or k for k in range(5))
    work = Local().map(square, items)
    assert next(work) == (0, (0, os.getpid()))
    assert taken == [0]
    assert [item for item, _ in work] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_pool_replaces_a_process_that_dies(tmp_path):
    items = [(k, str(tmp_path / "flag")) for k in range(6)]
    got = sorted(value for _, value in Local(2).map(die_once, items))
    assert got == list(range(6))
    assert (tmp_path / "flag").exists()  # one did die


@pytest.mark.slow
def test_a_pool_gives_up_in_the_end():
    with pytest.raises(EngineError, match="died 3 times in a row"):
        list(Local(2).map(always_die, [1, 2]))


class TwoParts(Exception):
    """Is not made again from its own arguments: its pickle does not load."""

    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


class Held(Exception):
    """Has no pickle at all."""

    def __init__(self):
        super().__init__("held")
        self.what = lambda: None


def raising(k):
    raise (KeyError("mine"), TwoParts("this", "that"), Held())[k]


def test_a_pool_is_kept_for_several_maps_and_tells_every_error():
    engine = Local(2)
    with engine:
        first = {pid for _, (_, pid) in engine.map(square, range(4))}
        again = dict(engine.map(square, range(3, 40)))
        assert {k: v for k, (v, _) in again.items()} == {k: k * k for k in range(3, 40)}
        pids = first | {pid for _, pid in again.values()}
        assert len(pids) <= 2
        with pytest.raises(KeyError, match="mine") as caught:
            list(engine.map(raising, [0]))
        assert "in raising" in caught.value.__notes__[0]
        for k, text in ((1, "TwoParts: this and that"), (2, "Held: held")):
            with pytest.raises(EngineError, match=rf"(?s)an item failed in a process of the pool: {text}.*in raising"):
                list(engine.map(raising, [k]))
        expected = sf.expect(_first, Pull(), torch.ones(1), sf.solvers.EulerMaruyama(), **EXPECT)
        found = sf.expect(_first, Pull(), torch.ones(1), sf.solvers.EulerMaruyama(), engine=engine, **EXPECT)
        assert (found.mean, found.num) == (expected.mean, expected.num)
        folder = engine._folder
        assert {pid for _, (_, pid) in engine.map(square, range(40))} <= {
            process for process in engine._pool._processes
        }
        assert list(folder.iterdir()) == []  # work that is done is not kept
    assert not folder.exists()


def test_a_program_from_standard_input_is_told_that_a_pool_needs_a_file(monkeypatch, tmp_path):
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__spec__", None)
    monkeypatch.setattr(main, "__file__", "<stdin>", raising=False)
    with pytest.raises(EngineError, match="expected a program in a file, got <stdin>"):
        list(Local(2).map(square, [1]))
    work = tmp_path / "work"
    work.write_bytes(pickle.dumps(square).replace(b"square", b"absent"))
    outcome = local._compute(str(work), 1)  # as of a notebook's function, which a new process does not have
    with pytest.raises(EngineError, match=r"cannot import what the work needs: .*absent.*; functions and classes must"):
        local._value(outcome)


_SLEEPER = """
import os, time
from sdeflow.engine import Local
def sleep(k):
    time.sleep(100)
def pid(k):
    return os.getpid()
if __name__ == "__main__":
    with Local(2) as engine:
        print(*{pid for _, pid in engine.map(pid, range(8))}, flush=True)
        list(engine.map(sleep, range(4)))
"""


@pytest.mark.slow
def test_processes_of_a_pool_end_with_their_parent(tmp_path):
    script = tmp_path / "sleeper.py"
    script.write_text(_SLEEPER)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as driver:
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        driver.kill()
    assert pids
    for _ in range(100):
        if not any(alive(pid) for pid in pids):
            return
        time.sleep(0.1)
    raise AssertionError(f"still alive: {pids}")


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_work_raises_is_raised():
    def broken(k):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        list(Local().map(broken, [1]))
    with pytest.raises(TypeError, match="can be pickled"):
        list(Local(2).map(broken, [1]))


def test_engines_by_name(monkeypatch):
    assert isinstance(named("local"), Local)
    assert named("local", workers=3).workers == 3
    for call, text in (
        (lambda: named("spark"), "unknown engine 'spark': expected one of local, ray"),
        (lambda: named("local", address="auto"), "an address belongs to --engine ray"),
        (lambda: Local(0), "workers >= 1"), (lambda: Ray("auto", workers=2), "address or workers"),
        (lambda: Ray(cpus=0), "one of them above"), (lambda: Ray(retries=-1), "retries >= 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            call()
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # taken, but nobody listens
        with pytest.raises(ConnectionError, match=r"no Ray answers at ray://127\.0\.0\.1:"):
            on_ray._refuse_silent(f"ray://127.0.0.1:{held.getsockname()[1]}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'needs Ray.s client: pip install "ray\[client\]"'):
        named("ray", address="ray://head:10001")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'needs Ray: pip install "sdeflow\[ray\]"'):
        named("ray")


# ---- datasets


def test_gaps_are_what_is_missing():
    assert list(gaps([], 10, 4, 4)) == [(0, 4), (4, 4), (8, 2)]
    assert list(gaps([(4, 8)], 20, 4, 9)) == [(0, 4), (8, 8), (16, 4)]
    assert list(gaps([(0, 8), (8, 20)], 20, 4, 4)) == []


def test_the_content_does_not_know_the_shards():
    blocks = [(k, {"x": torch.full((2, 3), float(k)), "s": torch.tensor([k, k])}) for k in range(0, 8, 2)]
    whole = content_of(blocks)
    assert added([content_of(blocks[:1]), content_of(blocks[1:])]) == whole
    assert added([content_of(blocks[2:]), content_of(blocks[:2])]) == whole
    swapped = [(0, blocks[1][1]), (2, blocks[0][1]), *blocks[2:]]
    assert content_of(swapped) != whole
    other = [*blocks[:3], (6, {"x": blocks[3][1]["x"] + 1e-6, "s": blocks[3][1]["s"]})]
    assert content_of(other) != whole


@pytest.mark.parametrize("kind", ["npz", "safetensors", "parquet"])
def test_files_hold_their_columns(tmp_path, kind):
    columns = {"samples": torch.randn(5, 2), "status": torch.arange(5)}
    path = tmp_path / f"a.{kind}"
    path.write_bytes(packed(columns, kind))
    assert packed(columns, kind) == path.read_bytes()
    got = unpacked(path)
    if kind == "parquet":
        assert torch.equal(got["samples_1"], columns["samples"][:, 1])
        assert torch.equal(got["status"], columns["status"])
    else:
        assert same(got, columns)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="not a shard"):
        unpacked(path)


def test_a_manifest_is_read_with_care(tmp_path):
    with pytest.raises(ValueError, match="holds no dataset"):
        Dataset(tmp_path)
    data = Dataset(tmp_path / "a", {"num": 8})
    with pytest.raises(ValueError, match="8 samples are missing"):
        data.finish()
    manifest = tmp_path / "a" / "manifest.jsonl"
    head = manifest.read_text()
    row = Shard(0, 4, "shards/000000000000-000000000004.npz", 3, "0", "0" * 64)
    data.add(row)
    with open(manifest, "a") as file:
        file.write('{"first": 4, "cou')  # broken off in the middle of a line
    again = Dataset(tmp_path / "a")
    assert again.shards == [row]
    again.add(Shard(4, 4, "shards/000000000004-000000000008.npz", 3, "0", "0" * 64))
    assert len(Dataset(tmp_path / "a").shards) == 2  # and the next line begins a line
    good = dataclasses.asdict(row)
    changed = (
        {"file": "../x.npz"}, {"file": "x.npz"}, {"first": 6}, {"count": 3}, {"count": 0}, {"first": 0.0},
        {"failed": "a"}, {"failed": -1}, {"content": "0"}, {"size": True}, {"more": 1},
    )  # fmt: skip
    for bad in ('{"first": 0}', "[]", "{}", "nothing", *(json.dumps({**good, **change}) for change in changed)):
        manifest.write_text(head + bad + "\n")
        with pytest.raises(ValueError, match="not the manifest of a run"):
            Dataset(tmp_path / "a")
    manifest.write_text(head + 2 * (json.dumps(good) + "\n"))  # of two runs at once
    with pytest.raises(ValueError, match="not the manifest of a run"):
        Dataset(tmp_path / "a")


# ---- samples


def test_samples_are_the_same_bytes_on_any_engine_in_any_shards(tmp_path):
    sample_to(tmp_path / "one", MODEL, 50, **SAMPLES)
    want = files(tmp_path / "one")
    assert set(want) == {"manifest.jsonl", "samples.npz", "samples.png"}
    contents = set()
    for k, shard in enumerate((8, 24, 100)):
        sample_to(tmp_path / f"{k}", MODEL, 50, engine=Shuffled(), shard=shard, **SAMPLES)
        assert files(tmp_path / f"{k}") == want
        sample_to(tmp_path / f"d{k}", MODEL, 50, engine=Shuffled(), shard=shard, merge=False, **SAMPLES)
        data = Dataset(tmp_path / f"d{k}")
        assert data.complete
        contents.add(data.content)
        assert len(data.shards) == math.ceil(50 / shard)
    assert contents == {Dataset(tmp_path / "one").content}
    other = sample_to(tmp_path / "other", MODEL, 50, **{**SAMPLES, "chunk": 7})
    assert Dataset(other.parent).content not in contents  # another chunk may round otherwise: it is another run


def test_a_run_goes_on_in_other_shards_and_repairs_damage(tmp_path):
    how = {**SAMPLES, "merge": False}
    sample_to(tmp_path / "whole", MODEL, 50, shard=8, **how)

    def stop(done):
        if done >= 24:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_to(tmp_path / "a", MODEL, 50, shard=8, on_chunk=stop, **how)
    part = min((tmp_path / "a" / "shards").iterdir())
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1  # the right length, another bit, among the numbers
    part.write_bytes(data)
    (tmp_path / "a" / "shards" / "stray.npz").write_bytes(b"of a run that died between the file and its entry")
    sample_to(tmp_path / "a", MODEL, 50, shard=16, **how)
    data, whole = Dataset(tmp_path / "a"), Dataset(tmp_path / "whole")
    assert data.content == whole.content
    assert {f"shards/{p.name}" for p in (tmp_path / "a" / "shards").iterdir()} == {s.file for s in data.shards}
    joined = torch.cat([data.columns(s)["samples"] for s in data.shards])
    assert torch.equal(joined, torch.cat([whole.columns(s)["samples"] for s in whole.shards]))


# ---- ensembles


def test_statistics_of_an_ensemble_are_those_of_all_its_paths():
    result = ensemble(Pull(), torch.tensor([1.0, -0.5]), 500, steps=10, statistics=STATISTICS, batch=64, seed=5)
    x = Pull().simulate(torch.tensor([1.0, -0.5]).expand(500, 2).clone(), steps=10, seed=5).x.double()
    torch.testing.assert_close(result["end"].mean, x.mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(result["end"].variance, x.var(0), rtol=1e-6, atol=0)
    assert (result.num, result.failed, result.nfe) == (500, 0, 10)
    for shard, engine in ((64, Shuffled()), (200, None), (1000, Shuffled())):
        again = ensemble(
            Pull(), torch.tensor([1.0, -0.5]), 500, steps=10, statistics=STATISTICS, batch=64, seed=5, shard=shard,
            engine=engine,
        )  # fmt: skip
        assert same(held(again), held(result))
    other = ensemble(Pull(), torch.tensor([1.0, -0.5]), 500, steps=10, statistics=STATISTICS, batch=64, seed=6)
    assert not same(held(other), held(result))  # the control


def test_an_ensemble_goes_on_where_it_was(tmp_path):
    how = {"steps": 5, "statistics": STATISTICS, "batch": 32, "shard": 32, "store": True}
    want = ensemble(Pull(), torch.ones(2), 300, out=tmp_path / "whole", **how)
    seen = []

    def stop(done):
        seen.append(done)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensemble(Pull(), torch.ones(2), 300, out=tmp_path / "a", on_done=stop, **how)
    got = ensemble(Pull(), torch.ones(2), 300, out=tmp_path / "a", on_done=seen.append, **how)
    assert seen[4:][0] == seen[3]  # it began where it was
    assert same(held(got), held(want))
    assert files(tmp_path / "a") == files(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"holds another run.* options"):
        ensemble(Pull(), torch.ones(2), 300, out=tmp_path / "a", **{**how, "steps": 6})


def test_functionals_of_paths_and_paths_that_fail(tmp_path):
    class Explodes(Pull):
        def drift(self, x, t):
            return torch.where(x > 1.5, torch.full_like(x, float("nan")), -x)

    def highest(solution):
        return solution.xs.amax(0)

    start = torch.tensor([1.0])
    result = ensemble(
        Explodes(), start, 256, steps=20, save=True, batch=100,
        statistics={"highest": Functional(highest, Moments()), "end": Moments()}, out=tmp_path, store=True,
    )  # fmt: skip
    solution = Explodes().simulate(start.expand(256, 1).clone(), steps=20, seed=0, save=True, throw=False)
    assert 0 < result.failed == int((~solution.ok).sum()) < 256
    torch.testing.assert_close(
        result["highest"].mean, solution.xs.amax(0)[solution.ok].double().mean(0), rtol=1e-6, atol=0
    )
    shard = result.dataset.shards[0]
    assert shard.failed == int((~solution.ok[: shard.count]).sum())
    assert result.dataset.columns(shard)["paths"].shape == (shard.count, 21, 1)
    with pytest.raises(ValueError, match="one value a sample"):
        ensemble(Pull(), start, 4, steps=2, statistics={"a": Functional(lambda s: s.x.sum(), Moments())})


def test_a_reversal_starts_from_its_prior():
    model = sf.problems.Gaussian([0.5, -1.0], [0.3, 2.0]).model(sf.VP())
    problem = model.sde.reverse(model)
    result = ensemble(
        problem, PriorStart(problem, (2,), 7), 4000, sf.solvers.DDPM(), steps=20, statistics={"x": Moments()}, seed=7
    )
    x = sf.sample(model, 4000, shape=(2,), solver=sf.solvers.DDPM(), steps=20, eta=1.0, seed=7).x
    torch.testing.assert_close(result["x"].mean, x.double().mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["plain", "antithetic", "control", "multilevel"])
def test_an_expectation_is_the_same_on_any_engine(method):
    how = {"steps": 16, "method": method, "tol": 0.004, "batch": 256, "pilot": 128, "seed": 2}
    one = sf.expect(lambda x: x[:, 0] ** 2, Pull(), torch.ones(1), sf.solvers.EulerMaruyama(), **how)
    two = sf.expect(lambda x: x[:, 0] ** 2, Pull(), torch.ones(1), sf.solvers.EulerMaruyama(), engine=Shuffled(), **how)
    assert (one.mean, one.stderr, one.num, one.nfe) == (two.mean, two.stderr, two.num, two.nfe)
    assert one.num > 4 * how["batch"]


def test_what_an_ensemble_refuses(tmp_path):
    start = torch.ones(2)
    for change, text in (
        ({"num": 0}, "num >= 1"), ({"statistics": None}, "nothing is asked for"), ({"store": True}, "needs a folder"),
        ({"start": lambda index: torch.ones(1, 2)}, "give 4 states"), ({"kind": "pickle"}, "expected kind as one of"),
        ({"batch": 0}, "batch >= 1"),
    ):  # fmt: skip
        given = {"start": start, "num": 4, "statistics": {"a": Moments()}, "steps": 2, **change}
        with pytest.raises(ValueError, match=text):
            ensemble(Pull(), given.pop("start"), given.pop("num"), **given)
    with pytest.raises(TypeError, match="statistics by name"):
        ensemble(Pull(), start, 4, steps=2, statistics={"a": Moments})
    with pytest.raises(TypeError, match="start"):
        ensemble(Pull(), 1.0, 4, steps=2, statistics={"a": Moments()})


# ---- processes and Ray


def test_ray_gives_the_same_bytes_although_its_workers_are_killed(tmp_path):
    """One Ray for both: starting it takes seconds. A worker is killed by its process id as soon as one is known."""
    engine = Ray(workers=2)
    with engine:
        import ray

        assert engine.workers == 2
        assert {node["NodeManagerAddress"] for node in ray.nodes()} == {"127.0.0.1"}
        killed = []

        def kill(done):
            shown = json.loads("[" + ",".join((tmp_path / "pids").read_text().split()) + "]")
            if len(killed) < 2 and shown:
                killed.append(shown[-1])
                with contextlib.suppress(ProcessLookupError):
                    os.kill(shown[-1], signal.SIGKILL)

        class Noted(sf.Model):
            """A model that leaves the id of its process behind."""

            def raw(self, x, t):
                with open(tmp_path / "pids", "a") as file:
                    file.write(f"{os.getpid()}\n")
                return super().raw(x, t)

        (tmp_path / "pids").touch()
        noted = Noted(MODEL.net, MODEL.sde, MODEL.prediction, MODEL.time)
        sample_to(tmp_path / "ray", noted, 96, engine=engine, shard=8, on_chunk=kill, **SAMPLES)
        sample_to(tmp_path / "local", noted, 96, **SAMPLES)
        assert files(tmp_path / "ray") == files(tmp_path / "local")
        assert killed

        one = ensemble(Pull(), torch.ones(2), 300, steps=5, statistics=STATISTICS, batch=32, shard=64)
        two = ensemble(Pull(), torch.ones(2), 300, steps=5, statistics=STATISTICS, batch=32, shard=32, engine=engine)
        assert same(held(one), held(two))

        def broken(item):
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            list(engine.map(broken, [1]))
        with pytest.raises(EngineError, match="died over 0 times"):
            list(Ray(retries=0).map(always_die, [1]))
        with pytest.raises(ValueError, match="a task asks for 64000 CPU and Ray on this machine has 2"):
            Ray(cpus=64000)._refuse_more_than_there_is(ray)
    assert not ray.is_initialized()


def test_a_pool_writes_the_same_bytes(tmp_path):
    sample_to(tmp_path / "pool", MODEL, 40, engine=Local(2), shard=8, **SAMPLES)
    sample_to(tmp_path / "here", MODEL, 40, **SAMPLES)
    assert files(tmp_path / "pool") == files(tmp_path / "here")


def test_a_worker_on_another_disk_sends_its_bytes(tmp_path):
    """A worker that does not see the folder's manifest hands its file over instead of writing it."""

    class Elsewhere(Local):
        def map(self, work, items, *, memory=0):
            work._shared_disk = False
            for item in items:
                delivery = work(item)
                assert delivery.data is not None
                yield item, delivery

    sample_to(tmp_path / "far", MODEL, 40, engine=Elsewhere(), shard=8, **SAMPLES)
    sample_to(tmp_path / "here", MODEL, 40, **SAMPLES)
    assert files(tmp_path / "far") == files(tmp_path / "here")
