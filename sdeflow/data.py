"""Real data that comes with an installed package, as float tensors scaled to [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor


def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's handwritten digits: images (1797, 1, 8, 8) float32 and labels 0..9 (1797,) int64.

    Pixels count 0..16 become pixel/8 - 1 in [-1, 1] (Alpaydin and Kaynak 1998, Optical recognition of
    handwritten digits; the test part). The images are in scikit-learn's wheel: nothing is downloaded.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the digits come with scikit-learn: pip install "sdeflow[train]"') from error
    bunch = load_digits()
    images = torch.as_tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    return images, torch.as_tensor(bunch.target, dtype=torch.int64)


DATASETS = {"digits": digits}
"""Built-in data by its name on the command line."""
