"""The bridge to diffusers, against the installed package: the same networks through both libraries.

Figures are relative, max |ours - theirs| / max |theirs|: a network of random weights that predicts noise makes states
of 10 to 100. Where two methods coincide they agree to `SAME`; diffusers' tables are float32 products, ours float64.
"""

from __future__ import annotations

import ast
import copy
import itertools
import json
import math
import pickle
from pathlib import Path

import pytest
import torch

import sdeflow as sf

pytest.importorskip("diffusers")
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DEISMultistepScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
)

from sdeflow.integrations.diffusers_config import betas_of, process_of, read_config
from sdeflow.integrations.diffusers_grids import diffusers_grid
from sdeflow.integrations.diffusers_scheduler import PlanScheduler
from sdeflow.integrations.plan_rows import solver_of, text_of
from sdeflow.integrations.seed_rows import SeedRows

pytestmark = [
    # what diffusers itself warns of with numpy 2
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]

SAME = 1e-5
TABLE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
MIDPOINT = "DPMSolverPP(2, second='midpoint', lower_order_final=True)"
SMALL = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tiny networks, saved as diffusers saves them."""
    path = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    plain = UNet2DModel(
        in_channels=3, out_channels=3, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, **SMALL
    )
    plain.save_pretrained(path / "plain")
    conditional = UNet2DConditionModel(
        in_channels=3, out_channels=3, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=8, attention_head_dim=4,
        num_class_embeds=5, mid_block_type="UNetMidBlock2DCrossAttn", **SMALL,
    )  # fmt: skip
    conditional.save_pretrained(path / "conditional")
    return path


@pytest.fixture(scope="module")
def net(folder):
    return UNet2DModel.from_pretrained(folder / "plain").eval()


@pytest.fixture(scope="module")
def conditional(folder):
    return UNet2DConditionModel.from_pretrained(folder / "conditional").eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def loop(scheduler, steps, x, net, **conditions):
    """What the pipelines of diffusers do between the start noise and the image."""
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for t in scheduler.timesteps:
            given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            output = net(given, t, **conditions).sample
            x = scheduler.step(output, t, x).prev_sample
    return x


def solved(model, solver, grid, x, eta=0.0, seed=None):
    with torch.no_grad():
        return sf.solve(model.sde.reverse(model, eta), x, solver, grid=grid, seed=seed).x


def off(ours, theirs):
    assert bool(torch.isfinite(theirs).all())
    return float((ours - theirs).abs().max() / theirs.abs().max())


def both(scheduler, solver, steps, x, net, start=1.0):
    """(off ours in their loop, off `sf.solve`) from theirs; `start` is their state over ours at the start."""
    theirs = loop(scheduler, steps, start * x, net)
    plan = PlanScheduler.from_scheduler(scheduler, solver)
    direct = solved(sf.Model.from_diffusers(net, scheduler), solver_of(solver), diffusers_grid(scheduler, steps), x)
    ours = loop(plan, steps, x, net)
    assert torch.equal(ours, direct)  # the same coefficients in the same order of operations
    return off(ours, theirs)


# ---- the same method through both


COINCIDE = [
    (DDIMScheduler(**TABLE, clip_sample=False, timestep_spacing="trailing"), "DDIM()"),
    (DDIMScheduler(**TABLE, clip_sample=False, set_alpha_to_one=False, steps_offset=1), "DDIM()"),
    (DPMSolverMultistepScheduler(**TABLE, timestep_spacing="trailing"), MIDPOINT),
    (DPMSolverMultistepScheduler(**TABLE, timestep_spacing="leading", final_sigmas_type="sigma_min"), MIDPOINT),
    (UniPCMultistepScheduler(**TABLE), "UniPC(2, lower_order_final=True)"),
    (
        UniPCMultistepScheduler(**TABLE, solver_type="bh1", final_sigmas_type="sigma_min"),
        "UniPC(2, variant='bh1', lower_order_final=True)",
    ),
    (DEISMultistepScheduler(**TABLE), "DEIS(2, coordinate='lam', lower_order_final=True)"),
    (UniPCMultistepScheduler(**TABLE, solver_order=3), "UniPC(3, lower_order_final=True)"),
]


@pytest.mark.parametrize(("scheduler", "solver"), COINCIDE, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_samplers_agree_in_both_directions(scheduler, solver, prediction, net, x):
    """Where these coincide: UniPC and DPM-Solver++ of diffusers lower their order at the end (below 15 steps for the
    latter); its 2M is the "midpoint" form, its default `solver_type`."""
    scheduler = type(scheduler).from_config(scheduler.config, prediction_type=prediction)
    assert both(scheduler, solver, 10, x, net) < SAME


@pytest.mark.parametrize(
    ("theirs", "ours"), [(EulerDiscreteScheduler, "EDMEuler()"), (HeunDiscreteScheduler, "EDMHeun()")]
)
def test_samplers_in_sigma_agree(theirs, ours, net, x):
    """Their state is x/alpha. 10 steps of "linspace" over 1000 entries fall on entries (999/9): elsewhere they
    interpolate sigma between entries where we interpolate log alpha."""
    scheduler = theirs(**TABLE)
    process = process_of(read_config(scheduler))
    assert both(scheduler, ours, 10, x, net, start=float(1 / process.alpha(process.t1))) < SAME
    assert PlanScheduler.from_scheduler(scheduler, ours).order == 1  # before set_timesteps
    plan = PlanScheduler.from_scheduler(scheduler, ours)
    plan.set_timesteps(10)
    scheduler.set_timesteps(10)
    assert plan.order == scheduler.order
    assert torch.equal(plan.timesteps.float(), scheduler.timesteps)


def test_what_is_left_is_the_float32_table(net, x):
    """DDIM of diffusers takes 1 - alpha^2 from a float32 product: 1.2e-5 here, 50 times less with that in float64."""
    scheduler = DDIMScheduler(
        **TABLE, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="sample"
    )
    left = both(scheduler, "DDIM()", 10, x, net)
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    assert both(scheduler, "DDIM()", 10, x, net) < min(1e-6, 0.1 * left)
    assert left < 2 * SAME


def test_what_should_not_agree_does_not(net, x):
    """Another prediction type, another grid, another method, another end: each is off by far more than `SAME`."""
    scheduler = DPMSolverMultistepScheduler(**TABLE, timestep_spacing="trailing", prediction_type="v_prediction")
    theirs = loop(scheduler, 10, x, net)
    config = {**scheduler.config, "_class_name": "DPMSolverMultistepScheduler"}
    for change, solver in [
        ({"prediction_type": "sample"}, MIDPOINT),
        ({"timestep_spacing": "linspace"}, MIDPOINT),
        ({"final_sigmas_type": "sigma_min"}, MIDPOINT),
        ({"beta_schedule": "linear"}, MIDPOINT),
        ({}, "DPMSolverPP(2, lower_order_final=True)"),
        ({}, "DDIM()"),
    ]:
        ours = loop(PlanScheduler.from_scheduler({**config, **change}, solver), 10, x, net)
        assert off(ours, theirs) > 100 * SAME, (change, solver)


def normals(plan, seed, x):
    """The standard normals of each step that a plan of one draw a step uses."""
    walk = sf.Noise(seed, len(x)).walk(plan.normal_times, x.shape[1:], x.dtype, lengths=plan.lengths)
    return [walk(i).w / math.sqrt(walk.lengths[i]) if walk.lengths[i] > 0 else 0 * x for i in range(plan.steps)]


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_with_noise_agrees_given_the_same_normals(eta, net, x):
    scheduler = DDIMScheduler(**TABLE, clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing")
    ours = PlanScheduler.from_scheduler(scheduler, f"DDIM(eta={eta})", seed=5)
    ours.set_timesteps(10)
    draws = iter(normals(ours._plan, 5, x))
    scheduler.set_timesteps(10)
    theirs = x
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = net(theirs, t).sample
            theirs = scheduler.step(output, t, theirs, eta=eta, variance_noise=next(draws)).prev_sample
    result = loop(ours, 10, x, net)
    assert off(result, theirs) < SAME
    model = sf.Model.from_diffusers(net, scheduler)
    assert torch.equal(result, solved(model, sf.solvers.DDIM(eta=eta), diffusers_grid(scheduler, 10), x, seed=5))
    assert off(loop(PlanScheduler.from_scheduler(scheduler, f"DDIM(eta={eta})", seed=6), 10, x, net), theirs) > 1e-2


@pytest.mark.parametrize("clip", [False, True])
def test_ddpm_agrees_given_the_same_normals(clip, net, x, monkeypatch):
    """Also with clip_sample=True, DDPM's default, as its step is of x and x_0 alone."""
    scheduler = DDPMScheduler(**TABLE, clip_sample=clip, prediction_type="v_prediction")
    ours = PlanScheduler.from_scheduler(scheduler, "DDPM()", seed=5)
    ours.set_timesteps(20)
    draws = iter(normals(ours._plan, 5, x))
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(draws))
    theirs, result = loop(scheduler, 20, x, net), loop(ours, 20, x, net)
    assert off(result, theirs) < SAME
    assert off(loop(PlanScheduler.from_scheduler(scheduler, "DDPM()", seed=6), 20, x, net), theirs) > 1e-2


