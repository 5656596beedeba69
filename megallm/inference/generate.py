"""`megallm generate`: load a checkpoint at the wanted layout and continue prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megallm.base.errors import CheckpointError, UsageError
from megallm.base.files import atomic_write_text
from megallm.checkpoint import store
from megallm.checkpoint.reader import Reader
from megallm.convert.folder import is_model_folder
from megallm.convert.weights import HfReader
from megallm.data import tokenizer
from megallm.data.tokenizer import Tokenizer
from megallm.engine.config import EngineConfig
from megallm.engine.model import ParallelModel
from megallm.inference.generator import Completion, Generator
from megallm.inference.request import GenerateRequest
from megallm.inference.sampling import Sampling
from megallm.models.config import ModelConfig
from megallm.parallel.mesh import Mesh

Row = dict[str, Any]


def run(request: GenerateRequest, mesh: Mesh, show: Callable[[Row], None] | None = None) -> list[Row]:
    """Continue each prompt; rows {prompt, tokens, text, logprobs} on every rank. Collective over the world.

    Rank 0 writes them to `request.output`, or passes each to `show` as it comes.
    """
    with open_model(request.model) as reader:
        config = model_config(reader)
        model = ParallelModel.load(config, mesh, reader)
        words = find_tokenizer(reader)
    sampling = Sampling(request.max_new_tokens, request.temperature, request.top_k, request.top_p, request.seed)
    generator = Generator(model)
    rows = []
    for number, prompt in enumerate(request.prompts):
        tokens = words.encode(prompt) or [words.eod]
        completion = generator.generate(tokens, sampling, request=number, stop=words.eod)
        rows.append(row_of(prompt, completion, words))
        if mesh.rank == 0 and request.output is None and show is not None:
            show(rows[-1])
    if mesh.rank == 0 and request.output is not None:
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        atomic_write_text(Path(request.output), "".join(f"{line}\n" for line in lines))
    return rows


def row_of(prompt: str, completion: Completion, words: Tokenizer) -> Row:
    """The JSON row of one completion; the end-of-text token is not part of the text."""
    shown = [token for token in completion.tokens if token != words.eod]
    return {
        "prompt": prompt,
        "tokens": completion.tokens,
        "text": words.decode(shown),
        "logprobs": completion.log_probs,
    }


def open_model(model: str) -> Reader | HfReader:
    """The weights of a run folder, a step folder or a Hugging Face folder."""
    return HfReader(model) if is_model_folder(Path(model)) else Reader(find_step(model))


def find_step(model: str) -> Path:
    """The checkpoint that a run folder or a step folder stands for; UsageError when there is none."""
    path = Path(model)
    if not path.is_dir():
        raise UsageError(f"--model {model}: there is no such folder; give a run folder or one of its step folders.")
    if (path / "manifest.json").exists():
        return path
    found, warnings = store.latest(path / "checkpoints")
    if found is None:
        raise CheckpointError(f"{path} holds no valid checkpoint. {' '.join(warnings)}".rstrip())
    return found


def model_config(reader: Reader | HfReader) -> EngineConfig:
    """What to build, from what the checkpoint remembers."""
    try:
        return EngineConfig(model=ModelConfig(**reader.meta["model"]), precision=reader.meta["precision"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{reader.folder} does not say which model it holds ({error}).") from error


def find_tokenizer(reader: Reader | HfReader) -> Tokenizer:
    """The copy in the run folder, else what the run was configured with or came with its folder, else bytes."""
    kept = reader.folder.parent.parent / "tokenizer"
    if isinstance(reader, Reader) and kept.is_dir():
        return tokenizer.load(str(kept))
    return tokenizer.load(reader.meta.get("tokenizer") or tokenizer.BYTES)
