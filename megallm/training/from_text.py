"""From a folder of text to a configuration that trains on it: tokenizer, tokens and sizes that fit.
No torch.

`prepare_run` is what `megallm pretrain --text` does before it trains. Everything lies in
RUN/from_text: the tokenizer, the indexed dataset, `config.yaml`, and `choices.json`, by which the
same command finds all of it again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megallm.base import files, suggest
from megallm.base.errors import DataError, UsageError
from megallm.data.text import preprocess, readers, textfile, tokenizer
from megallm.models.config import ModelConfig
from megallm.models.presets import PRESETS

TINY = "tiny"  # stands for the tiny preset that fits the amount of text
TINY_FROM_BYTES = {"tiny-1m": 0, "tiny-7m": 4 << 20, "tiny-15m": 40 << 20, "tiny-42m": 200 << 20}
RATES = {
    "tiny-1m": 3e-3,
    "tiny-7m": 2e-3,
    "tiny-15m": 1.5e-3,
    "tiny-42m": 1e-3,
}  # of others: the rule's default
PLAIN = (".txt", ".text", ".md")
OTHERS = (".jsonl", ".json", ".parquet")
PACKED = textfile.SUFFIXES
SUFFIXES = (
    *PLAIN,
    *OTHERS,
    *(f"{suffix}{packed}" for suffix in (*PLAIN, ".jsonl", ".json") for packed in PACKED),
)
ENOUGH_FILES, ENOUGH_DOCUMENTS = 100, 20
SAMPLE_BYTES, PIECE_CHARACTERS = (
    8 << 20,
    1 << 16,
)  # what the tokenizer is trained on: its memory is about 80 times that
MAX_VOCABULARY = 32_000
EPOCHS, TOKENS_PER_PARAMETER = (
    5,
    20,
)  # train on each token so often, or as long as the Chinchilla rule says
FEWEST_STEPS, MOST_STEPS = 100, {"cpu": 1_000, "gpu": 20_000}
SCHEMA = 1
CHOICES = "choices.json"


@dataclass(frozen=True)
class Survey:
    """What a folder holds: its files, and how many documents they make by each way of splitting
    plain text.
    """

    files: tuple[str, ...]
    size_bytes: int
    documents: dict[str, int]

    def split_text(self) -> str:
        """Returns what makes a document: a file where there are many; else a paragraph, else a
        line; else what makes most of them.
        """
        wanted = {"file": ENOUGH_FILES, "paragraphs": ENOUGH_DOCUMENTS, "lines": ENOUGH_DOCUMENTS}
        enough = [way for way, least in wanted.items() if self.documents[way] >= least]
        return enough[0] if enough else max(self.documents, key=lambda way: self.documents[way])


@dataclass(frozen=True)
class Machine:
    """What training will run on."""

    cores: int
    gpus: int

    @property
    def ranks(self) -> int:
        """Data-parallel ranks: one a GPU, else one for two cores; a power of two, at most 8."""
        return 1 << (min(8, max(1, self.gpus or self.cores // 2)).bit_length() - 1)


@dataclass(frozen=True)
class FromTextRequest:
    """The command: which text, which preset, where the run lives, on what machine."""

    text: str
    preset: str
    run_dir: str
    machine: Machine

    @property
    def folder(self) -> Path:
        return Path(self.run_dir).expanduser() / "from_text"

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"


def default_run(text: str) -> str:
    """Returns the run folder of a text: runs/ and its name."""
    return f"runs/{Path(text).resolve().name.partition('.')[0] or 'text'}"


def check_preset(name: str) -> None:
    """Errors: `UsageError` for a preset that is not there, or that does not predict the next
    token.
    """
    if name != TINY and name not in PRESETS:
        hint = suggest.did_you_mean(name, [TINY, *PRESETS])
        raise UsageError(
            f"--preset '{name}' is unknown.{hint} `megallm presets` lists them; {TINY} fits the "
            "text."
        )
    if name != TINY and not ModelConfig(preset=name).resolve().causal:
        raise UsageError(
            f"--preset {name} learns hidden tokens, --text the next one: see docs/encoders.md."
        )


def is_prepared(request: FromTextRequest) -> bool:
    """Returns whether the same text was prepared for the same preset.

    Errors: `UsageError` when the run folder belongs to another text or preset, `DataError` without
    any text.
    """
    path = request.folder / CHOICES
    if not request.folder.exists():
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        state, made_for = found["state"], found["made_for"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{request.folder} was not made by `megallm pretrain --text`: choose another run.dir."
        ) from error
    if state != "ready":
        return False
    wanted = _identity(request)
    different = [key for key, value in wanted.items() if made_for.get(key) != value]
    if different:
        what = {
            "preset": "--preset",
            "files": "the text (files, their sizes or times)",
            "schema": "the format",
        }
        raise UsageError(
            f"{request.run_dir} was made from another command: "
            f"{', '.join(what[key] for key in different)} changed. Choose another run.dir, such as "
            f"run.dir={request.run_dir}-2, or remove that folder to start anew."
        )
    return True


def prepare_run(
    request: FromTextRequest,
    say: Callable[[str], None],
    progress: Callable[[preprocess.Stats], None] | None = None,
) -> dict[str, Any]:
    """Make tokenizer, dataset and configuration in `request.folder`; returns the choices that were
    made.

    Errors: `DataError` for the text, `UsageError`, `CannotWrite`. What an interrupted one left is
    made anew.
    """
    check_preset(request.preset)
    folder, marker = request.folder, request.folder / CHOICES
    survey = look(request.text)
    made_for = _identity(request)
    _begin(folder, {"state": "preparing", "made_for": made_for})
    split_text = survey.split_text()
    preset = _fitting(survey.size_bytes) if request.preset == TINY else request.preset
    documents = survey.documents[split_text]
    say(
        f"text: {len(survey.files):,} files, {survey.size_bytes / 1e6:.1f} MB, {documents:,} "
        f"documents ({'a file each' if split_text == 'file' else split_text}); preset {preset}"
    )
    vocab_size = _train_tokenizer(request, survey, split_text, preset)
    say(f"tokenizer: byte-level BPE of {vocab_size:,} tokens, {folder / 'tokenizer'}")
    done = preprocess.run(
        preprocess.PreprocessConfig(
            survey.files,
            str(folder / "data"),
            str(folder / "tokenizer"),
            append_eod=True,
            split_text=split_text,
        ),
        progress,
    )
    tokens, prefix = done.tokens["text"], done.outputs["text"]
    say(f"tokens: {tokens:,} in {done.documents:,} documents, {prefix}.bin")
    config = choose_settings(request, preset, vocab_size, Text(prefix, tokens, done.documents))
    written = yaml.safe_dump(config, sort_keys=False)
    files.atomic_write_text(request.config, f"# Made by `megallm pretrain --text`.\n{written}")
    chosen = {
        "preset": preset,
        "split_text": split_text,
        "vocab_size": vocab_size,
        "tokens": tokens,
    }
    files.atomic_write_json(marker, {"state": "ready", "made_for": made_for, "chosen": chosen})
    return chosen


def _begin(folder: Path, state: dict[str, Any]) -> None:
    """An empty folder but for its choices.json, by which it is ours at every moment: whoever ends
    us may come again.
    """
    with files.writing(folder):
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with files.atomic_path(folder) as temporary:
                temporary.mkdir()
                files.atomic_write_json(temporary / CHOICES, state)
            return
        files.atomic_write_json(folder / CHOICES, state)  # `is_prepared` has seen that it is ours
        for path in folder.iterdir():
            if path.name == CHOICES:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def find_files(text: str) -> tuple[str, ...]:
    """Returns the text files of a folder (hidden ones aside) in order, or the one file. Errors:
    `DataError` without any.
    """
    path = Path(text)
    if path.is_file():
        return (text,)
    if path.exists() and not path.is_dir():
        raise DataError(
            f"--text {text} is a pipe or device, but the text is read more than once: write it to "
            "a file."
        )
    if not path.is_dir():
        raise DataError(f"--text {text} does not exist: give a folder of text files, or one file.")
    found = sorted(
        str(one)
        for one in path.rglob("*")
        if one.is_file() and not any(part.startswith(".") for part in one.relative_to(path).parts)
    )
    usable = tuple(name for name in found if name.lower().endswith(SUFFIXES))
    if not usable:
        has = (
            f"It has {len(found)} other files, such as {Path(found[0]).name}."
            if found
            else "It is empty."
        )
        raise DataError(
            f"--text {text} holds no text file: no name ends in {', '.join((*PLAIN, *OTHERS))}, "
            f"or in these with {', '.join(PACKED)}. {has}"
        )
    return usable


def look(text: str) -> Survey:
    """Read every file once. Errors: `DataError` `file:line: reason` for what cannot be read."""
    names = find_files(text)
    counts, options = (
        {"file": 0, "paragraphs": 0, "lines": 0},
        readers.ReadOptions(split_text="paragraphs"),
    )
    readers.check_inputs(names)
    for name in names:
        paragraphs = lines = 0
        for one in _parsed(name, options, text):
            paragraphs += len(one.documents)
            lines += sum(
                bool(row.strip()) for _, texts in one.documents for row in texts[0].split("\n")
            )
        plain = readers.suffix_of(name) in PLAIN
        counts["paragraphs"] += paragraphs
        counts["file"] += min(1, paragraphs) if plain else paragraphs
        counts["lines"] += lines if plain else paragraphs
    if not counts["lines"]:
        raise DataError(f"--text {text}: {len(names)} files without any text.")
    return Survey(names, sum(map(os.path.getsize, names)), counts)


def _parsed(name: str, options: readers.ReadOptions, text: str) -> Iterator[readers.Parsed]:
    """The documents of a file, chunk by chunk. Errors: `DataError` for the first that cannot be
    used.
    """
    first = 1
    for chunk in readers.chunks(name, options):
        parsed = readers.parse_chunk(chunk, options)
        for line, reason in parsed.rejects:
            raise DataError(
                f"{name}:{first + line}: {reason}. Mend the file, or move it out of {text}."
            )
        first += parsed.lines
        yield parsed


def _fitting(size_bytes: int) -> str:
    """The tiny preset for so much text."""
    return [name for name, least in TINY_FROM_BYTES.items() if size_bytes >= least][-1]


def _train_tokenizer(request: FromTextRequest, survey: Survey, split_text: str, preset: str) -> int:
    """Train on an even sample of the documents, at most SAMPLE_BYTES of them; returns the size of
    the vocabulary.
    """
    sample, every = request.folder / "sample.jsonl", max(1, -(-survey.size_bytes // SAMPLE_BYTES))
    options = readers.ReadOptions(split_text=split_text)
    pieces = (
        texts[0][begin : begin + PIECE_CHARACTERS]
        for name in survey.files
        for parsed in _parsed(name, options, request.text)
        for _, texts in parsed.documents
        for begin in range(0, len(texts[0]), PIECE_CHARACTERS)
    )
    with files.writing(sample), sample.open("w", encoding="utf-8") as file:
        for number, piece in enumerate(pieces):
            if number % every == 0:
                file.write(json.dumps({"text": piece}) + "\n")
    wanted = min(PRESETS[preset]["vocab_size"], MAX_VOCABULARY)
    done = tokenizer.train_bpe([str(sample)], wanted, str(request.folder / "tokenizer"))
    sample.unlink()
    return done["vocab_size"]


@dataclass(frozen=True)
class Text:
    """The indexed dataset that was made."""

    prefix: str
    tokens: int
    documents: int


def choose_settings(request: FromTextRequest, preset: str, vocab_size: int, text: Text) -> dict[str, Any]:
    """Returns the configuration: how long, how much at once, how much is held out. Plain values of
    YAML.
    """
    gpu = request.machine.gpus > 0
    seq_len, global_batch = (512, 64) if gpu else (256, 16)
    model = ModelConfig(preset=preset, vocab_size=vocab_size).resolve()
    seq_len = min(seq_len, model.max_positions)
    split, batches = _held_out(text, seq_len * global_batch)
    wanted = min(EPOCHS * text.tokens, TOKENS_PER_PARAMETER * model.num_params())
    steps = min(
        max(FEWEST_STEPS, wanted // (seq_len * global_batch)), MOST_STEPS["gpu" if gpu else "cpu"]
    )
    rate = RATES.get(preset)
    rates = {} if rate is None else {"lr": rate, "min_lr": float(f"{rate / 10:g}")}
    return {
        "run": {"dir": request.run_dir},
        "model": {"preset": preset, "vocab_size": vocab_size},
        "layout": {"dp": request.machine.ranks},
        "data": {
            "sources": {text.prefix: 1.0}, "tokenizer": str(request.folder / "tokenizer"), "split": split,
            "seq_len": seq_len,
        },
        "train": {
            "steps": steps, "global_batch": global_batch, "micro_batch": global_batch // request.machine.ranks,
            "precision": "bf16" if gpu else "fp32",
        },
        "optim": rates | {"warmup_steps": max(10, steps // 20)},
        "eval": {"every": steps // 5 if batches else 0, "batches": batches},
        "checkpoint": {"every": max(50, steps // 10), "keep": 2},
        "log": {"every": max(1, steps // 50)},
    }  # fmt: skip


def _held_out(text: Text, batch_tokens: int) -> tuple[str, int]:
    """(data.split, eval.batches): a twentieth of the documents, of few documents one, of a single
    one nothing.
    """
    if text.documents < 2:
        return "1,0,0", 0
    held = max(1, round(0.05 * text.documents))
    tokens = text.tokens * held // text.documents
    return f"{text.documents - held},{held},0", min(16, max(1, tokens // batch_tokens))


def _identity(request: FromTextRequest) -> dict[str, Any]:
    """What decides the preparation: the files with their sizes and times, and the preset."""
    names = find_files(request.text)
    found = [(os.path.relpath(name, request.text), os.stat(name)) for name in names]
    listed = [[name, status.st_size, status.st_mtime_ns] for name, status in found]
    return {"schema": SCHEMA, "preset": request.preset, "files": listed}


def machine(devices: Path = Path("/dev")) -> Machine:
    """Returns this machine's cores for us, and its NVIDIA GPUs, without torch."""
    gpus = sum(path.name.removeprefix("nvidia").isdigit() for path in devices.glob("nvidia*"))
    return Machine(len(os.sched_getaffinity(0)), gpus)
