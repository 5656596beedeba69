"""Generation: token for token what transformers gives, whatever the layout and whatever else is in the batch."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest
import torch

from megallm.base.errors import UsageError
from megallm.checkpoint import store
from megallm.cli.generate import Printer
from megallm.cli.main import main
from megallm.convert.tokenizer_files import write_byte_tokenizer
from megallm.engine.config import EngineConfig
from megallm.engine.engine import Engine
from megallm.inference import cache as cache_module
from megallm.inference import generate, sampling
from megallm.inference.answer import Answer
from megallm.inference.blocks import BlockPool
from megallm.inference.cache import Pages
from megallm.inference.request import GenerateRequest
from megallm.inference.sampling import Sampling
from megallm.models.config import ModelConfig
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from tests.convert.tiny import case, make
from tests.inference.tiny import END, continue_all, make_model, prompts
from tests.ranks import run_ranks
from tests.system.commands import megallm, start, wait_for

GREEDY = Sampling(max_new_tokens=14, temperature=0.0)
DRAWN = Sampling(max_new_tokens=14, temperature=1.1, top_k=40, top_p=0.9, seed=7, repetition_penalty=1.3)
LAYOUTS = [Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2)]
PROMPTS = prompts(20)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")

    @cache
    def get(name: str) -> str:
        return make_model(folder, name)

    return get


def at(layout: Layout, *args) -> list:
    """The same on every rank; rank 0's."""
    results = run_ranks(layout.world, continue_all, args[0], layout, *args[1:])
    assert all(result == results[0] for result in results[1:])
    return results[0]


@pytest.fixture(scope="module")
def theirs(models):
    """Greedy continuations of transformers, one prompt at a time."""
    import transformers

    @cache
    def get(name: str, penalty: float = 1.0) -> list[list[int]]:
        model = transformers.AutoModelForCausalLM.from_pretrained(models(name), dtype=torch.float32)
        found = []
        for prompt in PROMPTS:
            out = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False,
                max_new_tokens=GREEDY.max_new_tokens, eos_token_id=END, pad_token_id=END, repetition_penalty=penalty,
            )  # fmt: skip
            found.append(out[0, len(prompt) :].tolist())
        return found

    return get


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_greedy_equals_transformers_at_each_layout(models, theirs, name, layout):
    ours = [tokens for tokens, _ in at(layout, models(name), PROMPTS, GREEDY, 6)]
    assert ours == theirs(name)
    assert len({tuple(tokens) for tokens in ours}) > 15  # the model does not say the same whatever it is asked


@pytest.mark.parametrize("name", ["mistral", "odd"])
def test_greedy_equals_transformers_with_windows_and_shared_heads(models, theirs, name):
    """A sliding window shorter than the texts, and 2 kv heads read by 6 query heads on tp=3."""
    layout = Layout(tp=3) if name == "odd" else Layout(pp=2)
    assert [tokens for tokens, _ in at(layout, models(name), PROMPTS, GREEDY, 7)] == theirs(name)


def test_repetition_penalty_equals_transformers(models, theirs):
    penal = Sampling(max_new_tokens=14, temperature=0.0, repetition_penalty=1.8)
    ours = [tokens for tokens, _ in continue_all(models("llama"), Layout(), PROMPTS, penal)]
    assert ours == theirs("llama", 1.8) != theirs("llama")


@pytest.fixture(scope="module")
def drawn_alone(models):
    """Sampled continuations of one process, one prompt at a time."""
    return continue_all(models("llama"), Layout(), PROMPTS, DRAWN, 1)


@pytest.mark.parametrize(
    ("layout", "batch"),
    [(Layout(), 5), (Layout(), 20), *((layout, 5) for layout in LAYOUTS), (Layout(pp=3), 7)],
    ids=str,
)
def test_sampling_does_not_depend_on_layout_or_batch(models, drawn_alone, layout, batch):
    ours = at(layout, models("llama"), PROMPTS, DRAWN, batch)
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in drawn_alone]
    for (_, mine), (_, alone) in zip(ours, drawn_alone, strict=True):
        assert mine == pytest.approx(alone, abs=2e-5)


def test_sampling_depends_on_what_it_should(models, drawn_alone):
    """Seed and request number: another of either gives other text (so equality above is not for lack of chance)."""
    others = continue_all(models("llama"), Layout(), PROMPTS, Sampling(**(vars(DRAWN) | {"seed": 8})), 20)
    assert sum(a[0] != b[0] for a, b in zip(others, drawn_alone, strict=True)) > 15
    twice = continue_all(models("llama"), Layout(), [PROMPTS[3], PROMPTS[3]], DRAWN, 2)
    assert twice[0][0] != twice[1][0]


# Negative controls: each mistake of a batched decoder must change the tokens.


def same_as_alone(model: str, batch: int = 20) -> bool:
    return [t for t, _ in continue_all(model, Layout(), PROMPTS, GREEDY, batch)] == [
        t for t, _ in continue_all(model, Layout(), PROMPTS, GREEDY, 1)
    ]


