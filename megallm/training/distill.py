"""`megallm distill`: a student learns the distribution of a teacher (generalised knowledge
distillation, arXiv 2306.13649), on answers that were read, on its own, or on both by turns; or from
the reverse KL divergence as the reward of its own tokens (on-policy distillation).

A step on the student's own answers takes the prompts of its rows. Which steps these are, and what
they answer, follows from the seed and the weights, so that a step which was ended in between is
made again with the same answers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from megallm.base.errors import InternalError, UsageError
from megallm.base.rng import key_of, uniform
from megallm.data.batches import Share
from megallm.data.chat.rows import PromptRow
from megallm.data.loader import Batch, to_tensors
from megallm.engine.distillation import compare_with, hidden_states
from megallm.engine.engine import Engine, Loss, Mesh
from megallm.losses.distill import Distillation
from megallm.losses.policy import first_update_fault, policy_loss
from megallm.parallel.config import LayoutConfig
from megallm.peft.reference import off
from megallm.run.recorder import Recorder
from megallm.training.adapters import frozen_engine
from megallm.training.chat_run import ChatIdentity, ChatRun
from megallm.training.distill_config import DistillConfig
from megallm.training.held_out import HeldOut
from megallm.training.reference_run import NEUTRAL
from megallm.training.responses import Response, ResponseRows
from megallm.training.rl_config import SamplingConfig
from megallm.training.rollout import Codec, Rollouts
from megallm.training.supervised import Evaluation, SupervisedTrainer, run_supervised
from megallm.training.teacher_store import META, StoreMeta, TeacherStore, sequences_of, write_store
from megallm.training.trainer import Ledger, StepReport

REWARD = "reverse_kl_reward"
TOLERANCE = {"fp64": 1e-9, "fp32": 1e-4}  # nats of a first step; others compute in 8 or 11 bits
_TEACHER = ("model", "top_k", "tail")  # its layout may change
_OPTIONS = ("loss", "beta", "temperature", "nll", "max_new_tokens", "stop")


class DistillIdentity(ChatIdentity):
    """What a checkpoint of `megallm distill` remembers."""

    KIND = "distill"
    config: DistillConfig

    def own(self) -> dict[str, Any]:
        """Returns the teacher and the comparison besides."""
        config = self.config
        teacher = {key: vars(config.teacher)[key] for key in _TEACHER}
        teacher["kind"] = config.teacher_kind
        options = {key: vars(config.distill)[key] for key in _OPTIONS} | {"lmbda": config.on_policy}
        return super().own() | json.loads(json.dumps({"teacher": teacher, "distill": options}))


class DistillTrainer(SupervisedTrainer):
    """Trains a step on what was read, or on the student's own answers."""

    job: DistillRun
    figures: dict[str, float | None]

    def completed(self, step: int, batches: list[Batch]) -> list[Batch]:
        """Returns the microbatches of a step with what the teacher says of them."""
        job, share = self.job, self.config.on_policy
        own = uniform(key_of(self.config.run.seed, "on_policy", step), 0, 1)[0] < share
        self.figures = {"distill/on_policy": float(own)} if 0 < share < 1 else {}
        if not own:
            return job.complete(self.engine, batches)
        answers = job.answers(self.engine, step, batches)
        if answers:
            cut = [float(one.truncated) for one in answers]
            self.figures["completions/mean_length"] = fmean(len(one.tokens) for one in answers)
            self.figures["completions/clipped_ratio"] = fmean(cut)
        if self.config.distill.loss != REWARD:
            return job.complete(self.engine, job.response_rows(self.engine).batches(answers, {}))
        batches, divergence = job.rewarded(self.engine, answers)
        self.figures["distill/reverse_kl"] = divergence
        return batches

    def step(self, step: int) -> StepReport:
        """Train one step, numbered from 1. Errors: InternalError for a first step that shows
        another teacher than the student where they are the same model, and for answers that are not
        the student's.
        """
        report = super().step(step)
        reward = self.config.distill.loss == REWARD
        most = TOLERANCE.get(self.config.train.precision)
        if reward and most is not None and any(report.stats.counts.values()):
            fault = first_update_fault(dict(report.stats.metrics))
            if fault is not None:
                raise InternalError(f"Step {step}: {fault}")
        found = self.figures["distill/reverse_kl"] if reward else report.stats.losses["loss"]
        if step == 1 and self.job.begins_as_teacher and abs(found or 0.0) > (most or 0.1):
            raise InternalError(
                f"The first divergence is {found:.3g}; while the student is its teacher it must be "
                "0: teacher and student see other tokens, weights or temperatures. Please report "
                "this."
            )
        losses = dict(report.losses)
        if "nll" in report.stats.losses:
            losses["train/nll_loss"] = report.stats.losses["nll"]
        metrics = dict(report.metrics) | self.figures
        return dataclasses.replace(report, losses=losses, metrics=metrics)


