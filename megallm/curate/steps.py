"""The table of local steps: name -> how it is built. A step's module is imported when the step is
used.
"""

from __future__ import annotations

import importlib
from typing import Any

from megallm.curate.config import CurateConfig

# step -> (module, class); the class takes its section of the configuration
LOCAL_STEPS = {
    "language": ("language", "Language"),
    "quality": ("quality", "Quality"),
    "classifier": ("classifier", "Classifier"),
    "pii": ("pii", "Pii"),
    "toxicity": ("toxicity", "Toxicity"),
    "perplexity": ("perplexity", "Perplexity"),
    "decontaminate": ("decontaminate", "Decontaminate"),
}


def build_step(name: str, config: CurateConfig) -> Any:
    """Returns a local step ready to judge. Errors: `UsageError`, `DataError` for models and lists
    that cannot be read.
    """
    module, cls = LOCAL_STEPS[name]
    return getattr(importlib.import_module(f"megallm.curate.{module}"), cls)(getattr(config, name))
