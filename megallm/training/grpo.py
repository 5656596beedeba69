"""`megallm grpo`: what a run of reinforcement learning reads, keeps and shows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from megallm.base.errors import UsageError
from megallm.checkpoint.reader import CheckpointReader
from megallm.data.batches import Share
from megallm.data.chat.cache import content_hash
from megallm.data.chat.prepare import Prepared, files_of, prepare
from megallm.data.chat.reader import ChatReader, reader_of
from megallm.data.chat.template import ChatTemplate
from megallm.data.stream.samplelog import SampleLog, truncate_log
from megallm.data.text.tokenizer import Tokenizer
from megallm.engine.engine import Engine, Mesh, Part
from megallm.peft.reference import off
from megallm.run.phases import PhaseLine
from megallm.run.recorder import Recorder
from megallm.run.rows import read_rows
from megallm.run.runfolder import RunFolder
from megallm.training.adapters import frozen_engine
from megallm.training.chat_run import ChatIdentity, ChatRun
from megallm.training.collapse import CollapseMonitor
from megallm.training.demonstrations import Demonstrations
from megallm.training.grpo_trainer import Feeds, GrpoTrainer, PolicyReference
from megallm.training.loop import Loop
from megallm.training.model_rewards import functions_of, open_rewards
from megallm.training.reward_calls import RewardCaller
from megallm.training.rl_config import GrpoConfig
from megallm.training.rollout import Codec, Experience, Rollouts
from megallm.training.shared_prefix import SAVING, saving_said
from megallm.training.supervised import open_run
from megallm.training.trainer import StepReport
from megallm.training.turns import open_turns

ROLLOUTS = "rollouts.jsonl"  # of the run folder
SHOWN_CHARACTERS = 160


class GrpoIdentity(ChatIdentity):
    """What a checkpoint of `megallm grpo` remembers."""

    KIND = "grpo"
    config: GrpoConfig

    def own(self) -> dict[str, Any]:
        """Returns how prompts are read and how many are, how they are answered, and what answers
        earn.
        """
        sampling, reward = self.config.sampling, self.config.reward
        kept = {"group": sampling.group, "temperature": sampling.temperature}
        kept |= {"max_new_tokens": sampling.max_new_tokens, "prompts": self.config.prompts}
        own = super().own() | {"sampling": kept, "reward": {"functions": dict(reward.functions)}}
        turns, expert = self.config.turns, self.config.expert
        if turns.used:
            kept_turns = ("tools", "environment", "weight", "calls", "most", "tokens", "reply")
            own["turns"] = json.loads(json.dumps({key: vars(turns)[key] for key in kept_turns}))
        return own | ({"expert": {"mix": expert.mix, "phi": expert.phi}} if expert.sources else {})

    def of_files(self, folder: RunFolder) -> dict[str, Any]:
        """Returns the hash of each file that is trained on, demonstrations too."""
        made, shown = super().of_files(folder)["content"], files_of(self.config.expert.sources)
        return {"content": made | {name: content_hash(name) for name in shown}}


class GrpoRun(ChatRun):
    """Reads prompts; its engine answers them."""

    identity = GrpoIdentity
    config: GrpoConfig
    reference: PolicyReference | None = None
    found: Path | None = None  # the checkpoint that the run goes on from
    shown: Prepared | None = None  # demonstrations

    @property
    def trainer(self) -> type[PolicyTrainer]:
        """Returns what makes the steps."""
        return PolicyTrainer

    def build(self, mesh: Mesh, found: Path | None) -> tuple[Engine, str]:
        """Returns the policy's engine, and has the reference ready; collective over the world."""
        engine, begin = super().build(mesh, found)
        self.found = found
        if self.config.rl.kl.used:
            self.reference = self._reference(engine)
        return engine, begin

    def _reference(self, engine: Engine) -> PolicyReference:
        return self.frozen(engine, self.config.rl.kl.reference, "rl.kl compares with")

    def frozen(self, engine: Engine, given: str | None, reader: str) -> PolicyReference:
        """Returns the policy without its adapters, or a model of its own, whose weights are
        frozen: those of `given`, or with None those that the run started from. `reader` says in an
        error what reads it. Collective over the world.
        """
        config = self.config
        plain = config.peft.adapter is None and not config.peft.modules_to_save
        if given is None and self.base.adapted and plain:

            @contextmanager
            def without() -> Iterator[Engine]:
                with off(engine):
                    yield engine

            return without
        if given is None and config.model.hf is None and config.model.init is None:
            raise UsageError(
                f"{reader} the weights that the run started from, which nothing names: give "
                "model.hf, model.init, or a folder instead of null."
            )
        frozen = frozen_engine(config, given, "rl.kl.reference", engine.mesh)

        @contextmanager
        def apart() -> Iterator[Engine]:
            yield frozen

        return apart

    def _read(self) -> None:
        super()._read()
        config = self.config
        if config.expert.sources:
            self.shown = prepare(config.shown, "sft", Path(config.run.dir) / "cache")
            self.shown.check_vocabulary(config.model.vocab_size)

    def demonstrations(self, ledger: Mapping[str, Any]) -> Demonstrations | None:
        """Returns what is trained beside answers, all of a draw on every rank; None where there is
        nothing.
        """
        expert, known = self.config.expert, ledger.get("demonstrations") or {}
        if self.shown is None:
            return None
        share, first = Share(expert.batch, 1), int(known.get("draws", 0)) + 1
        return Demonstrations(
            expert, reader_of(self.shown, share, first, known.get("stream")), known
        )

    def rollouts(self, engine: Engine, scorer: RewardCaller) -> Rollouts:
        """Returns what answers prompts."""
        config = self.config
        stops = (*self.rows.template.stops, *config.sampling.stop)
        codec = Codec.of(self.rows.words, stops)
        return Rollouts(engine, config.sampling, codec, scorer, config.run.seed)

    def words(self) -> tuple[Tokenizer, ChatTemplate]:
        """Returns the policy's tokenizer and template."""
        return self.rows.words, self.rows.template

    def prompts(self, ledger: Mapping[str, Any]) -> ChatReader:
        """Returns the prompts that come next, all of a draw on every rank."""
        share, first = Share(self.config.prompts, 1), int(ledger.get("draws", 0)) + 1
        return reader_of(self.rows, share, first, ledger.get("stream"))

    def held_out_prompts(self) -> ChatReader:
        """Returns the held-out prompts, each once."""
        return reader_of(self.held_out, Share(self.config.prompts, 1), epochs=1)

    def parts(self, engine: Engine) -> Iterator[Part]:
        """Yields what this rank owns of a checkpoint."""
        return self.base.parts(engine)

    def next_command(self) -> str:
        """Returns the command that shows what the model has learned."""
        return f'megallm generate --model {Path(self.config.run.dir)} --prompt "..."'


