"""Every recipe of docs/recipes/ trains and samples at reduced size, and the comparison reads what it gives."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

import sdeflow as sf
import sdeflow.data
import sdeflow.training

RECIPES = Path(__file__).parent.parent / "docs" / "recipes"
STEPS, NUM = 40, 12

LABELS = {
    "ncsn": ["annealed Langevin"],
    "ddpm": ["DDPM, posterior variance", "DDPM, forward variance"],
    "ddim": ["DDIM, 20 steps", "DDIM, 100 steps", "DDIM, eta = 1, 20 steps"],
    "improved_ddpm": [
        "learned variance, 1000 steps", "learned variance, 100 steps", "learned variance, 25 steps",
        "posterior variance, 25 steps",
    ],
    "score_sde": [
        f"{name}, {sampler}"
        for name in ("VP", "sub-VP", "VE")
        for sampler in ("predictor-corrector", "probability flow")
    ],
    "edm": ["Heun, 18 steps", "Heun with churn, 256 steps"],
    "flow_matching": ["Euler, 20 steps", "Euler, 100 steps", "Heun, 25 steps", "RK45 to 1e-5"],
    "latent": ["DDIM, 50 steps", "DPM-Solver++(2M), 20 steps", "autoencoder alone"],
}  # fmt: skip
ASKED = {
    "ncsn": [None], "ddpm": [1000, 1000], "ddim": [20, 100, 20], "improved_ddpm": [1000, 100, 25, 25],
    "score_sde": [500, None] * 3, "edm": [18, 256], "flow_matching": [20, 100, 25, None], "latent": [50, 20],
}  # fmt: skip
"""Steps of each sampler; None where a grid or a tolerance gives them."""


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """As when a script of the folder is run."""
    monkeypatch.syspath_prepend(str(RECIPES))


@pytest.fixture
def recipe(request, monkeypatch):
    """A recipe's module, the `losses` of its trainings, and the steps `asked` of its samplers, 30 at most taken."""
    module, train, sample = importlib.import_module(request.param), sf.training.train, sf.sample
    losses, asked = [], []

    def recorded(*args, **options):
        result = train(*args, **options, log_every=1)
        losses.append([row["loss"] for row in result[1]])
        return result

    def shortened(*args, steps=None, **options):
        asked.append(steps)
        return sample(*args, steps=steps if steps is None else min(steps, 30), **options)

    monkeypatch.setattr(sf.training, "train", recorded)
    monkeypatch.setattr(sf, "sample", shortened)
    return module, losses, asked


@pytest.mark.parametrize("recipe", list(LABELS), indirect=True, ids=list(LABELS))
def test_a_recipe_trains_and_samples(recipe):
    module, losses, asked = recipe
    model = module.train(steps=STEPS, seed=0)
    assert len(losses) == (3 if module.__name__ == "score_sde" else 1)
    for values in losses:
        assert len(values) == STEPS
        assert sum(values[-5:]) < 0.95 * sum(values[:5])
    images = module.samples(model, NUM, seed=1)
    assert list(images) == list(images.nfe) == LABELS[module.__name__]
    assert asked == ASKED[module.__name__]
    for label, x in images.items():
        assert x.shape == (NUM, 1, 8, 8), label
        assert bool(torch.isfinite(x).all()), label
        assert float(x.std(0).mean()) > 0, label  # not one image
        assert images.nfe[label] > 0 or label == "autoencoder alone"


def test_the_autoencoder_keeps_the_statistics_of_its_codes():
    """Codes of the data have mean 0 and variance 1 a channel, and the decoder takes them back."""
    latent, images = importlib.import_module("latent"), sf.data.digits()[0]
    autoencoder = latent.train_autoencoder(images, 300, seed=0)
    codes = autoencoder.encode(images)
    torch.testing.assert_close(codes.mean(0), torch.zeros(16), rtol=0, atol=1e-5)
    torch.testing.assert_close(codes.std(0), torch.ones(16), rtol=0, atol=1e-5)
    error = float((autoencoder.decode(codes) - images).square().mean())
    assert error < 0.2 * float((images - images.mean(0)).square().mean())


def test_the_learned_variance_is_that_of_the_last_call():
    improved = importlib.import_module("improved_ddpm")
    torch.manual_seed(0)
    net = sf.nets.MLP((1, 8, 8), width=16, depth=1, learned_variance=True)
    torch.nn.init.normal_(net.leave.weight)
    process = sf.DiscreteVP(improved.cosine_betas())
    both, v = improved.two_heads(sf.Model(net, process, "eps", "lam"))
    x, t = torch.randn(5, 1, 8, 8), torch.tensor(0.5, dtype=torch.float64)
    value = both.eps(x, t)
    lam = process.lam(t).float().expand(5)
    assert torch.equal(value, net(x, lam))
    assert torch.equal(v(x, t), net.both(x, lam)[1])
    betas = improved.cosine_betas()
    assert float(betas.max()) == 0.999
    alphas = torch.cos(torch.tensor(0.5 * torch.pi * (0.5 + 0.008) / 1.008, dtype=torch.float64))
    start = torch.cos(torch.tensor(0.5 * torch.pi * 0.008 / 1.008, dtype=torch.float64))
    assert float(process.alpha(torch.tensor(0.5))) == pytest.approx(float(alphas / start), rel=1e-9)


def test_every_recipe_is_compared_and_is_on_the_page():
    compare = importlib.import_module("compare")
    scripts = {path.stem for path in RECIPES.glob("*.py")} - {"judge", "report", "compare"}
    assert set(compare.RECIPES) == scripts
    page = (RECIPES.parent / "recipes.md").read_text()
    assert all(f"recipes/{name}.py" in page for name in compare.RECIPES)


def test_a_second_comparison_only_samples(tmp_path, monkeypatch, capsys):
    """One model, several, and a recipe with files of its own."""
    compare, judge = importlib.import_module("compare"), importlib.import_module("judge")
    monkeypatch.setattr(compare, "KEPT", tmp_path)
    monkeypatch.setattr(judge, "SIZE", NUM)
    x, z = torch.randn(3, 1, 8, 8), torch.randn(3, 16)
    results = {}
    for name in ("flow_matching", "score_sde", "latent"):
        module = importlib.import_module(name)
        once = iter([module.train(steps=2)])

        def train(once=once):
            return next(once)  # a second call is an error

        train.__module__ = name
        monkeypatch.setattr(module, "train", train)
        results[name] = [compare.trained(module, tmp_path) for _ in range(2)]
    for model in results["flow_matching"], [m["sub-VP"] for m in results["score_sde"]]:
        assert torch.equal(model[0].score(x, 0.3), model[1].score(x, 0.3))
    given, kept = results["latent"]
    assert torch.equal(given.autoencoder.decode(z), kept.autoencoder.decode(z))
    assert torch.equal(given.model.score(z, 0.3), kept.model.score(z, 0.3))
    compare.main(("flow_matching",))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| recipe | sampler | NFE | Frechet distance |"
    assert [line.split(" | ")[1] for line in lines[2:-1]] == LABELS["flow_matching"]
    assert lines[-1].startswith("| real digits")


def test_the_picture_has_a_row_a_recipe():
    compare = importlib.import_module("compare")
    images = {"a": {"x": torch.full((12, 1, 8, 8), -1.0)}, "b": {"x": torch.ones(12, 1, 8, 8), "y": torch.zeros(0)}}
    picture = compare.picture(images, count=10, scale=2)
    assert picture.size == (200, 40)
    assert (picture.getpixel((10, 10)), picture.getpixel((10, 30)), picture.getpixel((0, 0))) == (0, 255, 255)
