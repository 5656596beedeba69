"""Every verb of `megallm`, and the module that holds it. A module is imported only when its verb is
called.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """What a verb's module exports: how its arguments are declared, and what it does (the exit code
    comes back).
    """

    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


@dataclass(frozen=True)
class Verb:
    """One row of `megallm --help`. The module has `COMMANDS[words]`.

    kept: of a verb that may take long, what an interruption leaves and how to go on; such a verb is
    supervised.
    """

    words: str
    module: str
    help: str
    kept: str = ""


_ROWS = (
    ("preprocess", "data", "turn raw text into an indexed dataset (.bin/.idx)"),
    ("tokenizer train", "data", "train a byte-level BPE tokenizer on raw text"),
    ("data verify", "data", "check every byte and token of an indexed dataset"),
    ("data show", "data", "print documents of an indexed dataset"),
    ("data merge", "data", "join indexed datasets"),
    ("data split", "data", "divide an indexed dataset by documents"),
    ("data stats", "data", "lengths, packing and most frequent tokens of an indexed dataset"),
    ("data stream", "stream", "print which documents a run reads at which step"),
    ("data trace", "stream", "name the documents, and the raw lines, behind one row of a step"),
    (
        "curate",
        "curate",
        "clean raw text: language, quality, duplicates, personal data; with a ledger and a report",
    ),
    ("curate train-classifier", "curate", "train a quality classifier on good and bad documents"),
    ("curate train-lm", "curate", "train a Kneser-Ney n-gram model for the perplexity step"),
    (
        "synth",
        "curate",
        "write synthetic tasks with known answers: arithmetic, code with tests, templates",
    ),
    (
        "pretrain",
        "train",
        "train a language model from a configuration, or from a folder of text",
    ),
    ("sft", "train", "fine-tune a model on conversations: all of it, or adapters such as LoRA"),
    ("reward", "train", "train a reward model on pairs of answers"),
    ("dpo", "train", "train on pairs of answers: DPO and its kin, ORPO, SimPO, CPO"),
    ("kto", "train", "train on single answers that are good or bad"),
    ("offline", "train", "learn from answers with rewards, sampling none: RAFT, AWR, ILQL, ..."),
    ("grpo", "train", "train a model on rewards of its own answers: GRPO, DAPO, RLOO, GSPO, ..."),
    ("ppo", "train", "train a model on rewards of its own answers, with a critic: PPO"),
    (
        "launch",
        "launch",
        "run a verb that trains, and start it again after crashes and hangs; --slurm: as a job",
    ),
    ("profile", "profile", "run some steps of a configuration and say where their time goes"),
    ("watch", "report", "show a run on the terminal, while it goes on or after"),
    ("report", "report", "write a page about a run: curves, goodput, incidents, samples"),
    (
        "distill",
        "train",
        "train a student on a teacher's distribution, on its own answers or on given ones",
    ),
    (
        "replay",
        "replay",
        "run the batch of a step that was not finite again, on the CPU, and name the layer",
    ),
    ("score", "score", "write the reward of each row of a file"),
    ("rewards try", "rewards", "call reward functions on rows of a file, as training would"),
    ("rewards list", "rewards", "list the rewards that have a name, and the accepted signatures"),
    ("presets", "presets", "list the model sizes that model.preset names"),
    ("config", "config", "check a configuration and print it resolved, or its schema"),
    ("generate", "generate", "continue prompts with a trained model"),
    ("chat", "chat", "talk to a trained model"),
    ("convert", "convert", "convert between checkpoints and Hugging Face folders"),
    ("merge", "merge", "merge an adapter of PEFT's into its base: a full Hugging Face folder"),
    ("ckpt ls", "ckpt", "list the checkpoints of a run"),
    ("ckpt show", "ckpt", "print what a checkpoint holds"),
    ("ckpt verify", "ckpt", "read every byte of a checkpoint and compare its hashes"),
    ("ckpt diff", "ckpt", "compare two checkpoints bit by bit"),
    ("ckpt pin", "ckpt", "keep a checkpoint whatever checkpoint.keep says"),
    ("ckpt unpin", "ckpt", "let a pinned checkpoint go when it is old"),
    ("ckpt reshard", "ckpt", "write a checkpoint as the ranks of another layout would"),
    ("ckpt dump", "ckpt", "write a checkpoint's logical tensors to one safetensors file"),
    ("ckpt upcycle", "ckpt", "make a mixture of experts of a dense checkpoint"),
    ("schedule", "schedule", "print, draw or trace what each pipeline rank does when"),
    ("oracle", "oracle", "compare parallel layouts with an independent reference in float64"),
    ("completion", "completion", "print the completion script of a shell: bash, zsh or fish"),
    ("doctor", "doctor", "show versions, the extension, optional libraries and a check of gloo"),
)
_NOTHING = "nothing was written: the same command begins again."
_PARTIAL = (
    "what is done stays in OUTPUT.partial: the same command goes on from there (a pipe is read "
    "from its start)."
)
_WORK = (
    "the shards that are done stay in OUTPUT/work: the same command, without --overwrite, goes on "
    "from there."
)
KEPT = {
    "preprocess": _PARTIAL, "tokenizer train": _NOTHING, "data verify": "nothing was found to be "
                                                                        "wrong so far.",
    "data merge": _NOTHING, "data split": _NOTHING, "data stats": _NOTHING, "data stream": _NOTHING, "curate": _WORK,
    "curate train-classifier": _NOTHING, "curate train-lm": _NOTHING, "synth": _NOTHING, "convert": _NOTHING,
    "merge": _NOTHING, "ckpt reshard": _NOTHING,
    "ckpt verify": "nothing was found to be wrong so far.", "ckpt diff": _NOTHING, "ckpt dump": _NOTHING,
    "ckpt upcycle": _NOTHING, "generate": _NOTHING, "score": _NOTHING, "oracle": "the rows above are done; --json "
                                                              "was not written.",
}  # fmt: skip
VERBS = {
    words: Verb(words, f"megallm.cli.{module}", text, KEPT.get(words, ""))
    for words, module, text in _ROWS
}
TRAINING = tuple(words for words, module, _ in _ROWS if module == "train")  # verbs that start ranks
