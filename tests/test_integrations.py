"""Bridges: k-diffusion's denoisers, EDM's preconditioned networks, any torch module, and the Hugging Face Hub."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
import itertools
import pickle
import shutil
import sys
import types

import numpy as np
import pytest
import torch

import sdeflow as sf
from sdeflow.integrations import hub, k_diffusion

F64 = torch.float64
VP, EDM = sf.VP(), sf.EDM()
MIXTURE = sf.problems.GaussianMixture([[1.5, -0.5], [-1.0, 1.0]], 0.09)
PROCESSES = {
    "VP": VP,
    "SubVP": sf.SubVP(),
    "VE": sf.VE(),
    "CosineVP": sf.CosineVP(),
    "EDM": EDM,
    "RectifiedFlow": sf.RectifiedFlow(),
    "DiscreteVP": sf.DiscreteVP(torch.linspace(1e-4, 0.02, 1000, dtype=F64)),
    "kernel": sf.GaussianSDE.from_kernel(lambda t: 1 / (1 + t), lambda t: t + 0.1 * t**2, 0.0, 3.0),
}


def posterior_mean(y, u):
    """E[x_0 | y] of y = x_0 + u eps for MIXTURE, by Bayes' rule on its two components; u (batch,)."""
    means = torch.tensor([[1.5, -0.5], [-1.0, 1.0]], dtype=y.dtype)
    variance = (u**2)[:, None]
    gap = y[:, None, :] - means
    weight = torch.softmax(-0.5 * (gap**2).sum(-1) / (0.09 + variance), dim=1)
    each = means + 0.09 / (0.09 + variance[:, None]) * gap
    return (weight[..., None] * each).sum(1)


def ve_states(count=64, top=10.0):
    generator = torch.Generator().manual_seed(0)
    u = torch.logspace(-1.5, float(np.log10(top)), count, dtype=F64)
    return MIXTURE.sample(count, seed=0) + u[:, None] * torch.randn(count, 2, dtype=F64, generator=generator), u


# ---- a model as a denoiser, and back


