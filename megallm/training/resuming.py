"""Going on from a checkpoint, for any trainer: which one is whole, and whether the run is still the
same one.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from megallm.base import suggest
from megallm.base.config import leaves, to_dict
from megallm.base.errors import CheckpointError, MegallmError, UsageError
from megallm.base.redact import redacted
from megallm.checkpoint import store
from megallm.checkpoint.reader import CheckpointReader
from megallm.convert.convert import IMPORTED, is_import
from megallm.convert.weights import stored_model
from megallm.engine.engine import Mesh
from megallm.run.changes import Change, is_allowed, table_of
from megallm.run.config import JobConfig
from megallm.run.runfolder import RunFolder, shown_yaml
from megallm.training.trainer import Ledger

_REFUSED = ("optim.rule",)  # of what only run.yaml tells: the optimizer's state would not fit
_OF_THE_PLACE = ("run.dir",)  # no part of the run

log = logging.getLogger(__name__)


class Identity:
    """What a run must agree with to go on from a checkpoint; `values` are saved in its meta.

    A trainer's own class says its `KIND` (its verb), adds `own` values, and what follows from the
    files that it reads.
    """

    KIND: ClassVar[str]
    # Dotted path in `values` -> the key that a person knows it by.
    KEYS: ClassVar[Mapping[str, str]] = {"precision": "train.precision", "seed": "run.seed"}
    APART: ClassVar[
        Sequence[str]
    ] = ()  # keys of `values` that `changes` does not compare one by one
    WHOLE: ClassVar[Sequence[str]] = ()  # mappings that are compared as one value
    ALLOWED: ClassVar[Sequence[str]] = ()  # what --allow-change may name beside configuration keys

    def __init__(self, config: JobConfig) -> None:
        self.config = config
        self.values: dict[str, Any] = {
            "kind": self.KIND,
            "model": dataclasses.asdict(config.model.described),
            "precision": config.train.precision,
            "seed": config.run.seed,
            **self.own(),
        }

    def own(self) -> dict[str, Any]:
        """Returns what the trainer's part of the configuration adds."""
        return {}

    def of_files(self, folder: RunFolder) -> dict[str, Any]:
        """Returns what is known of the bytes of the data; rank 0 only, may read them."""
        return {}

    def completed(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Returns the meta of an older checkpoint with what it did not say yet."""
        return saved

    def changes(self, saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
        """Yields what differs between a checkpoint's meta and the values of this run."""
        for path, before, after in self._differences(saved, now):
            dotted = ".".join(path)
            yield Change(self.KEYS.get(dotted, dotted), before, after, "checkpoint", True)

    def _differences(
        self, saved: Mapping[str, Any], now: Mapping[str, Any], path: tuple[str, ...] = ()
    ) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
        for key, new in now.items():
            old = saved.get(key)
            if key in self.APART:
                continue
            if isinstance(new, dict) and isinstance(old, dict) and key not in self.WHOLE:
                yield from self._differences(old, new, (*path, key))
            elif old != new:
                yield (*path, key), old, new

    def kept_ledger(self, ledger: dict[str, Any], changes: Sequence[Change]) -> dict[str, Any]:
        """Returns the ledger without what the changes make void."""
        return ledger


def find_checkpoint(root: Path, resume: str, mesh: Mesh) -> tuple[Path | None, list[str]]:
    """Returns the newest whole checkpoint and what was passed over, as rank 0 sees it; collective
    over the world.
    """
    found, warnings = store.latest_whole(root, mesh)
    if found is None and resume == "must":
        raise UsageError(
            f"--resume must: there is no valid checkpoint under {root}. "
            f"{' '.join(warnings)}".rstrip()
        )
    if found is not None and resume == "never":
        raise UsageError(f"--resume never: {found} exists. Choose another run.dir, or remove it.")
    if found is None and warnings:
        raise CheckpointError(
            f"No checkpoint under {root} is usable: {' '.join(warnings)} "
            "Repair or remove the folder; starting afresh over it would hide the damage."
        )
    return found, warnings


def ledger_and_changes(
    found: Path, identity: Identity, others: Sequence[Change], allowed: Sequence[str]
) -> tuple[dict[str, Any], list[Change]]:
    """Returns the ledger to go on with and all changes, the refused ones allowed.

    `others` are changes that only run.yaml tells of; `allowed` are keys, or sections, whose changes
    pass. Errors: `UsageError` with a table of what differs when the run is another one,
    `CheckpointError` for a checkpoint of another kind of training.

    What an older checkpoint's model does not say, because the key came later, is what its family
    says.
    """
    now = redacted(identity.values)
    with CheckpointReader(found) as reader:
        saved = reader.meta
        if isinstance(saved, dict) and "model" in saved:
            saved = saved | {"model": dataclasses.asdict(stored_model(reader))}
        if is_import(reader):
            now = {"model": now["model"]}
            saved = {"ledger": {}, **saved}
    if not isinstance(saved, dict) or saved.get("kind") not in (identity.KIND, IMPORTED):
        raise CheckpointError(_other_kind(found, saved, identity.KIND))
    saved = identity.completed(saved)
    changes = list(identity.changes(saved, now))
    keys = {change.key for change in changes}
    changes += [change for change in others if change.key not in keys]
    if any(change.refused and not is_allowed(change, allowed) for change in changes):
        raise UsageError(_refusal(found, changes, allowed))
    return identity.kept_ledger(saved["ledger"], changes), changes


def _other_kind(found: Path, saved: Any, wanted: str) -> str:
    written = saved.get("kind") if isinstance(saved, dict) else None
    by = f"was written by `megallm {written}`" if written else "does not say which run wrote it"
    return (
        f"{found} {by}; `megallm {wanted}` does not go on from it. To start from its weights "
        "alone, "
        "write them to a folder, `megallm convert --to hf --input RUN --output DIR`, and "
        "train with "
        "model.hf=DIR in another run.dir."
    )


def config_changes(folder: RunFolder, config: JobConfig) -> list[Change]:
    """Returns what differs between run.yaml, which the last start wrote, and this configuration; a
    missing file has nothing.
    """
    try:
        before = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, yaml.YAMLError) as error:
        log.warning(
            "%s cannot be read (%s): only the checkpoint is compared.", folder.config, error
        )
        return []
    now, usual = yaml.safe_load(shown_yaml(config)), to_dict(type(config)())
    found = []
    for key in leaves(type(config)):
        old, new = _look_up(before, key, _look_up(usual, key, None)), _look_up(now, key, None)
        if old != new and key not in _OF_THE_PLACE:
            found.append(Change(key, old, new, "run.yaml", key in _REFUSED))
    return found