# ---- inside real pipelines


def test_ddpm_pipeline(net):
    scheduler = PlanScheduler.from_scheduler(DDPMScheduler(**TABLE, clip_sample=False), "UniPC(3)", grid="logsnr")
    pipeline = DDPMPipeline(net, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, torch.Generator().manual_seed(3), 7, output_type="pt").images
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    process = process_of(read_config(scheduler))
    model = sf.Model.from_diffusers(net, scheduler)
    direct = solved(model, sf.solvers.UniPC(3), sf.grids.logsnr(process, 7), x)
    assert torch.equal(images, (direct / 2 + 0.5).clamp(0, 1))
    assert float(images.std()) > 0.05


def test_the_generator_of_a_pipeline_seeds_the_noise(net):
    scheduler = PlanScheduler.from_scheduler(DDPMScheduler(**TABLE), "DPMSolverPP(2)", eta=1.0)
    pipeline = DDPMPipeline(net, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    one = [pipeline(2, torch.Generator().manual_seed(seed), 5, output_type="pt").images for seed in (3, 3, 4)]
    assert torch.equal(one[0], one[1])
    assert not torch.equal(one[0], one[2])


def test_each_image_has_the_noise_of_its_own_generator(net):
    """In a list of one a sample; a noisy method, through the pipeline that passes its generators to `step`."""
    scheduler = PlanScheduler.from_scheduler(DDPMScheduler(**TABLE), "DDPM()")
    pipeline = DDIMPipeline(net, DDIMScheduler(**TABLE))
    pipeline.scheduler = scheduler
    pipeline.set_progress_bar_config(disable=True)

    def images(*seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(len(seeds), generators, num_inference_steps=4, output_type="np").images

    batch = images(5, 6, 7)
    for i, seed in enumerate((5, 6, 7)):
        assert abs(images(seed) - batch[i]).max() < SAME
    assert abs(images(5, 8, 7)[1] - batch[1]).max() > 1e-2
    # exactly, where the network says the same of a sample in any batch
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def ends(x, generators):
        scheduler.set_timesteps(4)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(x), t, x, generator=generators).prev_sample
        return x

    own = [torch.Generator().manual_seed(seed) for seed in (5, 6, 5)]
    together = ends(x, own)
    for i, generator in enumerate(own):
        assert torch.equal(together[i : i + 1], ends(x[i : i + 1], generator))
    assert not torch.equal(together, ends(x, own[0]))  # rows 1 and 2 of one seed are other samples
    assert torch.equal(ends(x, own[:1]), ends(x, own[0]))
    with pytest.raises(ValueError, match="expected one generator, or one a sample, 3, got 2"):
        ends(x, own[:2])


def test_rows_of_seeds_are_the_noise_of_batches_of_one():
    seeds = [3, -1, 3, 2**63]
    rows, alone = SeedRows(seeds), [sf.Noise(seed, 1) for seed in seeds]
    times = torch.linspace(1, 0, 6, dtype=torch.float64)

    def drawn(noise):
        walk = noise.walk(times, (2,), torch.float32)
        return torch.cat([noise.normal(2, 7, (2,), torch.float32), *(walk(k).w for k in range(5))], 1)

    assert torch.equal(drawn(rows), torch.cat([drawn(one) for one in alone]))
    for some in (torch.tensor([3, 1]), torch.tensor([False, True, True, False])):
        kept = torch.arange(4)[some].tolist()
        assert torch.equal(drawn(rows.take(some)), torch.cat([drawn(alone[i]) for i in kept]))
        assert torch.equal(SeedRows(seeds).take(some).index, torch.zeros(2, dtype=torch.int64))
    assert torch.equal(drawn(rows.other(2)), torch.cat([drawn(one.other(2)) for one in alone]))


def test_ddim_pipeline_takes_it_as_an_attribute(net):
    """Its constructor makes a DDIMScheduler of whatever it gets; it also passes eta to `step`."""
    scheduler = PlanScheduler.from_scheduler(DDIMScheduler(**TABLE, clip_sample=False), "DPMSolverPP(2)")
    pipeline = DDIMPipeline(net, DDIMScheduler(**TABLE))
    pipeline.scheduler = scheduler
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, torch.Generator().manual_seed(3), num_inference_steps=6, output_type="pt").images
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(images, (loop(scheduler, 6, x, net) / 2 + 0.5).clamp(0, 1))
    with pytest.raises(ValueError, match="noise belongs to the plan"):
        pipeline(2, eta=0.5, num_inference_steps=6)


