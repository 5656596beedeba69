"""From a configuration to what is read: the plan of the stream, its sources, or Megatron's samples.
No torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megallm.base.errors import CheckpointError, DataError, UsageError
from megallm.checkpoint import manifest
from megallm.data import objective
from megallm.data.batches import BatchReader, MegatronReader, Share, StreamReader
from megallm.data.indexed import meta
from megallm.data.masking import MaskRule
from megallm.data.megatron.order import parse_split
from megallm.data.megatron.samples import SampleOptions, build_samples
from megallm.data.objective import TokenMasker
from megallm.data.stream import fim
from megallm.data.stream.plan import Reading, StreamPlan, StreamSegment, stream_segments
from megallm.data.stream.source import DocumentSource
from megallm.data.stream.state_cache import StreamStateCache
from megallm.data.stream.stream import Stream, holds_rearranged
from megallm.data.text import tokenizer
from megallm.data.text.tokenizer_folder import saved_tokenizer
from megallm.training import starting
from megallm.training.config import PretrainConfig, SegmentConfig

WHOLE_VALID = "0,1,0"  # the split of a dataset that is validation data as a whole


def plan_of(config: PretrainConfig) -> StreamPlan:
    """Returns the stream's plan; the configuration is checked and resolved."""
    data = config.data
    reading = Reading(
        data.seq_len, data.packing, data.window, data.fim.rate, data.fim.spm, data.fim.form
    )
    changes = [(segment.until_tokens, _given(segment)) for segment in data.segments]
    return StreamPlan(stream_segments(data.sources, reading, changes), data.seed, data.split)


def _given(segment: SegmentConfig) -> dict[str, Any]:
    return {
        key: value
        for key, value in vars(segment).items()
        if value is not None and key != "until_tokens"
    }


def uses_fim(config: PretrainConfig) -> bool:
    """Returns whether any segment rearranges documents."""
    return any(
        rate > 0
        for rate in (config.data.fim.rate, *(s.fim_rate or 0 for s in config.data.segments))
    )


def tokenizer_of(config: PretrainConfig) -> str | None:
    """Returns `data.tokenizer`, else the one that came with `model.hf` or `model.init`, else what
    the sources' own metadata and the copies kept beside them say made them, else None.
    """
    if config.data.tokenizer is not None:
        return config.data.tokenizer
    came_along = starting.tokenizer_of_model(config.model)
    if came_along is not None:
        return came_along
    if any(meta.read_meta(prefix) is None for prefix in config.data.prefixes):
        return None  # who knows what made that one
    return next(filter(None, map(meta.kept_tokenizer, config.data.prefixes)), None)


def pretrain_tokenizer_vocab(config: PretrainConfig) -> int | None:
    """Returns the largest vocabulary that the sources were made with, from their side-cars; None
    when none has one.
    """
    side_cars = [meta.read_meta(prefix) for prefix in config.data.prefixes]
    return max(
        (side_car["tokenizer"]["vocab_size"] for side_car in side_cars if side_car), default=None
    )


def words_of(config: PretrainConfig) -> str | None:
    """Returns the fingerprint of the tokenizer that made the sources; None when nobody knows."""
    made_by = [
        car["tokenizer"]["fingerprint"]
        for car in map(meta.read_meta, config.data.prefixes)
        if car is not None
    ]
    spec = tokenizer_of(config)
    return made_by[0] if made_by else None if spec is None else tokenizer.load(spec).fingerprint


