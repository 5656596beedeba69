"""Reinforcement learning without a critic: GRPO and its kin.

A step draws prompts, answers each of them `sampling.group` times with the weights as they are,
rewards the answers, and trains them in one or more updates. What it needs to go on is the state of
the stream of prompts and, where answers are used again, the replay buffer; a step that was ended in
between is made again, with the same answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megallm.base.errors import InternalError, UsageError
from megallm.base.rng import key_of, permutation
from megallm.data.chat.rows import PromptRow
from megallm.engine.engine import Engine, Part, StepStats
from megallm.losses.advantage import combine_rewards, informative, overlong_punishment
from megallm.losses.importance import importance_weights
from megallm.losses.kl import adapt_kl_coefficient
from megallm.losses.policy import Policy, first_update_fault, policy_loss
from megallm.optim.lr import learning_rate
from megallm.training.advantages import OF_ALGORITHM, Credit, advantages_of
from megallm.training.demonstrations import Demonstrations
from megallm.training.novelty import Novelty
from megallm.training.partial import PartialRollouts
from megallm.training.replay import ReplayBuffer
from megallm.training.responses import Batch, Response, ResponseRows
from megallm.training.rl_config import GrpoConfig, RlConfig
from megallm.training.rl_metrics import (
    Figures,
    Phases,
    differences,
    importance_metrics,
    length_metrics,
    mean,
    reward_metrics,
    update_metrics,
)
from megallm.training.rollout import Experience, Prompts, Rollouts
from megallm.training.shared_prefix import SAVING, sharing_of
from megallm.training.trainer import StepReport

TOLERANCE = {"fp32": 1e-4, "fp64": 1e-4}  # nats, in the first update of a rollout
COARSE = 0.1  # the same for narrower types
STALE = "rollout.stale"  # a negative control: the answers of the step before are taken for new ones

# The reference model: an engine inside a context.
PolicyReference = Callable[[], AbstractContextManager[Engine]]


def policy_loss_of(rl: RlConfig, max_new_tokens: int, temperature: float) -> Policy:
    """Returns the loss of an algorithm with what the configuration says otherwise. Errors:
    UsageError for a bound that the algorithm's others rule out.
    """
    given = {key: vars(rl)[key] for key in ("low", "high", "dual_clip", "opsm")}
    changes = {key: value for key, value in given.items() if value is not None}
    changes |= {"beta": rl.kl.loss, "kl": rl.kl.estimator, "entropy_coef": rl.entropy_coef}
    try:
        return policy_loss(
            rl.algorithm, length=max_new_tokens, temperature=temperature, **changes
        )
    except ValueError as error:
        raise UsageError(f"rl.algorithm {rl.algorithm}: {error}") from error


@dataclass(frozen=True)
class Feeds:
    """Where prompts come from: those to train on, what opens the held-out ones (None: there are
    none), what is told of each step's answers, and demonstrations to train beside them.
    """

    prompts: Prompts
    held_out: Callable[[], Prompts] | None = None
    tell: Callable[[int, Experience, Sequence[float]], None] = lambda step, drawn, rewards: None
    demonstrations: Demonstrations | None = None


class GrpoTrainer:
    """A step is a rollout and its updates; see `training.trainer.Trainer`.

    `ledger` is what a checkpoint remembers of the prompts: how many draws of them there were, and
    the coefficient of the KL divergence in the reward where it is steered. `reference` gives the
    reference model, None without one.
    """

    def __init__(
        self,
        config: GrpoConfig,
        rollouts: Rollouts,
        feeds: Feeds,
        reference: PolicyReference | None,
        ledger: Mapping[str, Any],
        identity: dict[str, Any],
    ) -> None:
        self.config, self.rollouts, self.feeds = config, rollouts, feeds
        self.engine, self.reference, self.identity = rollouts.engine, reference, identity
        sampling, rl, train = config.sampling, config.rl, config.train
        self.loss = policy_loss_of(rl, sampling.max_new_tokens, sampling.temperature)
        dtype = torch.float64 if train.precision == "fp64" else torch.float32
        multiple = 2 * config.layout.cp * config.layout.tp
        sharing = sharing_of(rl.shared_prefix, self.engine.config.model, "rl.shared_prefix")
        self.rows = ResponseRows(
            self.engine, train.micro_batch, multiple, rl.packing, dtype, sharing
        )
        self.buffer = ReplayBuffer(rl.replay.staleness, config.run.seed)
        self.partial = PartialRollouts(rollouts, sampling.partial)
        size, novelty = self.engine.config.model.hidden_size, rl.novelty
        self.novelty = Novelty(novelty, size, config.run.seed) if novelty.coefficient else None
        further = () if self.novelty is None else (self.novelty,)
        self.kept = (self.buffer, self.partial, *further)
        self.draws = int(ledger.get("draws", 0))
        self.coefficient = float(ledger.get("kl_coefficient", rl.kl.reward))
        self.entered: Callable[[int, str], None] = lambda step, name: None
        self._before: Experience | None = None  # of the negative control
        self._trained: list[Response] = []  # the answers of the last step

    # Steps

    def step(self, step: int) -> StepReport:
        """Train one step, numbered from 1."""
        phases, rl = Phases(partial(self.entered, step)), self.config.rl
        updates_before = self.engine.counters()["updates"]
        drawn, seen = self._draw(step, phases)
        fresh = drawn.answers
        again = self.buffer.take(step, rl.replay.prompts) if rl.replay.prompts else []
        with phases("score"):
            figures = self._score(fresh, again)
        credit = self._credit(drawn)
        figures |= self._penalty_metrics(credit)
        figures[SAVING] = self.rows.shape([*fresh, *again]).saved
        for answer, values in zip(fresh, self.advantages(credit, fresh), strict=True):
            answer.advantages = values
        lr = learning_rate(self.config.optim, step, self.config.train.steps)
        self._trained = [*fresh, *again]
        with phases("update"):
            stats = self._train(step, [*fresh, *again], lr, updates_before == 0)
        self.buffer.add(step, fresh)
        self._adapt(credit)
        self.feeds.tell(step, drawn, credit.totals.tolist())
        figures = self._rewards(seen) | update_metrics([each.metrics for each in stats]) | figures
        if self.feeds.demonstrations is not None:
            figures["rl/mu"] = self.feeds.demonstrations.weight(step)
        losses = [each.loss for each in stats]
        tokens = sum(len(each.prompt) + len(each.tokens) for each in seen.answers)
        return StepReport(
            replace(
                stats[-1],
                metrics={},
                skipped=any(each.skipped for each in stats),
                spiked=any(each.spiked for each in stats),
            ),
            lr,
            len(seen.answers),
            tokens,
            losses={"train/loss": sum(losses) / len(losses)},
            metrics=figures | phases.metrics(),
            data=self.ledger(),
            warnings=[("reward_failed", sentence) for sentence in seen.failures],
        )

    def advantages(self, credit: Credit, fresh: list[Response]) -> list[list[float]]:
        """Returns the advantage of each token of new answers."""
        rl = self.config.rl
        return advantages_of(credit, rl.advantage or OF_ALGORITHM.get(rl.algorithm, "group"))

    def update(self, step: int, chosen: list[Response], lr: float) -> StepStats:
        """Train one update from these answers."""
        shown = self.feeds.demonstrations
        beside = [] if shown is None else shown.draw()
        batches = self.rows.batches([*chosen, *beside])
        if self._recomputed:
            self._correct(batches)
        loss = self.loss if shown is None else shown.loss(self.loss, step)
        return self.engine.train_step(batches, loss, lr)

    def ledger(self) -> dict[str, Any]:
        """Returns what the ledger keeps of the prompts."""
        kept: dict[str, Any] = {
            "draws": self.draws,
            "stream": self.feeds.prompts.state_after(self.draws),
        }
        if self.config.rl.kl.target is not None:
            kept["kl_coefficient"] = self.coefficient
        if self.feeds.demonstrations is not None:
            kept["demonstrations"] = self.feeds.demonstrations.ledger()
        return kept

    def _draw(self, step: int, phases: Phases) -> tuple[Experience, Experience]:
        """Answers to train on, and all that were drawn for them: more where groups without a
        difference were replaced.
        """
        sampling, kept, seen = self.config.sampling, Experience(), Experience()
        if sampling.partial.tokens:
            drawn = self.partial.draw(step, self.config.prompts, self._fresh, phases)
            self._wonder(drawn, phases)
            return drawn, drawn
        wanted = self.config.prompts * sampling.group
        for number in range(1 + sampling.resample):
            self.draws += 1
            # What novelty has learned of the draw before cannot be given up.
            self.rollouts.may_stop = number == 0 or self.novelty is None
            drawn = self.rollouts.draw(step, self.draws, self.feeds.prompts, phases)
            self._wonder(drawn, phases)
            seen = seen.join(drawn)
            if not sampling.resample:
                kept = drawn
                break
            rewards = combine_rewards(drawn.table, self.rollouts.weights) + self._extra(drawn)
            useful = informative(rewards, [answer.group for answer in drawn.answers])
            kept = kept.join(drawn.select(np.flatnonzero(useful).tolist()))
            if len(kept.answers) >= wanted:
                kept = kept.select(range(wanted))
                break
        if STALE in self.engine.mesh.world.broken:
            kept, self._before = self._before or kept, kept
        return (kept if kept.answers else drawn), seen

    def _fresh(self) -> tuple[int, list[PromptRow]]:
        """The rows of the next draw, and the id of its first answer."""
        self.draws += 1
        rows = [row for _, row in self.feeds.prompts.examples(self.draws)]
        return (self.draws - 1) * len(rows) * self.config.sampling.group, rows

    @property
    def _recomputed(self) -> bool:
        """Whether ratios are formed with the trainer's log-probs, and weighed for the sampler's."""
        rl = self.config.rl
        return bool(rl.recompute or rl.replay.prompts or self.config.sampling.partial.tokens)

    def _wonder(self, drawn: Experience, phases: Phases) -> None:
        """Say how new answers are, if the run asks for it: rank 0 does, and tells the others."""
        novelty = self.novelty
        if novelty is None or not drawn.answers:
            return
        with phases("score"):
            features = self.rows.pooled(drawn.answers)
            told: Any = None
            if self.engine.mesh.rank == 0:
                told = [novelty(features).tolist(), novelty.error]
            values, error = self.engine.mesh.broadcast_json(told)
        for answer, value in zip(drawn.answers, values, strict=True):
            answer.novelty = value
        drawn.metrics |= {"novelty/reward": sum(values) / len(values), "novelty/error": error}

    def _extra(self, drawn: Experience) -> np.ndarray:
        """What is added to the rewards of functions, `[n]`."""
        rl, sizes = self.config.rl, [len(one.tokens) for one in drawn.answers]
        added = rl.novelty.coefficient * np.array([one.novelty for one in drawn.answers])
        if rl.overlong_cache:
            longest = self.config.sampling.max_new_tokens
            added = added + overlong_punishment(sizes, longest, rl.overlong_cache)
        return added

    def _score(self, fresh: list[Response], again: list[Response]) -> Figures:
        """Give answers the log-probs that a ratio is formed with, and the reference's."""
        temperature, figures = self.config.sampling.temperature, {}
        everything = [*fresh, *again]
        if self._recomputed:
            old = self.rows.scores(
                everything, lambda batches: self.engine.log_probs(batches, temperature)
            )
            now = self.engine.counters()["updates"]
            pairs = [one.compared(new, now) for one, new in zip(everything, old, strict=True)]
            figures = importance_metrics(pairs)
            same = [pair.same for pair in pairs if pair.same[0]]
            if same:
                figures |= differences(same)
                self._check_sampler(figures)
        else:
            old = [answer.log_probs for answer in everything]
        for answer, values in zip(everything, old, strict=True):
            answer.old = values
        if self.reference is not None:
            for answer, values in zip(everything, self._referred(everything), strict=True):
                answer.reference = values
        return figures

    def _referred(self, answers: list[Response]) -> list[list[float]]:
        """What the reference model says of each token."""

        def score(batches: list[Batch]) -> list[Tensor]:
            with self.reference() as engine:
                return engine.log_probs(batches, self.config.sampling.temperature)

        return self.rows.scores(answers, score)

    def _credit(self, drawn: Experience) -> Credit:
        penalties = None
        if self.config.rl.kl.reward > 0:
            penalties = [
                self.coefficient * np.subtract(one.log_probs, one.reference)
                for one in drawn.answers
            ]
        return Credit(
            drawn.table,
            np.array(self.rollouts.weights),
            self._extra(drawn),
            [one.group for one in drawn.answers],
            [len(one.tokens) for one in drawn.answers],
            penalties,
            [one.sampled for one in drawn.answers],
        )

    def _train(
        self, step: int, answers: list[Response], lr: float, reference_is_policy: bool
    ) -> list[StepStats]:
        """The updates of a step; the first one proves that the answers are this policy's."""
        rl, made = self.config.rl, []
        kept = [one for one in answers if not (rl.mask_truncated and one.truncated)]
        for chosen in self._minibatches(step, kept):
            stats = self.update(step, chosen, lr)
            if not made:
                self._check_first(step, stats, reference_is_policy)
            made.append(stats)
        return made

    def _minibatches(self, step: int, answers: list[Response]) -> Iterator[list[Response]]:
        """The answers of each update, mixed by the seed where there are several."""
        count = self.config.rl.updates
        for epoch in range(self.config.rl.epochs):
            if count == 1:
                yield answers
                continue
            order = permutation(key_of(self.config.run.seed, "update", step, epoch), len(answers))
            for chosen in np.array_split(order, count):
                yield [answers[i] for i in sorted(chosen.tolist())]

    def _correct(self, batches: list[Batch]) -> None:
        """Weigh answers of another policy than that of the step's beginning."""
        replay = self.config.rl.replay
        if replay.correction == "none":
            return
        for batch in batches:
            batch["importance_weights"] = importance_weights(
                batch["old_log_probs"],
                batch["rollout_log_probs"],
                batch,
                replay.correction,
                replay.low,
                replay.high,
            )

    def _adapt(self, credit: Credit) -> None:
        """Steer the coefficient of the divergence in the reward."""
        kl = self.config.rl.kl
        if kl.target is None or credit.penalties is None:
            return
        sums = [each.sum() for each in credit.penalties]
        measured = float(np.mean(sums)) / self.coefficient if self.coefficient else 0.0
        self.coefficient = adapt_kl_coefficient(
            self.coefficient, measured, kl.target, len(sums), kl.horizon
        )

    # What must hold

    @property
    def _tolerance(self) -> float:
        return TOLERANCE.get(self.config.train.precision, COARSE)

    def _check_first(self, step: int, stats: StepStats, reference_is_policy: bool) -> None:
        """Raises InternalError when the first update of a rollout does not find the policy that
        has sampled. Types narrower than fp32 are allowed what their rounding makes.
        """
        report = dict(stats.metrics)
        if self._tolerance == COARSE:
            report = {name: 0.0 if "clip" in name else x for name, x in report.items()}
            report["off_policy"] = 0.0
        own = self.config.rl.kl.reference is None and self.config.peft.begins_as_base
        fault = first_update_fault(report, reference_is_policy and own, self._tolerance)
        if fault is not None and stats.counts["ratio/mean"]:
            raise InternalError(f"Step {step}: {fault}")

    def _check_sampler(self, figures: Figures) -> None:
        """Raises InternalError when the trainer gives fresh answers other log-probs than the
        sampler.
        """
        worst = figures["sampling/sampling_logp_difference/mean"] or 0.0
        if worst > self._tolerance:
            raise InternalError(
                f"The trainer's log-probs of new answers differ from the sampler's by {worst:.2e} "
                "nats on the average: they do not compute with the same weights, tokens or "
                "temperature."
            )

    # What is told

    def _rewards(self, seen: Experience) -> Figures:
        answers = seen.answers
        totals = combine_rewards(seen.table, self.rollouts.weights) + self._extra(seen)
        groups = [one.group for one in answers]
        figures = seen.metrics | reward_metrics(self.rollouts.names, seen.table, totals, groups)
        figures |= length_metrics(
            [one.count for one in answers], [one.truncated for one in answers]
        )
        if self.config.sampling.resample:
            figures["rl/draws"] = len({*groups}) / self.config.prompts
        return figures

    def _penalty_metrics(self, credit: Credit) -> Figures:
        if credit.penalties is None or not self.coefficient:
            return {}
        kept = [x[list(s)] for x, s in zip(credit.penalties, credit.sampled, strict=True)]
        per_token = mean(np.concatenate(kept) / self.coefficient)
        return {"kl": per_token, "rl/kl": per_token, "rl/kl_coefficient": self.coefficient}

    def rows(self, step: int) -> list[dict[str, Any]]:
        """Returns the answers of the last step, of all ranks."""
        return [{"answer": one.id, "group": one.group} for one in self._trained]

    def evaluate(self) -> dict[str, float | None]:
        """Returns the mean reward of greedy answers to the held-out prompts; collective over the
        world.
        """
        if self.feeds.held_out is None or not self.config.eval.batches:
            return {}
        prompts, seen = self.feeds.held_out(), Experience()
        self.rollouts.may_stop = True
        for number in range(1, self.config.eval.batches + 1):
            rows = [row for _, row in prompts.examples(number)]
            if not rows:
                break
            samples = self.rollouts.play(rows, 0, 1, greedy=True)
            seen = seen.join(self.rollouts.scored(0, samples, rows, 1))
        totals = combine_rewards(seen.table, self.rollouts.weights)
        figures: dict[str, float | None] = {"val/reward": mean(totals)}
        for name, column in zip(self.rollouts.names, seen.table.T, strict=True):
            figures[f"val/rewards/{name}"] = mean(column)
        return figures

    # State

    def state(self) -> Iterator[Part]:
        """Yields what this rank owns of weights, optimizer state and the replay buffer."""
        yield from self.engine.parts()
        yield from self.kept_parts()

    def kept_parts(self) -> Iterator[Part]:
        """Yields what this rank keeps beside the engine, rank 0 alone: the parts of `kept`."""
        for each in self.kept if self.engine.mesh.rank == 0 else ():
            yield from each.state()

    def counters(self) -> dict[str, Any]:
        """Returns what belongs to the engine's state besides tensors."""
        return self.engine.counters()