def _look_up(tree: Any, key: str, default: Any) -> Any:
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return default
        tree = tree[part]
    return tree


def check_allowed(keys: Sequence[str], config: type[JobConfig], identity: type[Identity]) -> None:
    """Errors: `UsageError` for a key of --allow-change that means nothing."""
    known = {*identity.ALLOWED, *leaves(config)}
    sections = {
        key.rsplit(".", count)[0] for key in known for count in range(1, key.count(".") + 1)
    }
    for key in keys:
        if key not in known | sections:
            hint = suggest.did_you_mean(key, sorted(known | sections))
            raise UsageError(f"--allow-change {key}: there is no such key.{hint}")


def _refusal(found: Path, changes: Sequence[Change], allowed: Sequence[str]) -> str:
    first = next(change for change in changes if change.refused and not is_allowed(change, allowed))
    return (
        f"{found} belongs to a run that differs from this "
        f"configuration:\n{table_of(changes, allowed)}\nWhat is marked with * makes it another "
        "run: restore these values, start anew in another run.dir, or let each pass, as in "
        f"--allow-change {first.key.partition(' ')[0]}. The rest may change."
    )


def unreadable(error: CheckpointError, changes: Sequence[Change]) -> MegallmError:
    """Returns the error of a whole checkpoint that does not fit what --allow-change let pass; the
    same one without such.
    """
    passed = [change for change in changes if change.refused]
    if not passed:
        return error
    return UsageError(
        "The checkpoint does not fit a change that --allow-change let pass: "
        f"{error}\n{table_of(passed)}\nRestore the values that it was written with, or start anew "
        "in another run.dir."
    )


def same_run(
    identity: Identity, found: Path | None, allowed: Sequence[str], mesh: Mesh
) -> tuple[Ledger, list[Change]]:
    """Returns the ledger to go on with and what was changed since; completes `identity` with what
    rank 0 finds in the files.

    Collective over the world. Errors: `UsageError` on rank 0 when the run is another one; the
    others lose a peer.
    """
    answer: dict[str, Any] = {}
    changes: list[Change] = []
    if mesh.rank == 0:
        folder = RunFolder(identity.config.run.dir)
        answer["files"] = identity.of_files(folder)
        identity.values |= answer["files"]
        if found is not None:
            others = config_changes(folder, identity.config)
            answer["ledger"], changes = ledger_and_changes(found, identity, others, allowed)
        answer["changes"] = changes
    answer = mesh.broadcast_json(answer)
    identity.values |= answer["files"]
    return Ledger(**answer.get("ledger", {})), changes or [
        Change(*change) for change in answer["changes"]
    ]