def test_dit_pipeline_with_guidance_and_learned_variance():
    """Two calls of the network in one batch, out_channels = 2 in_channels, labels: against our `classifier_free`."""
    torch.manual_seed(2)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4,
    ).eval()  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=8)
    theirs = DPMSolverMultistepScheduler(**TABLE, timestep_spacing="trailing")
    pipeline = DiTPipeline(transformer, vae, theirs)
    pipeline.set_progress_bar_config(disable=True)
    call = {"guidance_scale": 3.0, "num_inference_steps": 8, "output_type": "np"}
    reference = pipeline([1, 7], generator=torch.Generator().manual_seed(4), **call).images
    pipeline.scheduler = PlanScheduler.from_scheduler(theirs, MIDPOINT)
    images = pipeline([1, 7], generator=torch.Generator().manual_seed(4), **call).images
    assert abs(images - reference).max() < SAME
    model = sf.Model.from_diffusers(transformer, theirs)
    guided = sf.guidance.classifier_free(
        model.bind(class_labels=torch.tensor([1, 7])), model.bind(class_labels=torch.tensor([1000, 1000])), 3.0
    )
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    latents = solved(guided, solver_of(MIDPOINT), diffusers_grid(theirs, 8), x)
    with torch.no_grad():
        decoded = vae.decode(latents / vae.config.scaling_factor).sample
    ours = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert abs(ours - reference).max() < SAME
    wrong = pipeline([2, 7], generator=torch.Generator().manual_seed(4), **call).images
    assert abs(wrong - reference).max() > 100 * SAME


