"""`megallm generate`: load weights at the wanted layout and continue prompts, many at a time."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megallm.base.errors import CheckpointError, DataError, UsageError
from megallm.base.files import atomic_write_text
from megallm.checkpoint import store
from megallm.checkpoint.reader import CheckpointReader
from megallm.convert import tokenizer_files
from megallm.convert.convert import is_import
from megallm.convert.folder import is_model_folder
from megallm.convert.tokenizer_files import TOKENIZER, copied_folder, end_ids
from megallm.convert.weights import Cast, HfReader, WeightSource
from megallm.data.text import tokenizer
from megallm.data.text.tokenizer import Tokenizer
from megallm.data.text.tokenizer_folder import TOKENIZER_FORMS
from megallm.inference.answer import Answer, Ending
from megallm.inference.generator import Generator
from megallm.inference.request import GenerateRequest
from megallm.inference.samples import Request
from megallm.inference.sampling import Sampling
from megallm.models.compute import ComputeConfig
from megallm.models.config import ModelConfig
from megallm.models.parallel_model import ParallelModel, Prepare
from megallm.parallel.config import LayoutConfig
from megallm.parallel.mesh import Mesh

log = logging.getLogger(__name__)

OutputRow = dict[str, Any]
Show = Callable[[int, str, bool], None]  # (number of the prompt, new text, whether it has ended)


@dataclass(frozen=True)
class Loaded:
    """A model ready to generate: this rank's weights, the tokenizer, the ids that end a text.

    `folder` is where a chat template and a generation_config.json would be, `opening` what the
    tokenizer's template puts before a prompt: of models from Hugging Face folders, and of those
    that were trained with it.
    """

    generator: Generator
    words: Tokenizer
    ends: frozenset[int]
    folder: Path | None
    opening: tuple[int, ...] = ()

    def request(
        self, number: int, tokens: list[int], request: GenerateRequest, stops: tuple[str, ...] = ()
    ) -> Request:
        """Returns one text to continue as the request says, which also ends before any of `stops`.

        Errors: DataError for a token that the model has no row for: the tokenizer is another
        model's.
        """
        rows = self.generator.model.config.vocab_size
        if max(tokens, default=0) >= rows:
            raise DataError(
                f"Prompt {number + 1} has the token id {max(tokens)}, but the model has {rows} "
                "rows: its tokenizer is another one. Give --tokenizer DIR."
            )
        ending = Ending(request.max_new_tokens, self.ends, (*request.stop, *stops))
        return Request(number, tokens, Answer(ending, self.words, tokens))


class Opened(Protocol):
    """Weights to generate with: `reader` says of which model and with which tokenizer, `source` has
    its tensors, `prepare_adapters` fills slots with adapters.
    """

    reader: CheckpointReader | HfReader

    @property
    def source(self) -> WeightSource: ...

    @property
    def prepare_adapters(self) -> Prepare | None: ...


@dataclass(frozen=True)
class Plain:
    """Weights without an adapter."""

    reader: CheckpointReader | HfReader
    source: WeightSource
    prepare_adapters: Prepare | None = None


@contextmanager
def open_plain(place: Path, adapter: str | None, mesh: Mesh) -> Iterator[Opened]:
    """Yields the weights of a Hugging Face or step folder; `peft.adapted.open_adapted` opens those
    with adapters too.
    """
    with open_place(place) as reader:
        if adapter is not None or "base" in reader.meta:
            raise UsageError(f"{place} has an adapter, which only open_adapted opens.")
        yield Plain(reader, reader if isinstance(reader, HfReader) else Cast(reader))


Opener = Callable[[Path, str | None, Mesh], AbstractContextManager[Opened]]


def run(
    request: GenerateRequest,
    mesh: Mesh,
    show: Show | None = None,
    warn: Callable[[str], None] | None = None,
    opener: Opener = open_plain,
) -> list[OutputRow]:
    """Continue each prompt; rows {prompt, tokens, text, logprobs, finish_reason} on rank 0, in the
    prompts' order.

    Data-parallel ranks share the prompts out. Rank 0 passes text to `show` as it becomes certain,
    and writes the rows to `request.output`; `warn` is told of its prompts that are longer than the
    model knows. Collective over the world; other ranks get the rows of their own replica.
    """
    loaded = load(request, mesh, opener)
    mine = range(mesh.dp.rank, len(request.prompts), mesh.dp.size)
    requests = []
    for number in mine:
        tokens = [*loaded.opening, *loaded.words.encode(request.prompts[number])] or [
            min(loaded.ends)
        ]
        requests.append(loaded.request(number, tokens, request))
    if warn is not None and mesh.rank == 0:
        for asked in requests:
            known = loaded.generator.model.config.max_positions
            if asked.most > known:
                warn(
                    f"prompt {asked.id + 1} may reach position {asked.most}; the model was made "
                    f"for {known}"
                )

    def listen(asked: Request) -> None:
        show(asked.id, asked.answer.fresh(), asked.answer.done)

    loaded.generator.generate(
        requests, sampling_of(request), listen if show is not None and mesh.rank == 0 else None
    )
    rows = {asked.id: row_of(request.prompts[asked.id], asked.answer) for asked in requests}
    rows = _collect(rows, mesh)
    if mesh.rank == 0 and show is not None:
        for number in sorted(rows.keys() - set(mine)):
            show(number, rows[number]["text"], True)
    ordered = [rows[number] for number in sorted(rows)]
    if mesh.rank == 0 and request.output is not None:
        lines = (json.dumps(row, ensure_ascii=False) for row in ordered)
        atomic_write_text(Path(request.output), "".join(f"{line}\n" for line in lines))
    return ordered


def _collect(rows: dict[int, OutputRow], mesh: Mesh) -> dict[int, OutputRow]:
    """On rank 0 the rows of every replica. Collective over the world when there are several."""
    if mesh.dp.size == 1:
        return rows
    first = mesh.rank == mesh.model.ranks[0]
    gathered = mesh.gather_json([[number, row] for number, row in rows.items()] if first else [])
    return rows if gathered is None else {number: row for part in gathered for number, row in part}


def load(request: GenerateRequest, mesh: Mesh, opener: Opener = open_plain) -> Loaded:
    """Returns the model of `request.model` at this mesh's layout; each rank reads its own pieces.
    Collective over the world.
    """
    with opener(find_place(request.model, mesh), request.adapter, mesh) as opened:
        reader = opened.reader
        spec, folder = find_tokenizer(reader, request.tokenizer)
        words = tokenizer.load(spec)
        if request.tokenizer is None:
            tokenizer_files.check_vocabulary(reader.meta, spec, words)
        config, precision = model_config(reader), request.precision or reader.meta["precision"]
        _check_model(config, mesh.tp.size)
        compute = ComputeConfig(precision)
        model = ParallelModel(config, LayoutConfig(), compute, mesh, opened.prepare_adapters)
        model.load(opened.source)
        imported = isinstance(reader, HfReader) or is_import(reader)
        framed = not imported and reader.meta.get("framed")
    opening = tuple(words.template[0]) if imported or framed else ()
    ends = end_tokens(words, folder, words.template[1][-1:] if framed else ())
    return Loaded(
        Generator(model, min(request.batch, max(1, len(request.prompts)))),
        words,
        ends,
        folder,
        opening,
    )


def _check_model(model: ModelConfig, tp: int) -> None:
    """Only causal language models continue texts; a tensor-parallel rank holds whole heads, as in
    training.
    """
    if not model.causal or model.head != "lm":
        seen = "only what came before" if model.causal else "the whole text"
        raise UsageError(
            f"--model: this model has the head {model.head} and its tokens see {seen}; only causal "
            "language models (model.causal true, model.head lm) generate text."
        )
    if model.num_heads % tp:
        fits = ", ".join(str(n) for n in range(1, model.num_heads + 1) if model.num_heads % n == 0)
        raise UsageError(
            f"--layout: tp {tp} does not divide the {model.num_heads} heads of the model; choose "
            f"{fits}."
        )


def sampling_of(request: GenerateRequest) -> Sampling:
    """Returns the request's part that chooses tokens."""
    return Sampling(
        request.max_new_tokens,
        request.temperature,
        request.top_k,
        request.top_p,
        request.seed,
        request.repetition_penalty,
        q_beta=request.q_beta,
    )


