"""table.py WORK SECONDS: what each way of training did to held-out pairs and to held-out sums."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).parents[1] / "07_reward"))
from toy import answer, read

NAMES = {
    "dpo": "DPO", "dpo_nll": "DPO + likelihood (`rpo_alpha: 1`)", "lora": "the same with LoRA, reference: adapter off",
    "ipo": "IPO", "simpo": "SimPO", "orpo": "ORPO", "kto": "KTO",
}  # fmt: skip
MEANS = ("orpo", "simpo")  # their log-probs are those of a token, not of an answer


def greedy(path: Path) -> float:
    """The share of held-out sums that the likeliest answer gets right."""
    return fmean(row["text"] == answer(row["prompt"]) for row in read(path))


def shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def rows(work: Path) -> list[str]:
    made = []
    for name, title in NAMES.items():
        found = [row for row in read(work / name / "metrics.jsonl") if "val/loss" in row]
        first, last = found[0], found[-1]
        fall = None if name in MEANS else last["val/logps/chosen"] - BEFORE
        warned = any(event["event"] == "likelihood_displacement" for event in read(work / name / "events.jsonl"))
        accuracies = (shown(row.get("val/rewards/accuracies"), ".3f") for row in (first, last))
        made.append(
            f"| {title} | {' -> '.join(accuracies)} | {shown(fall, '+.2f')} | "
            f"{greedy(work / f'{name}.jsonl'):.3f} | {'yes' if warned else 'no'} |"
        )
    return made


if __name__ == "__main__":
    work = Path(sys.argv[1])
    # The reference's mean log-prob of the chosen answers: what the policy gives less the log-ratio.
    one = next(row for row in read(work / "dpo/metrics.jsonl") if "val/loss" in row)
    BEFORE = one["val/logps/chosen"] - one["val/rewards/chosen"] / 0.1
    steps = read(work / "dpo/metrics.jsonl")[-1]["step"]
    first = json.dumps(read("examples/07_reward/work/prompts-near.jsonl")[0])
    before = greedy(work / "base.jsonl")
    print(f"""# Result: preferring the right answer is not giving it

Command: `bash examples/11_dpo/run.sh`: {sys.argv[2]} s. A Llama of 0.8M parameters adds numbers of two digits. It is
right in {before:.3f} of 200 held-out sums (greedy). Pairs are the right answer and a wrong one that the model itself
sampled, such as `{first}`; {steps} steps of 32 pairs.

Columns: held-out pairs whose right answer is preferred, at the first and the last evaluation; change of the right
answers' log-prob in nats; held-out sums that are right; whether the run itself warned.

| trained by | right one preferred | log-prob | right sums | warned |
|---|---|---|---|---|
| nothing: the model before | | | {before:.3f} | |
{chr(10).join(rows(work))}

DPO only asks that the gap between two answers grows. Where both are alike, the cheapest way is to make both less
likely, the wrong one more so, and what takes their place is something else. The likelihood of the chosen answers beside
it (`dpo.rpo_alpha`), or a loss that has it inside (ORPO), is meant to keep the task. A warned run has an event
`likelihood_displacement` in events.jsonl.""")
