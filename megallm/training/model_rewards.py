"""Rewards that models give: a reward model, and a language model that judges answers in words.

Both compute on the mesh of the policy, frozen, each data rank a share of the answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from megallm.base.errors import UsageError
from megallm.data.chat.config import ChatDataConfig
from megallm.data.chat.formats import Example
from megallm.data.chat.prepare import template_of
from megallm.data.chat.rows import RowMaker, RowRules
from megallm.data.chat.spans import Speaker
from megallm.data.chat.template import ChatTemplate, Renderer
from megallm.data.text.tokenizer import Tokenizer
from megallm.engine.engine import Engine
from megallm.inference.sampling import Sampling
from megallm.rewards.samples import Completion
from megallm.rewards.table import GIVEN, JUDGE_PROMPT, judged, resolved
from megallm.rewards.workers import build
from megallm.training.grpo_trainer import PolicyReference
from megallm.training.replies import talk_of
from megallm.training.reward_calls import Functions, FurtherReward, NoFunctions
from megallm.training.rl_config import GrpoConfig
from megallm.training.rollout import Codec
from megallm.training.scoring import OpenedFrozen, open_frozen, open_scorer, score


class Job(Protocol):
    """What a run tells of itself."""

    config: GrpoConfig

    def words(self) -> tuple[Tokenizer, ChatTemplate]: ...

    def frozen(self, engine: Engine, given: str | None, reader: str) -> PolicyReference: ...


def functions_of(config: GrpoConfig) -> Functions:
    """Returns the functions of `reward.functions`, those of models left out."""
    named = config.reward.functions
    kept = {spec: weight for spec, weight in named.items() if resolved(spec)[0] not in GIVEN}
    if not kept:
        return NoFunctions()
    return build(dataclasses.replace(config.reward, functions=kept))


def open_rewards(job: Job, engine: Engine) -> list[FurtherReward]:
    """Returns the rewards of models that `reward.functions` names, with their models loaded;
    collective over the world.

    Errors: UsageError for a folder without a model of that kind, DataError for one without a
    tokenizer.
    """
    config, made = job.config, []
    for spec, weight in config.reward.functions.items():
        target, options = resolved(spec)
        if target == "reward_model":
            scorer = open_scorer(config.reward_model.model, engine.mesh, config.train.precision)
            call = RewardModel(scorer, job.words()[0], config)
            call.check_length()
        elif target == "judge":
            given = {"template": config.judge.template or JUDGE_PROMPT} | options
            given = {"pattern": config.judge.pattern, "most": config.judge.most} | given
            call = judged(open_judge(job, engine), **given)
        else:
            continue
        made.append(FurtherReward(target, weight, call, config.reward.on_error))
    return made


@dataclass(frozen=True)
class RewardModel:
    """Scores answers with a model of `megallm reward`, or a *ForSequenceClassification.

    With the policy's tokenizer the ids are scored as they were sampled, with another one the text.
    Calls are collective over the world.
    """

    opened: OpenedFrozen
    words: Tokenizer  # the policy's
    config: GrpoConfig

    @property
    def _reads_ids(self) -> bool:
        return self.opened.words.fingerprint == self.words.fingerprint

    def check_length(self) -> None:
        """Errors: UsageError for a model with fewer learned positions than answers may need."""
        config, model = self.config, self.opened.engine.config.model
        longest = config.data.seq_len + config.sampling.max_new_tokens
        if self._reads_ids and model.positions == "learned" and longest > model.max_positions:
            raise UsageError(
                f"reward_model.model {config.reward_model.model} has {model.max_positions} "
                f"positions; data.seq_len {config.data.seq_len} and sampling.max_new_tokens "
                f"{config.sampling.max_new_tokens} need {longest}."
            )

    def __call__(self, samples: Sequence[Completion]) -> list[float]:
        if self._reads_ids:
            ids = [np.array([*one.prompt_ids, *one.completion_ids], np.int32) for one in samples]
        else:
            ids = self._written(samples)
        return score(self.opened.engine, ids, self.config.reward_model.batch)

    def _written(self, samples: Sequence[Completion]) -> list[np.ndarray]:
        """The answers as the reward model's own template and tokenizer write them."""
        opened, strings = self.opened, self.config.data.strings
        template, _ = template_of(ChatDataConfig(tokenizer=opened.spec), opened.words)
        ends = (*opened.words.special_texts, *template.stops, template.tokens.get("eos_token", ""))
        longest = opened.engine.config.model.max_positions
        with Renderer(template, self.config.data.template_date) as renderer:
            rules = RowRules("classification", "all", longest, "error")
            maker = RowMaker(opened.words, lambda: Speaker(renderer, ends), rules)
            made = []
            for one in samples:
                talk = talk_of({**one.columns, "prompt": one.prompt}, strings)
                answer = one.completion if isinstance(talk, str) else tuple(one.messages)
                said = talk if isinstance(talk, str) else tuple(talk)
                (row,) = maker.rows(Example(said, (answer,), label=0.0))
                made.append(row.sequence.ids)
        return made


class JudgeModel:
    """Answers prompts in words, greedily; calls are collective over the world."""

    def __init__(
        self, engine: PolicyReference, words: Tokenizer, template: ChatTemplate, config: GrpoConfig
    ) -> None:
        self.engine, self.words, self.template = engine, words, template
        self.config = config
        self.codec = Codec.of(words, template.stops)

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        limit = self.config.judge.max_new_tokens
        ids = self._ids(prompts)
        asked = [self.codec.request(number, one, limit) for number, one in enumerate(ids)]
        with self.engine() as engine, engine.generator(self.config.sampling.batch) as generator:
            made = generator.generate(engine.mine(asked), Sampling(limit, 0.0))
            told = engine.all([[one.tokens, one.reason] for one in made])
        return [self.codec.text(tokens, reason) for tokens, reason in told]

    def _ids(self, prompts: Sequence[str]) -> list[list[int]]:
        if self.template.built_in:
            begin = list(self.words.template[0])
            return [[*begin, *self.words.encode(text)] for text in prompts]
        with Renderer(self.template, self.config.data.template_date) as renderer:
            talks = [[{"role": "user", "content": text}] for text in prompts]
            texts = [renderer.texts(talk, [(1, True)])[0] for talk in talks]
        return [self.words.encode(text, special=True) for text in texts]


def open_judge(job: Job, engine: Engine) -> JudgeModel:
    """Returns the model of the section `judge`: its folder, or what the policy started from."""
    config = job.config
    if config.judge.model is None:
        words, template = job.words()
        return JudgeModel(job.frozen(engine, None, "judge.model null is"), words, template, config)
    opened = open_frozen(config.judge.model, engine.mesh, config.train.precision)
    template, _ = template_of(ChatDataConfig(tokenizer=opened.spec), opened.words)
    return JudgeModel(partial(nullcontext, opened.engine), opened.words, template, config)
