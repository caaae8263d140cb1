"""The judge of the recipes on digits: a classifier, and a Frechet distance in its features.

The classifier (scikit-learn, one hidden layer) is trained on half of the real digits, which is also the half that
samples are compared with; the other half gives the floor: what real digits score. Every set has the size of that half.
"""

from __future__ import annotations

import warnings
from functools import cache

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from sdeflow.data import digits
from sdeflow.metrics import frechet

SIZE = 898
"""Images in each half, and samples that a full comparison draws."""


def halves() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(images, labels) of each half, (SIZE, 1, 8, 8) and (SIZE,), by a fixed shuffle."""
    images, labels = digits()
    order = torch.from_numpy(np.random.Generator(np.random.Philox(0)).permutation(len(images)))
    a, b = order[:SIZE], order[SIZE : 2 * SIZE]
    return images[a], labels[a], images[b], labels[b]


@cache
def classifier() -> MLPClassifier:
    """64 hidden units, trained on the first half."""
    images, labels, _, _ = halves()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return MLPClassifier((64,), max_iter=400, alpha=1e-2, random_state=0).fit(_pixels(images), labels.numpy())


def features(x: Tensor) -> Tensor:
    """The hidden layer's values (n, 64), float64."""
    net = classifier()
    return torch.from_numpy(np.maximum(_pixels(x) @ net.coefs_[0] + net.intercepts_[0], 0)).to(torch.float64)


def classes(x: Tensor) -> Tensor:
    """The class that the classifier sees in each image, int64 (n,)."""
    return torch.from_numpy(classifier().predict(_pixels(x)))


def distance(x: Tensor) -> float:
    """The Frechet distance of images x (n, 1, 8, 8) to the first half, n of them."""
    images, _, _, _ = halves()
    return frechet(features(x), features(images[: len(x)]))


def floor(n: int = SIZE) -> float:
    """The distance of n real digits of the other half."""
    return distance(halves()[2][:n])


def _pixels(x: Tensor) -> np.ndarray:
    return x.detach().cpu().clamp(-1, 1).flatten(1).numpy().astype(np.float32)


if __name__ == "__main__":
    _, _, images, labels = halves()
    print(f"accuracy on the other half {float((classes(images) == labels).float().mean()):.3f}, floor {floor():.3f}")
