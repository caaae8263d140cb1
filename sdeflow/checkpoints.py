"""Checkpoints: the weights of a Model and all that is needed to rebuild it, in one safetensors file.

Nothing is ever unpickled. The file's header holds, as JSON under the key "sdeflow",

    {"format": 1, "net": {"name": "MLP", ...its config}, "process": {"name": "VP", "beta_min": 0.1, ...},
     "prediction": "v", "time": "lam", "shape": [1, 8, 8], "versions": {...}, "info": {...the caller's}}.
"""

from __future__ import annotations

import dataclasses
import json
import os
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sdeflow.discrete import DiscreteVP
from sdeflow.files import write_atomically as write_atomically
from sdeflow.gaussian import GaussianSDE
from sdeflow.model import Model
from sdeflow.nets import MLP, EDMPreconditioned, UNet
from sdeflow.processes import EDM, VE, VP, CosineVP, RectifiedFlow, SubVP

NETS: tuple[type[MLP] | type[UNet] | type[EDMPreconditioned], ...] = (MLP, UNet, EDMPreconditioned)
"""Networks that a checkpoint can hold: each has `shape`, and `config`, its constructor's arguments."""

PROCESSES: tuple[type[GaussianSDE], ...] = (VP, SubVP, VE, CosineVP, EDM, RectifiedFlow, DiscreteVP)
"""Processes that a checkpoint can hold."""

_KEY = "sdeflow"
_FORMAT = 1
_SUFFIX = ".safetensors"


def save_model(path: str | os.PathLike[str], model: Model, **info: Any) -> None:
    """Write `model` to a safetensors file, whole or not at all.

    Args:
        path: of the file; replaced if there is one.
        model: its network is one of `NETS`, its process one of `PROCESSES`, its time input not a function.
        info: what else to keep, as JSON: the command, the seed, the loss.

    Raises:
        TypeError, ValueError: a part of the model that a file cannot describe, or weights that are not finite.
    """
    if not isinstance(model, Model):
        raise TypeError(f"expected a Model, got {type(model).__name__}")
    net, process = model.net, model.sde
    if not isinstance(net, NETS) or type(net) not in NETS:
        raise TypeError(f"expected a network that can be rebuilt, {_names(NETS)}; got {type(net).__name__}")
    if not isinstance(process, PROCESSES) or type(process) not in PROCESSES:
        raise TypeError(f"expected a process that can be rebuilt, {_names(PROCESSES)}; got {process!r}")
    if callable(model.time):
        raise ValueError("a time input that is a function cannot be saved: expected None or a name such as 'lam'")
    if model.conditions or not model.expand:
        raise ValueError("bound conditions and expand=False cannot be saved: save the model they were made from")
    tensors = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    _check_finite("the network", tensors)
    description = {
        "format": _FORMAT,
        "net": {"name": type(net).__name__, **net.config},
        "process": {"name": type(process).__name__, **_parameters(process)},
        "prediction": model.prediction,
        "time": model.time,
        "shape": list(net.shape),
        "versions": {name: version(name) for name in ("sdeflow", "torch")},
        "info": info,
    }
    try:
        text = json.dumps(description, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"expected info that JSON can hold: {error}") from error
    write_atomically(path, safetensors.torch.save(tensors, {_KEY: text}))


