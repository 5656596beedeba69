"""`megallm sft`: every layout, packed or padded, learns the same; runs go on bit for bit, with adapters too; bad rows
end a run before it begins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megallm.base.config import replace
from megallm.base.errors import CheckpointError, DataError, UsageError
from megallm.checkpoint.reader import CheckpointReader, step_name
from megallm.engine.footprint import measure_bytes
from megallm.engine.state import count_params
from megallm.ops.dropout import keyed_uniform
from megallm.parallel.mesh import Mesh
from megallm.parallel.tensor import ADAPTER
from megallm.peft.dropout import keys_of
from megallm.peft.noise import EmbeddingNoise
from megallm.training.adapters import FrozenBase
from megallm.training.sft import SftIdentity
from megallm.training.validate import check
from tests.ranks import run_ranks
from tests.training.chat_runs import (
    config_of,
    conversations,
    numbers_of,
    rows_of,
    train,
    worst,
    write_rows,
)

LORA = {"peft__method": "lora", "peft__dim": 4, "peft__dropout": 0.2, "peft__lr_b": 4.0}
LAYOUTS = {
    "tp2-pp2": {"layout__tp": 2, "layout__pp": 2, "layout__sp": True},
    "cp2-dp2": {"layout__cp": 2, "layout__dp": 2, "zero__stage": 3},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A run of the model that others start from."""
    folder = tmp_path_factory.mktemp("base")
    return str(train(config_of(folder, train__steps=2)))


def from_base(folder: Path, base: str, **values):
    """A configuration that starts from the weights of `base`, which says what the model is."""
    config = config_of(folder, **values)
    empty = dict.fromkeys((f"model.{key}" for key, value in vars(config.model).items() if value is not None), None)
    keys = [key for key in empty if key.count(".") == 1 and key not in ("model.moe", "model.mla", "model.mtp")]
    return replace(config, dict.fromkeys(keys, None) | {"model.init": base, "data.tokenizer": None})


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    with CheckpointReader(run / "checkpoints" / step_name(step)) as reader:
        return {name: reader.read(name) for name in reader.names()}


# --- layouts -------------------------------------------------------------------------------------------------------


def on_ranks(folder: str, base: str, values: dict, break_keys: bool = False) -> None:
    """Train at a layout; with `break_keys` the noise of a token depends on where it lies on a rank."""
    real = EmbeddingNoise.watch
    if break_keys:

        def watch(self, batch):
            real(self, batch)
            self.keys = torch.arange(self.keys.numel()).view(self.keys.shape)

        EmbeddingNoise.watch = watch
    try:
        train(from_base(Path(folder), base, **values))
    finally:
        EmbeddingNoise.watch = real


