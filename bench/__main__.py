"""Runs the comparisons of this folder: python -m bench [NAME] [--rounds N] [--json F] [--quick] [-- OPTIONS]

Without a name it lists them. What stands behind `--` goes to the comparison as it is; `--quick` takes the smallest
cases and two rounds: it shows that everything runs, its figures are worth little. `--json` writes what was printed,
with the command and the machine. Peers that do not fit into the environment of megallm live in their own:
bash bench/setup.sh.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from ratio import machine  # noqa: E402


@dataclass(frozen=True)
class Bench:
    """One comparison: its file, the words of a quick run, and what it needs beside them."""

    file: str
    says: str
    quick: str
    rounds: bool = True
    needs: str = ""  # an option without which it cannot run


BENCHES = {
    "step": Bench("step.py", "a training step in one process beside transformers", "--shapes 15m --agree 2"),
    "parallel": Bench("parallel.py", "steps at several layouts beside DDP, FSDP2, DTensor, torch's pipelines",
                      "--only a/a tp --agree 2"),
    "head": Bench("head.py", "time and memory of the head beside torch's cross entropy",
                  "--tokens 512 --vocab 8000 --hidden 64"),
    "generation": Bench("generation.py", "generation beside transformers' generate", "--sizes 1M"),
    "collectives": Bench("collectives.py", "collectives over shared memory beside gloo", ""),
    "data": Bench("data.py", "preprocessing beside tokenizers and Megatron-LM", "--megabytes 2 --slow-megabytes 1",
                  rounds=False, needs="--tokenizer"),
    "curate": Bench("curate.py", "curation beside datatrove: pass its measure and a raw file behind --", "",
                    rounds=False),
    "checkpoint": Bench("checkpoint.py", "checkpoints beside torch's distributed checkpoint and torch.save",
                        "--megabytes 20"),
    "posttrain": Bench("posttrain.py", "fine-tuning, LoRA, DPO and GRPO steps beside PEFT and TRL",
                       "--cases lora-15M"),
    "attention": Bench("attention.py", "attention on a CPU beside torch's", ""),
    "optimizers": Bench("optimizers.py", "an update by each rule beside torch.optim", "adamw"),
    "experts": Bench("experts.py", "a layer of experts beside transformers'", "--tokens 256", rounds=False),
    "latent": Bench("latent.py", "decoding with latent attention, absorbed and not", "--context 256 --batch 1",
                    rounds=False),
}  # fmt: skip


def listing() -> str:
    """A line for each comparison whose file is there."""
    here = {name: bench for name, bench in BENCHES.items() if (HERE / bench.file).is_file()}
    lines = [f"  {name:12} {bench.says}" + (f" (needs {bench.needs})" if bench.needs else "")
             for name, bench in here.items()]  # fmt: skip
    return "\n".join(["python -m bench NAME [--rounds N] [--json F] [--quick] [-- OPTIONS]", *lines])


def command(name: str, rounds: int | None, quick: bool, further: list[str]) -> list[str]:
    """The words that run a comparison."""
    bench = BENCHES[name]
    words = [sys.executable, str(HERE / bench.file), *(shlex.split(bench.quick) if quick else [])]
    rounds = 2 if quick and rounds is None else rounds
    if rounds is not None and bench.rounds:
        words += ["--rounds", str(rounds)]
    return [*words, *further]


def run(words: list[str], output: Path | None) -> int:
    """Run a comparison, show its lines as they come, and keep them; the exit code."""
    begin, lines, where = time.monotonic(), [], machine()
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n"))
    if output is not None:
        kept = {"command": words[1:], "machine": where, "seconds": time.monotonic() - begin, "exit": child.returncode}
        output.write_text(json.dumps(kept | {"lines": lines}, indent=1) + "\n")
    return child.returncode


def main(argv: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    further = words[words.index("--") + 1 :] if "--" in words else []
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=BENCHES, metavar="NAME")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--json", type=Path, metavar="F")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(words[: len(words) - len(further) - ("--" in words)])
    if args.name is None:
        print(listing())
        return 0
    bench = BENCHES[args.name]
    if not (HERE / bench.file).is_file():
        parser.error(f"bench/{bench.file} is not there")
    if bench.needs and bench.needs not in further:
        parser.error(f"{args.name} needs {bench.needs}: python -m bench {args.name} -- {bench.needs} ...")
    return run(command(args.name, args.rounds, args.quick, further), args.json)


if __name__ == "__main__":
    sys.exit(main())
