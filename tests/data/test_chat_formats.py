"""Rows of every known shape, found by their columns; what is wrong with one is said with its file and line."""

from __future__ import annotations

import csv
import gzip
import json
import re
from pathlib import Path

import pytest

from megallm.base.errors import DataError, UsageError
from megallm.data.chat.config import ChatDataConfig
from megallm.data.chat.formats import RowReading, detect_format, examples
from megallm.data.chat.messages import BadRow
from megallm.data.chat.prepare import prepare
from megallm.data.chat.records import records
from tests.data.chat_cases import write_jsonl

USER, SAID = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
BETTER, WORSE = [{"role": "assistant", "content": "good"}], [{"role": "assistant", "content": "bad"}]
SYSTEM = {"role": "system", "content": "s"}

# row, kind -> what the file is said to hold, and (prompt, answers) of each example
SHAPES = {
    "messages": ({"messages": [USER, SAID]}, "sft", "messages rows (columns messages)", [((), ([USER, SAID],))]),
    "messages-parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, SAID]},
        "sft",
        "messages rows",
        [((), ([USER, SAID],))],
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        "sft",
        "ShareGPT rows (columns conversations)",
        [((), ([SYSTEM, USER, SAID],))],
    ),
    "sharegpt-calls": (
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "a"},
            ]
        },
        "sft",
        "ShareGPT rows",
        [
            (
                (),
                (
                    [
                        USER,
                        {
                            "role": "assistant",
                            "content": "",
                            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
                        },
                        {"role": "tool", "content": "3"},
                        SAID,
                    ],
                ),
            )
        ],
    ),
    "alpaca": (
        {"instruction": "add", "input": "1 1", "output": "2", "system": "s", "history": [["q", "a"]]},
        "sft",
        "Alpaca rows (columns instruction, output)",
        [((), ([SYSTEM, USER, SAID, {"role": "user", "content": "add\n1 1"}, {"role": "assistant", "content": "2"}],))],
    ),
    "prompt-completion": ({"prompt": "q", "completion": "a"}, "sft", "prompt-completion rows", [("q", ("a",))]),
    "prompt-completion-messages": (
        {"prompt": [USER], "completion": [SAID]},
        "sft",
        "prompt-completion rows",
        [([USER], ([SAID],))],
    ),
    "question-answer": (
        {"question": "q", "answer": "a", "metadata": {"source_dataset": "sums"}},
        "sft",
        "question-answer rows",
        [((), ([USER, SAID],))],
    ),
    "text": ({"text": "t"}, "sft", "text rows (columns text)", [("", ("t",))]),
    "preference": (
        {"prompt": "q", "chosen": "x", "rejected": "y", "margin": 0.5},
        "preference",
        "preference rows with explicit prompt (columns chosen, rejected, margin)",
        [("q", ("x", "y"))],
    ),
    "preference-implicit": (
        {"chosen": [USER, *BETTER], "rejected": [USER, *WORSE]},
        "preference",
        "preference rows with implicit prompt (columns chosen, rejected)",
        [([USER], (BETTER, WORSE))],
    ),
    "preference-implicit-text": (
        {"chosen": "Human: q Assistant: yes", "rejected": "Human: q Assistant: no"},
        "preference",
        "preference rows with implicit prompt",
        [("Human: q Assistant:", (" yes", " no"))],
    ),
    "preference-messages": (
        {"prompt": [USER], "chosen": "good", "rejected": WORSE[0]},
        "preference",
        "explicit prompt",
        [([USER], (BETTER, WORSE))],
    ),
    "preference-whole": (
        {"prompt": [USER], "chosen": [USER, *BETTER], "rejected": [USER, *WORSE]},
        "reward",
        "explicit prompt",
        [([USER], (BETTER, WORSE))],
    ),
    "swift-rejected": (
        {"messages": [USER, *BETTER], "rejected_response": "bad"},
        "preference",
        "ms-swift preference rows",
        [([USER], (BETTER, WORSE))],
    ),
    "swift-rejected-messages": (
        {"messages": [USER, *BETTER], "rejected_messages": [USER, *WORSE]},
        "preference",
        "ms-swift preference rows",
        [([USER], (BETTER, WORSE))],
    ),
    "several": (
        {"prompt": "q", "completions": ["x", "y", "z"], "scores": [1, 3, 2]},
        "reward",
        "several completions rows",
        [("q", ("y", "x"))],
    ),
    "ranks": ({"prompt": "q", "completions": ["x", "y"], "ranks": [2, 1]}, "reward", "several", [("q", ("y", "x"))]),
    "unpaired": (
        {"prompt": "q", "completion": "a", "label": False},
        "unpaired",
        "(columns prompt, completion, label)",
        [("q", ("a",))],
    ),
    "unpaired-messages": (
        {"messages": [USER, SAID], "label": True},
        "unpaired",
        "messages rows",
        [([USER], ([SAID],))],
    ),
    "unpaired-of-pairs": (
        {"prompt": "q", "chosen": "x", "rejected": "y"},
        "unpaired",
        "preference rows",
        [("q", ("x",)), ("q", ("y",))],
    ),
    "prompt": ({"prompt": [USER], "solution": "4"}, "prompts", "prompt-only rows", [([USER], ())]),
    "verl": (
        {
            "data_source": "d",
            "prompt": [USER],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "4"},
            "extra_info": {"i": 1},
        },
        "prompts",
        "verl rows (columns prompt, reward_model)",
        [([USER], ())],
    ),
    "prompt-of-messages": ({"messages": [USER, SAID]}, "prompts", "messages rows", [([USER], ())]),
    "prompt-of-question": (
        {"question": "q", "answer": "a", "metadata": {}},
        "prompts",
        "question-answer",
        [([USER], ())],
    ),
    "classes": ({"text": "t", "label": 2}, "classification", "text rows (columns text, label)", [("", ("t",))]),
}


