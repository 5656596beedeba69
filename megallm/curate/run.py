"""A whole run: plan shards, walk the segments, decide between them, publish.

Everything happens in OUTPUT/work; a shard's folder appears whole or not at all, so a killed run
goes on where it was when the same command is given again. kept/, ledger.jsonl, report.html and last
stats.json are published at the end.
"""

from __future__ import annotations

import fcntl
import hashlib
import heapq
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megallm.base import config as configs
from megallm.base import files
from megallm.base.errors import DataError, InternalError, UsageError
from megallm.base.files import writing
from megallm.base.progress import Progress, quiet
from megallm.curate import chain as chains
from megallm.curate import decontaminate, readers, report
from megallm.curate.chain import ShardJob, chain_of, run_shard, save_decisions
from megallm.curate.config import CurateConfig, check_config, used_files
from megallm.curate.exact import INDEX_BITS
from megallm.curate.stats import CurationStats, add_up
from megallm.data.text.workers import Workers

FORMAT = 2  # of the work folder and the outputs; a change makes old work folders unusable
STATS, LEDGER, REPORT, KEPT, TIMINGS = (
    "stats.json",
    "ledger.jsonl",
    "report.html",
    "kept",
    "timings.json",
)
CONTAMINATION = "contamination.json"


def run(
    config: CurateConfig,
    output: str | Path,
    workers: int = 1,
    fresh: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Curate into `output` and return the statistics; a finished run of the same configuration is
    not repeated.

    Errors: `UsageError` for a configuration that cannot be, or work of another one in `output`;
    `DataError` for missing or unusable input; `CannotWrite`.
    """
    check_config(config)
    if workers < 1:
        raise UsageError(f"--workers is {workers}; give at least 1.")
    output = Path(output)
    one = Run(config, output, readers.find_inputs(config.input), progress)
    one.check_models()  # before anything is written
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    with _locked(output):
        return one.go(workers, fresh)


class Run:
    """One output folder: which shards there are, what was decided, and how all of it is published.

    `go` does everything on this machine. An engine for several machines calls `begin`, then for
    each segment `jobs` (each to be done once, anywhere), `end_segment` and `decide`, and last
    `publish`.
    """

    def __init__(
        self, config: CurateConfig, output: Path, inputs: list[str], progress: Progress = quiet
    ) -> None:
        self.config, self.output, self.inputs, self.progress = config, output, inputs, progress
        self.work = output / "work"
        self.yaml = configs.to_yaml(config)
        self.segments = chains.chain_segments(config)
        self._count: int | None = None

    def check_models(self) -> None:
        """Load what the steps need, unless this run is finished. Errors: those of `build_chain`,
        such as a package that is missing."""
        if self._finished() is None:
            chain_of(self.yaml)

    def go(self, workers: int, fresh: bool) -> dict[str, Any]:
        finished = self.begin(fresh)
        if finished is not None:
            return finished
        try:
            return self._work(workers)
        except (
            DataError,
            UsageError,
        ):  # what mends it makes another run of this, which would be refused
            shutil.rmtree(self.work, ignore_errors=True)
            raise

    def _work(self, workers: int) -> dict[str, Any]:
        chain = chain_of(self.yaml)
        for number in range(len(self.segments)):
            if number:
                self.decide(number, chain)
            self._walk(number, workers)
            self.end_segment(number)
        return self.publish(chain)

    def begin(self, fresh: bool = False) -> dict[str, Any] | None:
        """Take up the work folder; the statistics when this very run is already finished. Errors:
        `UsageError`.
        """
        self._sweep_temporaries()
        finished = None if fresh else self._finished()
        if finished is not None:
            shutil.rmtree(self.work, ignore_errors=True)  # of a run that was killed at its very end
            return finished
        if fresh:
            self._sweep()
        elif (self.output / STATS).exists():
            raise UsageError(
                f"{self.output} holds a finished run of another configuration or input; choose "
                "another --output, or pass --overwrite to replace it."
            )
        elif not (self.work / "identity").exists():
            files.check_new(
                *(self.output / name for name in (KEPT, LEDGER, REPORT, TIMINGS, CONTAMINATION))
            )
        self._claim(self._identity())
        return None

    def _finished(self) -> dict[str, Any] | None:
        """Returns the statistics when this very run is already finished."""
        try:
            stats = json.loads((self.output / STATS).read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return (
            stats if isinstance(stats, dict) and stats.get("identity") == self._identity() else None
        )

    def _identity(self) -> str:
        """Changes with the configuration and with any file that is read: input, models, word lists,
        evaluation sets.
        """
        names = [*self.inputs, *(name for name in used_files(self.config) if os.path.isfile(name))]
        rows = [[name, (stat := os.stat(name)).st_size, stat.st_mtime_ns] for name in names]
        return hashlib.sha256(json.dumps([FORMAT, self.yaml, rows]).encode()).hexdigest()

    def _sweep(self) -> None:
        with writing(self.output):
            for name in ("work", KEPT):
                shutil.rmtree(self.output / name, ignore_errors=True)
            for name in (STATS, LEDGER, REPORT, TIMINGS, CONTAMINATION):
                (self.output / name).unlink(missing_ok=True)

    def _sweep_temporaries(self) -> None:
        """Remove what killed runs were writing."""
        for name in (KEPT, LEDGER, REPORT, TIMINGS, CONTAMINATION, STATS, "work/*", "work/*/*"):
            for left in self.output.glob(f"{name}{files.TEMPORARY}*"):
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)

    def _claim(self, identity: str) -> None:
        """Take up the work folder of this very run, or begin one."""
        mark = self.work / "identity"
        if mark.exists():
            if mark.read_text("utf-8") != identity:
                raise UsageError(
                    f"{self.work} holds an unfinished run of another configuration or input; "
                    "choose another --output, or pass --overwrite to throw it away."
                )
            return
        with writing(self.work):
            self.work.mkdir(exist_ok=True)
        files.atomic_write_text(mark, identity)

    def _folder(self, segment: int, shard: int) -> Path:
        return self.work / f"segment-{segment}" / f"{shard:06d}"

    @property
    def _shards(self) -> Path:
        return self.work / "shards"

    @property
    def count(self) -> int:
        """Returns how many shards there are; known once segment 0 has ended."""
        if self._count is None:
            self._count = int(self._shards.read_text("utf-8"))
        return self._count

    def jobs(self, number: int, part: int = 0, parts: int = 1) -> Iterator[ShardJob]:
        """Yields the shards of a segment that are still to be done, of them those with shard %
        parts == part.
        """
        with writing(self.work):
            (self.work / f"segment-{number}").mkdir(exist_ok=True)
        if number == 0:
            if self._shards.exists():
                return
            for shard, units in enumerate(plan_curation_shards(self.inputs, self.config)):
                target = self._folder(0, shard)
                if shard % parts == part and not target.exists():
                    yield ShardJob(self.yaml, 0, shard, target, units=units)
            return
        for shard in range(part, self.count, parts):
            target = self._folder(number, shard)
            if not target.exists():
                decisions = self.work / f"decide-{number}" / f"{shard:06d}"
                yield ShardJob(
                    self.yaml, number, shard, target, (), self._folder(number - 1, shard), decisions
                )

    def end_segment(self, number: int) -> None:
        """Finish a segment, every shard of which is there: check what was read, or remove what is
        not needed any more.
        """
        if number == 0:
            if not self._shards.exists():
                found = sorted(
                    path
                    for path in (self.work / "segment-0").iterdir()
                    if files.TEMPORARY not in path.name
                )
                missing = [shard for shard, path in enumerate(found) if path.name != f"{shard:06d}"]
                if missing:
                    raise InternalError(
                        f"Shard {missing[0]} of {self.output} was not done; run its stage again."
                    )
                self._check_read(len(found))
                files.atomic_write_text(self._shards, str(len(found)))
            return
        for shard in range(self.count):
            for path in self._folder(number - 1, shard).iterdir():
                if path.name not in (chains.LEDGER, chains.STATS):
                    path.unlink()

    def _walk(self, number: int, workers: int) -> None:
        """Do the jobs of a segment here or in workers."""
        total = self.count if number else None
        segment = self.segments[number]
        phase = " > ".join([*(["read"] if number == 0 else []), *segment.begin, *segment.local])
        done = 0
        jobs = self.jobs(number)
        with ExitStack() as stack:
            results: Iterator[Any] = map(run_shard, jobs)
            if workers > 1:
                results = stack.enter_context(Workers(workers, run_shard)).map(jobs)
            for _ in results:
                done += 1
                self.progress(phase, done, total, "shards")

    def _check_read(self, count: int) -> None:
        totals = add_up(self._shard_stats(0, count)).totals
        read, rejected = totals["documents"], totals["lines_rejected"]
        if not totals["characters"]:
            first = self._first_reject(count)
            raise DataError(
                f"The input holds no usable text: {len(self.inputs)} files, {read} empty "
                f"documents, {rejected} rejected lines.{first}"
            )
        limit = self.config.input.max_reject_percent
        if 100 * rejected > limit * (read + rejected):
            raise DataError(
                f"{rejected} of {read + rejected} lines were rejected, more than "
                f"input.max_reject_percent={limit}.{self._first_reject(count)}"
            )

    def _first_reject(self, count: int) -> str:
        for shard in range(count):
            with open(self._folder(0, shard) / chains.LEDGER, encoding="utf-8") as file:
                for line in file:
                    row = json.loads(line.partition("\t")[2])
                    if row["action"] == "reject":
                        return f" The first: {row['file']}:{row['line']}: {row['reason']}."
        return ""

    def _shard_stats(self, segment: int, count: int) -> Iterator[dict[str, Any]]:
        for shard in range(count):
            yield json.loads((self._folder(segment, shard) / chains.STATS).read_text("utf-8"))

    def decide(self, number: int, chain: chains.Chain) -> None:
        """Resolve the global steps that end segment number - 1, each without what those before it
        drop.
        """
        names, count = self.segments[number].begin, self.count
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
                found = chain.glob[name].resolve(
                    shards, scratch, self.config.memory_mib << 20, gone
                )
                gone = np.union1d(gone, chain.glob[name].dropped(found))
                for shard in range(count):
                    decisions[shard] |= found[shard]
            ids = lru_cache(16)(
                lambda shard: json.loads((shards[shard] / "ids.json").read_text("utf-8"))
            )
            for shard in range(count):
                save_decisions(
                    temporary / f"{shard:06d}", decisions[shard], _names(decisions[shard], ids)
                )
            temporary.replace(target)
            shutil.rmtree(scratch, ignore_errors=True)

    def publish(self, chain: chains.Chain) -> dict[str, Any]:
        """Write the outputs, stats.json last, and remove the work folder."""
        last, count = len(self.segments) - 1, self.count
        self.progress("writing", 0, None)
        total = add_up(
            one for number in range(last + 1) for one in self._shard_stats(number, count)
        )
        kept = files.temporary_name(self.output / KEPT)
        with writing(self.output):
            kept.mkdir()
            for shard in range(count):
                _link(self._folder(last, shard) / chains.KEPT, kept / f"part-{shard:06d}.jsonl.gz")
            shutil.rmtree(self.output / KEPT, ignore_errors=True)
            kept.replace(self.output / KEPT)
            with (
                files.atomic_path(self.output / LEDGER) as path,
                open(path, "w", encoding="utf-8", errors=chains.ESCAPED) as out,
            ):
                for shard in range(count):
                    out.writelines(self._ledger_of(shard, last))
        if "decontaminate" in chain.local:
            found = decontaminate.report_of(
                chain.local["decontaminate"], self._dropped_by("decontaminate")
            )
            files.atomic_write_json(self.output / CONTAMINATION, found)
        stats = stats_of(total, chain, self._identity())
        page = report.render_report(stats, total.examples)
        files.atomic_write_bytes(self.output / REPORT, page.encode("utf-8", "replace"))
        seconds = {step: round(spent, 3) for step, spent in total.seconds.items()}
        files.atomic_write_json(self.output / TIMINGS, {"cpu_seconds": seconds})
        files.atomic_write_json(self.output / STATS, stats)
        shutil.rmtree(self.work, ignore_errors=True)
        return stats

    def _dropped_by(self, step: str) -> Iterator[dict[str, Any]]:
        with open(self.output / LEDGER, encoding="utf-8") as file:
            for line in file:
                if (
                    f'"{step}"' in line
                    and (row := json.loads(line))["action"] == "drop"
                    and row["step"] == step
                ):
                    yield row

    def _ledger_of(self, shard: int, last: int) -> Iterator[str]:
        """Yields the rows of all segments, in the order of the documents."""
        paths = [self._folder(number, shard) / chains.LEDGER for number in range(last + 1)]
        with ExitStack() as stack:
            opened = [stack.enter_context(open(path, encoding="utf-8")) for path in paths]
            for line in heapq.merge(*opened, key=lambda line: int(line[: line.index("\t")])):
                yield line.partition("\t")[2]


def plan_curation_shards(
    inputs: list[str], config: CurateConfig
) -> Iterator[tuple[readers.Unit, ...]]:
    """Yields units of about `shard_mib` together; depends on the files and the configuration only.
    """
    limit = int(config.shard_mib * (1 << 20))
    held: list[readers.Unit] = []
    size = 0
    for name in inputs:
        for unit in readers.file_units(name, config.input):
            held.append(unit)
            size += unit.size
            if size >= limit:
                yield tuple(held)
                held, size = [], 0
    if held:
        yield tuple(held)


def stats_of(total: CurationStats, chain: chains.Chain, identity: str) -> dict[str, Any]:
    """Returns stats.json: equal for equal input and configuration, whatever the workers and
    interruptions.
    """
    marks = {name: mark for step in chain.local.values() for name, mark in step.marks.items()}
    order = [chains.READ, *chain.config.steps]
    return {
        "format": FORMAT,
        "identity": identity,
        "totals": total.totals,
        "steps": {name: total.steps[name] for name in order if name in total.steps},
        "histograms": {
            name: {"counts": counts.tolist(), "limits": list(marks.get(name, ()))}
            for name, counts in sorted(total.histograms.items())
        },
        "config": configs.to_dict(chain.config),
    }


def _names(
    decisions: dict[str, np.ndarray], ids: Callable[[int], dict[str, str]]
) -> dict[int, str]:
    """Returns the ids of the documents that decisions point at."""
    out = {}
    for rows in decisions.values():
        for column in ("first", "centre"):
            for number in (
                np.unique(rows[column]).tolist() if column in (rows.dtype.names or ()) else ()
            ):
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
            raise UsageError(
                f"Another run is writing to {output}; wait for it, or choose another --output."
            ) from None
        yield