def tokenizer_warning(config: PretrainConfig) -> str | None:
    """Returns a sentence to warn with when nothing says which tokenizer made the sources; None when
    it is known.

    Errors: `DataError` when the metadata name one that is not there, or that of some sources only.
    """
    if tokenizer_of(config) is not None:
        return None
    side_cars = {prefix: meta.read_meta(prefix) for prefix in config.data.prefixes}
    known = {
        prefix: car["tokenizer"]["fingerprint"]
        for prefix, car in side_cars.items()
        if car is not None
    }
    if not known:
        return (
            "No metadata say which tokenizer made the sources, and data.tokenizer is not set: the "
            "checkpoints will have none, so generate and chat will need --tokenizer."
        )
    prefix, made_by = next(iter(known.items()))
    bare = [each for each in side_cars if each not in known]
    if bare:
        raise DataError(
            f"{prefix} was made with tokenizer {made_by}, but no metadata say what made {bare[0]}: "
            "set data.tokenizer to the tokenizer of both."
        )
    raise DataError(
        f"{prefix} was made with tokenizer {made_by}, but {saved_tokenizer(prefix)}, where "
        "preprocess "
        "keeps it, holds none: set data.tokenizer to its folder."
    )


def check_tokenizers(config: PretrainConfig) -> None:
    """Refuse sources that were made with different tokenizers, or with another one than the
    run's.
    """
    spec = tokenizer_of(config)
    wanted = None if spec is None else tokenizer.load(spec).fingerprint
    side_cars = {prefix: meta.read_meta(prefix) for prefix in config.data.prefixes}
    known = {
        prefix: car["tokenizer"]["fingerprint"]
        for prefix, car in side_cars.items()
        if car is not None
    }
    first = next(iter(known), None)
    kept = (
        first is not None and config.data.tokenizer is None and spec == meta.kept_tokenizer(first)
    )
    for prefix, made_by in known.items():
        if wanted is not None and not kept:
            meta.check_tokenizer(prefix, wanted)
        if made_by != known[first]:
            raise DataError(
                f"{prefix} was made with tokenizer {made_by}, but {first} with {known[first]}: the "
                "same ids would mean different texts. Preprocess one of them again."
            )
    if kept and wanted not in (None, known[first]):
        raise DataError(
            f"{spec} holds the tokenizer {wanted}, but {first} was made with {known[first]}: set "
            "data.tokenizer to that one, or preprocess again."
        )


def open_sources(
    config: PretrainConfig, plan: StreamPlan, state: dict[str, Any] | None = None
) -> dict[str, DocumentSource]:
    """Returns the sources of a plan, which go on from `state`.

    Documents that were being read when fill-in-the-middle was switched off are read to their end as
    they were begun. Errors: `DataError` for files, `UsageError` when data.fim cannot work.
    """
    rearranger = None
    vocab = config.model.vocab_size
    if uses_fim(config) or holds_rearranged(state):
        spec = tokenizer_of(config)
        if spec is None:
            what = "data.fim.rate" if uses_fim(config) else "Going on amid rearranged documents"
            raise UsageError(f"{what} needs the text of the documents: set data.tokenizer.")
        loaded = tokenizer.load(spec)
        rearranger = fim.Rearranger(
            loaded, fim.find_sentinels(loaded, config.data.fim.tokens, vocab)
        )
    return {prefix: DocumentSource(prefix, plan, vocab, rearranger) for prefix in plan.prefixes}


def hider_of(config: PretrainConfig) -> TokenMasker | None:
    """Returns what hides tokens, None for the next token. Errors: `UsageError` without a mask
    token, `DataError`.
    """
    data, masking = config.data, config.data.masking
    if data.objective == objective.NEXT_TOKEN:
        return None
    spec = tokenizer_of(config)
    words = None if spec is None else tokenizer.load(spec)
    mask = objective.mask_token_of(words, masking.token, config.model.vocab_size)
    special = tuple(sorted(objective.special_tokens(words) | {mask}))
    vocab = (
        config.model.vocab_size if words is None else min(words.vocab_size, config.model.vocab_size)
    )
    rule = MaskRule(mask, vocab, special, masking.rate, masking.masked, masking.random)
    return TokenMasker(
        data.objective,
        rule,
        data.seed,
        objective.word_start_table(words) if masking.whole_word else None,
    )