def row_of(prompt: str, answer: Answer) -> OutputRow:
    """Returns the JSON row of one finished answer; `tokens` and `logprobs` hold all tokens, also
    those that ended it.
    """
    return {
        "prompt": prompt,
        "tokens": answer.tokens,
        "text": answer.text,
        "logprobs": answer.log_probs,
        "finish_reason": answer.reason,
    }


def open_model(model: str, mesh: Mesh | None = None) -> CheckpointReader | HfReader:
    """Returns the weights of a run folder, a step folder or a Hugging Face folder. Collective over
    the world.
    """
    return open_place(find_place(model, mesh))


def open_place(place: Path) -> CheckpointReader | HfReader:
    """Returns the weights of a step folder or a Hugging Face folder."""
    return HfReader(place) if is_model_folder(place) else CheckpointReader(place)


def find_place(model: str, mesh: Mesh | None = None) -> Path:
    """Returns the Hugging Face folder itself, or the step that a run or step folder stands for; see
    `find_step`.
    """
    return Path(model) if is_model_folder(Path(model)) else find_step(model, mesh)


def find_step(model: str, mesh: Mesh | None = None) -> Path:
    """Returns the checkpoint that a run folder or a step folder stands for; UsageError when there
    is none.

    Of a run folder it is the newest whose weights are whole; what is passed over is logged.
    Collective over the world.
    """
    path = Path(model)
    if not path.is_dir():
        raise UsageError(
            f"--model {model}: there is no such folder; give a run folder, one of its step folders "
            "or a Hugging Face folder."
        )
    if (path / "manifest.json").exists():
        return path
    found, warnings = store.latest_whole(path / "checkpoints", mesh, store.weights_only)
    for warning in warnings if found is not None and (mesh is None or mesh.rank == 0) else ():
        log.warning("%s %s is used.", warning, found.name)
    if found is None:
        raise CheckpointError(f"{path} holds no valid checkpoint. {' '.join(warnings)}".rstrip())
    return found


