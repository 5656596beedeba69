"""How long the example will take here: python calibrate.py CONFIG [key=value ...]

Times a few steps of the very run (its model, layout, batch and precision) on made-up text in a folder of its own, and
prints one line: the steps that are left at that pace, held-out losses, and starts. `run.sh` calls it at the start.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megallm.base.config import load
from megallm.training.config import PretrainConfig

STEPS, WARM_UP = 7, 3  # the first steps allocate memory and are slower
OTHER_STARTS = 4  # of programs about as heavy to start: tokenizer and preprocessing, training, comparison, samples
FORWARD_SHARE = 1 / 3  # of a step: the held-out loss has no backward pass


def megallm(*words: str) -> None:
    """Run one command of megallm quietly; its error ends the calibration."""
    done = subprocess.run([sys.executable, "-m", "megallm", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"megallm {words[0]} ended with {done.returncode}")


def rows_of(run: Path) -> list[dict]:
    """The rows of metrics.jsonl, a half-written last one aside; none without the file."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def measure(path: str, settings: list[str], config: PretrainConfig) -> tuple[float, float]:
    """(seconds a step, seconds of everything around the steps) of a short run."""
    draw = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="megallm-calibrate-") as name:
        folder = Path(name)
        rows = ("".join(draw.choices("abcdefgh ", k=config.data.seq_len)) for _ in range(8 * config.train.global_batch))
        (folder / "text.txt").write_text("\n".join(rows))
        megallm("preprocess", "--input", str(folder / "text.txt"), "--split-text", "lines", "--tokenizer", "bytes",
                "--append-eod", "--output", str(folder / "data"))  # fmt: skip
        last = min(STEPS, config.train.steps)
        begin = time.monotonic()
        megallm("pretrain", path, *settings, f"data.sources={{{folder}/data_text_document: 1}}", "data.tokenizer=bytes",
                f"run.dir={folder}/run", f"train.stop_at={last}", "eval.batches=0", "checkpoint.every=0",
                "log.plot=false", "--resume", "never")  # fmt: skip
        whole = time.monotonic() - begin
        seconds = [row["perf/step_seconds"] for row in rows_of(folder / "run")]
    return statistics.median(seconds[WARM_UP:] or seconds), max(0.0, whole - sum(seconds))


def estimate(config: PretrainConfig, done_steps: int, step: float, around: float) -> tuple[int, float]:
    """(steps that are left, seconds of everything that is left)."""
    last = config.train.stop_at or config.train.steps
    left = max(0, last - done_steps)
    held_out = (left // config.eval.every + 1 if config.eval.every else 1) * config.eval.batches
    return left, left * step + held_out * FORWARD_SHARE * step + OTHER_STARTS * around


def main(path: str, settings: list[str]) -> None:
    config = load(PretrainConfig, path, settings)
    rows = rows_of(Path(config.run.dir))
    done = rows[-1]["step"] if rows else 0
    if done >= (config.train.stop_at or config.train.steps):
        print("Everything was trained before: showing the results takes less than a minute.")
        return
    step, around = measure(path, settings, config)
    left, seconds = estimate(config, done, step, around)
    about = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
    pace = f"{left} steps of {step:.2f} s, measured just now, and the rest"
    print(f"This will take about {about} on this machine: {pace}.")


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2:])
    except (RuntimeError, IndexError, OSError) as error:
        print(f"calibrate.py: how long it will take could not be measured ({error}).", file=sys.stderr)
