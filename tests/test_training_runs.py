"""Training runs: broken off and taken up again, labels, bfloat16, two processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch

import sdeflow as sf
from sdeflow.nets import MLP
from sdeflow.training import train, untrained

DATA = sf.problems.TwoMoons().sample(256, 0).to(torch.float32)
ARGUMENTS = {"steps": 40, "batch": 32, "log_every": 5}


def small(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return sf.Model(MLP((2,), width=16, depth=1, embedding=8, harmonics=2, **options), sf.VP(), "v", "lam")


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.net.parameters()])


class Break(Exception):
    pass


def breaking(at):
    def on_row(history):
        if history[-1]["step"] == at:
            raise Break

    return on_row


@pytest.mark.parametrize("at", [5, 10, 15, 35, 40])
def test_a_run_that_breaks_goes_on_to_the_same_bits(at, tmp_path):
    """Broken off at a row, before and after a state was kept, once and again."""
    want, history = train(small(), DATA, **ARGUMENTS)
    file = tmp_path / "run.safetensors"
    for point in (at, min(at + 5, 40)):
        with pytest.raises(Break):
            train(small(), DATA, **ARGUMENTS, save=file, save_every=10, on_row=breaking(point))
    got, again = train(small(), DATA, **ARGUMENTS, save=file, save_every=10)
    assert torch.equal(weights(got), weights(want))
    assert again == history


def test_a_killed_process_goes_on_to_the_same_bits(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import os, signal, sys\n"
        "import torch\n"
        "torch.set_num_threads(1)\n"
        f"sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "import test_training_runs as t\n"
        "def kill(history):\n"
        "    if history[-1]['step'] == int(sys.argv[1]):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "model, _ = t.train(t.small(), t.DATA, **t.ARGUMENTS, save='run.safetensors', save_every=5, on_row=kill)\n"
        "import sdeflow as sf\n"
        "sf.save_model('model.safetensors', model)\n"
    )
    for at, code in ((10, -9), (25, -9), (0, 0)):
        done = subprocess.run([sys.executable, str(script), str(at)], cwd=tmp_path, timeout=120)
        assert done.returncode == code
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    want, _ = train(small(), DATA, **ARGUMENTS)
    torch.set_num_threads(threads)
    assert torch.equal(weights(sf.load_model(tmp_path / "model.safetensors")), weights(want))


def test_a_finished_run_is_not_run_again(tmp_path):
    file = tmp_path / "run.safetensors"
    first, history = train(small(), DATA, **ARGUMENTS, save=file, save_every=5)
    again, same = train(small(), DATA, **ARGUMENTS, save=file, save_every=5, on_row=lambda rows: pytest.fail("ran"))
    assert torch.equal(weights(first), weights(again))
    assert same == history


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda: (small(), DATA, {"lr": 1e-4}), "lr"),
        (lambda: (small(), DATA, {"steps": 50}), "steps"),
        (lambda: (small(), DATA + 1, {}), "data"),
        (lambda: (small(seed=1), DATA, {}), "start"),
        (lambda: (untrained((2,)), DATA, {}), "net, start"),
    ],
)
def test_the_state_of_another_run_is_one_error(change, named, tmp_path):
    file = tmp_path / "run.safetensors"
    train(small(), DATA, **ARGUMENTS, save=file, save_every=10)
    model, data, options = change()
    with pytest.raises(ValueError, match=f"state of another run: its {named} differ"):
        train(model, data, **{**ARGUMENTS, **options}, save=file, save_every=10)


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", safetensors.torch.save({"a": torch.zeros(1)})])
def test_a_file_that_is_no_state_is_one_error(content, tmp_path):
    file = tmp_path / "run.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"not (a safetensors file|the state of a training run)"):
        train(small(), DATA, **ARGUMENTS, save=file, save_every=5)
    with pytest.raises(ValueError, match="multiple of log_every = 5"):
        train(small(), DATA, **ARGUMENTS, save=file, save_every=7)


def test_labels_are_learned_and_dropped():
    """Two clusters, one a class: the network told the class finds its centre, told none the middle."""
    label = torch.arange(400) % 2
    data = torch.where(label[:, None] == 0, -1.0, 1.0) + 0.05 * torch.randn(400, 2)
    model, _ = train(
        small(classes=2), data, labels=label, label_dropout=0.3, steps=600, batch=64, lr=5e-3, log_every=100
    )
    x, t = torch.zeros(2, 2), 0.9
    told = model.bind(label=torch.tensor([0, 1])).x0(x, t)
    torch.testing.assert_close(told, torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), atol=0.35, rtol=0)
    assert float(model.x0(x, t).abs().max()) < 0.5


def test_bad_labels():
    label = torch.zeros(len(DATA), dtype=torch.int64)
    for model, labels, message in (
        (small(), label, "labels need a network"),
        (small(classes=2), label[:5], "int64 labels"),
        (small(classes=2), label.float(), "int64 labels"),
        (small(classes=2), label + 2, "from 0 to 1, got 2 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            train(model, DATA, labels=labels, **ARGUMENTS)
    with pytest.raises(ValueError, match="label_dropout"):
        train(small(classes=2), DATA, labels=label, label_dropout=1.5, **ARGUMENTS)


def test_bfloat16_trains_float32_weights():
    arguments = {**ARGUMENTS, "steps": 200}
    full, history = train(small(), DATA, **arguments)
    half, rows = train(small(), DATA, **arguments, precision="bfloat16")
    assert {p.dtype for p in half.net.parameters()} == {torch.float32}
    assert not torch.equal(weights(half), weights(full))
    assert abs(rows[-1]["loss"] - history[-1]["loss"]) < 0.05 * history[-1]["loss"]
    with pytest.raises(ValueError, match="precision"):
        train(small(), DATA, **ARGUMENTS, precision="float16")


def test_an_own_loss():
    def weighted(model, x0, t, eps):
        return 2 * sf.losses.denoising(model, x0, t, eps, "x0")

    _, rows = train(small(), DATA, **ARGUMENTS, loss=weighted)
    _, plain = train(small(), DATA, **ARGUMENTS)
    assert rows[0]["loss"] != plain[0]["loss"]


@pytest.mark.timeout(240)
def test_two_processes_train_one_network(tmp_path):
    """Each takes half of every batch; their weights are the same, and near those of one process."""
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys\n"
        "import torch\n"
        "torch.set_num_threads(1)\n"
        f"sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "import test_training_runs as t\n"
        "import sdeflow as sf\n"
        "model, rows = t.train(t.small(), t.DATA, **{**t.ARGUMENTS, 'steps': 200}, save='run.st', save_every=100)\n"
        "sf.save_model(f\"model{os.environ['RANK']}.safetensors\", model, loss=rows[-1]['loss'])\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=220)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (sf.load_model(tmp_path / f"model{k}.safetensors") for k in (0, 1))
    assert torch.equal(weights(first), weights(second))
    _, rows = train(small(), DATA, **{**ARGUMENTS, "steps": 200})
    losses = [sf.checkpoints.read_info(tmp_path / f"model{k}.safetensors")["info"]["loss"] for k in (0, 1)]
    assert losses[0] == losses[1]
    assert abs(losses[0] - rows[-1]["loss"]) < 0.25 * rows[-1]["loss"]
    assert (tmp_path / "run.st").exists()
    assert (tmp_path / "run.st.1").exists()


def test_a_batch_that_processes_cannot_share(monkeypatch):
    class Two:
        num_processes, process_index = 2, 0

    from sdeflow.training import _Ranks

    with pytest.raises(ValueError, match="batch that 2 processes can share, got 5"):
        _Ranks(Two(), 5)
