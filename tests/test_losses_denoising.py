"""Denoising losses: minimisers by quadrature, relations between predictions, weights by hand."""

import itertools
import math

import numpy as np
import pytest
import torch

import sdeflow as sf
from sdeflow import losses
from sdeflow.losses import weights
from sdeflow.model import PREDICTIONS
from tests.exact import F64
from tests.loss_cases import MIXTURE, TABLE, around, assert_minimal, curvature, mixture_pairs

SMOOTH = [sf.VP(), sf.SubVP(), sf.VE(0.1, 5.0), sf.EDM(), sf.RectifiedFlow(), sf.CosineVP(), sf.DiscreteVP(TABLE)]


def middle_times(process, count=7):
    share = torch.linspace(0.11, 0.83, count, dtype=F64)
    return process.t_min + share * (process.t1 - process.t_min)


# ---- denoising


@pytest.mark.parametrize("process", [sf.VP(), sf.VE(0.1, 5.0), sf.RectifiedFlow()], ids=repr)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_exact_model_minimises_denoising_of_a_mixture(process, prediction):
    x0, eps, probability = mixture_pairs()
    exact = MIXTURE.model(process)
    t = 0.6
    theta, model = around(lambda x, t: exact(x, t, prediction), process, prediction)
    assert_minimal(losses.denoising(model, x0, t, eps), probability, theta)
    other = losses.denoising(model, x0, t, eps, "v", weight=weights.min_snr())
    assert_minimal(other, probability, theta)
    # control: noise of another size than the process's
    wrong = losses.denoising(model, x0, t, 1.05 * eps)
    assert curvature(wrong, probability, theta)[0] > 1e-4


def test_denoising_is_what_it_was():
    """Values and draws that trained weights depend on, by the formulas they had."""
    process, x0, eps = sf.VP(), torch.randn(6, 3), torch.randn(6, 3)
    model = sf.Model(lambda x, t: torch.tanh(x + t[:, None]), process, "v")
    t = torch.linspace(0.1, 0.9, 6, dtype=F64)
    alpha, sigma = (v(t)[:, None].float() for v in (process.alpha, process.sigma))
    want = (torch.tanh(alpha * x0 + sigma * eps + t[:, None].float()) - (-sigma * x0 + alpha * eps)).square().mean(1)
    got = losses.denoising(model, x0, t, eps)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    torch.manual_seed(3)
    times = losses.stratified_times(process, 5)
    after = torch.rand(())
    torch.manual_seed(3)
    u = torch.rand((), dtype=F64)
    assert torch.equal(after, torch.rand(()))  # one number was drawn
    low, high = (math.atan(math.exp(-float(process.lam(v)))) for v in (1e-5, 1.0))
    angle = low + (torch.arange(5, dtype=F64) + u) / 5 * (high - low)
    torch.testing.assert_close(torch.atan(torch.exp(-process.lam(times))), angle, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        losses.stratified_times(process, 5, generator=torch.Generator().manual_seed(3)), times, rtol=0, atol=0
    )


@pytest.mark.parametrize("process", SMOOTH, ids=repr)
def test_losses_of_two_predictions(process):
    """loss_ratio relates every pair of losses, sample by sample; flow matching is the one of the velocity."""
    t = middle_times(process)
    x0, eps = torch.randn(7, 2, dtype=F64), torch.randn(7, 2, dtype=F64)
    for own in PREDICTIONS:
        model = sf.Model(lambda x, t: torch.tanh(x), process, own, expand=False)
        loss = {name: losses.denoising(model, x0, t, eps, name) for name in PREDICTIONS}
        for given, wanted in itertools.product(PREDICTIONS, repeat=2):
            ratio = losses.loss_ratio(process, t, given, wanted)
            torch.testing.assert_close(ratio * loss[given], loss[wanted], rtol=1e-10, atol=0)
        torch.testing.assert_close(losses.flow_matching(model, x0, t, eps), loss["velocity"], rtol=0, atol=0)


def test_flow_matching_is_weighted_noise_prediction():
    t = torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    ratio = losses.loss_ratio(sf.RectifiedFlow(), t, "eps", "velocity")
    torch.testing.assert_close(ratio, (1 - t) ** -2, rtol=1e-12, atol=0)
    for process in SMOOTH[:4]:
        t = middle_times(process)
        slope = 0.5 * process.diffusion_coeff(t) ** 2 / process.sigma(t) ** 2  # -lam'
        ratio = losses.loss_ratio(process, t, "eps", "velocity")
        torch.testing.assert_close(ratio, (process.sigma(t) * slope) ** 2, rtol=1e-10, atol=0)


# ---- weights


