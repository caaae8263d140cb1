"""Losses in float32, and what they refuse."""

import math

import pytest
import torch

import sdeflow as sf
from sdeflow import losses
from sdeflow.losses import weights
from tests.exact import F64
from tests.loss_cases import TABLE


def test_float32_keeps_its_dtype_and_most_digits():
    vp, table = sf.VP(), sf.DiscreteVP(TABLE)
    wide = torch.randint(0, 256, (6, 2)).double() / 127.5 - 1
    t, noise = torch.linspace(0.1, 0.9, 6, dtype=F64), torch.randn(6, 2, dtype=F64)
    n = torch.tensor([0, 1, 2, 3, 4, 0])

    def model(process, prediction):
        return sf.Model(lambda x, t: torch.tanh(x), process, prediction, expand=False)

    def all_of(x0, eps):
        yield losses.denoising(model(vp, "eps"), x0, t, eps, weight=weights.min_snr())
        yield losses.flow_matching(model(vp, "v"), x0, t, eps)
        yield losses.kernel_matching(model(vp, "score"), x0, t, losses.kernel_score(vp, x0, t, eps))
        yield losses.implicit(model(vp, "v"), x0, t, weight=weights.likelihood())
        yield losses.sliced(model(vp, "v"), x0, t, eps)
        yield losses.prior_bits(table, x0)
        yield losses.step_bits(model(table, "x0"), x0, n, eps)
        yield losses.hybrid(model(table, "eps"), x0, n, eps, lambda x, t: torch.sigmoid(x))
        yield losses.diffusion_rate(model(vp, "eps"), x0, t, eps)
        yield losses.reconstruction_bits(vp, x0, t, eps)

    for narrow, exact in zip(all_of(wide.float(), noise.float()), all_of(wide, noise), strict=True):
        assert narrow.shape == (6,)
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow.double(), exact, rtol=3e-5, atol=1e-6)


