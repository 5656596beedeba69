"""The tokenizer of a run, kept in its folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from megallm.base.errors import UsageError
from megallm.base.files import atomic_path, atomic_write_text, writing
from megallm.convert.folder import is_model_folder
from megallm.convert.tokenizer_files import copy_tokenizer, tokenizer_spec
from megallm.data.chat.template import ChatTemplate, find_template
from megallm.data.text import tokenizer
from megallm.data.text.tokenizer_folder import definition_file, save_tokenizer_files
from megallm.run.config import JobConfig
from megallm.training.reading import tokenizer_of


def keep_tokenizer(config: JobConfig, replace: bool = False) -> None:
    """Copy the tokenizer into the run folder, so that a checkpoint can be used wherever the run
    folder goes.

    Errors: `UsageError` when another one lies there already, unless it may be replaced.
    """
    spec, target = tokenizer_of(config), Path(config.run.dir) / "tokenizer"
    if (
        spec is not None
        and target.exists()
        and Path(spec).resolve().is_relative_to(target.resolve())
    ):
        return  # data.tokenizer names the run's own copy, as where the first one is gone
    if replace and spec is not None and target.exists():
        shutil.rmtree(target)
    if spec is not None and definition_file(target) is not None:
        if tokenizer.load(str(target)).fingerprint != tokenizer.load(spec).fingerprint:
            raise UsageError(
                f"{target} is another tokenizer than {spec}, which the data was made with: a run "
                "folder keeps the one that its checkpoints belong to. Choose another run.dir, or "
                "remove that folder."
            )
        return
    folder = None if config.model.hf is None else Path(config.model.hf)
    more = folder is not None and tokenizer_spec(folder) in (
        None,
        tokenizer.BYTES,
    )  # it only says which ids end a text
    if spec in (None, tokenizer.BYTES) and (not more or target.exists()):
        return
    with atomic_path(target) as temporary:
        if spec in (None, tokenizer.BYTES):
            temporary.mkdir()
        elif is_model_folder(Path(spec)):  # weights lie beside it, and nobody vouches for its files
            temporary.mkdir()
            copy_tokenizer(Path(spec), temporary)
        else:
            save_tokenizer_files(spec, temporary)
        if more:
            copy_tokenizer(folder, temporary, definition=False)
        if target.exists():  # what an import without a tokenizer said about texts
            for path in target.iterdir():
                if path.is_file() and not (temporary / path.name).exists():
                    shutil.copyfile(path, temporary / path.name)
            shutil.rmtree(target)


def keep_template(config: JobConfig, template: ChatTemplate) -> None:
    """Write the template of a run's conversations beside its tokenizer, unless that has it: the
    model is asked as it was taught, here and in an exported folder.
    """
    target = Path(config.run.dir) / "tokenizer"
    kept = find_template(target)
    if kept.source != template.source or kept.built_in:
        with writing(target):
            target.mkdir(exist_ok=True)
        atomic_write_text(target / "chat_template.jinja", template.source)
