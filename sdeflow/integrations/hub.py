"""Models on the Hugging Face Hub: one safetensors file that `sf.save_model` wrote. Nothing is ever unpickled."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

from sdeflow import checkpoints
from sdeflow.model import Model

FILENAME = "model.safetensors"
"""The name of the checkpoint in a repository, unless told otherwise."""


def load_model(
    repo_id: str,
    filename: str = FILENAME,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Model:
    """The model in a file of the Hub's repository `repo_id`, as `sf.load_model` of that file.

    Args:
        repo_id: "owner/name".
        filename: of a checkpoint that `sf.save_model` wrote, in the repository; it ends in .safetensors.
        revision: a branch, a tag or a commit. A commit's hash pins the weights.
        cache_dir, token, local_files_only: as in `huggingface_hub.hf_hub_download`, whose environment variables
            (HF_HUB_OFFLINE, HF_HOME, HF_TOKEN) hold too.

    Raises:
        ImportError: huggingface_hub is not installed.
        ValueError: a name that is not of a safetensors file inside the repository, or a file that is no checkpoint.
        huggingface_hub.errors: no such repository, revision or file, or none of them in the cache when offline.
    """
    if not isinstance(repo_id, str) or (revision is not None and not isinstance(revision, str)):
        raise TypeError(f"expected repo_id and revision as text, got {repo_id!r:.60} and {revision!r:.60}")
    _check_filename(filename)
    path = _client().hf_hub_download(
        repo_id, filename, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
    )
    return checkpoints.load_model(Path(path))


def save_folder(path: str | os.PathLike[str], model: Model, *, license: str | None = None, **info: Any) -> None:
    """Write `model.safetensors` and a model card into a folder, ready for `huggingface_hub.upload_folder`.

    Args:
        path: of the folder, made if there is none. A README.md that is there already is left as it is.
        model: as `sf.save_model` takes it.
        license: identifier of the weights' licence for the card, such as "apache-2.0"; none unless given.
        info: what else to keep in the checkpoint, as in `sf.save_model`.

    Raises:
        TypeError, ValueError: as `sf.save_model`.
    """
    folder = Path(path)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        checkpoints.save_model(folder / FILENAME, model, **info)
    except BaseException:
        if made:
            folder.rmdir()  # nothing is in it: the checkpoint is written whole or not at all
        raise
    card = folder / "README.md"
    if not card.exists():
        checkpoints.write_atomically(card, _card(folder / FILENAME, license).encode())


def _client() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ImportError('loading from the Hub needs huggingface_hub: pip install "sdeflow[hub]"') from error


def _check_filename(filename: str) -> None:
    if not isinstance(filename, str):
        raise TypeError(f"expected filename to be a string, got {type(filename).__name__}")
    if not filename.endswith(".safetensors"):
        raise ValueError(
            f"expected the name of a .safetensors file, got {filename!r}: other formats can run code when they are "
            "read; rebuild the model from one you trust and write it with sf.save_model"
        )
    parts = PurePosixPath(filename).parts
    inside = not filename.startswith("/") and ".." not in parts and not any(c in filename for c in "\\:\0")
    if not inside:
        raise ValueError(f"expected a path inside the repository, such as {FILENAME!r}, got {filename!r}")


def _card(checkpoint: Path, license: str | None) -> str:
    """A model card: metadata, what the model is, and how to load it."""
    info = checkpoints.read_info(checkpoint)
    process, net = ({**info[part]} for part in ("process", "net"))
    shape = tuple(info["shape"])
    metadata = {"library_name": "sdeflow", "tags": ["sdeflow", "diffusion"]}
    if license is not None:
        metadata["license"] = license
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items())  # JSON is YAML
    return f"""---
{front}
---

# A model for sdeflow

| | |
|---|---|
| process | {_described(process)} |
| network | {net["name"]} |
| prediction | {info["prediction"]} |
| time input | {info["time"]} |
| one sample | {shape} |

```python
import sdeflow as sf
from sdeflow.integrations import hub

model = hub.load_model("owner/name")
x = sf.sample(model, 16, shape={shape}, steps=10, seed=0).x
```
"""


def _described(part: dict[str, Any]) -> str:
    name = part.pop("name")
    return f"{name}({', '.join(f'{k}={v!r}' if not isinstance(v, list) else f'{k}=[...]' for k, v in part.items())})"