def by_hand(process, t):
    """name -> (weight, prediction, values), from alpha, sigma, g."""
    alpha, sigma, g = process.alpha(t), process.sigma(t), process.diffusion_coeff(t)
    snr = alpha**2 / sigma**2
    speed = g**2 / (2 * sigma**2)
    u = sigma / alpha
    return {
        "uniform": (weights.uniform("v"), "v", torch.ones_like(t)),
        "snr": (weights.snr(), "x0", snr),
        "snr of eps": (weights.snr(), "eps", torch.ones_like(t)),
        "truncated": (weights.truncated_snr(), "x0", torch.maximum(snr, torch.ones_like(t))),
        "min": (weights.min_snr(3.0), "x0", torch.minimum(snr, torch.full_like(t, 3))),
        "min of eps": (weights.min_snr(3.0), "eps", torch.minimum(snr, torch.full_like(t, 3)) / snr),
        "min of v": (
            weights.min_snr(3.0),
            "v",
            torch.minimum(snr, torch.full_like(t, 3)) / (snr + 1) / (alpha**2 + sigma**2),
        ),
        "sigma^2": (weights.noise_variance(), "score", sigma**2),
        "sigma^2 of eps": (weights.noise_variance(), "eps", torch.ones_like(t)),
        "likelihood": (weights.likelihood(), "score", g**2),
        "elbo of score": (weights.elbo(), "score", g**2 / 2),
        "elbo of x0": (weights.elbo(), "x0", speed * snr),
        "edm": (weights.edm(0.7), "x0", (u**2 + 0.49) / (u * 0.7) ** 2),
        "sigmoid": (weights.sigmoid(-1.0), "eps", speed / (1 + snr * math.exp(1.0))),
        "cosine": (weights.cosine(), "eps", speed * 2 / (alpha / sigma + sigma / alpha)),
        "by lam": (weights.by_lam(lambda lam: lam**2), "eps", speed * torch.log(alpha / sigma) ** 2),
    }


@pytest.mark.parametrize("process", SMOOTH, ids=repr)
def test_weights_by_hand(process):
    t = middle_times(process)
    for name, (weight, prediction, want) in by_hand(process, t).items():
        got = weight.of(process, t, prediction)
        assert got.dtype == F64
        torch.testing.assert_close(got, want, rtol=1e-10, atol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("process", SMOOTH, ids=repr)
def test_one_objective_whatever_the_prediction(process):
    t = middle_times(process)
    x0, eps = torch.randn(7, 2, dtype=F64), torch.randn(7, 2, dtype=F64)
    model = sf.Model(lambda x, t: torch.tanh(x), process, "v", expand=False)
    for weight, prediction, want in by_hand(process, t).values():
        base = want * losses.denoising(model, x0, t, eps, prediction)
        for name in PREDICTIONS:
            loss = losses.denoising(model, x0, t, eps, name, weight=weight)
            torch.testing.assert_close(loss, base, rtol=1e-9, atol=0)
        assert repr(weight)
    plain = losses.denoising(model, x0, t, eps, weight=lambda process, t: process.sigma(t))
    torch.testing.assert_close(plain, process.sigma(t) * losses.denoising(model, x0, t, eps), rtol=1e-12, atol=0)


def test_weights_where_no_data_is_left():
    """At alpha = 0, where noise prediction says nothing about the data, those for x0 and v have their limits."""
    process = sf.DiscreteVP(TABLE, zero_terminal_snr=True)
    limits = {weights.snr(): 0.0, weights.min_snr(): 0.0, weights.truncated_snr(): 1.0, weights.edm(0.5): 4.0}
    for weight, want in limits.items():
        for prediction in ("x0", "v"):
            assert float(weight.of(process, 1.0, prediction)) == pytest.approx(want, abs=1e-15)
    assert float(weights.snr().of(process, 1.0, "eps")) == 1.0
    with pytest.raises(ValueError, match=r"edm\(0.5\) of the eps loss: .*got inf at t = 1"):
        weights.edm(0.5).of(process, 1.0, "eps")


def test_cosine_weight_is_noise_prediction_on_the_cosine_schedule():
    cosine = sf.GaussianSDE.from_kernel(lambda t: torch.cos(math.pi * t / 2), lambda t: torch.sin(math.pi * t / 2))
    t = torch.linspace(0.05, 0.95, 9, dtype=F64)
    torch.testing.assert_close(weights.cosine().of(cosine, t, "eps"), torch.full_like(t, math.pi), rtol=1e-10, atol=0)


def test_a_weight_in_lam_is_one_objective_on_every_schedule():
    """int w(lam) D(lam) dlam over the same levels, by quadrature in t, on three schedules."""
    nodes, w = np.polynomial.legendre.leggauss(80)
    found = []
    for process in (sf.VP(), sf.CosineVP(), sf.GaussianSDE.from_kernel(lambda t: 1 - t, lambda t: t)):
        start, end = (float(process.time_of_lam(torch.tensor(v, dtype=F64))) for v in (2.0, -2.0))
        t = start + (end - start) * torch.from_numpy(nodes + 1) / 2
        value = weights.sigmoid(0.5).of(process, t, "eps") * process.lam(t) ** 2
        found.append(float((value * torch.from_numpy(w)).sum() * (end - start) / 2))
    assert found == pytest.approx([found[0]] * 3, rel=1e-9)