VARIANTS = {"noise": {"sft__neftune_alpha": 5.0, "data__packing": True}, "lora": LORA, "dft": {"sft__dft": True}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layout_learns_the_same(tmp_path, base, variant):
    values = VARIANTS[variant]
    single = train(from_base(tmp_path, base, run__dir=str(tmp_path / "single"), **values))
    for name, layout in LAYOUTS.items():
        run = tmp_path / name
        run_ranks(4, on_ranks, str(tmp_path), base, values | layout | {"run__dir": str(run)})
        assert worst(numbers_of(run), numbers_of(single)) <= 1e-9, name
        assert rows_of(run)[-1]["entropy"] == pytest.approx(rows_of(single)[-1]["entropy"], rel=1e-9)


def test_noise_that_knows_its_rank_is_noticed(tmp_path, base):
    """The negative control of the noise above."""
    values = VARIANTS["noise"]
    single = train(from_base(tmp_path, base, run__dir=str(tmp_path / "single"), **values))
    broken = values | {"layout__cp": 2, "run__dir": str(tmp_path / "broken")}
    run_ranks(2, on_ranks, str(tmp_path), base, broken, True)
    assert worst(numbers_of(tmp_path / "broken"), numbers_of(single)) > 1e-6


MORE = {
    "plain": {}, "noise": {"sft__neftune_alpha": 5.0}, "lora-dropout": LORA,
    "hidden-dropout": {"sft__hidden_dropout": 0.2},
}  # fmt: skip


@pytest.mark.parametrize("more", MORE.values(), ids=MORE)
def test_packed_is_padded(tmp_path, base, more):
    """All rows in each step, once as rows of a batch and once in one packed row: the same updates."""
    more = more | {"data__seq_len": 2048}
    values = more | {"train__micro_batch": 4, "train__global_batch": 16}
    padded = train(from_base(tmp_path, base, run__dir=str(tmp_path / "padded"), **values))
    values = more | {"train__micro_batch": 1, "train__global_batch": 1, "data__packing": True}
    packed = train(from_base(tmp_path, base, run__dir=str(tmp_path / "packed"), **values))
    assert worst(numbers_of(packed), numbers_of(padded)) <= 1e-9


# --- noise and options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{"sft__neftune_alpha": 5.0}, {"sft__hidden_dropout": 0.2}], ids=["noise", "dropout"])
def test_noise_is_there_in_training_only(tmp_path, base, more):
    """A learning rate that moves nothing: another training loss, the same held-out loss; each epoch other noise."""
    values = {"optim__lr": 1e-300, "optim__weight_decay": 0.0, "train__steps": 8}
    quiet = rows_of(train(from_base(tmp_path, base, run__dir=str(tmp_path / "q"), **values)))
    noisy = rows_of(train(from_base(tmp_path, base, run__dir=str(tmp_path / "n"), **more, **values)))
    assert quiet[-1]["val/loss"] == noisy[-1]["val/loss"]
    assert all(abs(a["train/loss"] - b["train/loss"]) > 1e-4 for a, b in zip(quiet, noisy, strict=True))
    epochs = [sum(row["train/loss"] * row["train/tokens"] for row in half) for half in (noisy[:4], noisy[4:])]
    assert epochs[0] != pytest.approx(epochs[1], rel=1e-9), "16 rows, 4 a step: the second epoch has other noise"


def test_the_size_of_the_noise_is_that_of_the_paper():
    """Uniform between -alpha / sqrt(L D) and as much above, L of each sequence by itself."""
    batch = {
        "tokens": torch.zeros(1, 60, dtype=torch.int64),
        "positions": torch.cat((torch.arange(50), torch.arange(10)))[None],
        "samples": torch.tensor([7, 9]), "epochs": torch.tensor([0, 0]), "cu_seqlens": torch.tensor([0, 50, 60]),
    }  # fmt: skip
    keys = keys_of(batch)
    drawn = keyed_uniform(torch.zeros(1, 60, 256), 1, keys)
    assert -1 <= drawn.min() < -0.99 and 0.99 < drawn.max() <= 1 and abs(float(drawn.mean())) < 0.02
    again = keys_of(batch | {"epochs": torch.tensor([1, 0])})
    assert not torch.equal(again[:, :50], keys[:, :50]) and torch.equal(again[:, 50:], keys[:, 50:])
    alone = {"tokens": torch.zeros(1, 10), "positions": torch.arange(10)[None], "samples": torch.tensor([9])}
    assert torch.equal(keys_of(alone), keys[:, 50:]), "where a sequence lies does not matter"


def test_dft_weighs_tokens_by_their_probability(tmp_path, base):
    run = [train(from_base(tmp_path, base, run__dir=str(tmp_path / name), sft__dft=name == "dft", train__steps=1))
           for name in ("plain", "dft")]  # fmt: skip
    plain, dft = (rows_of(each)[0]["train/loss"] for each in run)
    assert 0 < dft < plain / 10, "-p log p, p about 1/257"


def test_what_is_frozen_stays(tmp_path):
    run = train(config_of(tmp_path, freeze=("embedding.*", "layers.0.*"), checkpoint__every=1, checkpoint__keep=0))
    first, last = tensors(run, 1), tensors(run, 4)
    moved = {name for name in last if not name.startswith("optim.") and not torch.equal(first[name], last[name])}
    assert moved and all(name.startswith(("layers.1.", "final_norm")) for name in moved)
    with pytest.raises(UsageError, match=r"'layers\.9\.\*' takes no parameter"):
        train(config_of(tmp_path, freeze=("layers.9.*",), run__dir=str(tmp_path / "none")))
    with pytest.raises(UsageError, match=r"No parameter is trained: what freeze"):
        train(config_of(tmp_path, freeze=("*",), run__dir=str(tmp_path / "nothing")))


@pytest.mark.parametrize("head", ["classification", "value"])
def test_labels_are_learned(tmp_path, head):
    """Classes and numbers of texts: on the same path, and with LoRA the new head is trained in full."""
    rows = [{"text": "aa" if n % 2 else "bb", "label": n % 2} for n in range(16)]
    sources = {write_rows(tmp_path / "labels.jsonl", rows): None}
    values = {"data__sources": sources, "data__valid_sources": sources, "model__head": head, "train__steps": 30}
    values |= {"model__tie_embeddings": None, "model__num_labels": 2 if head == "classification" else None}
    rows = rows_of(train(config_of(tmp_path, **values)))
    assert rows[-1]["val/loss"] < 0.05 < rows[0]["train/loss"]
    assert rows[-1].get("val/mean_token_accuracy", 1.0) == 1.0


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"data__condition": "<{reward}> "}, "data.condition tells the reward of an answer, which rows of the kind"),
        ({"data__shared_prefix": "on"}, "data.shared_prefix is on, which rows of the kind sft do not read"),
        ({"data__pairs": "all"}, "data.pairs is all, which rows of the kind sft do not read"),
    ],
)
def test_settings_of_other_rows_are_refused(tmp_path, values, sentence):
    """data.condition was a traceback here, the others did nothing."""
    with pytest.raises(UsageError, match=sentence):
        check(config_of(tmp_path, **values))


