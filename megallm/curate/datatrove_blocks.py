"""Curation past one machine: the same shards, decisions and outputs, run by datatrove's executors
(local, Slurm, Ray).

`plan` gives the stages; each is a pipeline block and a number of tasks, and needs the one before to
be complete. Tasks share the output folder and nothing else. The result is the same, byte for byte,
as `megallm curate` writes. Every task of the first stage cuts the whole input and does its share of
the shards. `Judge` puts single local steps into a pipeline of the user's own.

    executor = None
    for stage in plan(config, "out", tasks=8):
        executor = LocalPipelineExecutor([stage.block], stage.tasks, logging_dir=..., depends=executor)
    executor.run()
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datatrove.data import Document as TroveDocument
from datatrove.pipeline.base import PipelineStep

from megallm.base import config as configs
from megallm.base.files import writing
from megallm.curate import readers
from megallm.curate.chain import batches, chain_of, chain_segments, run_shard
from megallm.curate.config import CurateConfig, check_config
from megallm.curate.document import Document, DocumentBatch
from megallm.curate.run import Run


@dataclass(frozen=True)
class BlockStage:
    """One block and how many tasks may do it at once."""

    name: str
    block: PipelineStep
    tasks: int


def plan(config: CurateConfig, output: str | Path, tasks: int) -> list[BlockStage]:
    """Returns the stages of a whole run, in order. Errors: those of `run.run` for configuration,
    input and output folder.
    """
    check_config(config)
    with writing(output):
        Path(output).mkdir(parents=True, exist_ok=True)
    Run(config, Path(output), readers.find_inputs(config.input)).begin()
    stages = []
    for number in range(len(chain_segments(config))):
        if number:
            stages.append(BlockStage(f"decide-{number}", Decide(config, output, number), 1))
        stages.append(BlockStage(f"segment-{number}", Shards(config, output, number), tasks))
    return [*stages, BlockStage("publish", Publish(config, output), 1)]


class _Block(PipelineStep):
    """A block that reads and writes the output folder; documents of a pipeline around it pass
    by.
    """

    type = "megallm curate"

    def __init__(self, config: CurateConfig, output: str | Path) -> None:
        super().__init__()
        self.yaml, self.output = configs.to_yaml(config), str(output)

    @cached_property
    def curation(self) -> Run:
        config = configs.loads(CurateConfig, self.yaml)
        return Run(config, Path(self.output), readers.find_inputs(config.input))

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[TroveDocument]:
        """Do this task's part, then hand on what came in."""
        with self.track_time():
            self.work(rank, world_size)
        yield from data or ()

    def work(self, rank: int, world_size: int) -> None:
        raise NotImplementedError


class Shards(_Block):
    """Every `world_size`-th shard of one segment."""

    name = "shards"

    def __init__(self, config: CurateConfig, output: str | Path, segment: int) -> None:
        super().__init__(config, output)
        self.segment = segment

    def work(self, rank: int, world_size: int) -> None:
        for job in self.curation.jobs(self.segment, rank, world_size):
            run_shard(job)
            self.stat_update("shards")


class Decide(_Block):
    """The global steps before a segment; one task."""

    name = "decide"

    def __init__(self, config: CurateConfig, output: str | Path, segment: int) -> None:
        super().__init__(config, output)
        self.segment = segment

    def work(self, rank: int, world_size: int) -> None:
        self.curation.end_segment(self.segment - 1)
        self.curation.decide(self.segment, chain_of(self.yaml))


class Publish(_Block):
    """kept/, ledger.jsonl, report.html, stats.json; one task."""

    name = "publish"

    def work(self, rank: int, world_size: int) -> None:
        self.curation.end_segment(len(self.curation.segments) - 1)
        self.curation.publish(chain_of(self.yaml))


class Judge(PipelineStep):
    """Local steps of a configuration on the documents of a datatrove pipeline: drops leave, edits
    are made.

    What a step notes about a document goes into its metadata; reasons are counted in datatrove's
    statistics.
    """

    name = "judge"
    type = "megallm curate"

    def __init__(self, config: CurateConfig) -> None:
        super().__init__()
        self.yaml = configs.to_yaml(config)

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[TroveDocument]:
        """Judge what comes in, a batch at a time."""
        chain = chain_of(self.yaml)
        held: dict[int, TroveDocument] = {}

        def taken() -> Iterator[Document]:
            for number, document in enumerate(data or ()):
                held[number] = document
                yield Document(document.id, document.text, "", 0, number, dict(document.metadata))

        for documents in batches(taken()):
            batch = DocumentBatch(documents)
            with self.track_time("batch"):
                for name, step in chain.local.items():
                    verdicts = step.judge(batch) if len(batch) else []
                    for verdict in verdicts:
                        self.stat_update(f"{name}_{verdict.reason or verdict.action}")
                    batch = batch.after(verdicts)
            for one in batch.documents:
                document = held[one.index]
                document.text, document.metadata = one.text, one.meta
                yield document
            held.clear()