def test_a_mask_that_shows_other_rows_ends_is_noticed(models, monkeypatch):
    """Rows shorter than the longest would see what lies beyond their end."""
    assert same_as_alone(models("gpt2"))
    real = cache_module.length_bias
    monkeypatch.setattr(cache_module, "length_bias", lambda n, *rest: real(n.fill_(int(n.max())), *rest))
    assert not same_as_alone(models("gpt2"))


def test_keys_stored_at_the_longest_row_are_noticed(models, monkeypatch):
    real = Pages.of
    monkeypatch.setattr(Pages, "of", lambda tables, begins, *rest: real(tables, [max(begins)] * len(begins), *rest))
    assert not same_as_alone(models("llama"))


def end_early(monkeypatch) -> None:
    """Let texts end after 3 to 8 tokens, so that rows become free at different times."""
    real = Answer.push

    def push(self, *numbers):
        real(self, *numbers)
        if len(self.tokens) == 3 + sum(self.tokens[:2]) % 6:
            self.end("end")

    monkeypatch.setattr(Answer, "push", push)


def test_a_block_that_is_given_back_too_early_is_noticed(models, monkeypatch):
    """Texts that leave hand their blocks to others; a block that somebody still reads must not go with them."""
    end_early(monkeypatch)
    assert same_as_alone(models("llama"), batch=6)
    monkeypatch.setattr(BlockPool, "_take", lambda self: self.free[-1])
    assert not same_as_alone(models("llama"), batch=6)


def test_randomness_keyed_by_row_is_noticed(models, monkeypatch, drawn_alone):
    """The usual mistake: one generator for the whole batch, in the order of the draws."""
    torch.manual_seed(0)
    monkeypatch.setattr(sampling, "uniform", lambda key, begin, count: torch.rand(count, dtype=torch.float64).numpy())
    ours = continue_all(models("llama"), Layout(), PROMPTS, DRAWN, 20)
    again = continue_all(models("llama"), Layout(), PROMPTS, DRAWN, 20)
    assert [t for t, _ in ours] != [t for t, _ in again]


# Memory, refusals, texts.


def bytes_held(model: str, layout: Layout) -> tuple[int, int]:
    loaded = generate.load(GenerateRequest(model), Mesh.start(layout))
    held = sum(param.numel() * param.element_size() for _, param, _, _ in loaded.generator.model.entries())
    return held, loaded.generator.model.config.num_params() * 4


def test_a_rank_holds_its_share_of_the_weights(tmp_path):
    deep = case("deep", "LlamaConfig", vocab_size=64, num_hidden_layers=8)
    folder = str(make(tmp_path / "deep", deep))
    write_byte_tokenizer(tmp_path / "deep")
    held = run_ranks(4, bytes_held, folder, Layout(tp=2, pp=2))
    assert all(mine <= 0.35 * whole for mine, whole in held), held
    assert sum(mine for mine, _ in held) >= held[0][1]
    ((alone, whole),) = [bytes_held(folder, Layout())]
    assert alone == whole


def refused(model: str, texts: list[list[int]], new_tokens: int) -> str:
    try:
        continue_all(model, Layout(), texts, Sampling(max_new_tokens=new_tokens))
    except UsageError as error:
        return str(error)
    return ""


def test_prompts_that_cannot_run_are_refused_before_any_does(models):
    assert "no tokens" in refused(models("llama"), [[1], []], 4)
    assert "need 130 positions; this model learned 128" in refused(models("gpt2"), [[1, 2]], 128)
    assert "token 300" in refused(models("llama"), [[300]], 4)
    assert refused(models("llama"), [[1, 2]], 4) == ""


def test_heads_that_tp_does_not_divide_are_refused_with_the_sizes_that_fit(models, tmp_path):
    done = megallm("generate", "--model", models("llama"), "--prompt", "ab", "--layout", "tp=3", cwd=tmp_path)
    assert done.code == 2 and "tp 3 does not divide the 4 heads of the model; choose 1, 2, 4." in done.err
    assert "Traceback" not in done.err


def test_a_dead_rank_ends_the_command(models, tmp_path):
    """In the middle of an answer that would take minutes; the others neither hang nor go on."""
    running = start("generate", "--model", models("llama"), "--prompt", "ab", "--layout", "tp=2", "--max-new-tokens",
                    "20000", "--stream", cwd=tmp_path)  # fmt: skip

    def answers() -> bool:  # more than the lines that say what a slow command does
        lines = running.output.read_text(errors="replace").splitlines()
        return sum(len(line) for line in lines if not line.startswith("generate |")) > 20

    assert wait_for(answers, running)
    running.kill_rank(1)
    done = running.wait(60)
    assert done.code == 137 and "rank 1 of 2 failed: killed by signal 9" in done.out


def test_models_that_do_not_continue_texts_are_refused(models):
    with generate.open_model(models("llama")) as reader:
        model = generate.model_config(reader)
    for change in ({"causal": False}, {"head": "classification", "num_labels": 3}, {"head": "none"}):
        with pytest.raises(UsageError, match="only causal language models"):
            generate._check_model(replace(model, **change), 1)
    generate._check_model(model, 2)


