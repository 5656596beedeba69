"""Tokens per CPU second of generation: ours, another checkout of ours, and transformers, on the same random weights.

Everything is single-threaded and each system a process of its own; rounds are interleaved and the ratio is that of
paired rounds (`bench/ratio.py`). Prompts, numbers of tokens and temperature are the same for all, and no text ends
early. `group` is 8 samples for each of 4 prompts.

    python bench/generation.py [--against FOLDER_OF_A_CHECKOUT] [--rounds 5] [--sizes 1M 10M]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

SIZES = {
    "1M": {"num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 344, "num_heads": 4, "num_kv_heads": 2,
           "vocab_size": 2048, "max_positions": 1024},
    "3M": {"num_layers": 6, "hidden_size": 192, "ffn_hidden_size": 512, "num_heads": 6, "num_kv_heads": 3,
           "vocab_size": 4096, "max_positions": 1024},
    "10M": {"num_layers": 8, "hidden_size": 320, "ffn_hidden_size": 864, "num_heads": 8, "num_kv_heads": 4,
            "vocab_size": 4096, "max_positions": 1024},
    "135M": {"num_layers": 30, "hidden_size": 576, "ffn_hidden_size": 1536, "num_heads": 9, "num_kv_heads": 3,
             "vocab_size": 49152, "max_positions": 1024},
}  # fmt: skip
LOADS = {"batch 1": (1, 1), "batch 32": (32, 1), "group": (4, 8)}  # prompts, samples of each
PROMPT, NEW = 64, 64


def prompts(load: str, vocab: int) -> list[list[int]]:
    """The prompts of a load, each as often as it has samples."""
    count, samples = LOADS[load]
    texts = [[(7 * i + 31 * n + i * i) % vocab for i in range(PROMPT)] for n in range(count)]
    return [text for text in texts for _ in range(samples)]


def ours(size: str):
    """A function that continues prompts with the generator of this checkout, or of the one that runs this file."""
    from megallm.engine.config import EngineConfig
    from megallm.engine.engine import Engine
    from megallm.inference.answer import Answer, Ending
    from megallm.inference.generator import Generator
    from megallm.inference.samples import Request
    from megallm.inference.sampling import Sampling
    from megallm.models.config import ModelConfig
    from megallm.parallel.mesh import Mesh

    config = EngineConfig(model=ModelConfig(family="llama", **SIZES[size]).resolve(), seed=1)  # fp32
    engine = Engine.build(config, Mesh.single())

    def run(texts: list[list[int]], temperature: float) -> int:
        asked = [Request(n, list(text), Answer(Ending(NEW))) for n, text in enumerate(texts)]
        with engine.parameters.gathered():
            Generator(engine.model, len(texts)).generate(asked, Sampling(NEW, temperature))
        return sum(len(each.answer.tokens) for each in asked)

    return run


def theirs(size: str):
    """The same with transformers' generate."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    s = SIZES[size]
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=s["vocab_size"], hidden_size=s["hidden_size"], intermediate_size=s["ffn_hidden_size"],
        num_hidden_layers=s["num_layers"], num_attention_heads=s["num_heads"], num_key_value_heads=s["num_kv_heads"],
        max_position_embeddings=s["max_positions"],
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()

    def run(texts: list[list[int]], temperature: float) -> int:
        ids = torch.tensor(texts)
        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0,
                **drawn,
            )
        return out[:, PROMPT:].numel()

    return run


def serve(system: str, size: str) -> None:
    """Answer each line `[load, temperature]` with tokens and CPU seconds."""
    import torch

    torch.set_num_threads(1)
    run, vocab = (theirs if system == "transformers" else ours)(size), SIZES[size]["vocab_size"]
    print("ready", flush=True)
    for line in sys.stdin:
        load, temperature = json.loads(line)
        begin = time.process_time()
        tokens = run(prompts(load, vocab), temperature)
        print(json.dumps([tokens, time.process_time() - begin]), flush=True)


class System:
    """A system in a process of its own."""

    def __init__(self, name: str, size: str, folder: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, __file__, "--serve", name, "--sizes", size]
        self.child = subprocess.Popen(
            words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        while self.child.stdout.readline().strip() != "ready":
            if self.child.poll() is not None:
                raise SystemExit(f"{name} ended with {self.child.returncode}.")

    def measure(self, load: str, temperature: float) -> float:
        """Tokens per CPU second."""
        self.child.stdin.write(json.dumps([load, temperature]) + "\n")
        self.child.stdin.flush()
        tokens, seconds = json.loads(self.child.stdout.readline())
        return tokens / seconds

    def close(self) -> None:
        self.child.stdin.close()
        self.child.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="another checkout, to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1M", "10M"])
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.sizes[0])
        return
    here = Path(__file__).resolve().parents[1]
    folders = {"megallm": here, "transformers": here} | ({"before": args.against} if args.against else {})
    for size in args.sizes:
        systems = {name: System(name, size, folder) for name, folder in folders.items()}
        for load in LOADS:
            rows = []
            for number in range(args.rounds + 1):  # the first one warms up
                row = {name: system.measure(load, args.temperature) for name, system in systems.items()}
                rows += [row] if number else []
            figures = [f"{name} {statistics.median(row[name] for row in rows):6.0f}" for name in systems]
            ratios = [
                f"{statistics.median(row['megallm'] / row[name] for row in rows):.2f}x {name}"
                for name in systems if name != "megallm"
            ]
            print(f"{size:>4} {load:9} tokens/CPU s: {', '.join(figures)}: {', '.join(ratios)}", flush=True)
        for system in systems.values():
            system.close()


if __name__ == "__main__":
    main()
