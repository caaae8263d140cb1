import math

import pytest
import torch

import sdeflow as sf
from sdeflow.nets import MLP, EDMPreconditioned, UNet, time_features


def _awake(net):
    """The network with every weight drawn, so that no block is silent."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.3)
    return net


@pytest.mark.parametrize("shape", [(1, 8, 8), (2,), (3, 4)])
def test_mlp_keeps_shapes_and_starts_at_zero(shape):
    net = MLP(shape)
    x = torch.randn(5, *shape)
    y = net(x, torch.linspace(-5, 5, 5))
    assert y.shape == x.shape
    assert torch.equal(y, torch.zeros_like(x))


def test_default_size_for_digits_is_below_two_megabytes():
    assert sum(p.numel() for p in MLP((1, 8, 8)).parameters()) * 4 < 1_940_000


def test_config_rebuilds_the_network():
    net = _awake(MLP((2, 3), width=16, depth=2, embedding=8, harmonics=3))
    again = MLP(**net.config)
    again.load_state_dict(net.state_dict())
    x, lam = torch.randn(4, 2, 3), torch.randn(4)
    assert again.config == net.config
    assert torch.equal(again(x, lam), net(x, lam))


def test_samples_do_not_see_each_other():
    net = _awake(MLP((2,), width=16, depth=2).double())
    x, lam = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    each = torch.cat([net(x[i : i + 1], lam[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(net(x, lam), each, rtol=1e-12, atol=1e-12)


def test_finite_at_both_ends_of_time():
    """Data (lam = inf) and pure noise (lam = -inf) are times like others."""
    net = _awake(MLP((2,), width=16))
    ends = net(torch.ones(2, 2), torch.tensor([torch.inf, -torch.inf]))
    assert bool(torch.isfinite(ends).all())
    model = sf.Model(net, sf.VP(), "v", "lam")
    assert bool(torch.isfinite(model.x0(torch.ones(3, 2), 0.0)).all())


def test_times_are_told_apart():
    lam = torch.linspace(-12, 12, 97, dtype=torch.float64)
    distance = torch.cdist(*2 * [time_features(lam, 8)]) + torch.eye(97, dtype=torch.float64)
    assert float(distance.min()) > 1e-3


def test_smooth_in_time():
    """The features' derivatives by lam stay moderate up to the fifth: solvers up to that order can be seen."""
    lam = torch.linspace(-8, 8, 401, dtype=torch.float64, requires_grad=True)
    values = time_features(lam, 8)
    for column in values.unbind(-1):
        derivative = column
        for _ in range(5):
            (derivative,) = torch.autograd.grad(derivative.sum(), lam, create_graph=True)
        assert float(derivative.detach().abs().max()) < (0.5 * torch.pi * 8 / 5) ** 5 * 1.5


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"shape": (0,)}, "sizes from 1"),
        ({"shape": (2,), "width": 0}, "sizes from 1"),
        ({"shape": (2,), "depth": 10**9}, "to 65536"),
        ({"shape": (2,), "width": 8.0}, "width as a whole number"),
    ],
)
def test_bad_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        MLP(**sizes)


def test_wrong_event_shape():
    with pytest.raises(ValueError, match=r"expected x of shape \(batch, 1, 8, 8\), got \(2, 64\)"):
        MLP((1, 8, 8))(torch.zeros(2, 64), torch.zeros(2))


# ---- images, labels, a learned variance, preconditioning


def nets():
    small = {"embedding": 16, "harmonics": 4}
    return {
        "MLP": MLP((2, 4, 4), width=16, depth=1, classes=3, learned_variance=True, **small),
        "UNet": UNet((2, 4, 4), width=8, classes=3, learned_variance=True, attention=True, **small),
        "UNet, one level": UNet((2, 5, 3), width=8, multipliers=(1,), **small),
        "EDM": EDMPreconditioned(UNet((2, 4, 4), width=8, classes=3, **small), 0.7),
    }


@pytest.mark.parametrize("name", nets())
def test_on_meta_and_compiled_as_one_graph(name):
    """The checks of arguments are in nobody's way: shapes without values, and no break in a compiled graph."""
    net = nets()[name]
    x, time = torch.randn(6, *net.shape), torch.linspace(0.1, 2, 6)
    assert net.to("meta")(x.to("meta"), time.to("meta")).shape == x.shape
    net = nets()[name]
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(x, time), net(x, time))


def test_a_checked_function_compiles():
    compiled = torch.compile(lambda lam: time_features(lam, 3), backend="eager", fullgraph=True)
    lam = torch.linspace(-6, 6, 7)
    torch.testing.assert_close(compiled(lam), time_features(lam, 3))