@pytest.mark.parametrize("name", PROCESSES)
def test_the_denoiser_of_a_model_is_the_posterior_mean_whatever_its_process(name):
    y, u = ve_states()
    denoiser = k_diffusion.as_denoiser(MIXTURE.model(PROCESSES[name]))
    keep = (u >= denoiser.sigma_min) & (u <= denoiser.sigma_max)
    assert int(keep.sum()) > 20
    y, u = y[keep], u[keep]
    torch.testing.assert_close(denoiser(y, u), posterior_mean(y, u), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(denoiser(y, u[5]), posterior_mean(y, u[5].expand(len(u))), rtol=1e-6, atol=1e-7)
    if float(PROCESSES[name].alpha(0.5 * PROCESSES[name].t1)) < 0.9:  # the test sees a scale that was forgotten
        t = denoiser.time(u, F64)
        assert not torch.allclose(denoiser.model.x0(y, t), posterior_mean(y, u), rtol=1e-2)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_denoiser_as_a_model_of_any_process_has_its_score(name):
    process = PROCESSES[name]
    model, exact = k_diffusion.from_denoiser(posterior_mean, process), MIXTURE.model(process)
    t = process.t0 + (process.t1 - process.t0) * torch.tensor([0.01, 0.3, 0.9], dtype=F64)
    x = process.perturb(MIXTURE.sample(3, seed=1), t, torch.randn(3, 2, dtype=F64))
    for as_ in ("score", "x0", "eps"):
        torch.testing.assert_close(model(x, t, as_), exact(x, t, as_), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.x0(x, 0.5 * process.t1), exact.x0(x, 0.5 * process.t1), rtol=1e-6, atol=1e-6)
    back = k_diffusion.as_denoiser(model)
    u = torch.exp(-process.lam(t))
    torch.testing.assert_close(back(x / process.alpha(t)[:, None], u), posterior_mean(x / process.alpha(t)[:, None], u))


def euler_in_sigma(denoiser, x, sigmas):
    """k-diffusion's Euler sampler, as anyone would write it."""
    for u, after in itertools.pairwise(sigmas):
        slope = (x - denoiser(x, u * x.new_ones(len(x)))) / u
        x = x + (after - u) * slope
    return x


def karras(count, low, high):
    ramp = torch.linspace(0, 1, count, dtype=F64)
    levels = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    return torch.cat([levels, levels.new_zeros(1)])


def start_and_grid(process, sigmas):
    """(a start at sigmas[0], the same in the process's variable, the levels in its time), ending at sigma = 0."""
    grid = torch.cat([process.time_of_lam(-torch.log(sigmas[:-1])), torch.zeros(1, dtype=F64)])
    x = sigmas[0] * torch.randn(32, 2, dtype=F64, generator=torch.Generator().manual_seed(3))
    return x, process.alpha(grid[0]) * x, grid


@pytest.mark.parametrize("process", [VP, EDM, PROCESSES["DiscreteVP"]], ids=repr)
def test_a_hand_written_euler_loop_in_sigma_is_EDMEuler(process):
    model = MIXTURE.model(process)
    sigmas = karras(12, 0.02, 20.0)
    x, start, grid = start_and_grid(process, sigmas)
    loop = euler_in_sigma(k_diffusion.as_denoiser(model), x, sigmas)
    ours = sf.solve(process.probability_flow(model), start, sf.solvers.EDMEuler(), grid=grid).x
    torch.testing.assert_close(ours, loop, rtol=1e-9, atol=1e-9)
    other = euler_in_sigma(k_diffusion.as_denoiser(model), x, karras(13, 0.02, 20.0))
    assert (other - loop).abs().max() > 1e-3  # the comparison sees another grid


@pytest.fixture(scope="module")
def real_sampling():
    """The sampling module of the real package, which is here only if someone installed it.

    Its package imports everything it has, CLIP and wandb's neighbours too, but `k_diffusion.sampling` needs only
    what the tests have, and torchvision for pictures that are not drawn here: an empty stand-in serves.
    """
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        pytest.skip("k_diffusion is not installed: pip install --no-deps k-diffusion")
    before = dict(sys.modules)
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["k_diffusion"] = package
    if importlib.util.find_spec("torchvision") is None:
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["torchvision.transforms"].functional = sys.modules["torchvision.transforms.functional"]
    try:
        yield importlib.import_module("k_diffusion.sampling"), importlib.import_module("k_diffusion.external")
    finally:
        for name in set(sys.modules) - set(before):
            if name.partition(".")[0] in ("k_diffusion", "torchvision"):
                del sys.modules[name]


SAME = {
    "sample_euler": sf.solvers.EDMEuler(),
    "sample_heun": sf.solvers.EDMHeun(),
    "sample_dpmpp_2m": sf.solvers.DPMSolverPP(2, second="midpoint"),
    "sample_dpm_2": sf.solvers.DPM2(),
    "sample_lms": sf.solvers.LMS(4),
}


@pytest.mark.parametrize("sampler", SAME)
@pytest.mark.parametrize("process", [VP, EDM], ids=repr)
def test_samplers_of_the_real_package_run_our_models_to_our_ends(real_sampling, process, sampler):
    model = MIXTURE.model(process)
    sigmas = real_sampling[0].get_sigmas_karras(12, 0.02, 20.0).to(F64)
    x, start, grid = start_and_grid(process, sigmas)
    theirs = getattr(real_sampling[0], sampler)(k_diffusion.as_denoiser(model), x, sigmas, disable=True)
    ours = sf.solve(process.probability_flow(model), start, SAME[sampler], grid=grid).x
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert (
        sf.solve(process.probability_flow(model), start, sf.solvers.UniPC(2), grid=grid).x - theirs
    ).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("sampler", "theirs", "solver", "ours"),
    [
        ("sample_euler_ancestral", 0.7, sf.solvers.EulerAncestral(0.7), 0.0),
        ("sample_dpmpp_2m_sde", 1.0, sf.solvers.DPMSolverPP(2, second="midpoint"), 1.0),
        ("sample_dpmpp_2m_sde", 0.5, sf.solvers.DPMSolverPP(2, second="midpoint"), 0.5**0.5),
    ],
)
def test_a_stochastic_step_of_the_real_package_is_ours_on_the_same_normals(
    real_sampling, sampler, theirs, solver, ours
):
    model = MIXTURE.model(VP)
    sigmas = karras(12, 0.02, 20.0)[3:5]
    x, normals = 5 * torch.randn(2, 32, 2, dtype=F64, generator=torch.Generator().manual_seed(4))
    grid = VP.time_of_lam(-torch.log(sigmas))
    sample = getattr(real_sampling[0], sampler)
    end = sample(
        k_diffusion.as_denoiser(model), x, sigmas, eta=theirs, noise_sampler=lambda a, b: normals, disable=True
    )
    start = VP.alpha(grid[0]) * x

    def step(eta):
        plan = solver.plan(VP.reverse(model, eta), grid)
        assert plan.target == "x0"
        return plan.ratio[0] * start + plan.weights[0, 0] * model.x0(start, plan.times[0]) + plan.noise[0] * normals

    torch.testing.assert_close(step(ours), VP.alpha(grid[1]) * end, rtol=1e-9, atol=1e-9)
    if ours:
        assert (step(0.9 * ours) - VP.alpha(grid[1]) * end).abs().max() > 1e-2  # the step sees another eta


