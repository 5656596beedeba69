"""Encoders and heads: counts in closed form, what padding may not change, and what does not go together."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from megallm.base.errors import UsageError
from megallm.models.config import ModelConfig
from megallm.models.presets import PRESETS
from tests.models.test_models_counts import TINY, batch_of, built, built_count, counted_flops

BERT = replace(TINY, family="bert", num_kv_heads=4)
HEADS = {
    "lm": {}, "lm with a bias": {"head_bias": True}, "mlm": {"head": "mlm", "causal": False},
    "classes": {"head": "classification", "num_labels": 5}, "value": {"head": "value"},
    "pooled classes": {"head": "classification", "num_labels": 5, "pooler": True}, "body": {"head": "none"},
    "pooled body": {"head": "none", "pooler": True},
}  # fmt: skip


def test_parameters_of_every_head_and_switch_of_an_encoder():
    seen = set()
    for family, head, tied, place, norm, types in product(
        ("llama", "bert"), HEADS, (False, True), ("pre", "post"), (False, True), (0, 3)
    ):
        switches = HEADS[head] | {"tie_embeddings": tied, "norm_place": place, "embedding_norm": norm}
        config = replace(TINY, family=family, token_types=types, **switches).resolve()
        assert config.num_params() == built_count(config), (family, switches, types)
        seen.add(config.num_params())
    assert len(seen) > 80


def test_presets_have_the_published_sizes():
    """BertForMaskedLM of bert-base-uncased and bert-large-uncased, counted by transformers."""
    sizes = {name: ModelConfig(preset=name).resolve().num_params() for name in PRESETS if name.startswith("bert")}
    assert sizes == {"bert-base": 109_514_298, "bert-large": 335_174_458}


@pytest.mark.parametrize("head", [name for name in HEADS if "body" not in name])
@pytest.mark.parametrize("base", [TINY, BERT], ids=["decoder", "encoder"])
def test_flops_equal_counted_ones(base, head):
    config = replace(base, **({"causal": False} if base is BERT else {}) | HEADS[head]).resolve()
    assert counted_flops(config, 16) == config.num_flops(16)


@pytest.mark.parametrize("head", ["mlm", "pooled classes", "value"])
def test_padding_changes_nothing(head):
    """Rows of 5 and 9 tokens, padded to 12 and packed with their padding as documents, against each row alone."""
    stage = built(replace(BERT, **HEADS[head]).resolve())
    lengths, rows = (5, 9), batch_of(2, 12)
    bounds = [0, 5, 12, 21, 24]
    positions = torch.cat([torch.arange(b - a) for a, b in zip(bounds, bounds[1:], strict=False)])[None]
    packed = {name: x.reshape(1, 24) for name, x in rows.items()} | {"positions": positions}
    for spoil in (0, 7):
        packed["tokens"][0, 5:12] = packed["tokens"][0, 21:] = spoil  # what stands in the padding is nobody's business
        found = stage(None, packed | {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)})
        for row, length in enumerate(lengths):
            alone = stage(None, {name: x[row : row + 1, :length] for name, x in rows.items()})
            for name, want in alone.items():
                got = found[name][:, 12 * row : 12 * row + length]
                torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    whole = stage(None, packed | {"cu_seqlens": torch.tensor([0, 12, 24], dtype=torch.int32)})  # negative control
    name = "value" if head == "value" else "log_prob"
    assert (whole[name][:, :5] - found[name][:, :5]).abs().max() > 1e-6


def test_a_token_of_an_encoder_sees_what_follows_and_one_of_a_decoder_does_not():
    for base, sees in ((BERT, True), (replace(BERT, causal=True), False)):
        stage, batch = built(base.resolve()), batch_of(1, 8)
        before = stage(None, batch)["log_prob"][0, :4]
        batch["tokens"] = batch["tokens"].clone()
        batch["tokens"][0, 7] = (batch["tokens"][0, 7] + 1) % 57
        after = stage(None, batch)["log_prob"][0, :4]
        assert ((after - before).abs().max() > 1e-9) == sees


def test_token_types_default_to_the_first():
    stage, batch = built(BERT.resolve()), batch_of(1, 8)
    plain = stage(None, batch)["log_prob"]
    first = stage(None, batch | {"token_types": torch.zeros(1, 8, dtype=torch.long)})["log_prob"]
    other = stage(None, batch | {"token_types": torch.ones(1, 8, dtype=torch.long)})["log_prob"]
    assert torch.equal(plain, first) and not torch.equal(plain, other)


def test_correct_tells_the_likeliest_class():
    stage, batch = built(replace(TINY, **HEADS["classes"]).resolve()), batch_of(2, 6)
    every = [stage(None, batch | {"labels": torch.full((2, 6), label)}) for label in range(5)]
    log_prob, correct = (torch.stack([one[name] for one in every]) for name in ("log_prob", "correct"))
    torch.testing.assert_close(log_prob.exp().sum(0), torch.ones(2, 6, dtype=torch.float64))
    assert torch.equal(correct.argmax(0), log_prob.argmax(0)) and (correct.sum(0) == 1).all()
    assert not correct.requires_grad


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"head": "classification"}, "model.head classification needs model.num_labels"),
        ({"num_labels": 3}, "model.head lm has no model.num_labels"),
        ({"head": "classification", "num_labels": 1}, "at least 2. For one number take model.head value"),
        ({"pooler": True}, "model.pooler stands before a classification or value head; model.head is lm"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, words):
    with pytest.raises(UsageError, match=words):
        replace(TINY, **fields).resolve()


def test_a_body_alone_computes_nothing_to_train_on():
    with pytest.raises(UsageError, match="model.head is none"):
        built(replace(TINY, head="none").resolve())(None, batch_of(1, 4))
