"""A whole run: plan shards, walk the segments, decide between them, publish.

Everything happens in OUTPUT/work; a shard's folder appears whole or not at all, so a killed run goes on where it
was when the same command is given again. kept/, ledger.jsonl, report.html and last stats.json are published at the end.
"""

from __future__ import annotations

import fcntl
import hashlib
import heapq
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megallm.base import config as configs
from megallm.base import files
from megallm.base.errors import DataError, UsageError
from megallm.base.files import writing
from megallm.curate import chain as chains
from megallm.curate import decontaminate, readers, report
from megallm.curate.chain import ShardJob, build_chain, run_shard, save_decisions
from megallm.curate.config import CurateConfig, check
from megallm.curate.exact import INDEX_BITS
from megallm.curate.tally import Tally, add_up
from megallm.data.workers import Workers

FORMAT = 1  # of the work folder and the outputs; a change makes old work folders unusable
STATS, LEDGER, REPORT, KEPT, TIMINGS = "stats.json", "ledger.jsonl", "report.html", "kept", "timings.json"
CONTAMINATION = "contamination.json"

Progress = Callable[[str, int, int | None], None]  # (phase, shards done, shards in all or None)


def quiet(phase: str, done: int, total: int | None) -> None:
    """The progress of nobody looking."""


def run(
    config: CurateConfig, output: str | Path, workers: int = 1, fresh: bool = False, progress: Progress = quiet
) -> dict[str, Any]:
    """Curate into `output` and return the statistics; a finished run of the same configuration is not repeated.

    Errors: `UsageError` for a configuration that cannot be, or work of another one in `output`; `DataError` for
    missing or unusable input; `CannotWrite`.
    """
    check(config)
    if workers < 1:
        raise UsageError(f"--workers is {workers}; give at least 1.")
    output = Path(output)
    inputs = readers.find_files(config.input)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    with _locked(output):
        return _Run(config, output, inputs, workers, progress).go(fresh)


