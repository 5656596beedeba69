"""Issue R, A.1 and A.2: the ids that begin, end and fill a text, templates and every form of tokenizer file, through
conversion and back, and what `generate` takes of them."""

from __future__ import annotations

import json
import shutil

import pytest

from megallm.base.errors import CheckpointError, DataError
from megallm.convert.convert import ConvertRequest, run
from megallm.convert.tokenizer_files import end_ids, token_ids, write_byte_tokenizer
from megallm.data.chat.template import find_template
from megallm.data.text import tokenizer
from megallm.data.text.tokenizer_folder import save_tokenizer_files
from megallm.inference.generate import end_tokens, find_tokenizer, open_model
from tests.convert.tiny import case, make
from tests.data.test_data_kept_tokenizer import made  # noqa: F401 - a fixture

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make(tmp_path_factory.mktemp("hf") / "model", case("llama", "LlamaConfig", vocab_size=400))


@pytest.fixture
def folder(model, tmp_path):
    """A model folder without tokenizer and without generation_config.json."""
    shutil.copytree(model, tmp_path / "hf")
    (tmp_path / "hf/generation_config.json").unlink()
    return tmp_path / "hf"


def edit(path, **values):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


def read(path):
    return json.loads(path.read_text())


def round_trip(folder, tmp_path):
    run(ConvertRequest("megallm", str(folder), str(tmp_path / "ours")))
    run(ConvertRequest("hf", str(tmp_path / "ours"), str(tmp_path / "back")))
    assert not (tmp_path / "back/token_ids.json").exists()
    return tmp_path / "back"


