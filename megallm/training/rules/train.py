"""Rules of the batch, of ZeRO and of the order in which gradients are summed. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from megallm.training.rules.nearest import divisors, multiples, nearest_fixes, power_of_two
from megallm.training.rules.problem import AXES, Facts, Problem, Rules


def batch(facts: Facts) -> Iterator[Problem]:
    """Yields a global batch that is not the same whole microbatches for every replica."""
    train, dp = facts.config.train, facts.dp
    unit = train.micro_batch * dp
    if not facts.dp_is_known:
        return
    if train.global_batch % unit:
        sentence = (
            f"train.global_batch {train.global_batch} is not a multiple of train.micro_batch "
        )
        sentence += (
            f"{train.micro_batch} x dp {dp} = {unit}: every replica runs the same "
            "number of whole microbatches."
        )
        fixes = nearest_fixes(
            "train.global_batch", train.global_batch, multiples(train.global_batch, unit)
        )
        if train.global_batch % dp == 0:
            fixes += nearest_fixes(
                "train.micro_batch", train.micro_batch, divisors(train.global_batch // dp)
            )
        yield Problem("batch", sentence, fixes)


def zero(facts: Facts) -> Iterator[Problem]:
    """Yields settings of ZeRO that its stage or the group does not have."""
    zero, group = facts.config.zero, facts.dp * facts.config.layout.cp
    size = zero.shard_size
    if zero.bf16_grads and (zero.stage == 0 or facts.config.train.determinism == "tree"):
        sentence = (
            "zero.bf16_grads is for the messages of zero.stage 1 to 3 without "
            "train.determinism tree."
        )
        yield Problem("zero", sentence, ({"zero.bf16_grads": False},))
    if size is not None and zero.stage == 0:
        sentence = f"zero.shard_size is {size}, but zero.stage 0 divides nothing."
        yield Problem("zero", sentence, ({"zero.shard_size": None},))
    elif size is not None and group % size:
        sentence = f"zero.shard_size {size} does not divide dp x cp = {group}."
        yield Problem("zero", sentence, nearest_fixes("zero.shard_size", size, divisors(group)))


def tree(facts: Facts) -> Iterator[Problem]:
    """Yields what has no one fixed order of summation."""
    config, dp = facts.config, facts.dp
    if config.train.determinism != "tree":
        return
    if config.zero.stage > 1:
        sentence = (
            "train.determinism tree keeps whole gradients, which zero.stage "
            f"{config.zero.stage} does not."
        )
        yield Problem("tree", sentence, ({"zero.stage": 1}, {"train.determinism": "none"}))
    cp = config.layout.cp
    if not power_of_two(cp):
        sentence = (
            f"train.determinism tree sums pairs of ranks, but layout.cp {cp} is not a power of two."
        )
        fixes = nearest_fixes("layout.cp", cp, [2**k for k in range(cp.bit_length() + 1)])
        yield Problem("tree", sentence, (*fixes, {"train.determinism": "none"}))
    micros = config.train.global_batch // config.train.micro_batch
    if facts.config.train.global_batch % (config.train.micro_batch * dp) == 0 and not power_of_two(
        micros
    ):
        sentence = (
            "train.determinism tree sums pairs of microbatches, but train.global_batch "
            "/ train.micro_batch is "
        )
        sentence += f"{micros}, which is not a power of two."
        sizes = [config.train.micro_batch * 2**k for k in range(40)]
        fixes = nearest_fixes(
            "train.global_batch",
            config.train.global_batch,
            [size for size in sizes if size % dp == 0],
        )
        yield Problem("tree", sentence, (*fixes, {"train.determinism": "none"}))
    if config.layout.schedule == "zb-v":
        sentence = (
            "train.determinism tree needs microbatches to end in order, which layout.schedule "
            "zb-v does not promise."
        )
        yield Problem(
            "tree",
            sentence,
            ({"layout.schedule": "1f1b", "layout.chunks": 1}, {"train.determinism": "none"}),
        )


RULES = Rules(
    resolved={
        zero: (*AXES, "zero.shard_size"),
        tree: (*AXES, "train.global_batch", "train.micro_batch"),
        batch: (*AXES, "train.global_batch", "train.micro_batch"),
    }
)