def test_wrappers_of_the_real_package_are_models(real_sampling):
    process = PROCESSES["DiscreteVP"]
    exact = MIXTURE.model(process)
    table = torch.cumprod(1 - process.betas, 0)

    def network(x, index):  # what a DDPM network is: eps at a fractional index
        return exact.eps(
            x, process.time_of_lam(torch.log(process.alpha((index + 1) / 1000) / process.sigma((index + 1) / 1000)))
        )

    wrapper = real_sampling[1].DiscreteEpsDDPMDenoiser(network, table, quantize=False)
    model = k_diffusion.from_denoiser(wrapper)
    assert model.sde.sigma_min == pytest.approx(float(torch.sqrt(1 / table[0] - 1)))
    assert model.sde.sigma_max == pytest.approx(float(torch.sqrt(1 / table[-1] - 1)))
    y, u = ve_states(32)
    torch.testing.assert_close(
        model.x0(y, u), posterior_mean(y, u), rtol=1e-3, atol=1e-3
    )  # their table is linear in log u


def test_a_denoiser_keeps_dtype_passes_conditions_and_refuses_what_it_cannot_do():
    asked = []

    def network(x, t, shift):
        asked.append((x.dtype, t.dtype, tuple(t.shape)))
        return x * 0 + shift[:, None].to(x)

    denoiser = k_diffusion.as_denoiser(sf.Model(network, VP, "x0"))
    for dtype in (torch.float32, torch.bfloat16, F64):
        shift = torch.arange(3.0)
        out = denoiser(torch.ones(3, 2, dtype=dtype), torch.ones(3, dtype=dtype), shift=shift)
        assert out.dtype == dtype
        assert torch.equal(out, shift[:, None].to(dtype).expand(3, 2))
        assert asked.pop() == (dtype, dtype, (3,))
    assert denoiser.model.nfe == 3
    top = torch.tensor(denoiser.sigma_max, dtype=torch.float32)  # rounded up: still the end of the process
    assert float(denoiser.time(top * (1 + 5e-7))) == 1.0
    x = torch.ones(3, 2)
    for sigma in (200.0, -1.0, float("nan"), torch.tensor([1.0, 1.0, 500.0])):
        with pytest.raises(ValueError, match="expected levels sigma/alpha"):
            denoiser(x, sigma, shift=torch.zeros(3))
    with pytest.raises(ValueError, match="'shift': expected one row a sample"):
        denoiser(x, 1.0, shift=torch.zeros(4))
    with pytest.raises(TypeError, match="does not take label"):
        denoiser(x, 1.0, label=torch.zeros(3))
    with pytest.raises(ValueError, match="one time for all samples or one a sample"):
        denoiser(x, torch.ones(2), shift=torch.zeros(3))
    with pytest.raises(TypeError, match="expected a Model"):
        k_diffusion.as_denoiser(network)
    with pytest.raises(ValueError, match="GaussianSDE"):
        k_diffusion.as_denoiser(sf.Model(lambda x, t: -x, sf.CLD(), "score"))


