"""Data for training, as float32 tensors: built-in sets, array files, folders of images."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from tokenize import TokenError
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from sdeflow import problems

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_SMALL = 4096
"""Samples of the built-in sets in the plane."""


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


def moons() -> tuple[Tensor, None]:
    """4096 draws of `problems.TwoMoons`, (4096, 2)."""
    return problems.TwoMoons().sample(_SMALL, 0).to(torch.float32), None


def eight_gaussians() -> tuple[Tensor, None]:
    """4096 draws of `problems.EightGaussians`, (4096, 2)."""
    return problems.EightGaussians().sample(_SMALL, 0).to(torch.float32), None


def checkerboard() -> tuple[Tensor, None]:
    """4096 points, uniform on the dark squares of a 4 x 4 board on [-2, 2]^2."""
    generator = np.random.Generator(np.random.Philox(0))
    column = generator.integers(0, 4, _SMALL)
    row = 2 * generator.integers(0, 2, _SMALL) + column % 2
    corner = np.stack([column, row], axis=1) - 2.0
    return torch.from_numpy((corner + generator.random((_SMALL, 2))).astype(np.float32)), None


DATASETS: dict[str, Callable[[], tuple[Tensor, Tensor | None]]] = {
    "digits": digits,
    "moons": moons,
    "eight-gaussians": eight_gaussians,
    "checkerboard": checkerboard,
}
"""Built-in data by its name on the command line."""


def load(what: str) -> tuple[Tensor, Tensor | None]:
    """(data (n, *event) float32, labels int64 (n,) or None) by name, from an array file, or from a folder of images.

    - a name of `DATASETS`;
    - .npy: the data; .npz: the arrays "data" (or the only one) and, if there is one, "labels"; nothing is unpickled;
    - .safetensors: the tensors "data" and, if there is one, "labels";
    - a folder: images of one size, (n, channels, height, width) in [-1, 1]; with subfolders, these are the labels in
      the order of their names.

    Raises:
        ValueError: there is no such thing, or it does not hold such arrays.
        ImportError: images need Pillow.
    """
    if what in DATASETS:
        return DATASETS[what]()
    path = Path(what)
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise ValueError(f"no data {what!r}: expected {', '.join(DATASETS)}, an array file or a folder of images")
    readers = {".npy": _npy, ".npz": _npz, ".safetensors": _safetensors}
    if path.suffix not in readers:
        raise ValueError(f"{what}: expected a file that ends in {', '.join(readers)}, or a folder of images")
    try:
        data, labels = readers[path.suffix](path)
    except (KeyError, EOFError, MemoryError, OSError, SyntaxError, TokenError, TypeError, ValueError) as error:
        raise ValueError(f"{what}: expected an array file, got one that cannot be read ({error})") from error
    except (BadZipFile, NotImplementedError, RuntimeError, zlib.error) as error:
        raise ValueError(f"{what}: expected an archive of arrays, got one that cannot be read ({error})") from error
    return _checked(what, data, labels)


def _npy(path: Path) -> tuple[Tensor, Tensor | None]:
    with path.open("rb") as file:  # numpy leaves a file that it cannot read open
        return torch.as_tensor(np.load(file, allow_pickle=False)), None


def _npz(path: Path) -> tuple[Tensor, Tensor | None]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        names = [name for name in arrays.files if name != "labels"]
        if "data" not in names and len(names) != 1:
            raise ValueError(f'expected an array "data", got {", ".join(arrays.files)}')
        data = torch.as_tensor(arrays["data" if "data" in names else names[0]])
        return data, torch.as_tensor(arrays["labels"]) if "labels" in arrays.files else None


def _safetensors(path: Path) -> tuple[Tensor, Tensor | None]:
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        tensors = safetensors.torch.load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"not a safetensors file ({error})") from error
    if "data" not in tensors:
        raise ValueError(f'expected a tensor "data", got {", ".join(tensors) or "none"}')
    return tensors["data"], tensors.get("labels")


def _folder(path: Path) -> tuple[Tensor, Tensor | None]:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('images need Pillow: pip install "sdeflow[bench]"') from error
    classes = sorted(p for p in path.iterdir() if p.is_dir())
    folders = classes or [path]
    images: list[np.ndarray] = []
    labels: list[int] = []
    for k, folder in enumerate(folders):
        for file in sorted(p for p in folder.iterdir() if p.suffix.lower() in _IMAGES):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", Image.DecompressionBombWarning)
                    with Image.open(file) as image:
                        own = np.asarray(image.convert("L" if image.mode in ("1", "L", "I", "I;16") else "RGB"))
            except (
                Image.DecompressionBombError,
                Image.DecompressionBombWarning,
                OSError,
                SyntaxError,
                ValueError,
            ) as error:
                raise ValueError(f"{file}: expected an image, got a file that is none ({error})") from error
            if images and own.shape != images[0].shape:
                raise ValueError(f"{file}: expected images of one size and kind, {images[0].shape}, got {own.shape}")
            images.append(own)
            labels.append(k)
    if not images:
        raise ValueError(f"{path}: no images ({', '.join(_IMAGES)})")
    stack = torch.from_numpy(np.stack(images)).to(torch.float32) / 127.5 - 1
    stack = stack.unsqueeze(1) if stack.ndim == 3 else stack.permute(0, 3, 1, 2).contiguous()
    return stack, torch.tensor(labels) if classes else None


def _checked(what: str, data: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if data.ndim < 2 or data.numel() < 1 or data.is_complex() or data.dtype == torch.bool:
        raise ValueError(f"{what}: expected numbers of shape (n, *event), got {data.dtype} of {tuple(data.shape)}")
    data = data.to(torch.float32)
    if not bool(torch.isfinite(data).all()):
        raise ValueError(f"{what}: expected finite data")
    if labels is not None:
        if labels.is_floating_point() or labels.shape != data.shape[:1] or int(labels.min()) < 0:
            raise ValueError(f"{what}: expected one label >= 0 a sample, got {labels.dtype} of {tuple(labels.shape)}")
        labels = labels.to(torch.int64)
    return data, labels