def seen(talk) -> object:
    return talk if isinstance(talk, str) else list(talk)


@pytest.mark.parametrize("name", SHAPES)
def test_the_kind_of_rows_is_found_by_their_columns(name):
    row, kind, words, expected = SHAPES[name]
    form, line = detect_format("F.jsonl", row, kind)
    assert words in line and line.startswith("F.jsonl: ")
    made = examples(form, row, RowReading(kind))
    wanted = [(seen(p) if p else p, tuple(map(seen, a))) for p, a in expected]
    assert [(seen(one.prompt) if one.prompt else one.prompt, tuple(map(seen, one.answers))) for one in made] == wanted
    if kind == "prompts":
        assert made[0].columns == row  # a reward function sees all of it


def test_labels_margins_and_all_pairs():
    row = {"prompt": "q", "completions": list("wxyz"), "scores": [1, 2, 3, 3]}
    form, _ = detect_format("F", row, "reward")
    made = examples(form, row, RowReading("reward", pairs="all"))
    assert sorted(one.answers for one in made) == [("x", "w"), ("y", "w"), ("y", "x"), ("z", "w"), ("z", "x")]
    (one,) = examples(form, row, RowReading("ranked"))
    assert one.answers == ("y", "z", "x", "w") and one.ranks == (0, 0, 1, 2)
    row = {"prompt": "q", "chosen": "x", "rejected": "y", "margin": "1.5"}
    form, _ = detect_format("F", row, "unpaired")
    assert [one.label for one in examples(form, row, RowReading("unpaired"))] == [1, 0]
    form, _ = detect_format("F", row, "preference")
    (one,) = examples(form, row, RowReading("preference", strings="messages"))
    assert (
        one.margin == 1.5
        and one.prompt[0] == {"role": "user", "content": "q"}
        and one.answers[0][0]["role"] == "assistant"
    )


@pytest.mark.parametrize("system", [(), ({"role": "system", "content": "s"},)])
def test_a_prompt_that_answers_repeat_stands_once(system):
    """UltraFeedback's rows: the prompt as a text, and whole conversations as answers."""
    talks = [[*system, USER, {"role": "assistant", "content": said}] for said in ("good", "bad")]
    row = {"prompt": USER["content"], "chosen": talks[0], "rejected": talks[1]}
    form, _ = detect_format("F", row, "preference")
    (one,) = examples(form, row, RowReading("preference"))
    assert one.prompt == (*system, USER) and [len(answer) for answer in one.answers] == [1, 1]
    other = row | {"prompt": "another question"}
    (one,) = examples(form, other, RowReading("preference"))
    assert [len(answer) for answer in one.answers] == [2 + len(system)] * 2