def test_the_range_of_a_denoiser_is_given_or_its_own():
    def plain(x, sigma):
        return x / (1 + sigma[:, None] ** 2)

    with pytest.raises(ValueError, match="expected sigma_min, as function has no attribute"):
        k_diffusion.from_denoiser(plain)
    assert k_diffusion.from_denoiser(plain, sigma_min=0.03, sigma_max=14.6).sde == sf.EDM(0.03, 14.6)
    plain.sigma_min, plain.sigma_max = torch.tensor(0.5), 7.0
    assert k_diffusion.from_denoiser(plain).sde == sf.EDM(0.5, 7.0)
    assert k_diffusion.from_denoiser(plain, sigma_max=9).sde == sf.EDM(0.5, 9)
    assert k_diffusion.from_denoiser(plain, sf.VE()).sde == sf.VE()
    with pytest.raises(ValueError, match="got both"):
        k_diffusion.from_denoiser(plain, VP, sigma_max=3.0)
    with pytest.raises(TypeError, match="expected a denoiser"):
        k_diffusion.from_denoiser("denoiser")
    with pytest.raises(TypeError, match="GaussianSDE"):
        k_diffusion.from_denoiser(plain, "VP")
    with pytest.raises(ValueError, match="sigma"):
        k_diffusion.from_denoiser(plain, sigma_min=3.0, sigma_max=2.0)


# ---- EDM's preconditioned networks


class Preconditioned(torch.nn.Module):
    """The signature and the attributes of NVlabs' networks; exact for N(0, sigma_data^2), shifted by the class."""

    sigma_min, sigma_max, sigma_data, label_dim = 0, float("inf"), 0.5, 3

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, sigma, class_labels=None, force_fp32=False, **model_kwargs):
        x, sigma = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        mean = 0 if class_labels is None else class_labels.argmax(1).to(x).reshape(-1, 1, 1, 1)
        variance = self.sigma_data**2
        return mean + self.gain * variance / (variance + sigma**2) * (x - mean)

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)


def test_an_edm_network_is_a_model_in_one_line():
    net = Preconditioned()
    model = k_diffusion.from_denoiser(net)
    assert model.sde == sf.EDM()
    by_hand = sf.Model(net, sf.EDM(), "x0", "sigma")
    x, sigma = 3 * torch.randn(4, 1, 2, 2), torch.tensor([0.1, 1.0, 5.0, 50.0])
    assert torch.equal(model.x0(x, sigma), by_hand.x0(x, sigma))
    torch.testing.assert_close(model.score(x, sigma), -x / (0.25 + sigma**2)[:, None, None, None], rtol=1e-4, atol=1e-6)
    labels = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 2]), 3)
    drawn = sf.sample(
        model.bind(class_labels=labels.repeat(250, 1)), 1000, shape=(1, 2, 2), solver=sf.solvers.EDMHeun(), steps=18,
        seed=0,
    ).x  # fmt: skip
    assert drawn.dtype == torch.float32
    # means of 1000 or 2000 normals of deviation 1/2 are within 0.08 of theirs but once in 10^6
    for of, want in ((slice(0, None, 4), 0.0), (slice(1, None, 4), 1.0), (slice(2, None, 4), 2.0)):
        assert drawn[of].mean() == pytest.approx(want, abs=0.08)
        assert drawn[of].std() == pytest.approx(0.5, abs=0.06)


