"""A tiny random model of a family in a Hugging Face folder, and generation from it on a rank."""

from __future__ import annotations

from pathlib import Path

import torch

from megallm.inference import generate
from megallm.inference.answer import Answer, Ending
from megallm.inference.generate import Loaded
from megallm.inference.generator import Generator
from megallm.inference.request import GenerateRequest
from megallm.inference.samples import Request
from megallm.inference.sampling import Sampling
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from tests.convert.tiny import case, make

MODELS = {
    "llama": case("llama", "LlamaConfig", vocab_size=257, max_position_embeddings=128),
    "gpt2": case("gpt2", "GPT2Config", vocab_size=257, n_positions=128),
    "mistral": case("mistral", "MistralConfig", vocab_size=257, sliding_window=6),
    "odd": case("odd", "LlamaConfig", vocab_size=257, num_attention_heads=6, hidden_size=48, head_dim=8,
                num_key_value_heads=2),
}  # fmt: skip
END = 256


def make_model(folder: Path, name: str) -> str:
    """Save the model; it has no tokenizer, so bytes stand for its tokens."""
    from megallm.convert.tokenizer_files import write_byte_tokenizer

    made = make(folder / name, MODELS[name])
    write_byte_tokenizer(made)
    return str(made)


def prompts(count: int, vocab: int = END) -> list[list[int]]:
    """Random prompts of 1 to 17 tokens."""
    draw = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 18, (count,), generator=draw).tolist()
    return [torch.randint(vocab, (n,), generator=draw).tolist() for n in lengths]


def continue_all(
    model: str, layout: Layout, texts: list[list[int]], sampling: Sampling, batch: int = 16
) -> list[tuple[list[int], list[float]]]:
    """On a rank: (tokens, log_probs) of each prompt, decoded `batch` together."""
    mesh = Mesh.start(layout)
    loaded: Loaded = generate.load(GenerateRequest(model), mesh)
    generator = Generator(loaded.generator.model, batch)
    requests = [
        Request(number, list(text), Answer(Ending(sampling.max_new_tokens, frozenset({END}))))
        for number, text in enumerate(texts)
    ]
    generator.generate(requests, sampling)
    return [(request.answer.tokens, request.answer.log_probs) for request in requests]
