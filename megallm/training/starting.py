"""What a run of megallm says about itself to a run that starts from its weights (`model.init`):
its model and its tokenizer. Pure.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megallm.base.errors import CheckpointError, UsageError
from megallm.checkpoint import manifest
from megallm.convert.tokenizer_files import checkpoint_tokenizer, tokenizer_spec
from megallm.models.config import ModelConfig

_STEP = re.compile(r"step-\d{8,}")


def newest_step(source: str) -> Path:
    """Returns the step folder that a run or step folder stands for, of a run the newest. Errors:
    `UsageError`; whether it is whole shows when it is read.
    """
    path = Path(source)
    if (path / manifest.MANIFEST).is_file():
        return path
    root = path / "checkpoints"
    names = [entry.name for entry in root.iterdir()] if root.is_dir() else []
    steps = sorted(
        (name for name in names if _STEP.fullmatch(name)), key=lambda name: int(name[5:])
    )
    if not steps:
        raise UsageError(
            f"model.init {source} is no run or step folder of megallm: it has no checkpoint. A "
            "Hugging Face folder goes into model.hf."
        )
    return root / steps[-1]


def check_source(key: str, source: str) -> None:
    """Checks that a folder that `key` of the configuration names holds a model. Errors:
    `UsageError` that names the key.
    """
    path = Path(source)
    if (path / "config.json").is_file():
        return
    try:
        newest_step(source)
    except UsageError:
        why = "holds no model" if path.is_dir() else "is not there"
        raise UsageError(
            f"{key} {source}: this folder {why}. Give a Hugging Face folder (with config.json), a "
            "run folder with a checkpoint, or one of its step folders."
        ) from None


def meta_of(source: str) -> dict[str, Any]:
    """Returns what that checkpoint remembers beside tensors. Errors: `CheckpointError`,
    `UsageError`.
    """
    path = newest_step(source) / manifest.MANIFEST
    try:
        found = manifest.decode(path.read_bytes(), str(path)).meta
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    return found if isinstance(found, dict) else {}


def model_of(source: str) -> ModelConfig:
    """Returns the model of a run, resolved. Errors: `UsageError` for a checkpoint that does not
    name one, or holds adapters alone.
    """
    meta = meta_of(source)
    if "base" in meta:
        raise UsageError(
            f"model.init {source} holds adapters alone: `megallm merge --model {source} --output "
            "DIR` puts them into their base; then give model.hf=DIR."
        )
    try:
        return ModelConfig(**meta["model"]).resolve()
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"model.init {source} does not say which model it holds ({error})."
        ) from error


def tokenizer_of_model(model: ModelConfig) -> str | None:
    """Returns the tokenizer of the folder that a model starts from; None without one."""
    if model.hf is not None:
        return tokenizer_spec(Path(model.hf))
    if model.init is not None:
        return checkpoint_tokenizer(newest_step(model.init), meta_of(model.init))
    return None