VP_MODEL = sf.Model(lambda x, t: x, sf.VP(), "eps", expand=False)
TABLE_MODEL = sf.Model(lambda x, t: x, sf.DiscreteVP(TABLE), "eps", expand=False)
ZERO = torch.zeros(3, 2, dtype=F64)
PIXEL = ZERO + 1.0
INFINITE = lambda process, t: 1 / (t - t)  # noqa: E731


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: losses.denoising(VP_MODEL, ZERO, 0.5, ZERO, weight=3.0),
            TypeError,
            "weight as a Weight, a function or None",
        ),
        (
            lambda: losses.denoising(VP_MODEL, ZERO, 0.5, ZERO, weight=INFINITE),
            ValueError,
            "finite values >= 0, got inf",
        ),
        (
            lambda: losses.denoising(VP_MODEL, ZERO, 0.5, ZERO, weight=lambda p, t: -t),
            ValueError,
            "got -0.5 at t = 0.5",
        ),
        (
            lambda: losses.denoising(VP_MODEL, ZERO, 0.5, ZERO, weight=lambda p, t: torch.ones(4)),
            ValueError,
            r"one value a time, shape \(\), got \(4,\)",
        ),
        (lambda: losses.Weight(INFINITE, "noise"), ValueError, "unknown prediction 'noise'"),
        (lambda: losses.loss_ratio(sf.VP(), 0.5, "eps", "noise"), ValueError, "unknown prediction 'noise'"),
        (lambda: weights.snr().of(sf.VP(), 0.5, "noise"), ValueError, "unknown prediction 'noise'"),
        (lambda: weights.snr().of(sf.VP(), 0.0, "x0"), ValueError, "snr of the x0 loss: expected finite"),
        (lambda: weights.min_snr(0.0), ValueError, "gamma > 0, got 0.0"),
        (lambda: weights.edm(-1.0), ValueError, "sigma_data > 0"),
        (lambda: weights.sigmoid(math.nan), ValueError, "bias as a number"),
        (lambda: losses.kernel_matching(VP_MODEL, ZERO, 0.5, ZERO[:2]), ValueError, "target of the shape of x"),
        (lambda: losses.kernel_score(sf.VP(), ZERO, 0.5, ZERO[:2]), ValueError, "x0 of the shape of x"),
        (lambda: losses.kernel_score(sf.VP(), ZERO, 0.0, ZERO), ValueError, "no density at t = 0"),
        (lambda: losses.kernel_score(sf.Student(dim=2), ZERO, 0.5, ZERO), TypeError, "no known kernel"),
        (lambda: losses.sliced(VP_MODEL, ZERO, 0.5, ZERO[:, :1]), ValueError, "directions of shape"),
        (lambda: losses.sliced(VP_MODEL, ZERO, 0.5, ZERO[None][:0]), ValueError, "directions of shape"),
        (lambda: losses.implicit(VP_MODEL, ZERO, torch.rand(2)), ValueError, "one time for all"),
        (lambda: losses.step_bits(VP_MODEL, PIXEL, 1, ZERO), TypeError, "Model of a DiscreteVP"),
        (lambda: losses.step_bits(TABLE_MODEL, PIXEL, 5, ZERO), ValueError, r"n in 0..4, got 5"),
        (lambda: losses.step_bits(TABLE_MODEL, PIXEL, 0.5, ZERO), TypeError, "n as a whole number"),
        (lambda: losses.step_bits(TABLE_MODEL, ZERO, 1, ZERO), ValueError, "256 values, evenly spaced"),
        (lambda: losses.step_bits(TABLE_MODEL, PIXEL, 1, ZERO, "beta"), ValueError, "'posterior', 'forward'"),
        (
            lambda: losses.step_bits(TABLE_MODEL, PIXEL, 1, ZERO, lambda x, t: torch.ones(7)),
            ValueError,
            r"v\(x, t\) to broadcast to x",
        ),
        (lambda: losses.step_bits(TABLE_MODEL, PIXEL, 1, ZERO, levels=1), ValueError, "levels to be an integer >= 2"),
        (lambda: losses.step_bits(TABLE_MODEL, PIXEL, 1, ZERO[:2]), ValueError, "eps of the shape of x0"),
        (lambda: losses.hybrid(TABLE_MODEL, PIXEL, 1, ZERO, "posterior"), TypeError, "to be learned"),
        (lambda: losses.hybrid(TABLE_MODEL, PIXEL, 1, ZERO, lambda x, t: x, vlb_weight=-1), ValueError, "vlb_weight"),
        (lambda: losses.reconstruction_bits(sf.VP(), PIXEL, 0.0, ZERO), ValueError, "alpha > 0 and sigma > 0"),
        (lambda: losses.reconstruction_bits(sf.VP(), PIXEL, 0.1, ZERO[:2]), ValueError, "eps of the shape of x0"),
        (lambda: losses.diffusion_rate(VP_MODEL, ZERO, 0.0, ZERO), ValueError, "elbo of the eps loss"),
        (lambda: losses.uniform_times(sf.VP(), 0), ValueError, "n to be an integer"),
        (lambda: losses.offset_times(sf.VP(), 3, 1.5), ValueError, r"t_min in \[0, 1\), got 1.5"),
        (lambda: losses.log_normal_times(sf.VP(), 3, std=0.0), ValueError, "std > 0"),
        (lambda: losses.log_normal_times(sf.VP(), 3, mean=40.0), ValueError, "no mass on the span"),
        (lambda: losses.LossHistory(0), ValueError, "bins to be an integer >= 1"),
        (lambda: losses.LossHistory(3, uniform=2.0), ValueError, r"uniform in \[0, 1\]"),
        (lambda: losses.LossHistory(3).draw(0), ValueError, "n to be an integer"),
        (lambda: losses.LossHistory(3).update(torch.tensor([3]), torch.ones(1)), ValueError, r"bins in 0..2"),
        (lambda: losses.LossHistory(3).update(torch.tensor([1]), torch.ones(2)), ValueError, "losses"),
        (
            lambda: losses.LossHistory(3).update(torch.tensor([1]), torch.tensor([math.nan])),
            ValueError,
            "finite losses",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