@pytest.mark.parametrize("network", ["a formula", pytest.param("the network", marks=pytest.mark.slow)])
def test_a_tuned_plan_runs_in_a_pipeline(network, net, tmp_path):
    """A plan belongs to the process: fitted to another network of it (a formula, which is quick), it runs as well."""
    scheduler = DDPMScheduler(**TABLE, clip_sample=False, prediction_type="v_prediction")
    fitted = net if network == "the network" else lambda x, t: torch.tanh(x) * (t / 1000)[:, None, None, None]
    plan = sf.tune(
        sf.Model.from_diffusers(fitted, scheduler), sf.solvers.DPMSolverPP(2), 4, shape=(3, 8, 8), calibration=4,
        iterations=3, starts={"logsnr": sf.grids.logsnr},
    )  # fmt: skip
    plan.save(tmp_path / "plan.json")
    pipeline = DDPMPipeline(net, PlanScheduler.from_plan(str(tmp_path / "plan.json"), scheduler))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, torch.Generator().manual_seed(3), 4, output_type="pt").images
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    model = sf.Model.from_diffusers(net, scheduler)
    with torch.no_grad():
        direct = sf.solve(model.sde.reverse(model, 0.0), x, plan).x
    assert torch.equal(images, (direct / 2 + 0.5).clamp(0, 1))
    assert any(float(t) != int(t) for t in pipeline.scheduler.timesteps)  # between entries
    with pytest.raises(ValueError, match="this plan has 4 steps"):
        pipeline(2, num_inference_steps=5)
    with pytest.raises(ValueError, match="this plan was made for"):
        PlanScheduler.from_plan(plan, DDPMScheduler(clip_sample=False))


def test_a_conditional_network_with_labels_and_encoder_states(conditional, x):
    states, labels = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([1, 3])
    scheduler = UniPCMultistepScheduler(**TABLE, prediction_type="v_prediction")
    theirs = loop(scheduler, 10, x, conditional, encoder_hidden_states=states, class_labels=labels)
    solver = "UniPC(2, lower_order_final=True)"
    ours = loop(
        PlanScheduler.from_scheduler(scheduler, solver), 10, x, conditional, encoder_hidden_states=states,
        class_labels=labels,
    )  # fmt: skip
    assert off(ours, theirs) < SAME
    model = sf.Model.from_diffusers(conditional, scheduler).bind(encoder_hidden_states=states, class_labels=labels)
    assert torch.equal(solved(model, solver_of(solver), diffusers_grid(scheduler, 10), x), ours)
    other = model.bind(class_labels=torch.tensor([1, 2]))
    changed = solved(other, solver_of(solver), diffusers_grid(scheduler, 10), x)
    assert off(changed[:1], theirs[:1]) < SAME
    assert off(changed[1:], theirs[1:]) > 1e-4
    with pytest.raises(TypeError, match="does not take labels: it takes sample, timestep"):
        model.bind(labels=labels).x0(x, 0.5)
    with pytest.raises(ValueError, match="by dotted names"):
        model.bind(added_cond_kwargs={"image_embeds": states}).x0(x, 0.5)


# ---- other processes


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching(shift, net, x):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    assert both(scheduler, "Euler()", 10, x, net) < SAME
    scheduler.set_timesteps(10)
    plan = PlanScheduler.from_scheduler(scheduler, "Euler()")
    plan.set_timesteps(10)
    assert torch.allclose(plan.timesteps, scheduler.timesteps, rtol=1e-6)
    assert torch.allclose(diffusers_grid(scheduler, 10), scheduler.sigmas.double(), rtol=1e-6)
    given = [1.0, 0.6, 0.3]
    plan.set_timesteps(sigmas=given)
    scheduler.set_timesteps(sigmas=given)
    assert torch.allclose(plan.timesteps, scheduler.timesteps, rtol=1e-6)


def test_a_flow_shifted_by_the_size_of_the_image():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    scheduler.set_timesteps(6, mu=0.8)
    assert torch.allclose(diffusers_grid(scheduler, 6, mu=0.8), scheduler.sigmas.double(), rtol=1e-6)
    with pytest.raises(ValueError, match="expected mu"):
        diffusers_grid(scheduler, 6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("theirs", "ours"), [(EDMEulerScheduler, "EDMEuler()"), (EDMDPMSolverMultistepScheduler, MIDPOINT)]
)
def test_edm_preconditioning(theirs, ours, prediction, net, x):
    scheduler = theirs(prediction_type=prediction)
    assert both(scheduler, ours, 10, 80 * x, net) < SAME
    other = theirs(prediction_type=prediction, sigma_data=1.0)
    assert off(loop(other, 10, 80 * x, net), loop(scheduler, 10, 80 * x, net)) > 100 * SAME


