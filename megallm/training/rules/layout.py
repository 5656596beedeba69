"""Rules between the layout, the model and the number of processes. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megallm.base.errors import UsageError
from megallm.models.stages import parse_stages
from megallm.parallel.schedule import SCHEDULES as PIPELINES
from megallm.parallel.zigzag import hybrid_degrees
from megallm.training.rules.nearest import divisors, multiples, nearest_fixes
from megallm.training.rules.problem import AXES, WORLD, Facts, Problem, Rules


def world(facts: Facts) -> Iterator[Problem]:
    """Yields a number of processes that the layout does not fit."""
    layout, world, ranks = facts.config.layout, facts.world, facts.model_ranks
    if world is None:
        return
    product = f"pp {layout.pp} x cp {layout.cp} x tp {layout.tp}"
    if layout.dp is not None and layout.dp * ranks != world:
        sentence = (
            f"{world} processes, but layout {product} x dp {layout.dp} needs {layout.dp * ranks}."
        )
        fixes: tuple[dict[str, Any], ...] = ({WORLD: layout.dp * ranks},)
        if world % ranks == 0:
            fixes = ({"layout.dp": world // ranks}, *fixes)
        yield Problem("world", sentence, fixes)
    elif layout.dp is None and world % ranks:
        sentence = f"{world} processes are not a multiple of layout {product} = {ranks}."
        yield Problem("world", sentence, nearest_fixes(WORLD, world, multiples(world, ranks)))


def heads(facts: Facts) -> Iterator[Problem]:
    """Yields heads that tensor parallelism or rotary positions cannot split."""
    heads, tp = facts.model.num_heads, facts.config.layout.tp
    if heads % tp:
        sentence = (
            f"layout.tp {tp} does not divide model.num_heads {heads}: a "
            "tensor-parallel rank holds whole heads."
        )
        yield Problem("heads", sentence, nearest_fixes("layout.tp", tp, divisors(heads)))
    if facts.model.positions == "rope" and facts.model.rope_size % 2:
        size = facts.model.head_size
        sentence = (
            f"model.head_size is {size}, of which {facts.model.rope_size} features are rotated; "
            "rotary positions turn pairs of features, so it must be even."
        )
        yield Problem(
            "head_size", sentence, nearest_fixes("model.head_size", size, (size - 1, size + 1))
        )


def widths(facts: Facts) -> Iterator[Problem]:
    """Yields sizes of which some rank would hold nothing."""
    tp = facts.config.layout.tp
    for name, size in (
        ("ffn_hidden_size", facts.model.ffn_hidden_size),
        ("vocab_size", facts.model.vocab_size),
    ):
        if size < tp:
            sentence = (
                f"model.{name} {size} is less than layout.tp {tp}: a rank would hold nothing."
            )
            yield Problem("widths", sentence, ({"layout.tp": size}, {f"model.{name}": tp}))


def layers(facts: Facts) -> Iterator[Problem]:
    """Yields stages that the layers do not fill."""
    layers, layout = facts.model.num_layers, facts.config.layout
    stages = layout.pp * layout.chunks
    if layout.stages is not None:
        try:
            parse_stages(layout.stages, layers, stages)
        except UsageError as error:
            yield Problem("layers", str(error), ({"layout.stages": None},))
    elif stages > layers:
        sentence = (
            f"layout.pp {layout.pp} x layout.chunks {layout.chunks} = {stages} stages, "
            "but the model has "
        )
        sentence += f"model.num_layers {layers}: each stage needs at least one layer."
        fixes: list[dict[str, Any]] = [{"model.num_layers": stages}]
        if layers >= layout.chunks:
            fixes.insert(0, {"layout.pp": layers // layout.chunks})
        yield Problem("layers", sentence, tuple(fixes))


def schedule(facts: Facts) -> Iterator[Problem]:
    """Yields what a pipeline schedule does not have."""
    layout = facts.config.layout
    wanted = PIPELINES[layout.schedule].chunks
    if wanted is not None and layout.chunks != wanted:
        sentence = (
            f"layout.schedule {layout.schedule} has {wanted} chunk{'s' * (wanted > 1)} a rank, "
        )
        sentence += f"but layout.chunks is {layout.chunks}."
        yield Problem(
            "schedule", sentence, ({"layout.chunks": wanted}, {"layout.schedule": "interleaved"})
        )
    if layout.group is not None and layout.schedule != "interleaved":
        sentence = (
            f"layout.group is {layout.group}, which layout.schedule {layout.schedule} does not use."
        )
        yield Problem("schedule", sentence, ({"layout.group": None},))
    elif layout.group is not None and layout.group < layout.pp:
        sentence = (
            f"layout.group {layout.group} is less than layout.pp {layout.pp}: the pipeline "
            "would wait for itself."
        )
        yield Problem("schedule", sentence, ({"layout.group": layout.pp},))


def context(facts: Facts) -> Iterator[Problem]:
    """Yields degrees of context parallelism that the heads do not fit."""
    layout, heads = facts.config.layout, facts.model.num_heads
    cp, wanted = layout.cp, layout.cp_ulysses
    if wanted is not None and layout.cp_kind != "hybrid":
        sentence = (
            f"layout.cp_ulysses is {wanted}, which only layout.cp_kind hybrid reads, "
            f"not {layout.cp_kind}."
        )
        yield Problem("cp_ulysses", sentence, ({"layout.cp_ulysses": None},))
    if heads % layout.tp == 0 and cp > 1:
        heads //= layout.tp
        ring = {"layout.cp_kind": "ring", "layout.cp_ulysses": None}
        if layout.cp_kind == "ulysses" and heads % cp:
            sentence = (
                f"layout.cp_kind ulysses spreads the {heads} query heads of a "
                "tensor-parallel rank over "
            )
            sentence += f"layout.cp {cp}, which does not divide them."
            yield Problem(
                "context", sentence, (*nearest_fixes("layout.cp", cp, divisors(heads)), ring)
            )
        degrees = hybrid_degrees(cp, heads)
        if layout.cp_kind == "hybrid" and (
            not degrees if wanted is None else wanted not in degrees
        ):
            sentence = (
                "layout.cp_kind hybrid is a ring of groups that exchange heads: layout.cp_ulysses "
            )
            sentence += (
                f"{'' if wanted is None else f'{wanted} '}must divide layout.cp {cp} "
                f"and the {heads} query "
            )
            sentence += (
                "heads of a tensor-parallel rank, and groups and ring be of more than one rank."
            )
            yield Problem(
                "context",
                sentence,
                (*nearest_fixes("layout.cp_ulysses", wanted or 0, degrees), ring),
            )


def row_length(facts: Facts, seq_len: int, key: str = "data.seq_len") -> Iterator[Problem]:
    """Yields what the layout and the model's positions ask of the tokens of a row, which `key`
    says; for the rules of a trainer.
    """
    layout, model = facts.config.layout, facts.model
    tp = layout.tp if layout.sp else 1
    if layout.cp > 1 and seq_len % (2 * layout.cp * tp):
        unit = 2 * layout.cp * tp
        sentence = f"{key} {seq_len} is not a multiple of 2 x layout.cp {layout.cp}"
        sentence += f" x layout.tp {tp} (layout.sp)" * (tp > 1)
        sentence += f" = {unit}: a context-parallel rank holds two equal chunks of each row."
        fits = [cp for cp in range(2, layout.cp) if seq_len % (2 * cp * tp) == 0] + [1] * (
            seq_len % tp == 0
        )
        fixes = nearest_fixes(key, seq_len, multiples(seq_len, unit)) + nearest_fixes(
            "layout.cp", layout.cp, fits
        )
        yield Problem("sequence", sentence, fixes)
    elif layout.sp and seq_len % layout.tp:
        sentence = (
            f"layout.sp splits {key} {seq_len} over layout.tp {layout.tp}, which does "
            "not divide it."
        )
        fixes = nearest_fixes(key, seq_len, multiples(seq_len, layout.tp))
        yield Problem("sequence", sentence, (*fixes, {"layout.sp": False}))
    grows = (
        model.positions == "rope" and model.rope_scaling == "dynamic"
    )  # made to go beyond its max_positions
    if seq_len > model.max_positions and not grows:
        sentence = f"{key} {seq_len} is greater than model.max_positions {model.max_positions}, "
        if model.positions == "learned":
            sentence += "and this model has one learned vector per position."
        else:
            sentence += (
                "which is what generation and an exported config.json would say that "
                "the model can read."
            )
        yield Problem(
            "positions", sentence, ({key: model.max_positions}, {"model.max_positions": seq_len})
        )


RULES = Rules(
    resolved={
        world: AXES,
        heads: ("layout.tp", "model.num_heads", "model.head_size"),
        widths: ("layout.tp", "model.ffn_hidden_size", "model.vocab_size"),
        layers: ("layout.pp", "layout.chunks", "model.num_layers"),
        schedule: ("layout.pp", "layout.chunks", "layout.group"),
        context: ("layout.tp", "layout.cp", "layout.cp_ulysses", "model.num_heads"),
    }
)
