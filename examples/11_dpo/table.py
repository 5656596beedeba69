"""table.py WORK SECONDS: what each way of training did to held-out pairs and to held-out sums."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean

from toy import answer, read

NAMES = {
    "dpo": "DPO", "nll": "DPO + likelihood (`rpo_alpha: 1`)", "ipo": "IPO", "kto": "KTO", "simpo": "SimPO",
    "orpo": "ORPO",
}  # fmt: skip
MEANS = ("orpo", "simpo")  # their log-probs are those of a token, not of an answer


def greedy(path: Path) -> float:
    """The share of held-out sums that the likeliest answer gets right."""
    return fmean(row["text"] == answer(row["prompt"]) for row in read(path))


def line(work: Path, name: str, title: str, before: float) -> str:
    found, events = read(work / name / "metrics.jsonl"), read(work / name / "events.jsonl")
    last = [row for row in found if "val/loss" in row][-1]
    accuracy = last.get("val/rewards/accuracies")
    fall = "-" if name.startswith(MEANS) else f"{last['val/logps/chosen'] - before:+.2f}"
    warned = any(event["event"] == "likelihood_displacement" for event in events)
    return (
        f"| {title} | {'-' if accuracy is None else f'{accuracy:.3f}'} | {fall} | "
        f"{greedy(work / f'{name}.jsonl'):.3f} | {'yes' if warned else 'no'} |"
    )


def lines(work: Path) -> list[str]:
    # What the policy gives less the log-ratio is what the model before gave.
    one = [row for row in read(work / "dpo-1/metrics.jsonl") if "val/loss" in row][-1]
    before = one["val/logps/chosen"] - one["val/rewards/chosen"] / 0.1
    made = []
    for name, title in NAMES.items():
        seeds = sorted(path.stem.rpartition("-")[2] for path in work.glob(f"{name}-*.jsonl"))
        made += [
            line(work, f"{name}-{seed}", f"{title}, seed {seed}" if len(seeds) > 1 else title, before) for seed in seeds
        ]
    return made


if __name__ == "__main__":
    work = Path(sys.argv[1])
    pairs, before = read(work / "pairs.jsonl"), greedy(work / "base.jsonl")
    scores = [json.loads((work / f"sum_{name}.json").read_text()) for name in ("before", "after")]
    steps = read(work / "lora/metrics.jsonl")
    sums = len(read(work / "sum_pairs.jsonl")), len(read(work / "sum_held_out.jsonl"))
    print(f"""# Result: preferring the right answer is not giving it

Command: `bash examples/11_dpo/run.sh`: {sys.argv[2]} s on two cores, installation apart.

## A toy: sums of two numbers with two digits

A Llama of 0.9M parameters, stopped while it learns to add, is right in {before:.3f} of 200 held-out sums (greedy). Its
own wrong samples and the right answers are {len(pairs)} pairs, such as `{json.dumps(pairs[0])}`; 100 steps of 64 pairs.
Columns: held-out pairs whose right answer is preferred; change of the right answers' log-prob on them, in nats; right
answers to the held-out sums; whether the run itself warned (`likelihood_displacement` in events.jsonl).

| trained by | preferred | log-prob | right sums | warned |
|---|---|---|---|---|
| nothing: the model before | | | {before:.3f} | |
{chr(10).join(lines(work))}

DPO asks that the gap between two answers grows. Where both are alike, the cheapest way is to make both less likely, the
wrong one more so, and what takes their place is something else. The likelihood of the right answers beside it
(`dpo.rpo_alpha`) keeps the task.

## SmolLM2-135M-Instruct with LoRA: sums of reasoning-gym

Answers that were sampled (T = 1) after three worked sums and that the scorer of `chain_sum` refuses, and the right
ones, are {sums[0]} pairs; {len(steps)} steps of 8 pairs with `rpo_alpha: 1`, reference: the model without its adapter.
`rewards/margins` {steps[0]["rewards/margins"]:.2f} -> {steps[-1]["rewards/margins"]:.2f}, `rewards/accuracies` of the
last step {steps[-1]["rewards/accuracies"]:.2f}. Right answers to {sums[1]} held-out sums (greedy, the scorer's word):
{scores[0]:.3f} before, {scores[1]:.3f} after.""")