def test_zero_terminal_snr_starts_from_alpha_zero(net, x):
    """diffusers' DDIM agrees; its DPM-Solver++ takes alpha^2 = 2^-24 for the 0 and is off by what that does."""
    table = {**TABLE, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    scheduler = DDIMScheduler(**table, clip_sample=False)
    process = process_of(read_config(scheduler))
    assert float(process.alpha(process.t1)) == 0.0
    assert both(scheduler, "DDIM()", 10, x, net) < SAME
    ours = loop(PlanScheduler.from_scheduler(scheduler, "DPMSolverPP(2)"), 10, x, net)
    assert bool(torch.isfinite(ours).all())
    assert SAME < both(DPMSolverMultistepScheduler(**table), MIDPOINT, 10, x, net) < 1e-3
    for clip in (False, True):
        config = {**table, "prediction_type": "epsilon", "clip_sample": clip}
        wrong = PlanScheduler.from_scheduler(config, "DDIM()", grid="trailing")
        with pytest.raises(ValueError, match="where alpha = 0"):
            wrong.set_timesteps(10)
        model = sf.Model.from_diffusers(net, config)
        with pytest.raises(ValueError, match="alpha = 0"):
            solved(model, sf.solvers.DDIM(), sf.grids.trailing(process, 10), x)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
def test_networks_of_16_bits(dtype, limit, folder, x):
    """The time is never told in 16 bits (bfloat16's 999 is 1000), and states may stay in float32."""
    scheduler = DDIMScheduler(**TABLE, clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing")
    half, net = (UNet2DModel.from_pretrained(folder / "plain", torch_dtype=d).eval() for d in (dtype, torch.float32))
    exact = loop(scheduler, 10, x, net)
    model = sf.Model.from_diffusers(half, scheduler)
    for start in (x, x.to(dtype)):
        ours = solved(model, sf.solvers.DDIM(), diffusers_grid(scheduler, 10), start)
        assert ours.dtype == start.dtype
        assert off(ours.float(), exact) < limit
    inside = loop(PlanScheduler.from_scheduler(scheduler, "DDIM()"), 10, x.to(dtype), half)
    assert torch.equal(inside, ours)
    seen = []
    sf.Model.from_diffusers(lambda x, t: seen.append(t) or x, scheduler).eps(x.to(dtype), 1.0)
    assert seen[0].tolist() == [999.0, 999.0]


def test_clipping_is_what_the_configuration_asks_for(net, x):
    """Solver++ clips x_0 as `thresholding` says; DDIM clips x_0 but not the noise unless use_clipped_model_output."""
    threshold = DPMSolverMultistepScheduler(
        **TABLE, thresholding=True, sample_max_value=1.5, timestep_spacing="trailing"
    )
    assert both(threshold, MIDPOINT, 10, x, net) < SAME
    clipped = DDIMScheduler(**TABLE, timestep_spacing="trailing")
    model = sf.Model.from_diffusers(net, clipped)
    with torch.no_grad():
        assert float(model.x0(x, 1.0).abs().max()) <= 1.0
        assert float(sf.Model.from_diffusers(net, clipped, clip=False).x0(x, 1.0).abs().max()) > 1.0
    clipped.set_timesteps(10)
    theirs = x
    with torch.no_grad():
        for t in clipped.timesteps:
            theirs = clipped.step(net(theirs, t).sample, t, theirs, use_clipped_model_output=True).prev_sample
    assert off(solved(model, sf.solvers.DDIM(), diffusers_grid(clipped, 10), x), theirs) < SAME
    assert off(loop(clipped, 10, x, net), theirs) > 1e-3


# ---- configurations


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
def test_betas_are_those_of_diffusers(schedule):
    scheduler = DDPMScheduler(beta_schedule=schedule)
    assert torch.equal(betas_of(read_config(scheduler)), scheduler.betas.double())
    rescaled = DDPMScheduler(beta_schedule="linear", rescale_betas_zero_snr=True)
    process = process_of(read_config(rescaled))
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert torch.allclose(process.alpha(t) ** 2, rescaled.alphas_cumprod.double(), rtol=1e-3, atol=1e-6)


def test_the_exponential_schedule_of_heun():
    scheduler = HeunDiscreteScheduler(beta_schedule="exp")
    assert torch.equal(betas_of(read_config(scheduler)), scheduler.betas.double())


def test_configurations_from_everywhere(tmp_path):
    scheduler = DDIMScheduler(trained_betas=[0.1, 0.2, 0.3], prediction_type="sample", num_train_timesteps=3)
    scheduler.save_pretrained(tmp_path / "scheduler")
    config = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    places = [scheduler, scheduler.config, config, tmp_path, str(tmp_path / "scheduler")]
    models = [sf.Model.from_diffusers(torch.nn.Identity(), place, clip=False) for place in places]
    assert all(m.sde == models[0].sde and m.prediction == "x0" and m.time == "discrete" for m in models)
    sparse = {"_class_name": "DDPMScheduler"}  # the defaults of its class
    assert read_config(sparse)["clip_sample"] is True
    for wrong, error in [(3, TypeError), ({}, ValueError), (tmp_path / "none", ValueError)]:
        with pytest.raises(error, match="expected"):
            sf.Model.from_diffusers(torch.nn.Identity(), wrong)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({**TABLE, "prediction_type": "noise"}, "expected prediction_type"),
        ({**TABLE, "prediction_type": "flow_prediction"}, "expected prediction_type"),
        ({**TABLE, "prediction_type": "epsilon", "beta_schedule": "cubic"}, "expected beta_schedule"),
        (TABLE, "no 'prediction_type'"),
        ({"beta_schedule": "linear", "prediction_type": "epsilon"}, "no 'num_train_timesteps'"),
        ({"_class_name": "DDIMScheduler", "snr_shift_scale": 3.0}, "snr_shift_scale"),
        ({"_class_name": "CosineDPMSolverMultistepScheduler"}, "expected beta_schedule"),
        ({"shift": 1.0, "num_train_timesteps": 1000, "invert_sigmas": True}, "invert_sigmas"),
        ({**TABLE, "prediction_type": "v_prediction", "timestep_type": "continuous"}, "timestep_type"),
        ({**TABLE, "prediction_type": "epsilon", "num_train_timesteps": 10**9}, "expected num_train_timesteps"),
        ({**TABLE, "prediction_type": "epsilon", "num_train_timesteps": -3}, "expected num_train_timesteps"),
        ({**TABLE, "prediction_type": "epsilon", "clip_sample": True, "clip_sample_range": -1.0}, "clip_sample_range"),
        ({**TABLE, "prediction_type": ["epsilon"]}, "expected prediction_type as text"),
        ({**TABLE, "prediction_type": "epsilon", "beta_start": "a"}, "expected a finite beta_start"),
    ],
)
def test_configurations_that_are_refused(config, says):
    with pytest.raises(ValueError, match=says):
        sf.Model.from_diffusers(torch.nn.Identity(), config)


