"""datatrove's local executor runs the same shards: the outputs are those of `run`, byte for byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="datatrove is not installed: pip install 'megallm[data]'")

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor

from megallm.curate import run
from megallm.curate.config import PiiConfig
from megallm.curate.datatrove_blocks import Judge, plan

from .test_chain import config_of, corpus, outputs, prose


def test_the_local_executor_writes_the_same_bytes(tmp_path: Path) -> None:
    raw = corpus(tmp_path)
    config = config_of(raw)
    run.run(config, tmp_path / "ours")
    executor = None
    for stage in plan(config, tmp_path / "theirs", tasks=2):
        logs = str(tmp_path / "logs" / stage.name)
        executor = LocalPipelineExecutor(
            [stage.block], stage.tasks, stage.tasks, logging_dir=logs, depends=executor, start_method="fork"
        )
    assert executor is not None
    executor.run()
    assert outputs(tmp_path / "ours") == outputs(tmp_path / "theirs")


def test_judge_is_a_block_of_any_pipeline(tmp_path: Path) -> None:
    config = replace(config_of(tmp_path), steps=("quality", "pii"), pii=PiiConfig(kinds=("email",)))
    good = Document(text=prose(1) + "\nWrite to me@mail.org today, all of you.", id="a", metadata={"url": "u"})
    block = Judge(config)
    kept = list(block.run([Document(text="short", id="b"), good, Document(text=prose(2), id="c")]))
    assert [document.id for document in kept] == ["a", "c"]
    assert "@mail.org" not in kept[0].text and kept[0].metadata["url"] == "u"
    assert block.stats.stats["quality_too_few_words"].total == 1