class DistillRun(ChatRun):
    """Reads conversations; has a teacher, live or stored."""

    identity, trainer = DistillIdentity, DistillTrainer
    config: DistillConfig
    teacher: Engine | None = None  # live; the student's own engine where it is its base
    store: TeacherStore | None = None
    teacher_mesh: Mesh | None = None  # over the same ranks

    # The teacher

    def build(self, mesh: Mesh, found: Path | None) -> tuple[Engine, str]:
        """Returns the student's engine, and has the teacher ready; collective over the world."""
        # Before any engine makes groups of its own: then every rank has made as many.
        there = self._teacher_grid(mesh)
        self.teacher_mesh = mesh if there is None else Mesh.start(there.grid(), mesh.device)
        engine, begin = super().build(mesh, found)
        config, kind = self.config, self.config.teacher_kind
        if kind == "stored":
            self.open_store(mesh)
        else:
            self.teacher = engine if kind == "adapter_off" else self._teacher(mesh)
        beta = 1.0 if config.distill.loss == REWARD else config.distill.beta
        compare_with(engine, self.teacher, beta, config.teacher.tail)
        return engine, begin

    def _teacher_grid(self, mesh: Mesh) -> LayoutConfig | None:
        """The layout of a teacher that has another one. Errors: UsageError where the ranks do not
        make it.
        """
        given, world = self.config.teacher.layout, mesh.layout.world
        if not given:
            return None
        each = given.get("tp", 1) * given.get("pp", 1) * given.get("cp", 1)
        if world % each:
            raise UsageError(
                f"teacher.layout {dict(given)} takes a multiple of {each} ranks, and the student's "
                f"has {world}: choose sizes whose product divides {world}."
            )
        return LayoutConfig(**given, sp=given.get("tp", 1) > 1, dp=world // each)

    def _teacher(self, mesh: Mesh) -> Engine:
        config = self.config
        there = self._teacher_grid(mesh)
        if there is not None:
            config, mesh = dataclasses.replace(config, layout=there), self.teacher_mesh
        return frozen_engine(config, config.teacher.model, "teacher.model", mesh, False)

    @property
    def multiple(self) -> int:
        """Returns what the tokens of a row are a multiple of at the layouts of both."""
        other = self.config.teacher.layout
        theirs = 2 * other.get("tp", 1) * other.get("cp", 1)
        return math.lcm(super().multiple, theirs)

    def open_store(self, mesh: Mesh) -> None:
        """Open the store of the teacher's log-probs, and make it where there is none; collective
        over the world. Errors: CheckpointError, UsageError, DataError for one that does not fit.
        """
        folder = self._store_folder()
        there = mesh.broadcast_json((folder / META).is_file())
        if not there and self.config.teacher.model is not None:
            self.make_store(folder, mesh)
        self.store = TeacherStore(folder)
        for rows in (self.rows, self.held_out):
            if rows is not None:
                self.store.check(rows, self.config.distill.temperature)

    def _store_folder(self) -> Path:
        config = self.config
        if config.teacher.store is not None:
            return Path(config.teacher.store)
        given = (self.rows, self.held_out)
        keys = [one.key for rows in given if rows is not None for one in rows.sources.values()]
        said = [keys, config.teacher.model, config.teacher.top_k, config.distill.temperature]
        name = hashlib.blake2b(json.dumps(said).encode(), digest_size=16).hexdigest()
        return Path(config.run.dir) / "cache" / "teacher" / name

    def make_store(self, folder: Path, mesh: Mesh) -> None:
        """Write the teacher's log-probs of every row; collective over the world."""
        teacher, config = self._teacher(mesh), self.config
        meta = StoreMeta(
            tokenizer=self.rows.words.fingerprint,
            temperature=config.distill.temperature,
            top_k=config.teacher.top_k,
            vocab_size=teacher.config.model.vocab_size,
            teacher=str(config.teacher.model),
            parts=mesh.data.size,
        )
        write_store(folder, teacher, self._passes(mesh), meta)

    def _passes(self, mesh: Mesh) -> Iterator[list[Batch]]:
        """Every row once, as this data rank's microbatches."""
        train = self.config.train
        share = Share(train.global_batch, train.micro_batch, mesh.data.size, mesh.data.rank)
        for rows in (self.rows, self.held_out):
            if rows is None:
                continue
            evenly = {name: float(len(source)) for name, source in rows.sources.items()}
            reader = self.once(dataclasses.replace(rows, weights=evenly), share)
            for step in range(1, reader.steps() + 1):
                yield [to_tensors(arrays) for arrays in reader.batches(step)]

    def _as_teacher(self, engine: Engine) -> Any:
        """A context in which `teacher` is the teacher: where that is the student, without its
        adapters.
        """
        return off(engine) if self.teacher is engine else nullcontext()

    @property
    def begins_as_teacher(self) -> bool:
        """Whether student and teacher are the same model before the first update."""
        config, named = self.config, self.config.teacher.model
        fresh = config.peft.method in NEUTRAL and config.peft.adapter is None
        own = named is not None and named in (config.model.hf, config.model.init)
        own = own and config.peft.quantize == "none"  # the teacher that is named is not quantised
        return fresh and (own or config.teacher_kind == "adapter_off")

    # Losses and batches

    def loss(self) -> Loss:
        """Returns the divergence, or the policy gradient of the reward."""
        options = self.config.distill
        if options.loss == REWARD:
            return policy_loss("reinforce", temperature=options.temperature)
        return Distillation(options.nll, temperature=options.temperature)

    def complete(self, engine: Engine, batches: list[Batch]) -> list[Batch]:
        """Returns the microbatches with what the teacher says of each token that counts; collective
        over the world.
        """
        if self.store is not None:
            wide = torch.float64 if engine.model.dtype == torch.float64 else torch.float32
            return [batch | self.store.top(batch, wide) for batch in batches]
        with self._as_teacher(engine):
            return hidden_states(self.teacher, batches, engine)

    def response_rows(self, engine: Engine) -> ResponseRows:
        """Returns what lays the student's answers into microbatches."""
        train = self.config.train
        wide = torch.float64 if train.precision == "fp64" else torch.float32
        packing = self.config.data.packing
        return ResponseRows(engine, train.micro_batch, self.multiple, packing, wide)

    def answers(self, engine: Engine, step: int, batches: list[Batch]) -> list[Response]:
        """Returns the student's answers to the prompts of the rows of a step, each once, on every
        rank; collective over the world.
        """
        options, train = self.config.distill, self.config.train
        sampling = SamplingConfig(
            1, options.max_new_tokens, options.temperature, options.stop, options.batch
        )
        codec = Codec.of(self.rows.words, (*self.rows.template.stops, *options.stop))
        rollouts = Rollouts(engine, sampling, codec, None, self.config.run.seed)
        asked = [ids for batch in batches for ids in prompts_of(batch)]
        rows = [PromptRow(np.array(ids, np.int32), {}) for ids in engine.all(asked)]
        made = rollouts.sample(rows, (step - 1) * train.global_batch, 1)
        return [
            Response(
                one.id, one.id, step, one.prompt, one.tokens, one.log_probs, one.reason, one.version
            )
            for one in made
        ]

    def rewarded(self, engine: Engine, answers: list[Response]) -> tuple[list[Batch], float | None]:
        """Returns microbatches whose advantage of each token is what the teacher's log-probability
        of it is above the student's, and the mean of the opposite: an estimate of the reverse KL
        divergence in nats per token. Collective over the world.
        """
        temperature = self.config.distill.temperature

        def score(batches: list[Batch]) -> list[torch.Tensor]:
            with self._as_teacher(engine):
                return self.teacher.log_probs(batches, temperature)

        found = self.response_rows(self.teacher).scores(answers, score)
        for answer, theirs in zip(answers, found, strict=True):
            answer.old = answer.log_probs
            answer.advantages = np.subtract(theirs, answer.log_probs).tolist()
        every = [x for answer in answers for x in answer.advantages]
        rows = self.response_rows(engine)
        return rows.batches(answers), -fmean(every) if every else None

    def evaluation(self, engine: Engine, share: Share, ledger: Ledger) -> Evaluation:
        """Returns the divergence on held-out rows, as they were read."""
        if self.held_out is None:
            return super().evaluation(engine, share, ledger)
        loss = Distillation(self.config.distill.nll, temperature=self.config.distill.temperature)

        def opened() -> Any:
            return self.once(self.held_out, share)

        batches = min(self.config.eval.batches, opened().steps())
        return HeldOut(engine, loss, opened, batches, complete=self.complete)

    def show(self, recorder: Recorder) -> None:
        """Say who teaches, beside what was read."""
        given, share = self.config.teacher, self.config.on_policy
        who = given.model or given.store or "the student's base, without adapters"
        recorder.note(f"teacher: {who}, {self.config.teacher_kind}; on-policy steps: {share:.0%}")
        super().show(recorder)


def prompts_of(batch: Batch) -> Iterator[list[int]]:
    """Yields the ids before the first trained token of each sequence of a microbatch."""
    tokens = batch["tokens"].reshape(-1)
    length = batch["tokens"].shape[1]
    starts = batch["cu_seqlens"].tolist() if "cu_seqlens" in batch else None
    for _, places in sequences_of(batch):
        if len(places):
            first = int(places[0])
            begin = first - first % length
            if starts is not None:
                begin = max(start for start in starts if start <= first)
            yield tokens[begin : first + 1].tolist()


def run(
    config: DistillConfig,
    mesh: Mesh,
    resume: str,
    own_log: bool = False,
    allowed: Sequence[str] = (),
) -> None:
    """Train on a checked and resolved configuration; see `run_supervised`."""
    run_supervised(DistillRun(config), mesh, resume, own_log, allowed)