class _Run:
    def __init__(self, config: CurateConfig, output: Path, inputs: list[str], workers: int, progress: Progress) -> None:
        self.config, self.output, self.inputs, self.workers = config, output, inputs, workers
        self.progress = progress
        self.work = output / "work"
        self.yaml = configs.to_yaml(config)

    def go(self, fresh: bool) -> dict[str, Any]:
        identity = self._identity()
        done = self.output / STATS
        if fresh:
            self._sweep()
        elif done.exists():
            stats = json.loads(done.read_text("utf-8"))
            if stats.get("identity") == identity:
                return stats
            raise UsageError(
                f"{self.output} holds a finished run of another configuration or input; choose another --output, or "
                "pass --fresh to replace it."
            )
        self._claim(identity)
        chain = build_chain(self.config)  # fails here, before any work, when a model is missing
        num_shards = self._read(chain)
        for number in range(1, len(chain.segments)):
            self._decide(chain, number, num_shards)
            self._walk(chain, number, num_shards)
        return self._publish(chain, num_shards, identity)

    def _identity(self) -> str:
        """Changes with the configuration and with any input file."""
        rows = [[name, (stat := os.stat(name)).st_size, stat.st_mtime_ns] for name in self.inputs]
        return hashlib.sha256(json.dumps([FORMAT, self.yaml, rows]).encode()).hexdigest()

    def _sweep(self) -> None:
        with writing(self.output):
            for name in ("work", KEPT):
                shutil.rmtree(self.output / name, ignore_errors=True)
            for name in (STATS, LEDGER, REPORT, TIMINGS, CONTAMINATION):
                (self.output / name).unlink(missing_ok=True)

    def _claim(self, identity: str) -> None:
        """Take up the work folder of this very run, or begin one."""
        mark = self.work / "identity"
        if mark.exists():
            if mark.read_text("utf-8") != identity:
                raise UsageError(
                    f"{self.work} holds an unfinished run of another configuration or input; choose another --output, "
                    "or pass --fresh to throw it away."
                )
            for left in self.work.glob(f"*/*{files.TEMPORARY}*"):
                shutil.rmtree(left, ignore_errors=True)
            return
        with writing(self.work):
            self.work.mkdir(exist_ok=True)
        files.atomic_write_text(mark, identity)

    def _folder(self, segment: int, shard: int) -> Path:
        return self.work / f"segment-{segment}" / f"{shard:06d}"

    def _read(self, chain: chains.Chain) -> int:
        """Segment 0: cut the input into shards and do each; returns how many there are."""
        count = 0
        mark = self.work / "shards"
        if mark.exists():
            return int(mark.read_text("utf-8"))

        def jobs() -> Iterator[ShardJob]:
            nonlocal count
            for shard, units in enumerate(plan_shards(self.inputs, self.config)):
                count = shard + 1
                target = self._folder(0, shard)
                if not target.exists():
                    yield ShardJob(self.yaml, 0, shard, target, units=units)

        with writing(self.work):
            (self.work / "segment-0").mkdir(exist_ok=True)
        for done, _ in enumerate(self._each(jobs()), start=1):
            self.progress(_phase(chain, 0), done, None)
        self._check_read(count)
        files.atomic_write_text(mark, str(count))
        return count

    def _each(self, jobs: Iterable[ShardJob]) -> Iterator[object]:
        """Do the jobs here or in workers; yields once for each that is done."""
        if self.workers == 1:
            yield from map(run_shard, jobs)
            return
        with Workers(self.workers, run_shard) as workers:
            yield from workers.map(jobs)

    def _check_read(self, count: int) -> None:
        totals = add_up(self._tallies(0, count)).totals
        read, rejected = totals["documents"], totals["lines_rejected"]
        if not totals["characters"]:
            first = self._first_reject(count)
            raise DataError(
                f"The input holds no usable text: {len(self.inputs)} files, {read} empty documents, {rejected} "
                f"rejected lines.{first}"
            )
        limit = self.config.input.max_reject_percent
        if 100 * rejected > limit * (read + rejected):
            raise DataError(
                f"{rejected} of {read + rejected} lines were rejected, more than input.max_reject_percent={limit}."
                f"{self._first_reject(count)}"
            )

    def _first_reject(self, count: int) -> str:
        for shard in range(count):
            with open(self._folder(0, shard) / chains.LEDGER, encoding="utf-8") as file:
                for line in file:
                    row = json.loads(line.partition("\t")[2])
                    if row["action"] == "reject":
                        return f" The first: {row['file']}:{row['line']}: {row['reason']}."
        return ""

    def _tallies(self, segment: int, count: int) -> Iterator[dict[str, Any]]:
        for shard in range(count):
            yield json.loads((self._folder(segment, shard) / chains.TALLY).read_text("utf-8"))

    def _decide(self, chain: chains.Chain, number: int, count: int) -> None:
        """Resolve the global steps that end segment number - 1, each without what those before it drop."""
        names = chain.segments[number].begin
        target = self.work / f"decide-{number}"
        if target.exists():
            return
        self.progress(f"{' > '.join(names)}: deciding", 0, None)
        scratch = self.work / f"scratch{files.TEMPORARY}"
        temporary = files.temporary_name(target)
        shutil.rmtree(scratch, ignore_errors=True)
        shards = [self._folder(number - 1, shard) for shard in range(count)]
        with writing(target):
            decisions: dict[int, dict[str, np.ndarray]] = {shard: {} for shard in range(count)}
            gone = np.zeros(0, np.uint64)
            for name in names:
                found = chain.glob[name].resolve(shards, scratch, self.config.memory_mib << 20, gone)
                gone = np.union1d(gone, chain.glob[name].dropped(found))
                for shard in range(count):
                    decisions[shard] |= found[shard]
            ids = lru_cache(16)(lambda shard: json.loads((shards[shard] / "ids.json").read_text("utf-8")))
            for shard in range(count):
                save_decisions(temporary / f"{shard:06d}", decisions[shard], _names(decisions[shard], ids))
            temporary.replace(target)
            shutil.rmtree(scratch, ignore_errors=True)

    def _walk(self, chain: chains.Chain, number: int, count: int) -> None:
        """A later segment over all shards; afterwards the documents of the one before are not needed any more."""
        with writing(self.work):
            (self.work / f"segment-{number}").mkdir(exist_ok=True)
        jobs = [
            ShardJob(
                self.yaml, number, shard, target, source=self._folder(number - 1, shard),
                decisions=self.work / f"decide-{number}" / f"{shard:06d}",
            )
            for shard in range(count)
            if not (target := self._folder(number, shard)).exists()
        ]  # fmt: skip
        finished = count - len(jobs)
        for done, _ in enumerate(self._each(jobs), start=finished + 1):
            self.progress(_phase(chain, number), done, count)
        for shard in range(count):
            for path in self._folder(number - 1, shard).iterdir():
                if path.name not in (chains.LEDGER, chains.TALLY):
                    path.unlink()

    def _publish(self, chain: chains.Chain, count: int, identity: str) -> dict[str, Any]:
        last = len(chain.segments) - 1
        self.progress("writing", 0, None)
        tally = add_up(one for number in range(last + 1) for one in self._tallies(number, count))
        kept = files.temporary_name(self.output / KEPT)
        with writing(self.output):
            kept.mkdir()
            for shard in range(count):
                _link(self._folder(last, shard) / chains.KEPT, kept / f"part-{shard:06d}.jsonl.gz")
            shutil.rmtree(self.output / KEPT, ignore_errors=True)
            kept.replace(self.output / KEPT)
            with files.atomic_path(self.output / LEDGER) as path, open(path, "w", encoding="utf-8") as out:
                for shard in range(count):
                    out.writelines(self._ledger_of(shard, last))
        if "decontaminate" in chain.local:
            found = decontaminate.report_of(chain.local["decontaminate"], self._dropped_by("decontaminate"))
            files.atomic_write_json(self.output / CONTAMINATION, found)
        stats = stats_of(tally, chain, identity)
        files.atomic_write_text(self.output / REPORT, report.render(stats, tally.examples))
        seconds = {step: round(spent, 3) for step, spent in tally.seconds.items()}
        files.atomic_write_json(self.output / TIMINGS, {"cpu_seconds": seconds})
        files.atomic_write_json(self.output / STATS, stats)
        shutil.rmtree(self.work, ignore_errors=True)
        return stats

    def _dropped_by(self, step: str) -> Iterator[dict[str, Any]]:
        with open(self.output / LEDGER, encoding="utf-8") as file:
            for line in file:
                if f'"{step}"' in line and (row := json.loads(line))["action"] == "drop" and row["step"] == step:
                    yield row

    def _ledger_of(self, shard: int, last: int) -> Iterator[str]:
        """The rows of all segments, in the order of the documents."""
        paths = [self._folder(number, shard) / chains.LEDGER for number in range(last + 1)]
        with ExitStack() as stack:
            opened = [stack.enter_context(open(path, encoding="utf-8")) for path in paths]
            for line in heapq.merge(*opened, key=lambda line: int(line[: line.index("\t")])):
                yield line.partition("\t")[2]


