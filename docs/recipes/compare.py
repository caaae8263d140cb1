"""Train, sample and judge the recipes: `python docs/recipes/compare.py`, or with the names of some.

A trained model is kept in results/recipes/, so that a second run only samples; remove its file to train anew, as after
a change of its script, which is not noticed. Prints one Markdown table, and with all recipes writes ten images of the
first sampler of each to docs/assets/recipes.png.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import judge
import report
import torch
from PIL import Image
from torch import Tensor

import sdeflow as sf

RECIPES = (
    "ncsn", "ddpm", "ddim", "improved_ddpm", "score_sde", "edm", "flow_matching", "latent", "progressive",
    "consistency", "conditional",
)  # fmt: skip
ROOT = Path(__file__).parents[2]
KEPT, GRID = ROOT / "results" / "recipes", ROOT / "docs" / "assets" / "recipes.png"


def trained(module: ModuleType, folder: Path) -> Any:
    """What `train` of a recipe gives, from `folder` if it is there, else trained and written to it.

    A `Model` is one file, a dict of them one each; a recipe with `load` reads and writes what it trains itself. A
    recipe that takes its `train` from another one shares the file of that one.
    """
    name = str(module.train.__module__).rpartition(".")[2]
    path, listed = folder / f"{name}.safetensors", folder / f"{name}.txt"
    if listed.is_file():
        return {key: sf.load_model(_part(path, key)) for key in listed.read_text().splitlines()}
    if path.is_file():
        return module.load(path) if hasattr(module, "load") else sf.load_model(path)
    folder.mkdir(parents=True, exist_ok=True)
    result = module.train()
    if isinstance(result, Mapping):
        for key, model in result.items():
            sf.save_model(_part(path, key), model)
        listed.write_text("\n".join(result))  # last: all parts are there
    elif isinstance(result, sf.Model):
        sf.save_model(path, result)
    else:
        result.save(path)
    return result


def _part(path: Path, key: str) -> Path:
    return path.with_name(f"{path.stem}-{key}.safetensors")


def table(images: Mapping[str, Mapping[str, Tensor]]) -> str:
    """One Markdown row a sampler, by the name of its recipe, and the floor."""
    lines = ["| recipe | sampler | NFE | Frechet distance |", "|---|---|---|---|"]
    for name, own in images.items():
        lines += [f"| `{name}.py` | {label} | {nfe} | {distance} |" for label, nfe, distance in report.rows(own)]
    num = min(len(x) for own in images.values() for x in own.values())
    return "\n".join([*lines, f"| real digits, the floor | - | - | {judge.floor(num):.2f} |"])


def picture(images: Mapping[str, Mapping[str, Tensor]], count: int = 10, scale: int = 4) -> Image.Image:
    """A row of `count` images for each recipe, of its first sampler, each pixel `scale` wide, one pixel between."""
    rows = torch.stack([next(iter(own.values()))[:count, 0] for own in images.values()])
    framed = torch.nn.functional.pad(rows.detach().clamp(-1, 1), (1, 1, 1, 1), value=1.0)
    flat = framed.permute(0, 2, 1, 3).reshape(framed.shape[0] * 10, count * 10)
    grey = (127.5 * (flat + 1)).round().to(torch.uint8).numpy()
    return Image.fromarray(grey).resize((grey.shape[1] * scale, grey.shape[0] * scale), Image.Resampling.NEAREST)


def main(names: tuple[str, ...] = RECIPES) -> None:
    images: dict[str, Mapping[str, Tensor]] = {}
    for name in names:
        module = importlib.import_module(name)  # a name that is no recipe is an error
        model = trained(module, KEPT)
        print(f"{name}: sampling", file=sys.stderr)
        images[name] = module.samples(model, judge.SIZE)
    print(table(images))
    if names == RECIPES:  # a part of the recipes leaves the page's picture alone
        picture(images).save(GRID, optimize=True)


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or RECIPES)
