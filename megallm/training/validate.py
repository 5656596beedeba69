"""Every rule between the fields of a configuration, checked before any process starts. Pure.

A rule is a generator of `Problem`s: the rule in words, the numbers that break it, and the nearest values that keep
it. `check` runs them all, so that one attempt shows everything that is wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from megallm.base.config import get, raise_problems, replace
from megallm.base.errors import UsageError
from megallm.base.suggest import nearest
from megallm.convert.hf_config import agree, read_config
from megallm.data.megatron.order import parse_split
from megallm.models.config import CHOICES, ModelConfig
from megallm.models.stages import parse_stages
from megallm.optim.config import CHOICES as OPTIM_CHOICES
from megallm.parallel.schedule import SCHEDULES as PIPELINES
from megallm.parallel.zigzag import hybrid_degrees
from megallm.training.config import PretrainConfig
from megallm.training.data_rules import placeholder_faults, source_faults
from megallm.training.expert_rules import layout_faults, router_faults, size_faults
from megallm.training.narrow_rules import narrow_faults
from megallm.training.nearest import divisors, multiples, nearest_fixes, power_of_two, ratio
from megallm.training.optimizing import optimizer_faults
from megallm.training.ranges import RANGES
from megallm.training.reading import objective_faults, segment_faults
from megallm.training.section_rules import section_faults

WORLD = "--nproc"  # stands for the number of processes among the fixes of a problem


@dataclass(frozen=True)
class Problem:
    """One broken rule. Applying any one of `fixes` (dotted key -> value) makes this rule hold."""

    rule: str
    sentence: str
    fixes: tuple[dict[str, Any], ...] = ()
    key: str = ""  # the key whose value is unusable by itself: rules that compute with it are left out

    def __str__(self) -> str:
        if not self.fixes:
            return self.sentence
        return f"{self.sentence} Nearest valid: {' or '.join(_shown(fix) for fix in self.fixes)}."


@dataclass(frozen=True)
class Facts:
    """What the rules look at: the configuration with its model resolved, and the size of the world."""

    config: PretrainConfig
    model: ModelConfig
    world: int | None  # None: as many processes as the layout asks for
    tokenizer_vocab: int | None

    @property
    def model_ranks(self) -> int:
        """Ranks of one replica."""
        layout = self.config.layout
        return layout.pp * layout.cp * layout.tp

    @property
    def dp(self) -> int:
        """Data-parallel replicas: given, or what the world leaves (at least 1)."""
        if self.config.layout.dp is not None:
            return self.config.layout.dp
        return max(1, self.world // self.model_ranks) if self.world else 1


def check(
    config: PretrainConfig, world: int | None = None, tokenizer_vocab: int | None = None, world_name: str = WORLD
) -> PretrainConfig:
    """The configuration with every inferred value filled in; raises one UsageError that lists all problems.

    `world` is the number of processes (None: what the layout asks for), `tokenizer_vocab` the tokenizer's size if
    known: it fills a missing `model.vocab_size`. `world_name` is the option that gave the number of processes.
    """
    problems = find_problems(config, world, tokenizer_vocab)
    hint = ""
    if world is not None and any(problem.rule in LAYOUT_RULES for problem in problems):
        close = nearest_layouts(config, world, tokenizer_vocab)
        if close:
            hint = f"Layouts of {world} processes that fit: {'; '.join(_shown(layout) for layout in close)}."
    raise_problems([str(problem).replace(WORLD, world_name) for problem in problems], hint)
    facts = _facts(config, world, tokenizer_vocab)
    seed = config.run.seed if config.data.seed is None else config.data.seed
    return replace(
        config, {"model": facts.model, "layout.dp": facts.dp, "data.seed": seed, "optim": config.optim.resolve()}
    )


def find_problems(config: PretrainConfig, world: int | None, tokenizer_vocab: int | None = None) -> list[Problem]:
    """All broken rules. Rules about the model's sizes are left out while the model itself cannot be resolved."""
    problems = [*_ranges(config, world), *_choices(config), *_split(config)]
    problems += [*_sources(config), *_segments(config), *_optimizer(config), *_expert_sizes(config)]
    broken = {problem.key for problem in problems}
    try:
        facts = _facts(config, world, tokenizer_vocab)
    except UsageError as error:
        if not any(key.startswith("model.") for key in broken):
            problems.append(Problem("model", str(error)))
        return problems
    for rule, needs in CROSS_RULES.items():
        if not broken.intersection(needs):
            problems += rule(facts)
    return problems