BAD = {
    "empty answer": (
        {"messages": [USER, {"role": "assistant", "content": " \n"}]},
        "an answer of the assistant without any",
    ),
    "no answer": ({"messages": [USER]}, "no message of the assistant"),
    "unknown role": (
        {"messages": [{"role": "wizard", "content": "x"}, SAID]},
        "role 'wizard'; accepted: system, developer",
    ),
    "no role": ({"messages": [{"content": "x"}, SAID]}, r"messages\[0\] has no role"),
    "wrong type": (
        {"messages": [{"role": "user", "content": 7}, SAID]},
        r"messages\[0\].content is a number, want a string",
    ),
    "no list": ({"messages": "hello"}, "messages is a string, want a list of messages"),
    "nothing in it": ({"messages": []}, "an empty list"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}, SAID]},
        "of type 'image', only text",
    ),
    "missing column": (
        {"prompt": "x"},
        "the column messages.conversation is missing or null; the rows of this file are messages",
    ),
    "null column": ({"messages": None}, "missing or null"),
    "surrogate": ({"messages": [{"role": "user", "content": "\ud800"}, SAID]}, "not valid JSON|lone surrogate"),
    "call without a name": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"x": 1}]}]},
        "without the name of a function",
    ),
    "loss": ({"messages": [USER, SAID | {"loss_scale": 0.3}]}, "has loss_scale '0.3'; accepted"),
    "tools": ({"messages": [USER, SAID], "tools": ["x"]}, "tools holds something else"),
    "options": ({"messages": [USER, SAID], "chat_template_kwargs": 3}, "chat_template_kwargs is a number"),
    "no object": ([1], "a JSON list, want an object"),
}
GOOD = {"messages": [USER, SAID]}


def config(path: str, **more) -> ChatDataConfig:
    return ChatDataConfig({path: None}, tokenizer="bytes", seed=1, **more)


def test_bad_rows_are_left_out_and_counted_each_with_its_line_and_reason(tmp_path):
    path = tmp_path / "F.jsonl"
    path.write_text("\n".join(map(json.dumps, [GOOD, *(row for row, _ in BAD.values()), GOOD])))
    made = prepare(config(str(path), on_error="skip"), "sft", tmp_path / "cache")
    assert (made.counts.rows, made.counts.bad, made.counts.lines) == (2, len(BAD), len(BAD) + 2)
    assert f"{len(BAD)} rows that cannot be used were left out; the first that cannot, {path}:2: " in made.notes[-1]
    (source,) = made.sources.values()
    rejects = dict(source.rejects())
    assert [*rejects] == [*range(2, len(BAD) + 2)]
    for reason, (name, (_, words)) in zip(rejects.values(), BAD.items(), strict=True):
        assert re.search(words, reason), f"{name}: {reason}"
    with pytest.raises(DataError, match="F.jsonl:2: "):  # also from the cache
        prepare(config(str(path)), "sft", tmp_path / "cache")


def test_a_bad_row_ends_the_run_and_leaves_nothing(tmp_path):
    path = tmp_path / "F.jsonl"
    path.write_text("\n".join([json.dumps(GOOD), "", json.dumps(BAD["empty answer"][0]), json.dumps(GOOD)]))
    with pytest.raises(DataError, match=r"F.jsonl:3: messages\[1\] is an answer .*data.on_error: skip") as error:
        prepare(config(str(path)), "sft", tmp_path / "cache")
    assert error.value.exit_code == 65 and not [*(tmp_path / "cache").iterdir()]  # nothing half-written


