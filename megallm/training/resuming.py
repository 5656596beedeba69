"""Going on from a checkpoint: which one is whole, and whether the run is still the same one."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megallm.base import suggest
from megallm.base.config import leaves, to_dict, to_yaml
from megallm.base.errors import CheckpointError, MegallmError, UsageError
from megallm.checkpoint import store
from megallm.checkpoint.reader import CheckpointReader
from megallm.convert.convert import IMPORTED, is_import
from megallm.convert.weights import stored_model
from megallm.data.indexed import content, meta
from megallm.data.indexed.dataset import IndexedDataset
from megallm.data.stream.source import dataset_fingerprint
from megallm.parallel.mesh import Mesh
from megallm.run.changes import Change, is_allowed, table_of
from megallm.run.runfolder import RunFolder
from megallm.training.config import PretrainConfig
from megallm.training.reading import planned_samples, tokenizer_of, words_of
from megallm.training.trainer import Ledger

CONTENT, SAMPLES = (
    "data.content",
    "data.samples",
)  # what may be allowed beside the keys of a configuration
_KEYS = {
    "precision": "train.precision",
    "seed": "run.seed",
    "data.global_batch": "train.global_batch",
}
_KEYS |= {"data.files": CONTENT}
_REFUSED = ("optim.rule",)  # of what only run.yaml tells: the optimizer's state would not fit
_OF_THE_PLACE = ("run.dir",)  # no part of the run
_RESTART = (
    "data.seed",
    "data.split",
    "data.order",
)  # the stream is gone through anew when they may change

log = logging.getLogger(__name__)


def find_checkpoint(root: Path, resume: str, mesh: Mesh) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint and what was passed over, as rank 0 sees it; collective over the
    world.
    """
    found, warnings = store.latest_whole(root, mesh)
    if found is None and resume == "must":
        raise UsageError(
            f"--resume must: there is no valid checkpoint under {root}. {' '.join(warnings)}".rstrip()
        )
    if found is not None and resume == "never":
        raise UsageError(f"--resume never: {found} exists. Choose another run.dir, or remove it.")
    if found is None and warnings:
        raise CheckpointError(
            f"No checkpoint under {root} is usable: {' '.join(warnings)} "
            "Repair or remove the folder; starting afresh over it would hide the damage."
        )
    return found, warnings


def describe(config: PretrainConfig) -> dict[str, Any]:
    """What a checkpoint remembers of the configuration, to refuse a run that is not the same run.

    In the stream order weights, lengths, batch sizes and steps may change: the ledger says what was
    read. `framed`, that the tokenizer's template stands around documents, is for generation.
    """
    data, train = config.data, config.train
    reading: dict[str, Any] = {"order": data.order, "split": data.split, "seed": data.seed}
    reading["objective"] = data.objective
    if data.objective != "next_token":
        reading["masking"] = dataclasses.asdict(data.masking)
    if data.order == "megatron":
        reading |= {
            "sources": data.sources,
            "seq_len": data.seq_len,
            "samples": planned_samples(config),
            "surplus": data.surplus,
            "global_batch": train.global_batch,
            "files": {
                prefix: dataset_fingerprint(IndexedDataset(prefix)) for prefix in data.sources
            },
        }
    return {
        "kind": "pretrain",
        "model": dataclasses.asdict(dataclasses.replace(config.model, hf=None)),
        "precision": train.precision,
        "seed": config.run.seed,
        "tokenizer": tokenizer_of(config),
        "framed": any(
            (meta.read_meta(prefix) or {}).get("add_special_tokens") for prefix in data.prefixes
        ),
        "data": reading,
    }


def describe_files(config: PretrainConfig, folder: RunFolder) -> dict[str, Any]:
    """What a checkpoint remembers of the data's bytes and of the tokenizer. Rank 0 only; reads what
    is not known.
    """
    sources = list(config.data.prefixes)
    return {
        "content": content.contents(sources, folder.path / "data.json"),
        "words": words_of(config),
    }