def test_an_output_that_cannot_be_is_refused_before_anything_is_generated(models, tmp_path, capsys):
    for output, words in ((tmp_path / "no/rows.jsonl", "does not exist"), (tmp_path, "it is a folder")):
        assert main(["generate", "--model", "nowhere", "--prompt", "ab", "--json", str(output)]) == 73
        assert words in capsys.readouterr().err


def test_prompts_begin_as_the_tokenizer_of_the_folder_wants(models, tmp_path):
    """A Llama's `<s>`: transformers puts it before a text, and so do we; a run of our own where its data had it."""
    import transformers

    folder = Path(shutil.copytree(models("llama"), tmp_path / "hf"))
    definition = json.loads((folder / "tokenizer.json").read_text())
    assert generate.load(GenerateRequest(str(folder)), Mesh.single()).opening == ()
    begin = {"<s>": {"id": "<s>", "ids": [7], "tokens": ["<s>"]}}
    definition["post_processor"] = {
        "type": "TemplateProcessing", "special_tokens": begin, "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    ids = transformers.AutoTokenizer.from_pretrained(folder)("ab", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [[7, 97, 98]]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    made = theirs.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=END)[0, 3:].tolist()
    request = GenerateRequest(str(folder), ("ab", ""), 9)
    rows = generate.run(request, Mesh.single())
    assert rows[0]["tokens"] == made
    request = GenerateRequest(models("llama"), ("ab",), 9)
    assert generate.run(request, Mesh.single())[0]["tokens"] != made  # the control: without it something else
    definition["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [9], "tokens": ["</s>"]}
    definition["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    sizes = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "vocab_size": 300}
    config = EngineConfig(ModelConfig(family="llama", **sizes).resolve())
    parts = list(Engine.build(config, Mesh.single()).parts())
    for framed, opening in ((True, (7,)), (False, ())):
        remembered = {"tokenizer": str(folder), "framed": framed, "precision": "fp32", "model": asdict(config.model)}
        step = store.save(tmp_path / str(framed), 1, parts, remembered, Mesh.single())
        loaded = generate.load(GenerateRequest(str(step)), Mesh.single())
        assert loaded.opening == opening and (9 in loaded.ends) == framed


def test_texts_longer_than_the_model_knows_are_told(models):
    told: list[str] = []
    request = GenerateRequest(models("llama"), ("ab", "x" * 130), 4)
    rows = generate.run(request, Mesh.single(), None, told.append)
    assert len(rows) == 2 and told == ["prompt 2 may reach position 134; the model was made for 128"]


def run_request(request: GenerateRequest, layout: Layout) -> tuple[list, list]:
    shown: list = []
    rows = generate.run(request, Mesh.start(layout), lambda *event: shown.append(event))
    return rows, shown


def test_rows_stream_and_files_agree_at_data_parallel_layouts(models, tmp_path):
    request = GenerateRequest(models("llama"), ("ab", "c", "", "defg", "h"), 9, 1.0, seed=3, batch=2)
    alone, shown = run_request(request, Layout())
    assert [row["prompt"] for row in alone] == list(request.prompts)
    for number, row in enumerate(alone):
        mine = [event for event in shown if event[0] == number]
        assert "".join(piece for _, piece, _ in mine) == row["text"]
        assert [ended for _, _, ended in mine].count(True) == 1 and mine[-1][2]
        assert len(row["tokens"]) == len(row["logprobs"]) and row["finish_reason"] in ("length", "end")
    output = tmp_path / "rows.jsonl"
    shared = GenerateRequest(**(vars(request) | {"output": str(output)}))
    rows, shown = run_ranks(2, run_request, shared, Layout(dp=2))[0]
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in alone]
    assert output.read_text().count("\n") == 5
    assert {number for number, _, ended in shown if ended} == set(range(5))


def test_stop_strings_cut_the_text_at_every_layout(models):
    request = GenerateRequest(models("llama"), ("ab", "zz"), 30, 0.0)
    free, _ = run_request(request, Layout())
    stop = free[0]["text"][5:7]
    assert len(stop.encode()) >= 2
    cut = GenerateRequest(**(vars(request) | {"stop": (stop,)}))
    for layout in (Layout(), Layout(pp=2)):
        rows, shown = run_ranks(layout.world, run_request, cut, layout)[0]
        assert rows[0]["text"] == free[0]["text"][: free[0]["text"].index(stop)]
        assert rows[0]["finish_reason"] == "stop"
        assert "".join(piece for number, piece, _ in shown if number == 0) == rows[0]["text"]


@pytest.mark.parametrize("live", [True, False])
def test_prompts_are_printed_in_their_order(live, capsys):
    """Answers grow together; a terminal shows the first as it comes, and the others when their turn has come."""
    printer = Printer(("A:", "B:"), live)
    printer(1, "b1", False)
    assert capsys.readouterr().out == ""
    printer(0, "a1", False)
    assert capsys.readouterr().out == ("A:a1" if live else "")
    printer(1, "b2", True)
    printer(0, "a2", False)
    assert capsys.readouterr().out == ("a2" if live else "")
    printer(0, "", True)
    assert capsys.readouterr().out == ("" if live else "A:a1a2") + "\n\nB:b1b2\n\n"