@pytest.mark.parametrize(
    "theirs",
    [DDPMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler,
     DEISMultistepScheduler],
)  # fmt: skip
def test_grids_are_the_entries_that_diffusers_visits(theirs):
    for spacing, offset in itertools.product(["leading", "trailing", "linspace"], [0, 1]):
        scheduler = theirs(**TABLE, timestep_spacing=spacing, steps_offset=offset)
        for steps in (1, 5, 10, 20, 28):
            scheduler.set_timesteps(steps)
            visited = torch.unique_consecutive(torch.as_tensor(scheduler.timesteps).double())
            grid = diffusers_grid(scheduler, steps)
            assert torch.allclose(1000 * grid[:-1] - 1, visited, atol=1e-3), (spacing, offset, steps)
            assert float(grid[-1]) == (0.001 if theirs is DEISMultistepScheduler else 0.0)


def test_grids_that_diffusers_does_not_visit_are_refused():
    """DDIM steps N // steps back from wherever it is, so that "linspace" and most "trailing" steps do not meet."""
    for spacing, steps in [("linspace", 10), ("trailing", 7)]:
        with pytest.raises(ValueError, match="do not meet"):
            diffusers_grid(DDIMScheduler(**TABLE, timestep_spacing=spacing), steps)
    with pytest.raises(ValueError, match="steps of no length"):
        diffusers_grid(DDIMScheduler(**TABLE, set_alpha_to_one=False), 10)
    with pytest.raises(ValueError, match="use_karras_sigmas"):
        diffusers_grid(DPMSolverMultistepScheduler(**TABLE, use_karras_sigmas=True), 10)
    with pytest.raises(ValueError, match="no '_class_name'"):
        diffusers_grid(dict(DDIMScheduler(**TABLE).config), 10)
    with pytest.raises(ValueError, match="at most 1000 steps"):
        diffusers_grid(DDPMScheduler(**TABLE), 1001)


# ---- the scheduler's own protocol


def test_configurations_round_trip(net, x, tmp_path):
    made = PlanScheduler.from_scheduler(
        DDPMScheduler(**TABLE, prediction_type="v_prediction"), sf.solvers.Heun(), grid="quadratic", eta=0.0
    )
    assert made.config["solver"] == "Heun()"
    made.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["scheduler_config.json"]
    again = PlanScheduler.from_pretrained(tmp_path)
    assert torch.equal(loop(again, 4, x, net), loop(made, 4, x, net))
    assert len(again.timesteps) == 8
    assert again.order == 2
    plan = made._solver.plan(made._problem, torch.tensor([1.0, 0.7, 0.4, 0.0011], dtype=torch.float64))
    PlanScheduler.from_plan(plan, made).save_pretrained(tmp_path / "plan")
    kept = PlanScheduler.from_pretrained(tmp_path / "plan")
    assert kept._plan.times.tolist() == plan.times.tolist()
    idiom = PlanScheduler.from_config(DDPMScheduler(**TABLE).config, solver="UniPC(2)", source="DDPMScheduler")
    assert idiom.config["clip_sample"] is True  # DDPM's default, not ours
    pipeline = DDPMPipeline(net, made)
    pipeline.save_pretrained(tmp_path / "pipeline")
    loaded = DDPMPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(loaded.scheduler) is PlanScheduler
    assert torch.equal(loop(loaded.scheduler, 4, x, loaded.unet), loop(made, 4, x, net))