class PolicyTrainer(GrpoTrainer):
    """The trainer of a run: its checkpoints hold what the run's adapters say, and its rows are
    watched for signs of collapse.
    """

    def __init__(self, job: GrpoRun, *args: Any) -> None:
        super().__init__(job.config, *args)
        self.job, self.monitor, self._told_saving = job, CollapseMonitor(), False
        self.note: Callable[[str], None] = lambda text: None

    def step(self, step: int) -> StepReport:
        """Train one step, numbered from 1."""
        report = super().step(step)
        row = {"step": step, **report.metrics}
        if not self._told_saving:
            self._told_saving = True
            self.note(saving_said("rl", self.config.rl.shared_prefix, row[SAVING]))
        if step % self.config.log.every == 0:
            self.note(_told(row))
        warnings = (*report.warnings, *self.monitor.see(row))
        return dataclasses.replace(report, warnings=warnings)

    def evaluate(self) -> dict[str, float | None]:
        """Returns the held-out rewards, and tells them; collective over the world."""
        figures = super().evaluate()
        if figures.get("val/reward") is not None:
            self.note(f"  held out: greedy reward {figures['val/reward']:.4g}")
        return figures

    def state(self) -> Iterator[Part]:
        """Yields what this rank owns of the state."""
        yield from self.job.parts(self.engine)
        yield from self.kept_parts()