def test_broken_json_and_files_that_hold_something_else(tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(GOOD) + '\n{"messages": [\n')
    with pytest.raises(DataError, match="broken.jsonl:2: not valid JSON"):
        prepare(config(str(broken)), "sft", tmp_path / "cache")
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match="latin.jsonl:2: invalid UTF-8"):
        prepare(config(str(tmp_path / "latin.jsonl")), "sft", tmp_path / "cache")
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "q", "chosen": "x", "rejected": "y"}])
    with pytest.raises(DataError, match="holds preference rows .* but sft rows are needed: messages"):
        prepare(config(path), "sft", tmp_path / "cache")
    path = write_jsonl(tmp_path / "odd.jsonl", [{"foo": 1}])
    with pytest.raises(DataError, match="the columns foo are of no kind of rows that is known. Known: "):
        prepare(config(path), "sft", tmp_path / "cache")
    path = write_jsonl(tmp_path / "unlabelled.jsonl", [{"prompt": "q", "completion": "x"}])
    with pytest.raises(DataError, match="unpaired rows are needed: .*label"):
        prepare(config(path), "unpaired", tmp_path / "cache")
    path = write_jsonl(tmp_path / "same.jsonl", [{"chosen": "x", "rejected": "y"}])
    with pytest.raises(DataError, match="same.jsonl:1: chosen and rejected have no common beginning"):
        prepare(config(path), "preference", tmp_path / "cache")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no row that can be used"):
        prepare(config(str(tmp_path / "empty.jsonl")), "sft", tmp_path / "cache")
    for name in ("gone.jsonl", "gone-*.jsonl"):
        with pytest.raises(DataError, match="gone"):
            prepare(config(str(tmp_path / name)), "sft", tmp_path / "cache")


ROWS = [
    {"prompt": 'q\n1, "x"', "completion": "Grüße"},
    {"prompt": "漢字", "completion": "b"},
    {"prompt": "c", "completion": "d"},
]


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    pyarrow, zstd = pytest.importorskip("pyarrow"), pytest.importorskip("zstandard")
    from pyarrow import parquet

    write_jsonl(tmp_path / "F.jsonl", ROWS)
    data = (tmp_path / "F.jsonl").read_bytes()
    (tmp_path / "F.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "F.jsonl.zst").write_bytes(zstd.compress(data))
    (tmp_path / "F.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "lines.json").write_bytes(data)
    with open(tmp_path / "F.csv", "w", newline="") as file:
        out = csv.DictWriter(file, ["prompt", "completion"])
        out.writeheader()
        out.writerows(ROWS)
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "F.parquet")
    lines = {"F.json": [2, 6, 10], "F.csv": [2, 4, 5]}
    for name in ("F.jsonl", "F.jsonl.gz", "F.jsonl.zst", "F.json", "lines.json", "F.csv", "F.parquet"):
        found = [*records(str(tmp_path / name))]
        assert [one.row for one in found] == ROWS, name
        assert [one.line for one in found] == lines.get(name, [1, 2, 3]), name


def test_messages_in_parquet_and_csv(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    talk = [USER, SAID | {"tool_calls": None}]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": talk, "tools": None}]), tmp_path / "F.parquet")
    (tmp_path / "F.csv").write_text('messages,tools\n"' + json.dumps([USER, SAID]).replace('"', '""') + '",\n')
    counts = [
        prepare(config(str(tmp_path / name)), "sft", tmp_path / "cache").counts for name in ("F.parquet", "F.csv")
    ]
    assert counts[0] == counts[1] and counts[0].trained == len("a<|im_end|>")


@pytest.mark.parametrize(
    ("name", "text", "line", "words"),
    [
        ("F.json", '[\n{"text": "a"},\n{"text" "b"}\n]', 3, "not valid JSON"),
        ("F.json", '[\n{"text": "a"},\n3]', 3, "a JSON number"),
        ("F.json", '[\n{"text": "a"},\n', 3, "not valid JSON"),
        ("F.csv", "text\na\nb,c\n", 3, "2 cells under 1 columns"),
        ("F.csv", 'text\na\n"b\n', 3, "not valid CSV"),
        ("F.csv", "text\na\n\xff\n", 3, "lone surrogate"),
    ],
)
def test_what_is_broken_has_its_line(name, text, line, words, tmp_path):
    path = tmp_path / name
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=f"{name}:{line}: .*{words}"):
        prepare(config(str(path)), "sft", tmp_path / "cache")


def test_the_section_says_what_is_wrong_with_it(tmp_path):
    for wrong, words in (
        (ChatDataConfig(), "data.sources is empty"),
        (ChatDataConfig({"a": 1.0, "b": None}), "give each a weight, or none"),
        (ChatDataConfig({"a": 0.0}), "no source with a weight above 0"),
        (ChatDataConfig({"a": None}, seq_len=0), "data.seq_len is 0"),
        (ChatDataConfig({"a": None}), "data.tokenizer is not given"),
    ):
        with pytest.raises(UsageError, match=words):
            prepare(wrong, "sft", tmp_path)
    assert isinstance(BadRow("x"), Exception) and Path(tmp_path).is_dir()