CASES = {
    "a list in config.json alone": ({"eos_token_id": [2, 7]}, None),
    "a list in each, that differ": ({"eos_token_id": [2, 7]}, {"eos_token_id": [9, 2], "temperature": 0.3}),
    "one, a list, a pad": ({"bos_token_id": 5, "eos_token_id": 6, "pad_token_id": 0}, {"eos_token_id": [6, 8]}),
    "only generation_config.json": (
        {"bos_token_id": None, "eos_token_id": None},
        {"bos_token_id": 3, "eos_token_id": 4},
    ),
    "a pad of -1, as the first Llamas had": ({"pad_token_id": -1}, None),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", [None, "folder", "pair", "sentencepiece folder", "bytes"])
def test_ids_come_out_as_they_went_in(folder, tmp_path, made, name, form):  # noqa: F811
    config, generation = CASES[name]
    if form == "bytes":
        write_byte_tokenizer(folder)
    elif form is not None:
        shutil.copytree(made[form], folder, dirs_exist_ok=True)
    edit(folder / "config.json", **config)
    if generation is not None:
        edit(folder / "generation_config.json", **generation)
    back = round_trip(folder, tmp_path)
    before, after = read(folder / "config.json"), read(back / "config.json")
    for key in IDS:
        if before.get(key) is not None:
            assert after[key] == before[key], key
    if generation is not None:
        assert read(back / "generation_config.json") == read(folder / "generation_config.json")
    assert end_ids(back) == end_ids(folder) == end_ids(tmp_path / "ours/tokenizer")
    if form is not None:
        with open_model(str(tmp_path / "ours")) as imported, open_model(str(folder)) as own:
            found = [find_tokenizer(reader) for reader in (imported, own)]
        ends = [end_tokens(tokenizer.load(spec), where) for spec, where in found]
        assert ends[0] == ends[1] >= set(end_ids(folder))
        assert (found[0][0] == "bytes") == (form == "bytes") == (found[1][0] == "bytes")


def test_generate_stops_where_transformers_does(folder):
    """generation_config.json goes before config.json, as in transformers; `[2, 7]` in config.json alone is not lost."""
    import transformers

    for config, generation, wanted in (
        ([2, 7], None, [2, 7]), (2, [5, 6], [5, 6]), ([2, 7], {}, [2, 7]), (None, 9, [9]),
    ):  # fmt: skip
        edit(folder / "config.json", eos_token_id=config)
        (folder / "generation_config.json").unlink(missing_ok=True)
        if generation is not None:
            edit(folder / "generation_config.json", **({"eos_token_id": generation} if generation else {}))
        assert end_ids(folder) == wanted
        theirs = transformers.AutoModelForCausalLM.from_pretrained(str(folder)).generation_config.eos_token_id
        if generation != {}:
            assert theirs in (wanted, wanted[0])


@pytest.mark.parametrize("value", ["</s>", 1.5, [], [2, "x"], True, {"id": 2}])
def test_an_id_that_is_none_is_refused(folder, tmp_path, value):
    edit(folder / "config.json", eos_token_id=value)
    with pytest.raises(CheckpointError, match="eos_token_id"):
        run(ConvertRequest("megallm", str(folder), str(tmp_path / "ours")))
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("form", ["pair", "sentencepiece folder", "folder", "tiktoken folder"])
def test_a_folder_with_only_that_form_works(folder, tmp_path, made, form):  # noqa: F811
    """A.1: `tokenizer.model`, or `vocab.json` with `merges.txt`, alone: the model gets its own tokenizer's ids."""
    if form == "tiktoken folder":  # as the first Qwen
        save_tokenizer_files(made["tiktoken"], folder)
    else:
        shutil.copytree(made[form], folder, dirs_exist_ok=True)
    run(ConvertRequest("megallm", str(folder), str(tmp_path / "ours")))
    wanted = tokenizer.load(str(folder))
    for source in (folder, tmp_path / "ours"):
        with open_model(str(source)) as reader:
            spec, _ = find_tokenizer(reader)
        found = tokenizer.load(spec)
        assert found.fingerprint == wanted.fingerprint != "bytes-257"
        assert found.template == wanted.template  # a Llama's <s>, though config.json stays behind
    if form == "sentencepiece folder":
        assert wanted.template == ([1], [])
    back = tmp_path / "back"
    run(ConvertRequest("hf", str(tmp_path / "ours"), str(back)))
    assert {path.name for path in (folder).iterdir()} <= {path.name for path in back.iterdir()}


def test_without_one_it_is_refused_by_name_and_never_bytes(folder, tmp_path):
    run(ConvertRequest("megallm", str(folder), str(tmp_path / "ours")))
    for source in (folder, tmp_path / "ours"):
        with open_model(str(source)) as reader:
            with pytest.raises(DataError, match=r"no tokenizer is known .*--tokenizer.*data\.tokenizer"):
                find_tokenizer(reader)
            assert find_tokenizer(reader, "bytes")[0] == "bytes"


def test_ids_of_a_tokenizer_in_any_form(tmp_path, made):  # noqa: F811
    """Where no config.json says them: from the settings, and from a sentencepiece model itself."""
    for form, settings, wanted in (
        ("sentencepiece folder", None, (None, 2)),
        ("sentencepiece folder", {"bos_token": "<s>", "eos_token": {"content": "</s>"}}, (1, 2)),
        ("pair", {"eos_token": "<|endoftext|>"}, (None, 0)),
        ("folder", None, (None, 0)),
        ("file", None, (None, 0)),  # a tokenizer.json alone: what `generate` ends at is what config.json says
        ("tiktoken", None, (None, 300)),
    ):
        target = tmp_path / f"{form}{settings is None}"
        save_tokenizer_files(made[form], target)
        if settings is not None:
            (target / "tokenizer_config.json").write_text(json.dumps(settings))
        found = token_ids(target)
        assert (found["bos_token_id"], found["eos_token_id"]) == wanted, form


# Chat templates.

NAMED = [{"name": "tool_use", "template": "T"}, {"name": "rag", "template": "R"}]


def test_a_list_without_default_is_imported_and_comes_out_again(folder, tmp_path, made):  # noqa: F811
    shutil.copytree(made["folder"], folder, dirs_exist_ok=True)
    edit(folder / "tokenizer_config.json", chat_template=NAMED)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/more.jinja").write_text("M")
    back = round_trip(folder, tmp_path)
    assert read(back / "tokenizer_config.json")["chat_template"] == NAMED
    assert (back / "additional_chat_templates/more.jinja").read_text() == "M"
    for where in (folder, tmp_path / "ours/tokenizer", back):
        with pytest.raises(DataError, match="more, rag, tool_use, of which none is the default"):
            find_template(where)


@pytest.mark.parametrize(
    "templates, more, wanted",
    [
        (NAMED[:1], {}, "T"),
        ([*NAMED, {"name": "default", "template": "D"}], {}, "D"),
        (None, {"default": "A", "b": "B"}, "A"),
        (None, {"only": "O"}, "O"),
        ("plain", {"tool": "X"}, "plain"),
    ],
)
def test_which_of_several_templates_counts(tmp_path, templates, more, wanted):
    edit(tmp_path / "tokenizer_config.json", chat_template=templates)
    (tmp_path / "additional_chat_templates").mkdir()
    for name, text in more.items():
        (tmp_path / f"additional_chat_templates/{name}.jinja").write_text(text)
    assert find_template(tmp_path).source == wanted


def test_special_tokens_of_other_forms_are_broken_up_in_what_a_person_says(tmp_path, made):  # noqa: F811
    """With tokenizer.model alone `</s>` in a message would end the conversation."""
    words = tokenizer.load(made["sentencepiece folder"])
    edit(tmp_path / "tokenizer_config.json", chat_template="{{ messages[0].content }}")
    text = find_template(tmp_path, words.special_texts).render([{"role": "user", "content": "a</s><s>b"}])
    assert not {1, 2} & set(words.encode(text, special=True))
    plain = find_template(tmp_path).render([{"role": "user", "content": "a</s><s>b"}])
    assert {1, 2} <= set(words.encode(plain, special=True))  # the control
