"""Every student of one seed: `python grid.py SEED WORK` trains them in this process and writes WORK/SEED.json."""

import json
import sys
import time
from pathlib import Path

from megallm.cli.main import main

HERE = Path(__file__).parent
GRID = [(beta, share) for beta in (0.0, 0.5, 1.0) for share in (0.0, 0.5, 1.0)]
WAYS = {f"beta {beta:g}, lmbda {share:g}": [f"distill.beta={beta}", f"distill.lmbda={share}"] for beta, share in GRID}
WAYS["top 8 stored, beta 0"] = ["teacher.kind=stored", "teacher.top_k=8", "distill.beta=0"]
WAYS["reverse KL as a reward"] = ["distill.loss=reverse_kl_reward"]


def megallm(*words: str) -> None:
    code = main(list(words))
    if code:
        sys.exit(code)


def shares(model: Path, work: Path, name: str) -> dict[str, float]:
    """The shares of held-out sums that greedy answers, and answers drawn at temperature 1, get right."""
    wanted = [json.loads(line)["answer"] for line in (work / "held_out.jsonl").read_text().splitlines()]
    found = {}
    for kind, temperature in (("greedy", "0"), ("sampled", "1")):
        made = work / "answers" / f"{name}-{kind}.jsonl"
        made.parent.mkdir(exist_ok=True)
        megallm(
            "generate", "--model", str(model), "--prompts", str(work / "held_out.jsonl"), "--temperature", temperature,
            "--max-new-tokens", "4", "--batch", "200", "--json", str(made), "--overwrite",
        )  # fmt: skip
        answers = [json.loads(line)["text"] for line in made.read_text().splitlines()]
        found[kind] = sum(map(str.__eq__, wanted, answers)) / len(wanted)
    return found


def student(seed: str, work: Path) -> dict[str, dict[str, float]]:
    start = work / f"student-{seed}"
    megallm("sft", str(HERE / "student.yaml"), f"run.dir={start}", f"run.seed={seed}")
    found = {"start": {**shares(start, work, f"{seed}-start"), "seconds": 0.0}}
    common = [f"model.init={start}", f"run.seed={seed}"]
    lines = (HERE / "distill.yaml").read_text().splitlines()
    sft = [line for line in lines if not line.startswith(("teacher", "distill"))]
    plain = work / f"sft-{seed}.yaml"
    plain.write_text("\n".join(sft) + "\n")
    for name, values in {"SFT": [], **WAYS}.items():
        run = work / "runs" / f"{seed}-{name.replace(' ', '_')}"
        verb, config = ("sft", plain) if name == "SFT" else ("distill", HERE / "distill.yaml")
        megallm(verb, str(config), f"run.dir={run}", *common, *values)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        seconds = sum(row["perf/step_seconds"] for row in rows)
        found[name] = {**shares(run, work, run.name), "seconds": seconds}
    return found


if __name__ == "__main__":
    seed, work = sys.argv[1], Path(sys.argv[2])
    began = time.monotonic()
    made = student(seed, work)
    (work / f"{seed}.json").write_text(json.dumps({"ways": made, "seconds": time.monotonic() - began}))
