import json
import os
import struct
from importlib import resources

import pytest
import safetensors.torch
import torch

import sdeflow as sf
from sdeflow import checkpoints
from sdeflow.checkpoints import load_model, read_info, save_model, write_atomically
from sdeflow.data import digits
from sdeflow.losses import denoising, stratified_times
from sdeflow.nets import MLP
from sdeflow.training import untrained

PROCESSES = [
    sf.VP(0.2, 15.0),
    sf.SubVP(),
    sf.VE(0.02, 30.0),
    sf.CosineVP(s=0.01, t1=0.99),
    sf.EDM(0.005, 40.0),
    sf.RectifiedFlow(),
    sf.DiscreteVP(torch.linspace(1e-4, 0.02, 100, dtype=torch.float64)),
]


def _model(process=None, prediction="v", time="lam", dtype=torch.float32):
    net = MLP((2,), width=8, depth=2, embedding=4, harmonics=2).to(dtype)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return sf.Model(net, process or sf.VP(), prediction, time)


def _saved(path, **changes):
    """A checkpoint with parts of its description, or its tensors, replaced."""
    save_model(path, _model())
    data = path.read_bytes()
    description = json.loads(json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]["sdeflow"])
    tensors = changes.pop("tensors", lambda tensors: tensors)(safetensors.torch.load(data))
    for key, value in changes.items():
        if value is None:
            del description[key]
        else:
            description[key] = value
    path.write_bytes(safetensors.torch.save(tensors, {"sdeflow": json.dumps(description)}))
    return path


# ---- what goes in comes out


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_every_process(process, tmp_path):
    model = _model(process)
    save_model(tmp_path / "model.safetensors", model)
    again = load_model(tmp_path / "model.safetensors")
    assert again.sde == process
    assert repr(again.sde) == repr(process)
    x = torch.randn(5, 2)
    with torch.no_grad():
        assert torch.equal(again.x0(x, 0.3), model.x0(x, 0.3))
    assert again.net.config == model.net.config


def test_every_process_is_covered():
    assert {type(p) for p in PROCESSES} == set(checkpoints.PROCESSES)


@pytest.mark.parametrize("prediction", ["x0", "eps", "score", "v", "velocity"])
@pytest.mark.parametrize("time", [None, "lam", "sigma"])
def test_every_prediction_and_time(prediction, time, tmp_path):
    save_model(tmp_path / "m.safetensors", _model(prediction=prediction, time=time))
    again = load_model(str(tmp_path / "m.safetensors"))
    assert (again.prediction, again.time) == (prediction, time)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_keep_their_bits(dtype, tmp_path):
    model = _model(dtype=dtype)
    save_model(tmp_path / "m.safetensors", model)
    state = torch.get_rng_state()
    again = load_model(tmp_path / "m.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.net.state_dict().items():
        assert again.net.state_dict()[name].dtype == dtype
        assert torch.equal(again.net.state_dict()[name], tensor)


def test_loaded_for_sampling(tmp_path):
    save_model(tmp_path / "m.safetensors", _model())
    net = load_model(tmp_path / "m.safetensors").net
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())


def test_info(tmp_path):
    save_model(tmp_path / "m.safetensors", _model(), command="make it", seed=3, loss=0.25)
    info = read_info(tmp_path / "m.safetensors")
    assert info["info"] == {"command": "make it", "seed": 3, "loss": 0.25}
    assert info["shape"] == [2]
    assert info["process"] == {"name": "VP", "beta_min": 0.1, "beta_max": 20.0}
    assert info["versions"]["sdeflow"] == sf.__version__


# ---- what cannot be saved


