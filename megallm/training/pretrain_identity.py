"""What a pre-training run must agree with to go on: its sources, their content, the order of the
samples, and the tokenizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megallm.data.indexed import content, meta
from megallm.data.indexed.dataset import IndexedDataset
from megallm.data.stream.source import dataset_fingerprint
from megallm.run.changes import Change
from megallm.run.runfolder import RunFolder
from megallm.training.config import PretrainConfig
from megallm.training.reading import planned_samples, tokenizer_of, words_of
from megallm.training.resuming import Identity

CONTENT, SAMPLES = "data.content", "data.samples"  # may be allowed beside the configuration's keys
_RESTART = ("data.seed", "data.split", "data.order")  # changed: the stream is gone through anew


class PretrainIdentity(Identity):
    """What a pre-training checkpoint remembers, to refuse a run that is not the same run.

    In the stream order weights, lengths, batch sizes and steps may change: the ledger says what was
    read. `framed`, that the tokenizer's template stands around documents, is for generation.
    """

    KIND = "pretrain"
    KEYS = {**Identity.KEYS, "data.global_batch": "train.global_batch", "data.files": CONTENT}
    APART = ("tokenizer", "framed", "content", "words")
    WHOLE = ("sources", "files")
    ALLOWED = (CONTENT, SAMPLES)
    config: PretrainConfig

    def own(self) -> dict[str, Any]:
        """Returns which tokenizer made the data, and how they are read."""
        prefixes = self.config.data.prefixes
        return {
            "tokenizer": tokenizer_of(self.config),
            "framed": any(
                (meta.read_meta(prefix) or {}).get("add_special_tokens") for prefix in prefixes
            ),
            "data": self._reading(),
        }

    def _reading(self) -> dict[str, Any]:
        data, train = self.config.data, self.config.train
        reading: dict[str, Any] = {"order": data.order, "split": data.split, "seed": data.seed}
        reading["objective"] = data.objective
        if data.objective != "next_token":
            reading["masking"] = dataclasses.asdict(data.masking)
        if data.order == "megatron":
            reading |= {
                "sources": data.sources,
                "seq_len": data.seq_len,
                "samples": planned_samples(self.config),
                "surplus": data.surplus,
                "global_batch": train.global_batch,
                "files": {
                    prefix: dataset_fingerprint(IndexedDataset(prefix)) for prefix in data.sources
                },
            }
        return reading

    def of_files(self, folder: RunFolder) -> dict[str, Any]:
        """Returns what is known of the data's bytes and of the tokenizer; reads what is not."""
        sources = list(self.config.data.prefixes)
        return {
            "content": content.contents(sources, folder.path / "data.json"),
            "words": words_of(self.config),
        }

    def completed(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Returns the meta with the objective that all runs had before there were others."""
        if "data" not in saved:
            return saved
        return saved | {"data": {"objective": "next_token"} | saved["data"]}

    def changes(self, saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
        """Yields what differs; of files the content where it is known, else size and time."""
        told = "content" in saved and "content" in now
        for change in super().changes(saved, now):
            if not (told and change.key == CONTENT):
                yield change
        held, holds = saved.get("content") or {}, now.get("content") or {}
        for prefix in holds:
            if prefix in held and held[prefix] != holds[prefix]:
                yield Change(
                    f"{CONTENT} of {prefix}", held[prefix], holds[prefix], "checkpoint", True
                )
        words, ours = saved.get("words"), now.get("words")
        if words is not None and ours is not None and words != ours:
            yield Change("data.tokenizer", words, ours, "checkpoint", True)

    def kept_ledger(self, ledger: dict[str, Any], changes: Sequence[Change]) -> dict[str, Any]:
        """Returns the ledger without what other data make void: a changed source begins anew, a
        changed order altogether.
        """
        state = ledger.get("data")
        if not state:
            return ledger
        if any(change.key in _RESTART for change in changes):
            return ledger | {"data": {}}
        sources = dict(state["sources"])
        for change in changes:
            prefix = change.key.removeprefix(f"{CONTENT} of ")
            if prefix in sources and sources[prefix]["files"] != dataset_fingerprint(
                IndexedDataset(prefix)
            ):
                del sources[prefix]
        return ledger | {"data": state | {"sources": sources}}