class RolloutLog:
    """RUN/rollouts.jsonl, one line an answer, and some of them for a person; rank 0 only.

    Lines of steps after `step`, which a run that was killed has left, are removed first.
    """

    def __init__(
        self, config: GrpoConfig, names: Sequence[str], recorder: Recorder, step: int
    ) -> None:
        self.config, self.names, self.recorder = config, names, recorder
        path = Path(config.run.dir) / ROLLOUTS
        truncate_log(path, step)
        self.lines = SampleLog(path)

    def __call__(self, step: int, drawn: Experience, rewards: Sequence[float]) -> None:
        """Write the answers of a step."""
        rows = []
        for i, answer in enumerate(drawn.answers):
            parts = [None if x != x else float(x) for x in drawn.table[i]]
            rows.append(
                {
                    "step": step,
                    "id": answer.id,
                    "prompt": drawn.columns[i].get("prompt"),
                    "answer": drawn.texts[i],
                    "tokens": answer.count,
                    "reason": answer.reason,
                    "rewards": dict(zip(self.names, parts, strict=True)),
                    "reward": None if rewards[i] != rewards[i] else rewards[i],
                    "advantage": answer.advantages[0],
                    "version": answer.version,
                    **drawn.extras[i],
                }
            )
        self.lines.append(rows, self.config.checkpoint.may_follow(step))
        if step % self.config.log.every == 0:
            for row in rows[: self.config.rl.show]:
                self.recorder.note(_shown(row))


def _told(row: Mapping[str, Any]) -> str:
    """The figures of a step that say how it goes, in one line."""
    names = {
        "reward": "reward",
        "frac_reward_zero_std": "same",
        "entropy": "entropy",
        "kl": "kl",
        "completions/mean_length": "tokens",
        "completions/clipped_ratio": "cut",
    }
    told = [f"{said} {row[name]:.3g}" for name, said in names.items() if row.get(name) is not None]
    return " | ".join([f"  step {row['step']}", *told])


def _shown(row: Mapping[str, Any]) -> str:
    """One answer in one line."""
    parts = ", ".join(f"{name} {value}" for name, value in row["rewards"].items())
    prompt, answer = (
        text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
        for text in (
            json.dumps(row["prompt"], ensure_ascii=False),
            json.dumps(row["answer"], ensure_ascii=False),
        )
    )
    return f"  {prompt} -> {answer} | {parts} | advantage {row['advantage']:+.2f}"


def run_policy(
    job: GrpoRun, mesh: Mesh, resume: str, own_log: bool = False, allowed: Sequence[str] = ()
) -> None:
    """Train a policy on rewards; collective over the world. See `open_run`."""
    config = job.config
    with open_run(job, mesh, resume, own_log, allowed) as opened, ExitStack() as stack:
        turns = stack.enter_context(open_turns(config, mesh, job.rows))
        further = [*turns.rewards, *open_rewards(job, opened.engine)]
        scorer = stack.enter_context(RewardCaller(mesh, lambda: functions_of(config), further))
        rollouts, ledger = job.rollouts(opened.engine, scorer), opened.ledger
        if config.turns.used:
            rollouts.let_reply(turns.replies, config.turns.tokens)
        tell: dict[str, Any] = {}
        if mesh.rank == 0:
            log = RolloutLog(config, rollouts.names, opened.recorder, ledger.step)
            stack.enter_context(log.lines)
            tell["tell"] = log
        held_out = None if job.held_out is None else job.held_out_prompts
        beside = job.demonstrations(ledger.data)
        feeds = Feeds(job.prompts(ledger.data), held_out, demonstrations=beside, **tell)
        identity = opened.identity.values | job.meta
        trainer = job.trainer(job, rollouts, feeds, job.reference, ledger.data, identity)
        trainer.note = opened.recorder.note
        if mesh.rank == 0:
            watch = PhaseLine(opened.recorder.progress, config.train.steps)
            trainer.entered = watch.enter
            rollouts.show(watch)
        if job.found is not None:
            with CheckpointReader(job.found) as reader:
                for kept in trainer.kept:
                    kept.load(reader)
            for row in read_rows(opened.recorder.folder.metrics) if mesh.rank == 0 else ():
                list(trainer.monitor.see(row))
        Loop(trainer, config, ledger, opened.recorder, opened.requests).run()
        job.finish(opened.engine)


def run(
    config: GrpoConfig,
    mesh: Mesh,
    resume: str,
    own_log: bool = False,
    allowed: Sequence[str] = (),
) -> None:
    """Train on a checked and resolved configuration; see `run_policy`."""
    run_policy(GrpoRun(config), mesh, resume, own_log, allowed)