@pytest.mark.parametrize("name", nets())
def test_shapes_and_the_start_at_zero(name):
    net = nets()[name]
    x, lam = torch.randn(6, *net.shape), torch.linspace(-6, 6, 6)
    time = torch.exp(-lam) if name == "EDM" else lam
    out = net(x, time)
    assert out.shape == x.shape
    if name == "EDM":
        s = time.reshape(-1, 1, 1, 1)
        torch.testing.assert_close(out, 0.49 / (s**2 + 0.49) * x)  # the inner network starts at 0
    else:
        assert float(out.detach().abs().max()) == 0.0


@pytest.mark.parametrize("name", [n for n in nets() if "level" not in n])
def test_labels_are_read_and_none_is_one_of_them(name):
    net = _awake(nets()[name])
    x, time = torch.randn(4, *net.shape), torch.full((4,), 0.5)
    none = net(x, time)
    labelled = net(x, time, label=torch.tensor([0, 1, 2, 0]))
    assert float((none - labelled).detach().abs().max()) > 1e-4
    torch.testing.assert_close(net(x, time, label=torch.full((4,), 3)), none)
    alone = net(x[1:2], time[:1], label=torch.tensor([1]))
    torch.testing.assert_close(alone, labelled[1:2])
    for label in (torch.tensor([0, 1]), torch.zeros(4)):
        with pytest.raises(ValueError, match="expected one int64 label a sample"):
            net(x, time, label=label)


def test_no_labels_without_classes():
    with pytest.raises(ValueError, match="without classes"):
        MLP((2,), width=8)(torch.zeros(1, 2), torch.zeros(1), label=torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("name", ["MLP", "UNet"])
def test_a_learned_variance_is_the_other_half(name):
    net = _awake(nets()[name])
    x, lam = torch.randn(4, *net.shape), torch.linspace(-2, 2, 4)
    prediction, v = net.both(x, lam)
    torch.testing.assert_close(prediction, net(x, lam))
    assert v.shape == x.shape
    assert bool(((v > 0) & (v < 1)).all())
    assert float(v.detach().std()) > 0
    with pytest.raises(ValueError, match="learned_variance=True"):
        nets()["UNet, one level"].both(x, lam)


@pytest.mark.parametrize("name", nets())
def test_a_checkpoint_rebuilds_it(name, tmp_path):
    net = _awake(nets()[name]).eval()
    process = sf.EDM() if name == "EDM" else sf.VP()
    model = sf.Model(net, process, "x0" if name == "EDM" else "v", "sigma" if name == "EDM" else "lam")
    sf.save_model(tmp_path / "m.safetensors", model)
    again = sf.load_model(tmp_path / "m.safetensors")
    x = torch.randn(3, *net.shape)
    with torch.no_grad():
        assert torch.equal(again.x0(x, 0.5), model.x0(x, 0.5))
    assert again.net.config == net.config


def test_the_preconditioning_is_that_of_edm():
    """Unit variance in and out: for data of variance sigma_d^2 the inner target has variance 1 at every level."""
    torch.manual_seed(0)
    seen = []

    class Spy(torch.nn.Module):
        shape = (1,)

        def forward(self, x, lam):
            seen.append((x, lam))
            return torch.zeros_like(x)

    net = EDMPreconditioned(Spy(), 0.5)
    x0 = 0.5 * torch.randn(200_000, 1, dtype=torch.float64)
    for sigma in (0.02, 0.5, 20.0):
        s = torch.full((len(x0),), sigma, dtype=torch.float64)
        x = x0 + sigma * torch.randn_like(x0)
        skip = net(x, s)
        c_out = sigma * 0.5 / math.sqrt(sigma**2 + 0.25)
        assert abs(float(seen[-1][0].var()) - 1) < 0.02  # 6 standard errors of sqrt(2/200000)
        assert abs(float(((x0 - skip) / c_out).var()) - 1) < 0.02
        assert float(seen[-1][1][0]) == pytest.approx(-math.log(sigma))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UNet((2, 5, 4)), "levels halve"),
        (lambda: UNet((4, 4)), "levels halve"),
        (lambda: UNet((1, 4, 4), width=12), "multiple of 8"),
        (lambda: UNet((1, 4, 4), blocks=0), "sizes from 1"),
        (lambda: MLP((2,), classes=-1), "sizes from 1"),
        (lambda: EDMPreconditioned(MLP((2,)), 0.0), "sigma_data > 0"),
        (lambda: EDMPreconditioned({"name": "Net"}), "description of one of MLP, UNet"),
    ],
)
def test_sizes_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_samples_of_an_image_network_do_not_see_each_other():
    net = _awake(nets()["UNet"])
    x, lam = torch.randn(5, *net.shape), torch.linspace(-1, 1, 5)
    whole = net(x, lam)
    torch.testing.assert_close(torch.cat([net(x[k : k + 1], lam[k : k + 1]) for k in range(5)]), whole)
