"""Rules about teachers and what is learned from them. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megallm.base.errors import MegallmError
from megallm.data.text import tokenizer
from megallm.models.config import ModelConfig
from megallm.training.distill_config import DistillConfig
from megallm.training.rules import finetune
from megallm.training.rules.problem import Facts, Problem, Rules
from megallm.training.rules.ranges import COUNT, NOT_NEGATIVE, Range
from megallm.training.starting import tokenizer_of_model

AXES = ("tp", "pp", "cp", "ep")  # of teacher.layout; dp is what the number of ranks leaves
_SHARE = Range(low=0, high=1)


def model_from(source: str) -> ModelConfig:
    """Returns a model that starts from a Hugging Face, run or step folder."""
    hf = (Path(source) / "config.json").is_file()
    return ModelConfig(hf=source) if hf else ModelConfig(init=source)


def had_teacher(config: DistillConfig) -> Iterator[Problem]:
    """Yields a teacher that cannot be had."""
    given, kind, peft = config.teacher, config.teacher_kind, config.peft
    if kind == "adapter_off":
        if given.model is not None:
            sentence = "teacher.kind adapter_off is the student without adapters; teacher.model "
            yield Problem("teacher", f"{sentence}names another.", ({"teacher.kind": "live"},))
        elif peft.method == "none":
            sentence = "teacher.model is not given, and the student has no adapters to switch off: "
            sentence += "name the model to learn from."
            yield Problem("teacher", sentence, (), "teacher.model")
        elif peft.modules_to_save:
            sentence = "peft.modules_to_save trains parts of the base, which is the teacher here: "
            yield Problem("teacher", f"{sentence}name another teacher.model.")
    elif kind == "live" and given.model is None:
        yield Problem("teacher", "teacher.kind is live, but teacher.model is not given.")
    elif kind == "stored" and given.model is None and given.store is None:
        sentence = "teacher.kind is stored: give teacher.store, or the teacher.model to make it."
        yield Problem("teacher", sentence)
    unknown = [name for name in given.layout if name not in AXES]
    if unknown or any(size < 1 for size in given.layout.values()):
        sentence = f"teacher.layout is {dict(given.layout)}; it takes {', '.join(AXES)} with sizes "
        yield Problem("teacher", f"{sentence}of at least 1.", ({"teacher.layout": {}},))
    if given.layout and kind != "live":
        sentence = f"teacher.layout is not read where teacher.kind is {kind}; with --store it is "
        yield Problem("teacher", f"{sentence}the section layout.", ({"teacher.layout": {}},))
    if given.store is not None and kind != "stored":
        sentence = f"teacher.store is not read where teacher.kind is {kind}."
        yield Problem("teacher", sentence, ({"teacher.kind": "stored"}, {"teacher.store": None}))


def on_policy(config: DistillConfig) -> Iterator[Problem]:
    """Yields answers that this teacher cannot judge, and a loss that has no use for others."""
    options, share = config.distill, config.on_policy
    if config.teacher_kind == "stored" and share > 0:
        sentence = f"distill.lmbda {share:g}: of the student's own answers nothing is stored; only "
        fixes = ({"distill.lmbda": 0.0}, {"teacher.kind": "live"})
        yield Problem("on_policy", f"{sentence}a live teacher can judge them.", fixes)
    if options.loss == "reverse_kl_reward":
        if share < 1:
            sentence = "distill.loss reverse_kl_reward rewards the student's own answers, and "
            sentence += f"distill.lmbda is {share:g}."
            yield Problem("on_policy", sentence, ({"distill.lmbda": 1.0},))
        if options.nll:
            sentence = "distill.nll is the likelihood of labels that were read; reverse_kl_reward "
            yield Problem("nll", f"{sentence}reads none.", ({"distill.nll": 0.0},))
    if share > 0 and config.peft.dropout:
        sentence = f"peft.dropout {config.peft.dropout:g}: the student that is trained would be "
        sentence += "another one than that which has sampled."
        yield Problem("dropout", sentence, ({"peft.dropout": 0.0}, {"distill.lmbda": 0.0}))
    if config.peft.method in ("prompt", "p-tuning"):
        sentence = f"peft.method {config.peft.method} moves tokens to other places than those that "
        yield Problem("peft", f"{sentence}the teacher sees.", ({"peft.method": "prefix"},))


def same_tokenizer(config: DistillConfig) -> Iterator[Problem]:
    """Yields a teacher that speaks of other tokens than the student."""
    if config.teacher.model is None:
        return
    try:
        theirs = tokenizer_of_model(model_from(config.teacher.model))
        own = config.data.tokenizer or tokenizer_of_model(config.model)
        if theirs is None or own is None:
            return
        same = tokenizer.load(theirs).fingerprint == tokenizer.load(own).fingerprint
    except (MegallmError, OSError) as error:
        yield Problem("teacher", f"teacher.model {config.teacher.model} cannot be read: {error}")
        return
    if not same:
        sentence = f"The tokenizer of teacher.model {config.teacher.model} ({theirs}) is another "
        sentence += f"one than the student's ({own}): a divergence compares probabilities of the "
        sentence += "same tokens. Take a teacher of the same tokenizer."
        yield Problem("tokenizer", sentence)


def student(facts: Facts) -> Iterator[Problem]:
    """Yields a model that writes no text, or none that is long enough."""
    config, model = facts.config, facts.model
    if model.head != "lm" or not model.causal:
        sentence = "megallm distill trains language models: model.head lm, model.causal true."
        yield Problem("objective", sentence, ({"model.head": "lm", "model.causal": True},))
    longest = config.data.seq_len + config.distill.max_new_tokens
    if config.on_policy and longest > model.max_positions and model.positions == "learned":
        sentence = f"data.seq_len {config.data.seq_len} of the longest prompt and "
        sentence += f"distill.max_new_tokens {config.distill.max_new_tokens} need {longest} "
        sentence += f"positions; model.max_positions is {model.max_positions}."
        yield Problem("positions", sentence)


RULES = Rules(
    (*finetune.GIVEN, had_teacher, on_policy, same_tokenizer),
    finetune.RESOLVED | {student: ("model.head", "data.seq_len", "model.max_positions")},
    finetune.RANGES
    | {
        "teacher.top_k": COUNT,
        "distill.beta": _SHARE,
        "distill.lmbda": _SHARE,
        "distill.temperature": Range(above=0),
        "distill.nll": NOT_NEGATIVE,
        "distill.max_new_tokens": COUNT,
        "distill.batch": COUNT,
    },
    finetune.chat_inferred,
)