def test_levels_and_lengths():
    theirs = DDPMScheduler(**TABLE)
    ours = PlanScheduler.from_scheduler(theirs, "DDIM()", grid="trailing")
    x0, noise = torch.randn(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 500, 999])
    assert torch.allclose(ours.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t), atol=1e-5)
    assert torch.allclose(ours.get_velocity(x0, noise, t), theirs.get_velocity(x0, noise, t), atol=1e-5)
    assert len(ours) == 1000
    with pytest.raises(ValueError, match="timesteps of the process"):
        ours.add_noise(x0, noise, torch.tensor([0, 500, 1000]))


@pytest.mark.parametrize("solver", ["Heun()", "RK4()", "DPMSolverPP(2, multistep=False)", "EDMHeun(s_churn=5.0)",
                                    "SASolver()", "EulerMaruyama()", "SEEDS(2)", "RK45()"])  # fmt: skip
def test_several_calls_a_step_churn_and_noise_are_those_of_solve(solver, net, x):
    eta = 1.0 if solver in ("EulerMaruyama()", "SEEDS(2)") else 0.0
    scheduler = DDPMScheduler(**TABLE, prediction_type="v_prediction", clip_sample=False)
    ours = PlanScheduler.from_scheduler(scheduler, solver, grid="trailing", eta=eta, seed=7)
    inside = loop(ours, 5, x, net)
    model = sf.Model.from_diffusers(net, scheduler)
    plan = ours._plan
    assert len(ours.timesteps) == plan.nfe
    assert torch.equal(inside, solved(model, solver_of(solver), plan.grid, x, eta=eta, seed=7))


SPLITS = [
    sf.solvers.EDMHeun(),
    sf.solvers.EDMEuler(s_churn=3.0, s_tmin=0.01),
    sf.solvers.GaussianSplit(3),
    sf.solvers.GaussianSplit(2, mean=0.1 * torch.arange(192.0).reshape(3, 8, 8).cos(), variance=torch.tensor(0.3)),
    sf.solvers.GaussianSplit(2, mean=[[[0.1]]], start="runge-kutta"),
    sf.recommend(sf.VP(), nfe=10).solver,
]


@pytest.mark.parametrize("solver", SPLITS, ids=lambda s: f"{s.name}-{s!r:.30}")
def test_solvers_are_given_as_such(solver, x):
    """Also those whose numbers are infinite or tensors: as text in the configuration, and the same when read back."""
    scheduler = DDPMScheduler(**TABLE, prediction_type="v_prediction", clip_sample=False)
    ours = PlanScheduler.from_scheduler(scheduler, solver, grid="trailing", seed=7)
    again = PlanScheduler.from_config(json.loads(ours.to_json_string()))
    model = sf.Model.from_diffusers(lambda x, t: torch.tanh(x), scheduler)
    direct = solved(model, solver, sf.grids.trailing(model.sde, 5), x, seed=7)
    for one in (ours, again):
        one.set_timesteps(5)
        state = x
        with torch.no_grad():
            for t in one.timesteps:
                state = one.step(torch.tanh(state), t, state).prev_sample
        assert torch.equal(state, direct)


RUNS = ["DDIM()", "DDIM(eta=1.0)", "UniPC(3)", "Heun()", "EDMHeun(s_churn=5.0)", "SASolver()", "GaussianSplit(2)"]