# ---- any network


class Plain(torch.nn.Module):
    """net(x, t): the exact eps of N(0, 1/4) under VP, and whatever `scale` adds."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, t):
        sigma = VP.sigma(t.double()).to(x)[:, None]
        return self.scale * sigma / (0.25 * (1 - sigma**2) + sigma**2) * x


class Conditional(Plain):
    def forward(self, x, t, cond):
        return super().forward(x - cond, t)


class OfSigma(torch.nn.Module):
    def forward(self, x, sigma):
        return x * (0.25 / (0.25 + sigma[:, None] ** 2))


def exact_vp(x, t):
    sigma = float(VP.sigma(t))
    return -x / (0.25 * (1 - sigma**2) + sigma**2)


@pytest.mark.parametrize("wrap", ["module", "function", "compiled", "parallel", "partial method"])
def test_any_network_of_x_and_t(wrap):
    net = Plain()
    call = {
        "module": net,
        "function": lambda x, t: net(x, t),
        "compiled": torch.compile(net, backend="eager"),
        "parallel": torch.nn.DataParallel(net),
        "partial method": net.forward,
    }[wrap]
    model = sf.Model(call, VP, "eps")
    x = torch.randn(8, 2)
    torch.testing.assert_close(model.score(x, 0.4), exact_vp(x, 0.4), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        x = sf.sample(model, 4, shape=(2,), solver=sf.solvers.DDIM(), steps=4, seed=0).x
        assert torch.equal(
            x, sf.sample(sf.Model(net, VP, "eps"), 4, shape=(2,), solver=sf.solvers.DDIM(), steps=4, seed=0).x
        )


def test_networks_of_sigma_and_of_a_condition():
    model = sf.Model(OfSigma(), EDM, "x0", "sigma")
    x = torch.randn(8, 2)
    torch.testing.assert_close(model.score(x, 3.0), -x / (0.25 + 9.0))
    cond = torch.randn(8, 2)
    conditional = sf.Model(Conditional(), VP, "eps").bind(cond=cond)
    torch.testing.assert_close(conditional.score(x, 0.4), exact_vp(x - cond, 0.4), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="'cond': expected one row a sample"):
        sf.sample(conditional, 4, shape=(2,), solver=sf.solvers.DDIM(), steps=2)


def test_a_network_in_16_bits_samples_in_its_own_dtype_or_says_which_it_wants():
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2).to(torch.bfloat16)
    seen = []

    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net

        def forward(self, x, t):
            seen.append((x.dtype, t.dtype))
            return self.inner(torch.cat([x, t[:, None]], 1))

    model = sf.Model(Half(), VP, "eps")
    drawn = sf.sample(model, 4, shape=(2,), solver=sf.solvers.DDIM(), steps=3, seed=0).x
    assert drawn.dtype == torch.bfloat16
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    with pytest.raises(RuntimeError, match="dtype"):
        sf.sample(model, 4, shape=(2,), solver=sf.solvers.DDIM(), steps=3, seed=0, dtype=torch.float32)
    # float32 states and an exact time around the same network
    mixed = sf.Model(lambda x, t: net(torch.cat([x, t[:, None]], 1).bfloat16()), VP, "eps", lambda t: 999 * t)
    finer = sf.sample(mixed, 4, shape=(2,), solver=sf.solvers.DDIM(), steps=3, seed=0).x
    assert finer.dtype == torch.float32


def test_a_network_that_returns_no_tensor_is_told_what_to_do():
    for value in ((torch.zeros(2, 2), None), {"sample": torch.zeros(2, 2)}, types.SimpleNamespace(sample=0), None):
        model = sf.Model(lambda x, t, value=value: value, VP, "eps")
        with pytest.raises(ValueError, match=rf"returned {type(value).__name__} .*wrap the network.*net\(x, t\)\[0\]"):
            sf.sample(model, 2, shape=(2,), solver=sf.solvers.DDIM(), steps=2)
    with pytest.raises(ValueError, match=r"returned \(2, 3\) for x of shape \(2, 2\)"):
        sf.Model(lambda x, t: torch.zeros(2, 3), VP, "eps").score(torch.zeros(2, 2), 0.5)


class Predicted(torch.nn.Module):
    """A network of any time."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.7))

    def forward(self, x, t):
        return self.weight * x * torch.cos(t)[:, None]


