import pytest
import torch

import sdeflow as sf
from sdeflow.nets import MLP, time_features


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
        ({"shape": (2,), "width": 8.0}, "sizes from 1"),
    ],
)
def test_bad_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        MLP(**sizes)


def test_wrong_event_shape():
    with pytest.raises(ValueError, match=r"expected x of shape \(batch, 1, 8, 8\), got \(2, 64\)"):
        MLP((1, 8, 8))(torch.zeros(2, 64), torch.zeros(2))