class _Sub(MLP):
    pass


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: "model", TypeError, "expected a Model, got str"),
        (
            lambda: sf.Model(torch.nn.Linear(2, 2), sf.VP()),
            TypeError,
            "one of MLP, UNet, EDMPreconditioned; got Linear",
        ),
        (lambda: sf.Model(_Sub((2,)), sf.VP()), TypeError, "one of MLP, UNet, EDMPreconditioned; got _Sub"),
        (
            lambda: _model(sf.GaussianSDE.from_kernel(lambda t: 1 - t, lambda t: t)),
            TypeError,
            "process that can be rebuilt, one of VP, ",
        ),
        (lambda: _model(time=lambda t: 999 * t), ValueError, "time input that is a function"),
        (lambda: sf.Model(MLP((2,)), sf.VP(), "v", "lam", expand=False), ValueError, "expand=False cannot be saved"),
    ],
)
def test_models_that_a_file_cannot_describe(model, error, message, tmp_path):
    with pytest.raises(error, match=message):
        save_model(tmp_path / "m.safetensors", model())
    assert not list(tmp_path.iterdir())


def test_bad_weights_and_info_are_not_saved(tmp_path):
    model = _model()
    with pytest.raises(TypeError, match="info that JSON can hold"):
        save_model(tmp_path / "m.safetensors", model, what=torch.zeros(1))
    with pytest.raises(TypeError, match="info that JSON can hold"):
        save_model(tmp_path / "m.safetensors", model, loss=float("nan"))
    with torch.no_grad():
        model.net.enter.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"the network: tensor 'enter.bias' holds NaN or infinity"):
        save_model(tmp_path / "m.safetensors", model)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    write_atomically(path, b"old")

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


# ---- what cannot be loaded


def test_unknown_name(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no file 'digit', and no shipped model of that name.*digits"):
        load_model("digit")
    with pytest.raises(FileNotFoundError, match="no file"):
        load_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file 'digits'"):
        load_model(tmp_path.__class__("digits"))  # a Path is never a shipped name


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00\x01",
        b"PK\x03\x04 a zip file, as torch.save writes",
        struct.pack("<Q", 1 << 40) + b"{}",
        struct.pack("<Q", 200_000_000) + b"{" * 64,
        struct.pack("<Q", 8) + b"not json",
        struct.pack("<Q", 2) + b"{}" + b"trailing",
        struct.pack("<Q", 62) + b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"x":1} ',
        struct.pack("<Q", 56) + b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}  ',
    ],
    ids=["empty", "short", "zip", "huge", "oversize", "not-json", "trailing", "not-a-tensor", "truncated"],
)
def test_not_safetensors(data, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"m\.safetensors: not a safetensors file"):
        load_model(path)


def test_pickles_are_not_opened(tmp_path):
    torch.save(_model().net.state_dict(), tmp_path / "m.pt")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_model(tmp_path / "m.pt")


def test_any_cut_or_changed_header_is_refused_or_loads(tmp_path):
    """No prefix of a checkpoint loads, and no changed byte of its header raises anything but ValueError."""
    path = tmp_path / "m.safetensors"
    save_model(path, _model())
    data = path.read_bytes()
    for end in range(0, len(data), 97):
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match="not a safetensors file"):
            load_model(path)
    for place in range(0, 8 + struct.unpack("<Q", data[:8])[0], 11):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x15]) + data[place + 1 :])
        try:
            load_model(path)
        except ValueError as error:
            assert "m.safetensors" in str(error)  # noqa: PT017  # most bytes matter, a few do not