def tripled(t):
    return 3 * t


@pytest.mark.parametrize(
    ("name", "time"),
    [
        ("DiscreteVP", "discrete"),
        ("VE", "sigma"),
        ("VP", "lam"),
        ("VP", tripled),
        *((name, None) for name in PROCESSES if name != "kernel"),
    ],
)
def test_a_model_and_its_reversal_are_pickled_where_the_network_is(name, time):
    process = PROCESSES[name]
    model = sf.Model(Predicted(), process, "x0", time)
    x, t = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), 0.4 * process.t1
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again.score(x, t), model.score(x, t))
    assert again.sde == model.sde
    reverse = model.gaussian.reverse(model)
    file = io.BytesIO()
    torch.save(reverse, file)
    file.seek(0)
    for other in (pickle.loads(pickle.dumps(reverse)), torch.load(file, weights_only=False), copy.deepcopy(reverse)):
        at = torch.tensor(t, dtype=F64)
        assert torch.equal(other.drift(x, at), reverse.drift(x, at))
        grid = torch.tensor([0.9, 0.6, 0.4], dtype=F64) * process.t1
        ends = [sf.solve(one, x, sf.solvers.EulerMaruyama(), grid=grid, seed=0).x for one in (other, reverse)]
        assert torch.equal(*ends)


# ---- one label for all


def labelled(kind):
    torch.manual_seed(0)
    if kind == "UNet":
        net, event = sf.nets.UNet((1, 4, 4), width=8, classes=3), (1, 4, 4)
    else:
        net, event = sf.nets.MLP((2,), width=8, depth=1, classes=3), (2,)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if kind == "EDM":
        return sf.Model(sf.nets.EDMPreconditioned(net), EDM, "x0", "sigma"), event
    return sf.Model(net, VP, "v", "lam"), event


@pytest.mark.parametrize("kind", ["MLP", "UNet", "EDM"])
def test_one_label_is_that_of_every_sample(kind):
    model, event = labelled(kind)
    how = {"shape": event, "solver": sf.solvers.DDIM(), "steps": 3, "seed": 0}
    want = sf.sample(model.bind(label=torch.full((5,), 2)), 5, **how).x
    for label in (2, np.int64(2), torch.tensor(2)):
        assert torch.equal(sf.sample(model.bind(label=label), 5, **how).x, want)
    assert not torch.allclose(sf.sample(model.bind(label=1), 5, **how).x, want)
    assert torch.equal(sf.sample(model.bind(label=None), 5, **how).x, sf.sample(model, 5, **how).x)
    assert torch.equal(sf.sample(model.bind(label=3), 5, **how).x, sf.sample(model, 5, **how).x)  # 3 is none


def test_one_label_follows_samples_that_leave_guidance_and_adaptive_steps():
    model, event = labelled("MLP")
    rows, one = model.bind(label=torch.full((5,), 2)), model.bind(label=2)
    how = {"shape": event, "solver": sf.solvers.RK45(), "rtol": 1e-3, "atol": 1e-3, "seed": 0}
    assert torch.equal(sf.sample(one, 5, **how).x, sf.sample(rows, 5, **how).x)
    guided = sf.guidance.classifier_free(model, model, 2.0)
    fixed = {"shape": event, "solver": sf.solvers.DDIM(), "steps": 3, "seed": 0}
    both = [sf.sample(guided.bind(label=label), 5, **fixed).x for label in (2, torch.full((5,), 2))]
    assert torch.equal(*both)


