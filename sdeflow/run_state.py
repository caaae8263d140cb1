"""The whole state of a training run in one safetensors file, so that it can go on after a break, bit by bit."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sdeflow.checkpoints import write_atomically
from sdeflow.model import Model

_KEY = "sdeflow-run"
_FORMAT = 1
_OPEN = ("losses", "norms")
_LONGEST = 100_000_000
"""Bytes of a header: what safetensors itself accepts."""


def fingerprint(model: Model, data: Tensor, labels: Tensor | None, **arguments: Any) -> dict[str, Any]:
    """What a run is made of, as JSON: a state is continued only by the same."""
    net: Any = model.net
    return {
        "net": {"name": type(net).__name__, "parameters": {n: list(p.shape) for n, p in net.named_parameters()}},
        "start": _digest(*net.state_dict().values()),
        "process": repr(model.sde),
        "prediction": model.prediction,
        "time": model.time if isinstance(model.time, str) else repr(model.time is not None),
        "data": _digest(data, *([] if labels is None else [labels])),
        **arguments,
    }


def _digest(*tensors: Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(str((tuple(tensor.shape), tensor.dtype)).encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class RunState:
    """Weights, their average, the optimiser's moments, the random numbers to come and the history, in a file.

    Args:
        net, average, optimiser: what is trained, in place.
        made_of: the run's `fingerprint`.
        path: of the file; None for a run that is not kept.
    """

    def __init__(
        self,
        net: nn.Module,
        average: AveragedModel,
        optimiser: torch.optim.Optimizer,
        made_of: dict[str, Any],
        path: Path | None,
    ) -> None:
        self._net, self._average, self._optimiser = net, average, optimiser
        self._made_of, self._path = made_of, path

    def write(
        self, step: int, history: list[dict[str, float]], losses: Sequence[Tensor] = (), norms: Sequence[Tensor] = ()
    ) -> None:
        """Keep the state after `step`, whole or not at all. The folder is made if it is not there.

        Args:
            losses, norms: of the steps since the last row of the history, for the row that they will be in.
        """
        assert self._path is not None
        tensors = {f"net.{name}": value for name, value in self._net.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self._average.state_dict().items()}
        moments = self._optimiser.state_dict()["state"]
        tensors |= {f"optimiser.{k}.{name}": value for k, own in moments.items() for name, value in own.items()}
        tensors |= {
            f"open.{name}": torch.stack(list(own)) for name, own in zip(_OPEN, (losses, norms), strict=True) if own
        }
        tensors["random"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        header = {"format": _FORMAT, "step": step, "history": history, "made_of": self._made_of}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, safetensors.torch.save(tensors, {_KEY: json.dumps(header)}))

    def resume(self, history: list[dict[str, float]], losses: list[Tensor], norms: list[Tensor]) -> int:
        """Take up the state of the file, if there is one: the step it was kept after (0 for none).

        Args:
            history, losses, norms: empty lists, filled with what `write` was given.

        Raises:
            ValueError: the file is no such state, or one of another run.
        """
        if self._path is None or not self._path.is_file():
            return 0
        header, tensors = self._read()
        different = [name for name, value in self._made_of.items() if header["made_of"].get(name) != value]
        if different:
            raise ValueError(
                f"{self._path} is the state of another run: its {', '.join(different)} differ; remove the file to "
                "start anew, or give the arguments it was made with"
            )
        device = next(self._net.parameters()).device
        groups: dict[str, dict[str, Tensor]] = {"net": {}, "average": {}, "optimiser": {}, "open": {}}
        for name, value in tensors.items():
            group, _, rest = name.partition(".")
            if group in groups:
                groups[group][rest] = value
        self._net.load_state_dict(groups["net"])
        self._average.load_state_dict(groups["average"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in groups["optimiser"].items():
            k, _, entry = name.partition(".")
            state.setdefault(int(k), {})[entry] = value
        self._optimiser.load_state_dict(self._optimiser.state_dict() | {"state": state})
        torch.set_rng_state(tensors["random"])
        if device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"])
        history += header["history"]
        for name, own in zip(_OPEN, (losses, norms), strict=True):
            own += groups["open"].get(name, torch.empty(0)).to(device).unbind()
        return int(header["step"])

    def _read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        assert self._path is not None
        data = self._path.read_bytes()
        try:
            tensors = safetensors.torch.load(data)
        except SafetensorError as error:
            raise ValueError(f"{self._path}: not a safetensors file ({error})") from error
        return _header(self._path, data), tensors


def steps_kept(path: Path) -> int:
    """The step that the state in a file was kept after; 0 if there is no file.

    Raises:
        ValueError: the file is no such state.
    """
    if not path.is_file():
        return 0
    with open(path, "rb") as file:
        size = file.read(8)
        start = size + file.read(min(int.from_bytes(size, "little"), _LONGEST))
    return int(_header(path, start)["step"])


def _header(path: Path, data: bytes) -> dict[str, Any]:
    """What the beginning of a safetensors file says of the run."""
    try:
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        header = json.loads(metadata.get(_KEY, "null"))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its header is not JSON ({error})") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT or not {"made_of", "step"} <= header.keys():
        raise ValueError(f"{path}: not the state of a training run")
    return header


def remove_unfinished(*paths: Path) -> None:
    """Remove what `write_atomically` leaves of these files where the process was killed while it wrote."""
    for path in paths:
        for part in path.parent.glob("*"):
            if part.name.startswith(path.name) and re.fullmatch(r"\.\d+\.part", part.name[len(path.name) :]):
                part.unlink(missing_ok=True)
