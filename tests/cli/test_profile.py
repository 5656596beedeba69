"""`megallm profile`: the parts of a step sum to its time, whatever trains, and say what was exchanged."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from megallm.cli.main import main
from megallm.cli.profile import read_profiles
from megallm.parallel.picture import to_svg
from megallm.run.profile import RankProfile, StepSpan, device_parts, draw_step, part_of, table
from tests.system.commands import megallm


def config_of(folder: Path) -> str:
    rows = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = {
        "run": {"dir": str(folder / "run"), "seed": 1},
        "model": {"family": "llama", "num_layers": 2, "hidden_size": 16, "num_heads": 2, "vocab_size": 257,
                  "max_positions": 32},
        "data": {"sources": {str(folder / "rows.jsonl"): 1}, "tokenizer": "bytes", "seq_len": 16},
        "train": {"steps": 9, "global_batch": 4, "micro_batch": 2, "precision": "fp32"}, "log": {"plot": False},
    }  # fmt: skip
    (folder / "sft.yaml").write_text(yaml.safe_dump(text))
    return str(folder / "sft.yaml")


def test_parts_sum_to_the_step(tmp_path, capsys):
    assert main(["profile", config_of(tmp_path), "--kind", "sft", "--steps", "2", "--warmup", "1"]) == 0
    folder = tmp_path / "run" / "profile"
    (found,) = read_profiles(folder, 1)
    assert len(found.steps) == 2
    for spans in found.steps:
        assert all(before.end == after.begin for before, after in pairwise(spans)), "a gap"
        assert {"data", "forward", "backward", "optimizer"} <= {span.name for span in spans}
    assert sum(found.parts().values()) == pytest.approx(found.seconds(), abs=1e-6)
    assert found.operations["aten::mm"] > 0 and sum(found.shares().values()) == pytest.approx(1)
    said = capsys.readouterr()
    assert "is saved in" not in said.out and re.search(r"^  sum .* 100.0%$", said.out, re.MULTILINE)
    assert not (tmp_path / "run" / "checkpoints").exists()
    names = {event.get("name") for event in json.loads((folder / "trace-rank-0.json").read_text())["traceEvents"]}
    assert {"megallm forward", "aten::mm"} <= names
    assert "<svg" in (folder / "timeline.svg").read_text()
    assert json.loads((folder / "profile.json").read_text())["ranks"]


def test_ranks_say_what_they_exchange(tmp_path):
    words = ["profile", config_of(tmp_path), "--kind", "sft", "--steps", "1", "--warmup", "1", "layout.pp=2"]
    done = megallm(*words, cwd=tmp_path, timeout=240)
    assert done.code == 0, done.err
    ranks = json.loads((tmp_path / "run" / "profile" / "profile.json").read_text())["ranks"]
    assert len(ranks) == 2
    for rank in ranks:
        assert sum(rank["parts"].values()) == pytest.approx(rank["seconds"], abs=1e-6)
    # Two microbatches of 2 x 16 x 16 numbers go up, and their gradients down.
    assert ranks[0]["traffic"]["pp send"] == [2, 2 * 2 * 16 * 16 * 4] == ranks[1]["traffic"]["pp send"]
    assert all(rank["parts"]["bubble"] > 0 for rank in ranks)
    assert "bubble" in done.out and "pp send: 2 calls" in done.out


def test_too_few_steps_are_refused(tmp_path, capsys):
    assert main(["profile", config_of(tmp_path), "--kind", "sft", "--steps", "20"]) == 2
    assert "train.steps is 9, and 23 steps are needed" in capsys.readouterr().err


def test_the_account_of_made_up_spans():
    names = ("data", 1), ("forward", 4), ("wait pp recv", 5), ("wait tp all_reduce", 7), ("forward", 8)
    names += (("optimizer", 10),)
    begins = (0, *(end for _, end in names))
    spans = [StepSpan(name, begin, end) for begin, (name, end) in zip(begins, names, strict=False)]
    rank = RankProfile([spans], {"tp all_reduce": [3, 2**20]}, {"aten::mm": 3.0}, 4.0)
    assert rank.parts() == {"data": 1, "compute": 4, "bubble": 1, "communication tp": 2, "optimizer": 2}
    assert rank.shares() == {"aten::mm": 0.75, "Python and launches": 0.25}
    said = "\n".join(table([rank, rank]))
    assert "tp all_reduce: 3 calls, 1.000 MiB" in said and "step 10.0000 s" in said
    assert part_of("wait ep all_to_all") == "communication ep" and part_of("between") == "other"
    picture = to_svg(draw_step([spans, spans]))
    assert picture.count("wait tp all_reduce: 2000.000 ms") == 2 and "rank 1" in picture


def test_what_a_gpu_exchanges_behind_its_kernels_costs_nothing():
    kernels = [("gemm", 1.0, 4.0), ("ncclDevKernel_AllReduce", 3.0, 6.0), ("copy", 8.0, 12.0)]
    assert device_parts(kernels, 0.0, 10.0) == {"compute": 5.0, "communication": 2.0, "idle": 3.0}
    assert device_parts([], 0.0, 2.0) == {"compute": 0.0, "communication": 0.0, "idle": 2.0}