def test_a_class_that_the_model_lacks_is_named(tmp_path):
    sources = {write_rows(tmp_path / "labels.jsonl", [{"text": "aa", "label": n} for n in (0, 1, 7)]): None}
    values = {"data__sources": sources, "data__valid_sources": {}, "model__head": "classification"}
    with pytest.raises(DataError, match=r"labels\.jsonl:3: label is 7, but model\.num_labels is 3"):
        train(config_of(tmp_path, **values, model__tie_embeddings=None, model__num_labels=3))


# --- adapters ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_adapter_and_names_its_base(tmp_path, base):
    run = train(from_base(tmp_path, base, **LORA))
    names = {name for name in tensors(run, 4) if not name.startswith("optim.")}
    assert names and all(ADAPTER in name for name in names)
    with CheckpointReader(run / "checkpoints" / step_name(4)) as reader:
        assert reader.meta["base"]["path"].startswith(base) and len(reader.meta["base"]["xxh3_128"]) == 32
    settings = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == 4 and (run / "adapter" / "adapter_model.safetensors").is_file()
    with pytest.raises(UsageError, match="holds adapters alone: `megallm merge"):
        check(from_base(tmp_path, str(run)))


METHODS = {
    "full": {}, "lora": LORA, "dora": {"peft__method": "lora", "peft__dora": True},
    "qlora": {"peft__method": "lora", "peft__quantize": "nf4"},
    "adalora": {"peft__method": "adalora", "peft__dim": 2, "peft__targets": ("q_proj", "down_proj")},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_two_legs_are_one_run(tmp_path, base, method):
    """Bit for bit: every tensor of the last state and every number of metrics.jsonl."""
    values = METHODS[method] | {"sft__neftune_alpha": 1.0}
    quiet = train(from_base(tmp_path, base, run__dir=str(tmp_path / "quiet"), **values))
    legs = from_base(tmp_path, base, run__dir=str(tmp_path / "legs"), **values)
    run = train(replace(legs, {"train.stop_at": 2}))
    assert train(legs, resume="must") == run
    assert [{**row, "val/loss": 0} for row in rows_of(run)][2:] == [
        {**row, "val/loss": 0} for row in rows_of(quiet)
    ][2:]
    assert rows_of(run)[-1] == rows_of(quiet)[-1]
    ours, theirs = tensors(run, 4), tensors(quiet, 4)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_adapters_go_on_at_another_layout(tmp_path, base):
    quiet = train(from_base(tmp_path, base, run__dir=str(tmp_path / "quiet"), **LORA))
    moved = LORA | {"run__dir": str(tmp_path / "moved")}
    train(from_base(tmp_path, base, train__stop_at=2, **moved))
    run_ranks(4, on_ranks, str(tmp_path), base, moved | LAYOUTS["tp2-pp2"])
    ours = [row["train/loss"] for row in rows_of(tmp_path / "moved")]
    assert worst(ours, [row["train/loss"] for row in rows_of(quiet)]) <= 1e-9


def test_another_base_is_refused_and_a_moved_one_is_found(tmp_path, base):
    own = tmp_path / "base"
    shutil.copytree(base, own)
    run = train(from_base(tmp_path, str(own), train__stop_at=2, **LORA))
    own.rename(tmp_path / "elsewhere")
    assert train(from_base(tmp_path, str(tmp_path / "elsewhere"), train__stop_at=3, **LORA)) == run
    other = train(config_of(tmp_path, run__dir=str(tmp_path / "other"), train__steps=1))
    shutil.rmtree(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="not there any more, or has other weights now"):
        train(from_base(tmp_path, str(other), **LORA))


def test_a_stage_may_be_changed_further(tmp_path, base):
    """As a reference is: none of it trained, so that there is no gradient, master or moment."""
    config = check(from_base(tmp_path, base))
    frozen, _ = FrozenBase(config, lambda stage: stage.requires_grad_(False)).build(Mesh.single(), None)
    trained, _ = FrozenBase(config).build(Mesh.single(), None)
    assert count_params(frozen).trained == count_params(trained).frozen == 0
    assert count_params(frozen).frozen == count_params(trained).trained > 0
    kept, moved = measure_bytes(frozen), measure_bytes(trained)
    assert kept.trained == kept.gradients == kept.optimizer == 0 < kept.frozen == moved.trained
    assert moved.optimizer == 2 * moved.gradients == 2 * moved.trained, "two moments, one gradient"


# --- what is refused -----------------------------------------------------------------------------------------------

GOOD = {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}
BAD = {
    "empty answer": {"messages": [GOOD["messages"][0], {"role": "assistant", "content": ""}]},
    "role": {"messages": [{"role": "robot", "content": "1"}]},
    "column": {"text_of": "1"},
    "type": {"messages": "1+1"},
    "json": "{",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_named_before_anything_is_trained(tmp_path, kind):
    path = tmp_path / "train.jsonl"
    lines = [json.dumps(GOOD)] * 6
    lines[4] = BAD[kind] if kind == "json" else json.dumps(BAD[kind])
    path.write_text("\n".join(lines) + "\n")
    conversations(tmp_path / "valid.jsonl", 2)
    with pytest.raises(DataError, match=r"train\.jsonl:5: "):
        train(config_of(tmp_path))
    run = tmp_path / "run"
    assert not (run / "metrics.jsonl").exists() and not list((run / "checkpoints").iterdir())
    assert not list((run / "cache").iterdir()), "nothing half-written"
    rows = rows_of(train(config_of(tmp_path, data__on_error="skip")))
    assert len(rows) == 4


def test_other_rows_are_another_run(tmp_path):
    run = train(config_of(tmp_path, train__stop_at=2))
    conversations(tmp_path / "train.jsonl", 16, seed=5)
    with pytest.raises(UsageError, match=r"\* data\.content of .*train\.jsonl"):
        train(config_of(tmp_path))
    assert train(config_of(tmp_path, train__stop_at=3), allowed=("data.content",)) == run
    for key, value in (("data__train_on", "all"), ("freeze", ("embedding.*",)), ("data__packing", True)):
        with pytest.raises(UsageError, match=rf"\* {key.replace('__', '.')}: checkpoint"):
            train(config_of(tmp_path, **{key: value}))
    (tmp_path / "t.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}<|endoftext|>"
                                      "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}")
    said = [
        SftIdentity(config_of(tmp_path, data__template=each)).values["data"]["template"]
        for each in (None, "chatml", str(tmp_path / "t.jinja"))
    ]
    assert said[0] == said[1] != said[2], "the template as a text, whatever it is called"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"data__sources": {}}, "data.sources is empty"),
        ({"data__tokenizer": None}, "data.tokenizer is not given, and no model.hf or model.init brings one"),
        ({"peft__method": "lora"}, "peft.method lora trains beside a model that is there"),
        ({"freeze": ("/(/",)}, "freeze: '/\\(/' is no regular expression"),
        ({"sft__neftune_alpha": -1.0}, "sft.neftune_alpha is -1.0; it must be at least 0"),
        ({"sft__neftune_alpha": float("inf")}, "sft.neftune_alpha is inf; it must be at least 0 and less than inf"),
        ({"sft__hidden_dropout": 1.0}, "sft.hidden_dropout is 1.0; it must be at least 0 and less than 1"),
        ({"model__causal": False}, "model.causal is false"),
        ({"model__head": "value", "model__tie_embeddings": None, "sft__dft": True}, "sft.dft weighs the tokens"),
        ({"data__packing": True, "layout__cp": 2, "data__seq_len": 126}, "data.seq_len 126 is not a multiple of 2"),
        ({"peft__method": "lora", "peft__dropout": 1.0}, "peft.dropout is 1; it must be at least 0 and below 1"),
        ({"model__hf": "a", "model__init": "b"}, "model.hf and model.init both name the weights"),
    ],
)
def test_what_does_not_go_together_is_told(tmp_path, values, sentence):
    with pytest.raises(UsageError, match=sentence):
        check(config_of(tmp_path, **values))


def test_virtual_tokens_need_positions(tmp_path, base):
    most = check(from_base(tmp_path, base)).model.max_positions
    config = from_base(tmp_path, base, peft__method="p-tuning", data__seq_len=most)
    with pytest.raises(UsageError, match=f"20 virtual tokens of peft.method p-tuning before it need {most + 20} pos"):
        check(config)
    check(from_base(tmp_path, base, peft__method="p-tuning", data__seq_len=most - 20))


def test_the_run_folder_keeps_what_the_model_was_taught_with(tmp_path, base):
    """The template of the rows, the first of them with their trained tokens, and the rows in a cache."""
    run = train(from_base(tmp_path, base))
    assert "<|im_start|>" in (run / "tokenizer" / "chat_template.jinja").read_text()
    shown = (run / "first_rows.txt").read_text()
    assert shown.count("[[") == 4 and "<|im_end|>]]" in shown
    caches = {path.name: path.stat().st_mtime_ns for path in (run / "cache").glob("*/cache.json")}
    train(from_base(tmp_path, base))
    assert caches == {path.name: path.stat().st_mtime_ns for path in (run / "cache").glob("*/cache.json")}