def model_config(reader: CheckpointReader | HfReader) -> ModelConfig:
    """Returns the model that the checkpoint remembers."""
    try:
        return ModelConfig(**reader.meta["model"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{reader.folder} does not say which model it holds ({error})."
        ) from error


def find_tokenizer(
    reader: CheckpointReader | HfReader, given: str | None = None
) -> tuple[str, Path | None]:
    """Returns (tokenizer, folder of what else is known about texts): given, kept in the run folder,
    or of the model's folder.

    Bytes only where the metadata say so. Errors: DataError when no tokenizer is known.
    """
    if isinstance(reader, HfReader):
        spec, folder = reader.meta["tokenizer"], reader.folder
    else:
        spec, folder = (
            tokenizer_files.checkpoint_tokenizer(reader.folder, reader.meta),
            copied_folder(reader.folder),
        )
    if given is not None:
        return given, Path(given) if Path(given).is_dir() else folder
    if spec is None:
        named = reader.meta.get("tokenizer")
        lost = f"; data.tokenizer was {named}, which is not there any more" if named else ""
        raise DataError(
            f"{reader.folder}: no tokenizer is known for this model{lost}, and bytes are used only "
            "where the data or the folder say so. Give --tokenizer DIR|bytes, or put "
            f"{TOKENIZER_FORMS} into "
            f"{_home(reader)}; for a run to come, set data.tokenizer."
        )
    return spec, folder or (Path(spec) if Path(spec).is_dir() else None)


def _home(reader: CheckpointReader | HfReader) -> Path:
    return (
        reader.folder if isinstance(reader, HfReader) else reader.folder.parent.parent / TOKENIZER
    )


def end_tokens(
    words: Tokenizer, folder: Path | None, closing: Sequence[int] = ()
) -> frozenset[int]:
    """Returns ids that end a text: the tokenizer's own, that which closes its template, and
    `eos_token_id` of the generation_config.json, else of the config.json, that came with the model.
    """
    named = [] if folder is None else end_ids(folder)
    try:
        return frozenset([*named, *closing, words.eod])
    except DataError:
        if not named and not closing:
            raise
        return frozenset([*named, *closing])