def halves(ours, net, x, generator=None):
    """(a state in mid-run, a function that ends the run of a scheduler from it)."""
    ours.set_timesteps(4)
    for t in ours.timesteps[:3]:  # there is a history, and a step of two calls is halfway
        x = ours.step(net(x), t, x, generator=generator).prev_sample

    def end(scheduler, state):
        for t in scheduler.timesteps[scheduler.step_index :]:
            state = scheduler.step(net(state), t, state).prev_sample
        return state

    return x, end


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["copy", "pickle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("solver", RUNS)
def test_a_copy_in_mid_run_goes_on_by_itself(solver, dtype, copied, x):
    scheduler = DDPMScheduler(**TABLE, prediction_type="v_prediction")
    ours = PlanScheduler.from_scheduler(scheduler, solver, grid="trailing", seed=3)
    with torch.no_grad():
        state, end = halves(ours, lambda x: torch.sin(2 * x), x.to(dtype))
    other = copied(ours)
    with torch.no_grad():
        assert torch.equal(end(ours, state), end(other, state))
        assert torch.equal(end(other, x.to(dtype)), end(ours, x.to(dtype)))  # another run


def test_copies_of_runs_with_a_generator_a_sample_in_inference_and_of_a_flow(x):
    scheduler = DDIMScheduler(**TABLE, thresholding=True, prediction_type="v_prediction", timestep_spacing="trailing")
    ours = PlanScheduler.from_scheduler(scheduler, "DDPM()")
    generators = [torch.Generator().manual_seed(i) for i in (5, 6)]
    with torch.inference_mode():
        state, end = halves(ours, torch.sin, x, generators)
        other = copy.deepcopy(ours)
        assert torch.equal(end(ours, state), end(other, state))
    flow = PlanScheduler.from_scheduler(FlowMatchEulerDiscreteScheduler(), "AdamsBashforth(2)")
    state, end = halves(flow, torch.sin, x)  # with gradients: other operations than without
    with torch.no_grad():
        other = pickle.loads(pickle.dumps(flow))
        assert torch.equal(end(flow, state), end(other, state))
    halves(flow, torch.sin, x.requires_grad_())
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(ValueError, match=r"whose gradients are recorded.*run it in torch.no_grad"):
            copied(flow)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_state_that_the_pipeline_changes_is_gone_on_from(dtype, net, x):
    """Also changed in place: inpainting writes the known part of the image into every state."""
    scheduler = DDPMScheduler(**TABLE, prediction_type="sample", clip_sample=False)
    ours = PlanScheduler.from_scheduler(scheduler, "DDIM()", grid="trailing")

    def painted(in_place):
        ours.set_timesteps(4)
        state = x.to(dtype)
        for t in ours.timesteps:
            state = ours.step(torch.tanh(state), t, state).prev_sample
            state = state.mul_(0.5) if in_place else state * 0.5
        return state

    assert torch.equal(painted(True), painted(False))
    assert off(loop(ours, 4, x, net), painted(False).float()) > 1e-2


def test_noise_belongs_to_the_sample(net, x):
    ours = PlanScheduler.from_scheduler(DDPMScheduler(**TABLE, prediction_type="v_prediction"), "DDPM()", seed=7)
    assert off(loop(ours, 5, x[:1], net), loop(ours, 5, x, net)[:1]) < SAME


def test_beginning_late(net, x):
    """Image to image: from the third step, as if the grid began there; a fixed plan cannot."""
    scheduler = DPMSolverMultistepScheduler(**TABLE, timestep_spacing="trailing", prediction_type="v_prediction")
    ours = PlanScheduler.from_scheduler(scheduler, MIDPOINT)

    def late(scheduler, say):
        scheduler.set_timesteps(8)
        state = x
        if say:
            scheduler.set_begin_index(3)
        with torch.no_grad():
            for t in scheduler.timesteps[3:]:
                state = scheduler.step(net(state, t).sample, t, state).prev_sample
        return state

    assert off(late(ours, True), late(scheduler, True)) < SAME
    assert torch.equal(late(ours, True), late(ours, False))
    plan = PlanScheduler.from_plan(ours._plan, scheduler)
    with pytest.raises(ValueError, match="a plan begins at its own start"):
        late(plan, True)


def test_what_a_scheduler_refuses(net, x):
    scheduler = DDPMScheduler(**TABLE)
    make = PlanScheduler.from_scheduler
    for solver, says in [
        ("__import__('os').getcwd()", "expected a solver"),
        ("NoSuch(2)", "no such name"),
        ("DPMSolverPP(9)", "expected order 1, 2 or 3"),
        ("PredictorCorrector", "expected a solver"),
        ("GaussianSplit(variance=[0.2, 0.3])", "one coefficient for all components"),
        (sf.solvers.GaussianSplit(variance=torch.ones(3)), "one coefficient for all components"),
        (sf.solvers.GaussianSplit(mean=torch.zeros(3, 64, 64)), "a mean of at most 10000 numbers.* 12288: .*from_plan"),
        (sf.solvers.AdaptiveSDE(), "has no plan"),
        ("AdaptiveSDE()", "has no plan"),
        ("by_name('RK4')", "has no plan"),
    ]:
        with pytest.raises(ValueError, match=says):
            make(scheduler, solver)
    with pytest.raises(TypeError, match="expected a solver, or its constructor as text, got 3"):
        make(scheduler, 3)
    with pytest.raises(ValueError, match="unknown grid"):
        make(scheduler, "DDIM()", grid="nice")
    with pytest.raises(ValueError, match="descending times"):
        make(scheduler, "DDIM()", grid=[0.1, 1.0])
    with pytest.raises(ValueError, match="deterministic"):
        make(scheduler, "Heun()", eta=1.0)
    with pytest.raises(ValueError, match="cannot be written down"):
        text_of(sf.solvers.SASolver(tau=lambda t: 0.0 * t))
    ours = make(scheduler, "DDIM()")
    output = torch.zeros_like(x)
    with pytest.raises(ValueError, match="call set_timesteps first"):
        ours.step(output, 1, x)
    with pytest.raises(ValueError, match="expected num_inference_steps >= 1"):
        ours.set_timesteps(0)
    ours.set_timesteps(5)
    ours.step(output, ours.timesteps[0], x)
    with pytest.raises(ValueError, match="timestep out of turn: model call 1 is at 600, got 400"):
        ours.step(output, ours.timesteps[2], x)
    with pytest.raises(ValueError, match="expected a sample of shape"):
        ours.step(output[:1], ours.timesteps[1], x[:1])
    with pytest.raises(ValueError, match="the network"):
        ours.step(output[:, :2], ours.timesteps[1], x)


def test_importing_sdeflow_imports_no_diffusers():
    """No module outside the bridge imports it, or diffusers, where it is imported itself."""
    root = Path(sf.__file__).parent
    files = [f for f in root.rglob("*.py") if f.parent.name != "integrations"] + [root / "integrations" / "__init__.py"]
    assert len(files) > 50
    for file in files:
        for node in ast.parse(file.read_text()).body:
            names = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "") or ""]
            )
            assert not any(n.split(".")[0] == "diffusers" or "integrations" in n for n in names), file
