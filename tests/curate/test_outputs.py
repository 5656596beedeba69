"""The command line with its exit codes, and the report: complete, self-contained, and harmless whatever the text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megallm.base import config as configs
from megallm.cli.main import main
from megallm.curate import kneser_ney, run
from megallm.curate.arpa import ArpaModel
from megallm.curate.config import QualityConfig

from .test_chain import config_of, corpus, kept, prose, write_jsonl

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'


def test_the_report_escapes_everything_and_needs_nothing_else(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    bad = f"{EVIL} & co \x1b[31m \x01"
    rows: list[object] = [{"text": bad, "id": EVIL}, {"text": prose(1)}]
    rows += [{"text": prose(2) + "\nMail jane.roe@mail.org or visit.", "id": "mail"}]
    write_jsonl(raw / "a<b>.jsonl", rows)
    config = config_of(raw, input=config_of(raw).input.__class__(files=(str(raw),), id_key="id"))
    run.run(config, tmp_path / "out")
    page = (tmp_path / "out" / run.REPORT).read_text("utf-8")
    assert "<script" not in page and "<img" not in page and "a<b>" not in page
    assert "&lt;script&gt;alert(&quot;x&quot;)" in page and "quality / too_few_words" in page
    assert "jane.roe" not in page and "@example.com" in page and not any(char in page for char in "\x1b\x01")
    assert (
        page.count("<svg") > 5
        and "http://" not in page
        and "https://" not in page
        and "src=" not in page.replace("img src=", "")
    )
    assert page.count("<details>") == page.count("</details>") == 2


def test_histograms_count_every_document(tmp_path: Path) -> None:
    stats = run.run(config_of(corpus(tmp_path)), tmp_path / "out")
    words = stats["histograms"]["quality.words"]
    assert sum(words["counts"]) == stats["steps"]["quality"]["in"] == 96 and words["limits"] == [50, 100_000]
    assert stats["totals"]["documents"] == stats["steps"]["read"]["in"] == 96
    assert next(iter(stats["steps"])) == "read" and stats["totals"]["lines_rejected"] == 6
    for row in stats["steps"].values():
        assert sum(row["dropped"].values()) <= row["in"]


def cli(*words: str) -> int:
    return main([*words])


def test_curate_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = corpus(tmp_path)
    (tmp_path / "c.yaml").write_text(configs.to_yaml(config_of(raw)), "utf-8")
    out = str(tmp_path / "out")
    assert cli("curate", str(tmp_path / "c.yaml"), "--output", out, "--workers", "2", "steps=[quality, exact]") == 0
    shown = capsys.readouterr()
    summary = json.loads(shown.out)
    assert summary["kept"] == len(kept(Path(out))) and summary["dropped"]["exact/duplicate_document"] == 5
    assert f"megallm: the text is in {out}/kept" in shown.err and "megallm preprocess" in shown.err
    for words, code, sentence in (
        (("steps=[quality, exat]",), 2, "'exat' is not a step"),
        (("near.threshhold=1",), 2, "Did you mean 'near.threshold'"),
        (("input.files=[/nonexistent/x.jsonl]", "--fresh"), 65, "matches no file"),
        (("steps=[decontaminate]", "decontaminate.sets=[/nonexistent]", "--fresh"), 65, "does not exist"),
        (("--workers", "0"), 2, "at least 1"),
    ):
        assert cli("curate", str(tmp_path / "c.yaml"), "--output", out, *words) == code
        assert sentence in capsys.readouterr().err
    assert cli("curate", str(tmp_path / "c.yaml"), "--output", "/proc/nowhere/out") == 73


def test_the_other_verbs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", [{"text": prose(k, 60)} for k in range(40)])
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": "buy cheap casino now " * (10 + k)} for k in range(40)])
    model = str(tmp_path / "m.npz")
    assert cli("curate", "train-classifier", "--good", str(good), "--bad", str(bad), "--output", model) == 0
    assert json.loads(capsys.readouterr().out)["auc"] == 1.0
    arpa = str(tmp_path / "m.arpa")
    assert cli("curate", "train-lm", "--input", str(good), "--order", "2", "--output", arpa) == 0
    assert ArpaModel(arpa).order == 2 == len(json.loads(capsys.readouterr().out))
    assert kneser_ney.sentences("A b, 12!") == ["a b , 0 !"]
    tasks = tmp_path / "t.jsonl"
    assert cli("synth", "--count", "9", "--seed", "3", "--output", str(tasks)) == 0
    assert [json.loads(line)["source"] for line in tasks.read_text().splitlines()[:3]] == [
        "synth/arithmetic", "synth/code", "synth/template",
    ]  # fmt: skip
    assert cli("synth", "--count", "9", "--kind", "poems", "--output", str(tmp_path / "no.jsonl")) == 2
    assert not (tmp_path / "no.jsonl").exists()
    capsys.readouterr()
    # Both models work as steps of a chain.
    config = config_of(good, steps=("classifier", "perplexity"), quality=QualityConfig())
    overrides = [f"classifier.model={model}", f"perplexity.model={arpa}"]
    (tmp_path / "c.yaml").write_text(configs.to_yaml(config), "utf-8")
    assert cli("curate", str(tmp_path / "c.yaml"), "--output", str(tmp_path / "out"), *overrides) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 40


def test_no_personal_data_comes_back_in_the_report(tmp_path: Path) -> None:
    """Neither in a dropped document's excerpt nor beside another replaced span nor cut at an excerpt's edge."""
    names = ["anna.lind@mail.org", "bob.berg@mail.org", "cleo.dahl@mail.org"]
    rows: list[object] = [{"text": f"short {names[0]}"}]
    rows.append({"text": f"{prose(2)}\n{names[1]}, {'x' * 60} {names[2]} and {names[0]}.\nSign in to go on"})
    raw = tmp_path / "raw"
    raw.mkdir()
    write_jsonl(raw / "a.jsonl", rows)
    for steps in (("quality", "pii"), ("pii", "quality")):
        run.run(config_of(raw, steps=steps), tmp_path / steps[0])
        page = (tmp_path / steps[0] / run.REPORT).read_text("utf-8")
        assert "quality / too_few_words" in page and "pii / email" in page and "@example.com" in page
        assert not any(part in page for name in names for part in (name, name.split("@")[0]))
    run.run(config_of(raw, steps=("quality",)), tmp_path / "control")
    assert names[0] in (tmp_path / "control" / run.REPORT).read_text("utf-8")
