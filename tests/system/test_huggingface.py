"""From a training run to a Hugging Face folder and on from there: real commands, ranks, and transformers to judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.system.commands import losses_of, make_corpus, megallm, write_config

PROMPT = "abc de"
LAYOUT = {"tp": 2, "pp": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A corpus, a run of 12 steps at tp=2 x pp=2, and its export."""
    folder = tmp_path_factory.mktemp("huggingface")
    prefix = make_corpus(folder)
    write_config(folder / "first.yaml", prefix, layout=LAYOUT, optim={"lr": 0.01})
    done = megallm("pretrain", "first.yaml", cwd=folder)
    assert done.code == 0, done.err
    done = megallm("convert", "--to", "hf", "--input", "run", "--output", "hf", "--verify", cwd=folder)
    assert done.code == 0, done.err
    assert json.loads(done.out)["max_rel_error"] <= 1e-5
    model = {"hf": "hf"}
    write_config(folder / "next.yaml", prefix, run={"dir": "next"}, optim={"lr": 0.001}, data={"order": "megatron"})
    text = (folder / "next.yaml").read_text()
    section = text[text.index("model:") : text.index("optim:")]
    (folder / "next.yaml").write_text(text.replace(section, f"model: {json.dumps(model)}\n"))
    return folder


def test_transformers_reads_the_folder_and_continues_the_same_way(place):
    import transformers

    words = transformers.AutoTokenizer.from_pretrained(place / "hf")
    ids = words(PROMPT)["input_ids"]
    assert ids == list(PROMPT.encode()) and words.eos_token_id == 256
    assert words.decode(words("Zürich ☃")["input_ids"]) == "Zürich ☃"
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "hf", dtype=torch.float32)
    made = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()
    for source, layout in (("run", "tp=2,pp=2"), ("hf", "tp=1"), ("hf", "tp=2,pp=2")):
        file = place / f"rows-{source}-{layout}.jsonl"
        done = megallm("generate", "--model", source, "--layout", layout, "--prompt", PROMPT, "--max-new-tokens", 24,
                       "--json", file, cwd=place)  # fmt: skip
        assert done.code == 0, done.err
        (row,) = (json.loads(line) for line in file.read_text().splitlines())
        assert row["tokens"] == made, (source, layout)


def first_loss(place: Path, run: str, *overrides: str) -> tuple[float, str]:
    done = megallm("pretrain", "next.yaml", f"run.dir={run}", "train.stop_at=2", *overrides, cwd=place)
    assert done.code == 0, done.err
    return losses_of(place / run)[0][1], done.out


def transformers_loss(place: Path) -> float:
    """The mean loss of the first global batch, by transformers on the samples that a run logs or draws first."""
    import transformers

    from megallm.data.megatron.sampler import rows_after
    from tests.data.megatron_cases import build_split

    data = build_split({str(place / "d_text_document"): 1.0}, "90,10,0", "train", 48, 32, 3, 257)
    rows = [row for micro in rows_after(0, 4, 1, 1, 0) for row in micro]
    samples = torch.stack([torch.as_tensor(data.sample(row)) for row in rows])
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "hf", dtype=torch.float32)
    with torch.no_grad():
        logits = model(samples[:, :-1]).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten()))


def test_training_goes_on_from_a_folder_at_any_layout(place):
    expected = transformers_loss(place)
    one, said = first_loss(place, "one")
    assert "starting from the weights of hf" in said
    four, _ = first_loss(place, "four", "layout.tp=2", "layout.pp=2")
    assert one == pytest.approx(expected, rel=1e-5) and four == pytest.approx(expected, rel=1e-5)
    fresh = losses_of(place / "run")[0][1]
    assert abs(fresh - one) > 0.1  # negative control: weights of the seed lose more
    done = megallm("pretrain", "next.yaml", "run.dir=one", "train.stop_at=3", cwd=place)
    assert done.code == 0 and "resumed at step 2 of its own checkpoint, which wins over model.hf hf" in done.out
    assert [step for step, _ in losses_of(place / "one")] == [1, 2, 3]


def test_imported_weights_start_a_run_and_come_back_bit_for_bit(place):
    done = megallm("convert", "--to", "megallm", "--input", "hf", "--output", "imported", "--verify", cwd=place)
    assert done.code == 0, done.err
    done = megallm("convert", "--to", "hf", "--input", "imported", "--output", "again", cwd=place)
    assert done.code == 0, done.err
    for name in (
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ):
        assert (place / "again" / name).read_bytes() == (place / "hf" / name).read_bytes(), name
    loss, said = first_loss(place, "imported", "layout.tp=2", "train.precision=fp64")
    assert "starting from the imported weights of " in said
    assert loss == pytest.approx(transformers_loss(place), rel=1e-5)


@pytest.mark.parametrize(
    ("override", "code", "sentence"),
    [
        ("model.num_layers=7", 2, "model.num_layers is 7, model.hf hf has 2"),
        ("model.preset=gpt2", 2, "model.hf and model.preset are both given"),
        ("model.hf=nowhere", 2, "nowhere is no Hugging Face model folder"),
        ("layout.tp=3", 2, "layout.tp 3 does not divide model.num_heads 4"),
    ],
)
def test_what_cannot_be_is_said_before_a_process_starts(place, override, code, sentence):
    done = megallm("pretrain", "next.yaml", "run.dir=never", override, cwd=place)
    assert done.code == code and sentence in done.err, done.err
    assert not (place / "never").exists()