@pytest.mark.parametrize(
    ("label", "error", "message"),
    [
        (4, ValueError, "expected labels 0 to 2, or 3 for none, got 4"),
        (-1, ValueError, "got -1"),
        (True, TypeError, "whole number"),
        (2.0, TypeError, "whole number"),
        ("2", TypeError, "whole number"),
        ([0, 1], TypeError, "whole number"),
        (torch.tensor(2.0), TypeError, "whole number"),
        (torch.tensor([0.0, 1.0]), ValueError, "one int64 label a sample"),
        (torch.tensor([[0, 1]]), ValueError, "one int64 label a sample"),
        (torch.tensor([0, 7]), ValueError, "labels from 0 to 7"),
    ],
)
def test_a_label_that_the_network_cannot_take_is_refused_when_bound(label, error, message):
    for kind in ("MLP", "EDM"):
        with pytest.raises(error, match=message):
            labelled(kind)[0].bind(label=label)


def test_labels_of_a_network_without_and_of_another_batch_are_refused():
    with pytest.raises(ValueError, match="made without classes"):
        sf.Model(sf.nets.MLP((2,), width=8, depth=1), VP, "v", "lam").bind(label=1)
    with pytest.raises(ValueError, match="'label': expected one row a sample"):
        sf.sample(labelled("MLP")[0].bind(label=torch.tensor([1, 2])), 3, shape=(2,), steps=2)
    told = []
    passed = sf.Model(lambda x, t, label: told.append(label) or x, VP).bind(label=3)
    passed.eps(torch.ones(2, 2), 0.5)
    assert told == [3]  # someone else's network: as it is
    assert type(told[0]) is int


# ---- the Hub


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "made.safetensors"
    sf.save_model(path, labelled("MLP")[0], seed=7)
    return path


SHA = "0123456789abcdef0123456789abcdef01234567"