def nearest_layouts(config: PretrainConfig, world: int, tokenizer_vocab: int | None = None) -> list[dict[str, int]]:
    """Up to three layouts of `world` ranks that break no rule about layouts, the closest to the wish first."""
    wish, found = config.layout, []
    model = dataclasses.replace(_facts(config, world, tokenizer_vocab).model, hf=None)  # a folder is read once
    for tp in divisors(world):
        for pp, cp in product(divisors(world // tp), {1, wish.cp}):
            if world // tp // pp % cp:
                continue
            layout = {"layout.pp": pp, "layout.dp": world // tp // pp // cp, "layout.tp": tp}
            layout |= {"layout.cp": cp} if wish.cp > 1 else {}
            trial = replace(config, layout | {"layout.ep": 1, "model": model})
            if not any(problem.rule in LAYOUT_RULES for problem in find_problems(trial, world, tokenizer_vocab)):
                found.append((ratio(tp, wish.tp) * ratio(pp, wish.pp) * ratio(cp, wish.cp), layout))
    return [layout for _, layout in sorted(found, key=lambda pair: pair[0])[:3]]


def _facts(config: PretrainConfig, world: int | None, tokenizer_vocab: int | None) -> Facts:
    model = config.model
    if model.hf is not None:
        model = agree(model, read_config(Path(model.hf)).model, f"model.hf {model.hf}")
    elif model.vocab_size is None and model.preset is None and tokenizer_vocab is not None:
        model = dataclasses.replace(model, vocab_size=tokenizer_vocab)
    return Facts(config, model.resolve(), world, tokenizer_vocab)


# Rules about single keys.


def _ranges(config: PretrainConfig, world: int | None) -> Iterator[Problem]:
    if world is not None and world < 1:
        yield Problem("ranges", f"{WORLD} is {world}; it must be at least 1.", ({WORLD: 1},), WORLD)
    for key, allowed in RANGES.items():
        value = get(config, key)
        if value is None:
            continue
        near = allowed.nearest(value, get(_DEFAULTS, key))
        if near != value:
            fixes = () if near is None else ({key: near},)
            yield Problem("ranges", f"{key} is {value}; it must be {allowed}.", fixes, key)


def _choices(config: PretrainConfig) -> Iterator[Problem]:
    tables = {f"model.{name}": values for name, values in CHOICES.items()}
    tables |= {f"optim.{name}": values for name, values in OPTIM_CHOICES.items()}
    for key, values in tables.items():
        value = get(config, key)
        if value is not None and value not in values:
            close = nearest(value, values, cutoff=0) or values[0]
            sentence = f"{key} is '{value}'; it must be one of {', '.join(values)}."
            yield Problem("choices", sentence, ({key: close},), key)


def _split(config: PretrainConfig) -> Iterator[Problem]:
    fixes: tuple[dict[str, Any], ...] = ({"data.split": _DEFAULTS.data.split},)
    try:
        train, valid, _ = parse_split(config.data.split)
    except UsageError as error:
        yield Problem("split", str(error), fixes)
        return
    if train == 0:
        yield Problem("split", f"data.split '{config.data.split}' leaves nothing for training.", fixes)
    elif config.eval.batches > 0 and valid == 0 and not config.data.valid_sources:
        sentence = f"data.split '{config.data.split}' leaves nothing for validation, but eval.batches is "
        sentence += f"{config.eval.batches}: the held-out loss is wanted, at least at the end."
        yield Problem("split", sentence, ({"eval.batches": 0, "eval.every": 0}, *fixes))


def _segments(config: PretrainConfig) -> Iterator[Problem]:
    for sentence, fix in segment_faults(config):
        yield Problem("segments", sentence, (fix,))


def _expert_sizes(config: PretrainConfig) -> Iterator[Problem]:
    for key, sentence, fixes in size_faults(config):
        yield Problem("expert_sizes", sentence, fixes, key)


def _sources(config: PretrainConfig) -> Iterator[Problem]:
    for rule, sentence, fixes in (*source_faults(config), *placeholder_faults(config)):
        yield Problem(rule, sentence, fixes)


def _optimizer(config: PretrainConfig) -> Iterator[Problem]:
    for rule, sentence, fixes in optimizer_faults(config):
        yield Problem(rule, sentence, fixes)


# Rules between the model, the layout and the batch.


def _heads(facts: Facts) -> Iterator[Problem]:
    heads, tp = facts.model.num_heads, facts.config.layout.tp
    if heads % tp:
        sentence = f"layout.tp {tp} does not divide model.num_heads {heads}: a tensor-parallel rank holds whole heads."
        yield Problem("heads", sentence, nearest_fixes("layout.tp", tp, divisors(heads)))
    if facts.model.positions == "rope" and facts.model.rope_size % 2:
        size = facts.model.head_size
        sentence = f"model.head_size is {size}; rotary positions turn pairs of features, so it must be even."
        yield Problem("head_size", sentence, nearest_fixes("model.head_size", size, (size - 1, size + 1)))


def _widths(facts: Facts) -> Iterator[Problem]:
    tp = facts.config.layout.tp
    for name, size in (("ffn_hidden_size", facts.model.ffn_hidden_size), ("vocab_size", facts.model.vocab_size)):
        if size < tp:
            sentence = f"model.{name} {size} is less than layout.tp {tp}: a rank would hold nothing."
            yield Problem("widths", sentence, ({"layout.tp": size}, {f"model.{name}": tp}))


def _schedule(facts: Facts) -> Iterator[Problem]:
    layout = facts.config.layout
    wanted = PIPELINES[layout.schedule].chunks
    if wanted is not None and layout.chunks != wanted:
        sentence = f"layout.schedule {layout.schedule} has {wanted} chunk{'s' * (wanted > 1)} a rank, "
        sentence += f"but layout.chunks is {layout.chunks}."
        yield Problem("schedule", sentence, ({"layout.chunks": wanted}, {"layout.schedule": "interleaved"}))
    if layout.group is not None and layout.schedule != "interleaved":
        sentence = f"layout.group is {layout.group}, which layout.schedule {layout.schedule} does not use."
        yield Problem("schedule", sentence, ({"layout.group": None},))
    elif layout.group is not None and layout.group < layout.pp:
        sentence = (
            f"layout.group {layout.group} is less than layout.pp {layout.pp}: the pipeline would wait for itself."
        )
        yield Problem("schedule", sentence, ({"layout.group": layout.pp},))


def _zero(facts: Facts) -> Iterator[Problem]:
    zero, group = facts.config.zero, facts.dp * facts.config.layout.cp
    size = zero.shard_size
    if zero.bf16_grads and (zero.stage == 0 or facts.config.train.determinism == "tree"):
        sentence = "zero.bf16_grads is for the messages of zero.stage 1 to 3 without train.determinism tree."
        yield Problem("zero", sentence, ({"zero.bf16_grads": False},))
    if size is not None and zero.stage == 0:
        sentence = f"zero.shard_size is {size}, but zero.stage 0 divides nothing."
        yield Problem("zero", sentence, ({"zero.shard_size": None},))
    elif size is not None and group % size:
        sentence = f"zero.shard_size {size} does not divide dp x cp = {group}."
        yield Problem("zero", sentence, nearest_fixes("zero.shard_size", size, divisors(group)))


def _tree(facts: Facts) -> Iterator[Problem]:
    config, dp = facts.config, facts.dp
    if config.train.determinism != "tree":
        return
    if config.zero.stage > 1:
        sentence = f"train.determinism tree keeps whole gradients, which zero.stage {config.zero.stage} does not."
        yield Problem("tree", sentence, ({"zero.stage": 1}, {"train.determinism": "none"}))
    cp = config.layout.cp
    if not power_of_two(cp):
        sentence = f"train.determinism tree sums pairs of ranks, but layout.cp {cp} is not a power of two."
        fixes = nearest_fixes("layout.cp", cp, [2**k for k in range(cp.bit_length() + 1)])
        yield Problem("tree", sentence, (*fixes, {"train.determinism": "none"}))
    micros = config.train.global_batch // config.train.micro_batch
    if facts.config.train.global_batch % (config.train.micro_batch * dp) == 0 and not power_of_two(micros):
        sentence = "train.determinism tree sums pairs of microbatches, but train.global_batch / train.micro_batch is "
        sentence += f"{micros}, which is not a power of two."
        sizes = [config.train.micro_batch * 2**k for k in range(40)]
        fixes = nearest_fixes(
            "train.global_batch", config.train.global_batch, [size for size in sizes if size % dp == 0]
        )
        yield Problem("tree", sentence, (*fixes, {"train.determinism": "none"}))
    if config.layout.schedule == "zb-v":
        sentence = (
            "train.determinism tree needs microbatches to end in order, which layout.schedule zb-v does not promise."
        )
        yield Problem(
            "tree", sentence, ({"layout.schedule": "1f1b", "layout.chunks": 1}, {"train.determinism": "none"})
        )


def _layers(facts: Facts) -> Iterator[Problem]:
    layers, layout = facts.model.num_layers, facts.config.layout
    stages = layout.pp * layout.chunks
    if layout.stages is not None:
        try:
            parse_stages(layout.stages, layers, stages)
        except UsageError as error:
            yield Problem("layers", str(error), ({"layout.stages": None},))
    elif stages > layers:
        sentence = f"layout.pp {layout.pp} x layout.chunks {layout.chunks} = {stages} stages, but the model has "
        sentence += f"model.num_layers {layers}: each stage needs at least one layer."
        fixes: list[dict[str, Any]] = [{"model.num_layers": stages}]
        if layers >= layout.chunks:
            fixes.insert(0, {"layout.pp": layers // layout.chunks})
        yield Problem("layers", sentence, tuple(fixes))


def _batch(facts: Facts) -> Iterator[Problem]:
    train, dp = facts.config.train, facts.dp
    unit = train.micro_batch * dp
    if facts.world is not None and facts.world % facts.model_ranks:
        return  # dp is not known
    if train.global_batch % unit:
        sentence = f"train.global_batch {train.global_batch} is not a multiple of train.micro_batch "
        sentence += f"{train.micro_batch} x dp {dp} = {unit}: every replica runs the same number of whole microbatches."
        fixes = nearest_fixes("train.global_batch", train.global_batch, multiples(train.global_batch, unit))
        if train.global_batch % dp == 0:
            fixes += nearest_fixes("train.micro_batch", train.micro_batch, divisors(train.global_batch // dp))
        yield Problem("batch", sentence, fixes)


def _sequence(facts: Facts) -> Iterator[Problem]:
    yield from _row_length(facts, facts.config.data.seq_len)
    for number, segment in enumerate(facts.config.data.segments):
        for problem in _row_length(facts, segment.seq_len) if segment.seq_len else ():
            fixes = tuple(fix for fix in problem.fixes if "data.seq_len" not in fix) or ({"data.segments": ()},)
            sentence = problem.sentence.replace("data.seq_len", f"data.segments[{number}].seq_len")
            yield Problem(problem.rule, sentence, fixes)


def _row_length(facts: Facts, seq_len: int) -> Iterator[Problem]:
    layout, model = facts.config.layout, facts.model
    tp = layout.tp if layout.sp else 1
    if layout.cp > 1 and seq_len % (2 * layout.cp * tp):
        unit = 2 * layout.cp * tp
        sentence = f"data.seq_len {seq_len} is not a multiple of 2 x layout.cp {layout.cp}"
        sentence += f" x layout.tp {tp} (layout.sp)" * (tp > 1)
        sentence += f" = {unit}: a context-parallel rank holds two equal chunks of each row."
        fits = [cp for cp in range(2, layout.cp) if seq_len % (2 * cp * tp) == 0] + [1] * (seq_len % tp == 0)
        fixes = nearest_fixes("data.seq_len", seq_len, multiples(seq_len, unit)) + nearest_fixes(
            "layout.cp", layout.cp, fits
        )
        yield Problem("sequence", sentence, fixes)
    elif layout.sp and seq_len % layout.tp:
        sentence = f"layout.sp splits data.seq_len {seq_len} over layout.tp {layout.tp}, which does not divide it."
        fixes = nearest_fixes("data.seq_len", seq_len, multiples(seq_len, layout.tp))
        yield Problem("sequence", sentence, (*fixes, {"layout.sp": False}))
    grows = model.positions == "rope" and model.rope_scaling == "dynamic"  # made to go beyond its max_positions
    if seq_len > model.max_positions and not grows:
        sentence = f"data.seq_len {seq_len} is greater than model.max_positions {model.max_positions}, "
        if model.positions == "learned":
            sentence += "and this model has one learned vector per position."
        else:
            sentence += "which is what generation and an exported config.json would say that the model can read."
        yield Problem("positions", sentence, ({"data.seq_len": model.max_positions}, {"model.max_positions": seq_len}))


def _further(facts: Facts) -> Iterator[Problem]:
    depth, data = facts.model.mtp.depth, facts.config.data
    lengths = [data.seq_len] + [segment.seq_len for segment in data.segments if segment.seq_len]
    if depth >= min(lengths):
        sentence = f"model.mtp.depth {depth} looks further ahead than a row of {min(lengths)} tokens reaches."
        fixes: tuple[dict[str, Any], ...] = ({"model.mtp.depth": min(lengths) - 1},)
        yield Problem("further", sentence, fixes + ({"data.seq_len": depth + 1},) * (len(lengths) == 1))


def _experts(facts: Facts) -> Iterator[Problem]:
    if facts.world is not None and facts.world % facts.model_ranks:
        return  # dp is not known
    for sentence, fixes in layout_faults(facts.config, facts.model, facts.dp, facts.world):
        yield Problem("experts", sentence, fixes)


def _router(facts: Facts) -> Iterator[Problem]:
    for sentence, fixes in router_faults(facts.model):
        yield Problem("router", sentence, fixes)


def _sections_of_model(facts: Facts) -> Iterator[Problem]:
    for sentence, fixes in section_faults(facts.config, facts.model):
        yield Problem("sections", sentence, fixes)


def _context(facts: Facts) -> Iterator[Problem]:
    layout, heads = facts.config.layout, facts.model.num_heads
    cp, wanted = layout.cp, layout.cp_ulysses
    if wanted is not None and layout.cp_kind != "hybrid":
        sentence = f"layout.cp_ulysses is {wanted}, which only layout.cp_kind hybrid reads, not {layout.cp_kind}."
        yield Problem("cp_ulysses", sentence, ({"layout.cp_ulysses": None},))
    if heads % layout.tp == 0 and cp > 1:
        heads //= layout.tp
        ring = {"layout.cp_kind": "ring", "layout.cp_ulysses": None}
        if layout.cp_kind == "ulysses" and heads % cp:
            sentence = f"layout.cp_kind ulysses spreads the {heads} query heads of a tensor-parallel rank over "
            sentence += f"layout.cp {cp}, which does not divide them."
            yield Problem("context", sentence, (*nearest_fixes("layout.cp", cp, divisors(heads)), ring))
        degrees = hybrid_degrees(cp, heads)
        if layout.cp_kind == "hybrid" and (not degrees if wanted is None else wanted not in degrees):
            sentence = "layout.cp_kind hybrid is a ring of groups that exchange heads: layout.cp_ulysses "
            sentence += f"{'' if wanted is None else f'{wanted} '}must divide layout.cp {cp} and the {heads} query "
            sentence += "heads of a tensor-parallel rank, and groups and ring be of more than one rank."
            yield Problem("context", sentence, (*nearest_fixes("layout.cp_ulysses", wanted or 0, degrees), ring))


def _world(facts: Facts) -> Iterator[Problem]:
    layout, world, ranks = facts.config.layout, facts.world, facts.model_ranks
    if world is None:
        return
    product = f"pp {layout.pp} x cp {layout.cp} x tp {layout.tp}"
    if layout.dp is not None and layout.dp * ranks != world:
        sentence = f"{world} processes, but layout {product} x dp {layout.dp} needs {layout.dp * ranks}."
        fixes: tuple[dict[str, Any], ...] = ({WORLD: layout.dp * ranks},)
        if world % ranks == 0:
            fixes = ({"layout.dp": world // ranks}, *fixes)
        yield Problem("world", sentence, fixes)
    elif layout.dp is None and world % ranks:
        sentence = f"{world} processes are not a multiple of layout {product} = {ranks}."
        yield Problem("world", sentence, nearest_fixes(WORLD, world, multiples(world, ranks)))


def _objective(facts: Facts) -> Iterator[Problem]:
    for sentence, fixes in objective_faults(facts.config, facts.model):
        yield Problem("objective", sentence, fixes)


def _narrow(facts: Facts) -> Iterator[Problem]:
    for rule, sentence, fixes in narrow_faults(facts.config, facts.model):
        yield Problem(rule, sentence, fixes)


def _vocabulary(facts: Facts) -> Iterator[Problem]:
    vocab, needed = facts.model.vocab_size, facts.tokenizer_vocab
    if needed is not None and vocab < needed:
        sentence = f"model.vocab_size {vocab} is smaller than the tokenizer's {needed}: some tokens would have no row."
        yield Problem("vocabulary", sentence, ({"model.vocab_size": needed},))


# Each rule and the keys it computes with: a rule is left out while one of its keys is out of range.
_AXES = ("layout.tp", "layout.pp", "layout.cp", "layout.dp", WORLD)
CROSS_RULES: dict[Callable[[Facts], Iterable[Problem]], tuple[str, ...]] = {
    _world: _AXES,
    _heads: ("layout.tp", "model.num_heads", "model.head_size"),
    _widths: ("layout.tp", "model.ffn_hidden_size", "model.vocab_size"),
    _layers: ("layout.pp", "layout.chunks", "model.num_layers"),
    _schedule: ("layout.pp", "layout.chunks", "layout.group"),
    _zero: (*_AXES, "zero.shard_size"),
    _tree: (*_AXES, "train.global_batch", "train.micro_batch"),
    _batch: (*_AXES, "train.global_batch", "train.micro_batch"),
    _sequence: ("layout.tp", "layout.cp", "data.seq_len", "model.max_positions"),
    _further: ("model.mtp.depth", "data.seq_len"),
    _context: ("layout.tp", "layout.cp", "layout.cp_ulysses", "model.num_heads"),
    _experts: (*_AXES, "layout.ep", "model.moe.num_experts"),
    _router: tuple(f"model.moe.{name}" for name in ("num_experts", "top_k", "num_groups", "top_groups")),
    _sections_of_model: ("model.num_layers", "model.moe.num_experts", "model.mla.kv_lora_dim", "model.mtp.depth"),
    _narrow: ("layout.tp", "model.num_layers", "train.fp8.bf16_first", "train.fp8.bf16_last"),
    _vocabulary: ("model.vocab_size",),
    _objective: (*(f"data.masking.{name}" for name in ("rate", "masked", "random")), "data.fim.rate", "model.head"),
}
LAYOUT_RULES = ("world", "heads", "widths", "layers", "batch", "sequence", "context", "schedule")
_DEFAULTS = PretrainConfig()


# Words.


def _shown(fix: dict[str, Any]) -> str:
    return " ".join(f"{WORLD} {value}" if key == WORLD else f"{key}={_value(value)}" for key, value in fix.items())


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)
