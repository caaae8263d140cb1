"""Digits by class: one network trained with labels, guided without a classifier (Ho and Salimans 2022).

`train` is `sdeflow train digits --labels`: an MLP that predicts v under VP and is told the class, or "none" for a tenth
of the batches. Printed: how many of 100 guided samples two classifiers take for the class that was asked for, and the
Frechet distance of unguided conditional samples by several samplers. Their labels are those of the real digits they are
compared with, so that the classes have the real proportions. Written: docs/assets/digits.png.
"""

from __future__ import annotations

import argparse
from functools import cache, partial
from pathlib import Path

import judge
import report
import torch
from PIL import Image
from sklearn.svm import SVC
from torch import Tensor

import sdeflow as sf
from sdeflow import training
from sdeflow.data import digits
from sdeflow.guidance import classifier_free

ROOT = Path(__file__).parents[2]
FILE = ROOT / "results" / "recipes" / "conditional.safetensors"
PICTURE = ROOT / "docs" / "assets" / "digits.png"
CLASSES, SCALES, SCALE = 10, (1.0, 1.5, 2.0, 3.0), 2.0
NONE = CLASSES
"""The label that stands for none."""


def train(steps: int = 8000, seed: int = 0) -> sf.Model:
    """A network of v that takes labels 0..9 and none."""
    images, labels = digits()
    model = training.untrained((1, 8, 8), seed=seed, classes=CLASSES)
    return training.train(model, images, labels=labels, steps=steps, seed=seed)[0]


def samples(model: sf.Model, num: int, seed: int = 0) -> report.Samples:
    """Unguided conditional images by several samplers, labelled as the first `num` digits of the judge."""
    run = partial(sf.sample, model.bind(label=judge.halves()[1][:num]), num, shape=(1, 8, 8), seed=seed)
    return report.Samples(
        {
            "DDPM, 250 steps": run(solver=sf.solvers.DDPM(), steps=250),
            "DDIM, 20 steps": run(solver=sf.solvers.DDIM(), steps=20),
            "DPM-Solver++(2M), 10 steps": run(solver=sf.solvers.DPMSolverPP(2), steps=10),
            "GaussianSplit, 10 steps": run(solver=sf.solvers.GaussianSplit(), steps=10),
            "EDM Heun, 18 steps": run(solver=sf.solvers.EDMHeun(), steps=18, grid=sf.grids.karras, final="zero"),
        }
    )


def guided(model: sf.Model, labels: Tensor, scale: float, seed: int = 0) -> sf.Solution:
    """One image of each label by classifier-free guidance, DPM-Solver++(2M) in 20 steps."""
    conditional, unconditional = (model.bind(label=label) for label in (labels, torch.full_like(labels, NONE)))
    both = classifier_free(conditional, unconditional, scale)
    return sf.sample(both, len(labels), shape=(1, 8, 8), solver=sf.solvers.DPMSolverPP(2), steps=20, seed=seed)


@cache
def witness() -> SVC:
    """A second classifier, of another kind, trained on all real digits."""
    images, labels = digits()
    return SVC().fit(images.flatten(1).numpy(), labels.numpy())


def agreement(x: Tensor, labels: Tensor) -> tuple[int, int]:
    """How many images each of the two classifiers takes for what was asked for."""
    seen = torch.from_numpy(witness().predict(x.clamp(-1, 1).flatten(1).numpy()))
    return int((judge.classes(x) == labels).sum()), int((seen == labels).sum())


def picture(x: Tensor, path: Path, size: int = 5, gap: int = 1) -> None:
    """A greyscale PNG of images in order of class, each class a column, each pixel size x size."""
    rows = len(x) // CLASSES
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).reshape(CLASSES, rows, 8, 8)
    side = 8 + gap
    board = torch.zeros(rows * side + gap, CLASSES * side + gap, dtype=torch.uint8)
    for column in range(CLASSES):
        for row in range(rows):
            top, left = row * side + gap, column * side + gap
            board[top : top + 8, left : left + 8] = pixels[column, row]
    board = board.repeat_interleave(size, 0).repeat_interleave(size, 1)
    Image.fromarray(board.numpy()).save(path, optimize=True)


def kept() -> sf.Model:
    """The model of the file, trained and written first if there is none."""
    if not FILE.exists():
        FILE.parent.mkdir(parents=True, exist_ok=True)
        sf.save_model(FILE, train())
    return sf.load_model(FILE)


def main() -> None:
    """Print both tables and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--consistency", action="store_true", help="also train and judge consistency models")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, labels = kept(), torch.arange(CLASSES).repeat_interleave(10)
    print("100 samples, 10 of each class, seen as that class by an MLP of half of the digits and an SVM of all")
    for scale in SCALES:
        solution = guided(model, labels, scale, arguments.seed)
        by_mlp, by_svm = agreement(solution.x, labels)
        calls = solution.stats.network_calls
        print(f"scale {scale:3.1f}  MLP {by_mlp:3d}  SVM {by_svm:3d}  network calls of the batch {calls}")
        if scale == SCALE:
            picture(solution.x, PICTURE)
    report.show(samples(model, judge.SIZE, arguments.seed))
    if arguments.consistency:
        import compare
        import consistency

        models = compare.trained(consistency, FILE.parent)  # its own file, which compare.py may have written
        report.show(consistency.samples(models, judge.SIZE, arguments.seed))


if __name__ == "__main__":
    main()