def ledger_and_changes(
    found: Path, identity: dict[str, Any], others: Sequence[Change], allowed: Sequence[str]
) -> tuple[dict[str, Any], list[Change]]:
    """Returns the ledger to go on with and all changes, the refused ones allowed.

    `others` are changes that only run.yaml tells of; `allowed` are keys, or sections, whose changes
    pass. Errors: `UsageError` with a table of what differs when the run is another one.

    What an older checkpoint's model does not say, because the key came later, is what its family
    says.
    """
    with CheckpointReader(found) as reader:
        saved = reader.meta
        if isinstance(saved, dict) and "model" in saved:
            saved = saved | {"model": dataclasses.asdict(stored_model(reader))}
        if is_import(reader):
            identity = {"model": identity["model"]}
            saved = {"ledger": {}, **saved}
    if not isinstance(saved, dict) or saved.get("kind") not in (identity.get("kind"), IMPORTED):
        raise CheckpointError(f"{found} was not written by a pretraining run.")
    if "data" in saved:
        saved = saved | {"data": {"objective": "next_token"} | saved["data"]}
    changes = list(_identity_changes(saved, identity))
    keys = {change.key for change in changes}
    changes += [change for change in others if change.key not in keys]
    if any(change.refused and not is_allowed(change, allowed) for change in changes):
        raise UsageError(_refusal(found, changes, allowed))
    return _ledger(saved["ledger"], changes), changes


def _identity_changes(saved: Mapping[str, Any], identity: Mapping[str, Any]) -> Iterator[Change]:
    for path, before, now in _differences(saved, identity):
        dotted = ".".join(path)
        known = (
            path[:2] == ("data", "files") and "content" in saved and "content" in identity
        )  # that tells more
        if not known:
            yield Change(_KEYS.get(dotted, dotted), before, now, "checkpoint", True)
    held, holds = saved.get("content") or {}, identity.get("content") or {}
    for prefix in holds:
        if prefix in held and held[prefix] != holds[prefix]:
            yield Change(f"{CONTENT} of {prefix}", held[prefix], holds[prefix], "checkpoint", True)
    words, now = saved.get("words"), identity.get("words")
    if words is not None and now is not None and words != now:
        yield Change("data.tokenizer", words, now, "checkpoint", True)


_APART = ("tokenizer", "framed", "content", "words")


def _differences(
    saved: Mapping[str, Any], wanted: Mapping[str, Any], path: tuple[str, ...] = ()
) -> list[tuple]:
    found = []
    for key, new in wanted.items():
        old = saved.get(key)
        if key in _APART:
            continue
        if isinstance(new, dict) and isinstance(old, dict) and key not in ("sources", "files"):
            found += _differences(old, new, (*path, key))
        elif old != new:
            found.append(((*path, key), old, new))
    return found


def config_changes(folder: RunFolder, config: PretrainConfig) -> list[Change]:
    """What differs between run.yaml, which the last start wrote, and this configuration; a missing
    file has nothing.
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
    now, usual = yaml.safe_load(to_yaml(config)), to_dict(PretrainConfig())
    found = []
    for key in leaves(PretrainConfig):
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


def check_allowed(keys: Sequence[str]) -> None:
    """Errors: `UsageError` for a key of --allow-change that means nothing."""
    known = {CONTENT, SAMPLES, *leaves(PretrainConfig)}
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
    """The error of a whole checkpoint that does not fit what --allow-change let pass; the same one
    without such.
    """
    passed = [change for change in changes if change.refused]
    if not passed:
        return error
    return UsageError(
        "The checkpoint does not fit a change that --allow-change let pass: "
        f"{error}\n{table_of(passed)}\nRestore the values that it was written with, or start anew "
        "in another run.dir."
    )


def _ledger(ledger: dict[str, Any], changes: Sequence[Change]) -> dict[str, Any]:
    """The ledger without what other data makes void: a changed source begins anew, a changed order
    altogether.
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


def same_run(
    config: PretrainConfig,
    identity: dict[str, Any],
    found: Path | None,
    allowed: Sequence[str],
    mesh: Mesh,
) -> tuple[Ledger, list[Change]]:
    """The ledger to go on with and what was changed since; completes `identity` with what rank 0
    finds in the files.

    Collective over the world. Errors: `UsageError` on rank 0 when the run is another one; the
    others lose a peer.
    """
    answer: dict[str, Any] = {}
    changes: list[Change] = []
    if mesh.rank == 0:
        folder = RunFolder(config.run.dir)
        answer["files"] = describe_files(config, folder)
        if found is not None:
            others = config_changes(folder, config)
            answer["ledger"], changes = ledger_and_changes(
                found, identity | answer["files"], others, allowed
            )
        answer["changes"] = changes
    answer = mesh.broadcast_json(answer)
    identity |= answer["files"]
    return Ledger(**answer.get("ledger", {})), changes or [
        Change(*change) for change in answer["changes"]
    ]