def load_model(path_or_name: str | os.PathLike[str]) -> Model:
    """The model in a file that `save_model` wrote, or a shipped one by its name: "digits".

    The network is in evaluation mode on the CPU and its weights record no gradients
    (`model.net.requires_grad_()` to train it on). `read_info` gives the rest of the file.

    Raises:
        FileNotFoundError: no such file, and no such shipped model.
        ValueError: not a checkpoint, or one whose parts do not fit each other.
    """
    where, description, tensors = _read(path_or_name)
    _check_finite(where, tensors)
    process = _rebuild(where, description, "process", PROCESSES)
    with torch.device("meta"):  # shapes alone: nothing is allocated or drawn for a file that does not fit
        net = _rebuild(where, description, "net", NETS)
    _check_fit(where, net, tensors)
    net.load_state_dict(tensors, assign=True)
    net.eval().requires_grad_(False)
    try:
        return Model(net, process, description["prediction"], description["time"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: no model can be made of its description ({error})") from error


def read_info(path_or_name: str | os.PathLike[str]) -> dict[str, Any]:
    """The description in a checkpoint's header (see the top of this module), without the weights.

    Raises:
        FileNotFoundError, ValueError: as `load_model`.
    """
    return _read(path_or_name)[1]


# ---- reading


def _read(path_or_name: str | os.PathLike[str]) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """(name for messages, description, tensors) of a file, or of a shipped model if a string names one."""
    where = os.fspath(path_or_name)
    shipped = {
        entry.name.removesuffix(_SUFFIX): entry
        for entry in resources.files("sdeflow").joinpath("weights").iterdir()
        if entry.name.endswith(_SUFFIX)
    }
    if isinstance(path_or_name, str) and where in shipped:
        return where, *_parsed(where, shipped[where].read_bytes())
    if not Path(where).is_file():
        known = ", ".join(sorted(shipped))
        raise FileNotFoundError(f"no file {where!r}, and no shipped model of that name: expected a path, or {known}")
    return where, *_parsed(where, Path(where).read_bytes())


def _parsed(where: str, data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        # refuses a header that is too long, is not JSON, or whose tensors do not cover the file exactly
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise ValueError(f"{where}: not a safetensors file ({error})") from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")], object_pairs_hook=_once)
    text = header.get("__metadata__", {}).get(_KEY)
    if text is None:
        raise ValueError(f"{where}: not written by save_model: no {_KEY!r} in the header's metadata")
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: the header's description is not JSON ({error})") from error
    got = description.get("format") if isinstance(description, dict) else description
    if isinstance(got, bool) or got != _FORMAT:
        raise ValueError(f"{where}: expected a description of format {_FORMAT}, got {got!r}")
    return description, tensors


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refused if it says a name twice: readers differ in which of the two they take."""
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("not a checkpoint: a name stands twice in its header")
    return dict(pairs)


def _rebuild(where: str, description: dict[str, Any], part: str, classes: tuple[type[Any], ...]) -> Any:
    """The network or process that the description names."""
    given = description.get(part)
    given = given if isinstance(given, dict) else {"name": given}
    name = given.get("name")
    for cls in classes:
        if cls.__name__ == name:
            try:
                return cls(**{key: value for key, value in given.items() if key != "name"})
            except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(f"{where}: {name} cannot be made from its description ({error})") from error
    raise ValueError(f"{where}: unknown {part} {name!r}: expected {_names(classes)}")


def _check_fit(where: str, net: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Refuse tensors that are not exactly those of the network, naming the first that differs."""
    expected = net.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        want, got = (_summary(group.get(name)) for group in (expected, tensors))
        if want != got:
            raise ValueError(f"{where}: tensor {name!r} of {type(net).__name__}: expected {want}, got {got}")


def _summary(tensor: Tensor | None) -> str:
    if tensor is None:
        return "none"
    return f"{'floats' if tensor.is_floating_point() else tensor.dtype} of shape {tuple(tensor.shape)}"


def _check_finite(where: str, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{where}: tensor {name!r} holds NaN or infinity")


# ---- describing


def _parameters(process: GaussianSDE) -> dict[str, Any]:
    if isinstance(process, DiscreteVP):
        return {"betas": process.betas.tolist()}
    fields = dataclasses.fields(process)  # type: ignore[arg-type]  # the others of PROCESSES are dataclasses
    return {field.name: getattr(process, field.name) for field in fields if field.init}


def _names(classes: tuple[type[Any], ...]) -> str:
    return "one of " + ", ".join(cls.__name__ for cls in classes)
