"""What every trainer on conversations has in common: rows made before the first step, their order,
their identity, adapters beside a frozen base, and what is kept in the run folder.

A trainer is a `ChatRun` with a loss; `run_supervised` drives it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path
from typing import Any

from megallm.base.files import atomic_write_text
from megallm.data.batches import BatchReader, Share
from megallm.data.chat import preview
from megallm.data.chat.cache import content_hash
from megallm.data.chat.prepare import Prepared, files_of, prepare, template_of
from megallm.data.chat.reader import ChatReader, reader_of
from megallm.data.text import tokenizer
from megallm.engine.engine import Engine, Mesh, Part
from megallm.run.changes import Change
from megallm.run.recorder import Recorder
from megallm.run.runfolder import RunFolder
from megallm.training.adapters import FrozenBase, in_training_only
from megallm.training.finetune import FinetuneConfig
from megallm.training.held_out import HeldOut
from megallm.training.kept_tokenizer import keep_template, keep_tokenizer
from megallm.training.resuming import Identity
from megallm.training.supervised import Evaluation, SupervisedRun
from megallm.training.trainer import Ledger

SHOWN = 3  # rows of every file in RUN/first_rows.txt
WAIT_SECONDS = 60.0  # between two signs of life to the ranks that wait for the first one
CONTENT = "data.content"  # may be allowed beside the configuration's keys
_READING = (
    "seq_len", "train_on", "strings", "pairs", "too_long", "on_error", "packing", "window", "seed",
    "template_options", "template_date",
)  # fmt: skip


class ChatIdentity(Identity):
    """What a checkpoint of a run on conversations remembers, to refuse a run that is not the same:
    files by their content, tokenizer, template, how rows are made, adapters and what is frozen.

    Weights of sources, batch sizes and steps may change: the ledger says what was read.
    """

    KEYS = {**Identity.KEYS, "words": "data.tokenizer"}
    APART = ("tokenizer", "framed", "content")
    WHOLE = ("template_options", "peft")
    ALLOWED = (CONTENT,)
    config: FinetuneConfig

    def own(self) -> dict[str, Any]:
        """Returns how rows are made, and what is trained."""
        config = self.config
        words = tokenizer.load(config.data.tokenizer)
        template, _ = template_of(config.data, words)
        reading = {key: value for key, value in vars(config.data).items() if key in _READING}
        if config.data.condition:
            edges = config.data.return_edges
            reading |= {"condition": config.data.condition, "return_edges": edges}
        reading["template"] = hashlib.blake2b(template.source.encode(), digest_size=8).hexdigest()
        values = {
            "tokenizer": config.data.tokenizer,
            "words": words.fingerprint,
            "framed": True,  # rows begin as the tokenizer has it, and generation does so too
            "data": {"kind": config.kind, **reading},
            "freeze": config.freeze,
            "peft": {"method": config.peft.method},
        }
        if config.peft.method != "none":
            values["peft"] = dataclasses.asdict(config.peft)
        return json.loads(json.dumps(values))

    def of_files(self, folder: RunFolder) -> dict[str, Any]:
        """Returns the hash of each file that is trained on."""
        files = files_of(self.config.data.sources)
        return {"content": {name: content_hash(name) for name in files}}

    def changes(self, saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
        """Yields what differs, of files those that both runs read."""
        yield from super().changes(saved, now)
        held, holds = saved.get("content") or {}, now.get("content") or {}
        for name in holds:
            if name in held and held[name] != holds[name]:
                key = f"{CONTENT} of {name}"
                yield Change(key, held[name], holds[name], "checkpoint", True)

    def kept_ledger(self, ledger: dict[str, Any], changes: Sequence[Change]) -> dict[str, Any]:
        """Returns the ledger without a place in rows that are others now."""
        made_anew = any(change.refused and change.key.startswith("data.") for change in changes)
        return ledger | {"data": {}} if made_anew else ledger


class ChatRun(SupervisedRun):
    """Conversations, one way or another; a trainer adds an identity with its KIND, and a loss."""

    config: FinetuneConfig
    rows: Prepared  # of data.sources, on every rank once `read_data` returns
    held_out: Prepared | None = None
    reader_type: type[ChatReader] = ChatReader
    neftune_alpha = 0.0  # how much noise embeddings get in training
    hidden_dropout = 0.0  # the share of the model's hidden states that is dropped in training

    def __init__(self, config: FinetuneConfig) -> None:
        super().__init__(config)
        self.log_samples = config.data.log_samples
        noise = in_training_only(self.neftune_alpha, self.hidden_dropout, config.run.seed)
        self.base = FrozenBase(config, noise)

    # Data

    def read_data(self, mesh: Mesh) -> None:
        """Make the rows on rank 0, in RUN/cache; the others read them there. Errors: `DataError`
        `file:line: reason` on rank 0, before any weight is read; the others lose a peer.
        """
        if mesh.rank == 0:
            with ThreadPoolExecutor(1) as pool:
                made = pool.submit(self._read)
                while not _done(made.exception):
                    mesh.broadcast_json(True)  # a file may take longer than ranks wait for a peer
                made.result()
            mesh.broadcast_json(False)
            return
        while mesh.broadcast_json(None):
            pass
        self._read()

    def _read(self) -> None:
        data, cache = self.config.data, Path(self.config.run.dir) / "cache"
        self.rows = prepare(data, self.config.kind, cache)
        self._check(self.rows)
        if data.valid_sources and self.config.eval.batches:
            self.held_out = prepare(data, self.config.kind, cache, valid=True)
            self._check(self.held_out)

    def _check(self, rows: Prepared) -> None:
        rows.check_vocabulary(self.config.model.vocab_size)
        if self.config.kind == "classification":
            rows.check_classes(self.config.model.num_labels)

    @property
    def multiple(self) -> int:
        """Returns what the tokens of a row are a multiple of at this layout."""
        return 2 * self.config.layout.cp * self.config.layout.tp

    def reader(self, share: Share, first_step: int, state: dict[str, Any]) -> BatchReader:
        """Returns what this rank's replica reads, the same on every rank of a replica."""
        made = self.reader_type
        return reader_of(self.rows, share, first_step, state or None, self.multiple, made=made)

    def once(self, rows: Prepared, share: Share) -> ChatReader:
        """Returns what reads every row once, from the first one; what comes after is padding."""
        made = self.reader_type
        return reader_of(rows, share, multiple=self.multiple, epochs=1, made=made)

    def evaluation(self, engine: Engine, share: Share, ledger: Ledger) -> Evaluation:
        """Returns the mean of every term over the held-out rows, each once, or over the first
        `eval.batches` global batches of them.
        """
        if self.held_out is None:
            return HeldOut(engine, self.loss(), None, 0)

        def opened() -> ChatReader:
            return self.once(self.held_out, share)

        batches = min(self.config.eval.batches, opened().steps())
        return HeldOut(engine, self.loss(), opened, batches, complete=self.complete)

    # Weights

    def build(self, mesh: Mesh, found: Path | None) -> tuple[Engine, str]:
        """Returns the engine, with adapters where the run has them; notes what a checkpoint has to
        say of them.
        """
        engine, begin = self.base.build(mesh, found)
        self.meta |= self.base.meta
        return engine, begin

    def parts(self, engine: Engine) -> Iterator[Part]:
        """Yields what this rank owns of a checkpoint: with adapters nothing of the frozen base."""
        return self.base.parts(engine)

    def finish(self, engine: Engine) -> None:
        """Write the adapter to RUN/adapter, a folder of PEFT's."""
        self.base.export(engine)

    # What a person sees

    def keep(self, changes: Sequence[Change]) -> None:
        """Copy the tokenizer into the run folder, with the template that rows were written with."""
        changed = any(change.key in ("data.tokenizer", "data.template") for change in changes)
        keep_tokenizer(self.config, replace=changed)
        keep_template(self.config, self.rows.template)

    def show(self, recorder: Recorder) -> None:
        """Say what was read, and show which tokens of the first rows are trained: in colours on a
        terminal, and in RUN/first_rows.txt.
        """
        if not recorder.writes:
            return
        held_out = () if self.held_out is None else self.held_out.notes[1:]  # the template is told
        for line in (*self.rows.notes, *(f"held out: {line}" for line in held_out)):
            recorder.note(line)
        path = Path(self.config.run.dir) / "first_rows.txt"
        atomic_write_text(path, preview.first_rows(self.rows.sources, self.rows.words, SHOWN))
        first = next(iter(self.rows.sources.values()))
        recorder.draw(lambda console: preview.show_row(first.row(0), self.rows.words, console))
        recorder.note(f"the first rows, with their trained tokens in brackets: {path}")

    def next_command(self) -> str:
        """Returns the command that shows what the model has learned."""
        run = Path(self.config.run.dir)
        if self.config.kind not in ("classification", "regression", "reward", "ranked"):
            return f"megallm chat --model {run}"
        return f"megallm convert --to hf --input {run} --output DIR"


def _done(wait: Any) -> bool:
    """Whether a future has ended within a while; its error is that of `result`."""
    try:
        wait(WAIT_SECONDS)
    except NotYet:
        return False
    return True