def plan_shards(inputs: list[str], config: CurateConfig) -> Iterator[tuple[readers.Unit, ...]]:
    """Units of about `shard_mib` together; depends on the files and the configuration only."""
    limit = int(config.shard_mib * (1 << 20))
    held: list[readers.Unit] = []
    size = 0
    for name in inputs:
        for unit in readers.units(name, config.input):
            held.append(unit)
            size += unit.size
            if size >= limit:
                yield tuple(held)
                held, size = [], 0
    if held:
        yield tuple(held)


def stats_of(tally: Tally, chain: chains.Chain, identity: str) -> dict[str, Any]:
    """stats.json: equal for equal input and configuration, whatever the workers and interruptions."""
    marks = {name: mark for step in chain.local.values() for name, mark in step.marks.items()}
    order = [chains.READ, *chain.config.steps]
    return {
        "format": FORMAT,
        "identity": identity,
        "totals": tally.totals,
        "steps": {name: tally.steps[name] for name in order if name in tally.steps},
        "histograms": {
            name: {"counts": counts, "limit": marks.get(name)} for name, counts in sorted(tally.histograms.items())
        },
        "config": configs.to_dict(chain.config),
    }


def _phase(chain: chains.Chain, number: int) -> str:
    segment = chain.segments[number]
    names = [*(["read"] if number == 0 else []), *segment.begin, *segment.local]
    return " > ".join(names)


def _names(decisions: dict[str, np.ndarray], ids: Callable[[int], dict[str, str]]) -> dict[int, str]:
    """The ids of the documents that decisions point at."""
    out = {}
    for rows in decisions.values():
        for column in ("first", "centre"):
            for number in np.unique(rows[column]).tolist() if column in (rows.dtype.names or ()) else ():
                out[number] = ids(number >> INDEX_BITS)[str(number & (1 << INDEX_BITS) - 1)]
    return out


def _link(source: Path, target: Path) -> None:
    """The same file under a second name, or a copy where the file system cannot do that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """One run at a time in a folder."""
    with writing(output), open(output / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"Another run is writing to {output}; wait for it, or choose another --output.") from None
        yield