def cached(cache, source, filename="model.safetensors", repo="models--owner--name"):
    """A file in the Hub client's cache, as a download leaves it: a blob, a link to it, and the branch."""
    folder = cache / repo
    link = folder / "snapshots" / SHA / filename
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(SHA)
    (folder / "blobs").mkdir(exist_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    blob = folder / "blobs" / filename.replace("/", "-")
    shutil.copy(source, blob)
    link.symlink_to(blob)
    return cache


def test_a_model_comes_out_of_the_cache_without_a_network(checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    cache = cached(tmp_path / "hub", checkpoint)
    want = sf.load_model(checkpoint).net.state_dict()
    for revision in (None, "main", SHA):
        model = hub.load_model("owner/name", revision=revision, cache_dir=cache, local_files_only=True)
        assert all(torch.equal(value, want[key]) for key, value in model.net.state_dict().items())
    cached(cache, checkpoint, "ema/best.safetensors", "models--owner--other")
    other = hub.load_model("owner/other", "ema/best.safetensors", cache_dir=cache, local_files_only=True)
    assert other.sde == VP
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # HF_HUB_OFFLINE=1, read at import
    assert hub.load_model("owner/name", cache_dir=cache).prediction == "v"


def test_what_the_cache_does_not_have_is_an_error_of_the_client(checkpoint, tmp_path):
    client = pytest.importorskip("huggingface_hub")
    cache = cached(tmp_path / "hub", checkpoint)
    for where in (("owner/nobody",), ("owner/name", "absent.safetensors")):
        with pytest.raises(client.errors.LocalEntryNotFoundError):
            hub.load_model(*where, cache_dir=cache, local_files_only=True)
    with pytest.raises(client.errors.HFValidationError):
        hub.load_model("../../name", cache_dir=cache, local_files_only=True)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the pickle ran')",))


def test_hostile_files_are_refused(tmp_path, checkpoint):
    pytest.importorskip("huggingface_hub")
    good = checkpoint.read_bytes()
    contents = {
        "pickle": pickle.dumps(Bomb()),
        "cut": good[:-8],
        "oversize-header": (1 << 60).to_bytes(8, "little") + good[8:],
        "empty": b"",
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
        cache = cached(tmp_path / "hub", tmp_path / name, repo=f"models--owner--{name}")
        with pytest.raises(ValueError, match="not a safetensors file"):
            hub.load_model(f"owner/{name}", cache_dir=cache, local_files_only=True)
    with pytest.raises(SystemExit):  # the pickle would have done something
        pickle.loads(contents["pickle"])


@pytest.mark.parametrize(
    ("filename", "message"),
    [
        ("model.bin", "expected the name of a .safetensors file, got 'model.bin': other formats can run code"),
        ("model.pt", "can run code"),
        ("model.ckpt", "can run code"),
        ("", "can run code"),
        ("../x.safetensors", "inside the repository"),
        ("a/../../x.safetensors", "inside the repository"),
        ("/etc/x.safetensors", "inside the repository"),
        ("..\\x.safetensors", "inside the repository"),
        ("C:x.safetensors", "inside the repository"),
        ("x\0.safetensors", "inside the repository"),
    ],
)
def test_only_safetensors_inside_the_repository_are_asked_for(filename, message, monkeypatch):
    def asked(*args, **kwargs):
        raise AssertionError("the client was asked")

    monkeypatch.setattr(hub, "_client", asked)
    with pytest.raises(ValueError, match=message):
        hub.load_model("owner/name", filename)


def test_the_arguments_reach_the_client(checkpoint, monkeypatch):
    calls = []

    def download(repo_id, filename, **rest):
        calls.append((repo_id, filename, rest))
        return str(checkpoint)

    monkeypatch.setattr(hub, "_client", lambda: types.SimpleNamespace(hf_hub_download=download))
    how = {"revision": "v1", "cache_dir": "there", "token": "secret", "local_files_only": False}
    hub.load_model("owner/name", "x.safetensors", **how)
    assert calls == [("owner/name", "x.safetensors", how)]


def test_without_the_client_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'pip install "sdeflow\[hub\]"'):
        hub.load_model("owner/name")


def test_a_folder_for_the_hub_has_the_checkpoint_and_a_card(tmp_path):
    model, _ = labelled("MLP")
    folder = tmp_path / "to" / "upload"
    hub.save_folder(folder, model, license="apache-2.0", steps=10)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "model.safetensors"]
    assert sf.checkpoints.read_info(folder / "model.safetensors")["info"] == {"steps": 10}
    card = (folder / "README.md").read_text()
    yaml = pytest.importorskip("yaml")
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata == {"library_name": "sdeflow", "tags": ["sdeflow", "diffusion"], "license": "apache-2.0"}
    assert "| process | VP(beta_min=0.1, beta_max=20.0) |" in card
    code = card.split("```python\n")[1].split("```")[0].replace('hub.load_model("owner/name")', "loaded")
    namespace = {"loaded": sf.load_model(folder / "model.safetensors")}
    exec(code, namespace)  # the card's own example, on the model that it would load
    assert namespace["x"].shape == (16, 2)
    (folder / "README.md").write_text("mine")
    hub.save_folder(folder, model)
    assert (folder / "README.md").read_text() == "mine"


def test_a_model_that_cannot_be_saved_leaves_no_folder(tmp_path):
    model, _ = labelled("MLP")
    broken = copy.deepcopy(model)
    torch.nn.init.constant_(broken.net.leave.bias, float("nan"))
    for bad, error in ((broken, ValueError), (sf.Model(lambda x, t: x, VP), TypeError)):
        with pytest.raises(error):
            hub.save_folder(tmp_path / "none", bad)
        assert not (tmp_path / "none").exists()