def open_reader(
    config: PretrainConfig,
    share: Share,
    first_step: int,
    state: dict[str, Any] | None = None,
    bookmarks: bool = False,
) -> BatchReader:
    """Returns what a data rank reads from `first_step` on; `state` is what the checkpoint of the
    step before kept.

    Without a state the stream is gone through from its beginning (lengths only, no tokens), or with
    `bookmarks` from the nearest one that an earlier call left.
    """
    data = config.data
    if data.order == "megatron":
        planned = planned_samples(config)
        samples = build_samples(data.sources, data.split, "train", planned, _sampling(config))
        return MegatronReader(samples, share, hider_of(config))
    plan = plan_of(config)
    sources = open_sources(config, plan, state)
    if bookmarks and not state:
        kept = StreamStateCache(plan, sources, share.global_batch)
        stream = kept.walked(plan, sources, first_step - 1, share.global_batch)
        return StreamReader(stream, share, first_step, data.document_masks, hider_of(config))
    stream = Stream(plan, sources, state)
    if not state:
        for _ in range(1, first_step):
            stream.take(share.global_batch)
    return StreamReader(stream, share, first_step, data.document_masks, hider_of(config))


def planned_samples(config: PretrainConfig) -> int:
    """Returns how many training samples Megatron-LM's order is made for."""
    return config.data.samples or config.train.steps * config.train.global_batch


def planned_held_out(config: PretrainConfig) -> int:
    """Returns how many validation samples it is made for: an evaluation every `eval.every` steps,
    one more.
    """
    every = config.eval.every
    evaluations = (config.train.steps // every if every else 0) + 1
    return evaluations * config.eval.batches * config.train.global_batch


def first_held_out(config: PretrainConfig, step: int) -> int:
    """Returns the number, from 1, of the first batch that the evaluation after `step` reads.

    Megatron-LM reads on from one evaluation to the next; in the stream order all read the same.
    """
    if config.data.order != "megatron" or not config.eval.every:
        return 1
    return max(0, step - 1) // config.eval.every * config.eval.batches + 1


def _sampling(config: PretrainConfig) -> SampleOptions:
    data = config.data
    return SampleOptions(data.seq_len, data.seed, data.surplus, config.model.vocab_size)


def held_out_readers(config: PretrainConfig, share: Share) -> Callable[[], BatchReader] | None:
    """Returns what reads the validation split from its beginning: packed as the training rows are,
    or Megatron's samples.

    Nothing is rearranged in it, and its rows have `data.seq_len`. Files and tokenizer are opened
    once, however often a reader is asked for. None without held-out data.
    """
    data, sources, split = config.data, config.data.sources, config.data.split
    if data.valid_sources:
        sources, split = data.valid_sources, WHOLE_VALID
    if not config.eval.batches or parse_split(split)[1] == 0:
        return None
    hide, vocab = hider_of(config), config.model.vocab_size
    if data.order == "megatron":
        planned = planned_held_out(config)
        samples = build_samples(sources, split, "valid", planned, _sampling(config))
        return lambda: MegatronReader(samples, share, hide)
    segment = StreamSegment(0, dict(sources), Reading(data.seq_len, data.packing, data.window))
    plan = StreamPlan((segment,), data.seed, split, "valid")
    opened = {prefix: DocumentSource(prefix, plan, vocab) for prefix in plan.prefixes}
    return lambda: StreamReader(Stream(plan, opened), share, 1, data.document_masks, hide)


def saved_state(step_dir: Path) -> tuple[int, dict[str, Any]]:
    """Returns (step, state of the stream) of a checkpoint. Errors: `CheckpointError`, `UsageError`
    without a state.
    """
    path = step_dir / manifest.MANIFEST
    try:
        meta_data = manifest.decode(path.read_bytes(), str(path)).meta
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    ledger = meta_data.get("ledger", {}) if isinstance(meta_data, dict) else {}
    if not ledger.get("data"):
        raise UsageError(f"{step_dir} was not written by a run with data.order stream.")
    return ledger["step"], ledger["data"]