def test_safetensors_of_others(tmp_path):
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not written by save_model: no 'sdeflow'"):
        load_model(path)
    for text in ("{", "[" * 100_000):
        safetensors.torch.save_file({"w": torch.zeros(2)}, path, {"sdeflow": text})
        with pytest.raises(ValueError, match="description is not JSON"):
            load_model(path)
    for text in ("[1]", "{}", '{"format": 2}'):
        safetensors.torch.save_file({"w": torch.zeros(2)}, path, {"sdeflow": text})
        with pytest.raises(ValueError, match="expected a description of format 1, got"):
            load_model(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"net": {"name": "ResNet"}}, "unknown net 'ResNet': expected one of MLP"),
        ({"net": None}, "unknown net None"),
        ({"net": "MLP"}, "MLP cannot be made from its description"),
        ({"net": {"name": "MLP", "shape": [2], "layers": 3}}, "MLP cannot be made .*layers"),
        ({"net": {"name": "MLP", "shape": [2], "depth": 10**9}}, "MLP cannot be made .*65536"),
        ({"net": {"name": "MLP", "shape": [60000] * 9}}, "MLP cannot be made"),
        ({"process": {"name": "OU"}}, "unknown process 'OU': expected one of VP, "),
        ({"process": {"name": "VP", "beta_min": -1.0}}, "VP cannot be made .*beta_min > 0"),
        ({"process": {"name": "VP", "beta_min": "a"}}, "VP cannot be made"),
        ({"prediction": "noise"}, "unknown prediction 'noise'"),
        ({"prediction": None}, "no model can be made .*prediction"),
        ({"time": "discrete"}, "needs a DiscreteVP"),
        ({"net": {"name": "MLP", "shape": [3]}}, r"tensor 'blocks.0.a.bias' of MLP: expected floats of shape \(232,\)"),
        ({"tensors": lambda t: {**t, "extra": torch.zeros(1)}}, r"'extra' of MLP: expected none, got floats of shape"),
        (
            {"tensors": lambda t: {k: v for k, v in t.items() if k != "enter.bias"}},
            r"'enter.bias' of MLP: expected floats of shape \(8,\), got none",
        ),
        (
            {"tensors": lambda t: {**t, "enter.bias": torch.zeros(9)}},
            r"'enter.bias' of MLP: expected floats of shape \(8,\), got floats of shape \(9,\)",
        ),
        ({"tensors": lambda t: {**t, "enter.bias": torch.zeros(8, dtype=torch.int64)}}, "got torch.int64"),
        ({"tensors": lambda t: {**t, "enter.bias": torch.full((8,), torch.inf)}}, "'enter.bias' holds NaN or infinity"),
    ],
)
def test_parts_that_do_not_fit(changes, message, tmp_path):
    path = _saved(tmp_path / "m.safetensors", **changes)
    with pytest.raises(ValueError, match=message) as raised:
        load_model(path)
    assert "m.safetensors" in str(raised.value)


# ---- the shipped network


def test_shipped_digits():
    model = load_model("digits")
    assert (model.sde, model.prediction, model.time) == (sf.VP(), "v", "lam")
    info = read_info("digits")
    assert info["shape"] == [1, 8, 8]
    assert info["info"]["command"].startswith("sdeflow train digits --out DIR --steps ")
    assert (resources.files("sdeflow") / "weights" / "digits.safetensors").stat().st_size < 2_000_000
    solution = sf.sample(model, 4, shape=model.net.shape, solver=sf.solvers.DPMSolverPP(2), steps=10)
    assert solution.x.shape == (4, 1, 8, 8)
    assert float(solution.x.abs().max()) < 2


def test_shipped_digits_denoise():
    """The loss at fixed times and noise: 0.27 as shipped, 0.86 (the mean of v^2) untrained."""
    images, _ = digits()
    torch.manual_seed(0)
    t, eps = stratified_times(sf.VP(), len(images)), torch.randn_like(images)
    with torch.no_grad():
        shipped, raw = (denoising(m, images, t, eps).mean() for m in (load_model("digits"), untrained((1, 8, 8))))
    assert float(shipped) < 0.28
    assert float(shipped) < 0.5 * float(raw)


def test_shipped_digits_are_smooth_enough_for_solvers():
    """On a network rough in time no solver shows its order, and error control takes thousands of calls."""
    model = load_model("digits")
    flow = model.sde.probability_flow(model)
    x = model.sde.prior_sample((16, 1, 8, 8), 0)
    assert sf.solve(flow, x, sf.solvers.RK45(), rtol=1e-6, atol=1e-6).stats.calls < 300

    model.net.double()
    x = x[:4].double()
    exact, coarse, fine = (sf.solve(flow, x, sf.solvers.RK4(), steps=n).x for n in (320, 40, 80))
    ratio = (coarse - exact).norm() / (fine - exact).norm()
    assert 3.6 < float(torch.log2(ratio)) < 4.4
