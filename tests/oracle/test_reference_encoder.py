"""The encoders' referee: against transformers; and what the oracle must notice of an encoder and of a loss."""

from __future__ import annotations

import ast
import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megallm.models.config import ModelConfig
from megallm.oracle import compare, objectives, reference_encoder, table
from megallm.oracle.compare import Verdict, judge, train_rank
from megallm.oracle.table import Row, row_named
from tests.ranks import run_ranks

transformers = pytest.importorskip("transformers", reason="the reference is compared with transformers' models")

SIZES = {"vocab_size": 61, "num_layers": 2, "hidden_size": 16, "num_heads": 4, "max_positions": 32}
HEADS: dict[str, dict[str, Any]] = {
    "BertForMaskedLM": {"head": "mlm"},
    "BertForTokenClassification": {"head": "classification", "num_labels": 5},
    "BertForSequenceClassification": {"head": "value", "pooler": True},
}


def theirs(kind: str, config: ModelConfig) -> Any:
    """The transformers model of the same configuration, float64, random weights everywhere."""
    torch.manual_seed(1)
    made = transformers.BertConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, intermediate_size=config.ffn_hidden_size,
        max_position_embeddings=config.max_positions, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        num_labels=config.num_labels or 1, attn_implementation="eager",
    )  # fmt: skip
    model = getattr(transformers, kind)(made).double()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=0.1, std=0.4)
    return model


def logical(config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their weights under our names and in our shapes, written out by hand."""
    ours = {}
    embeddings = {"embedding": "word_embeddings", "positions": "position_embeddings"}
    for mine, other in (embeddings | {"token_types": "token_type_embeddings"}).items():
        ours[f"{mine}.weight"] = state[f"bert.embeddings.{other}.weight"]
    names = {"attention.q": "attention.self.query", "attention.o": "attention.output.dense",
             "attention_norm": "attention.output.LayerNorm", "mlp.up": "intermediate.dense",
             "mlp.down": "output.dense", "mlp_norm": "output.LayerNorm"}  # fmt: skip
    head = {"head.dense": "cls.predictions.transform.dense", "head.norm": "cls.predictions.transform.LayerNorm"}
    if config.head != "mlm":
        head = {"head": "classifier"} | ({"head.pooler": "bert.pooler.dense"} if config.pooler else {})
    for kind in ("weight", "bias"):
        ours[f"embedding_norm.{kind}"] = state[f"bert.embeddings.LayerNorm.{kind}"]
        for n in range(config.num_layers):
            at, to = f"bert.encoder.layer.{n}.", f"layers.{n}."
            ours |= {f"{to}{mine}.{kind}": state[f"{at}{other}.{kind}"] for mine, other in names.items()}
            pair = [state[f"{at}attention.self.{part}.{kind}"] for part in ("key", "value")]
            ours[f"{to}attention.kv.{kind}"] = torch.stack(pair)
        ours |= {f"{mine}.{kind}": state[f"{other}.{kind}"] for mine, other in head.items()}
    if config.head == "mlm":
        ours["head.bias"] = state["cls.predictions.bias"]
    return ours


@pytest.mark.parametrize("kind", HEADS)
def test_scores_and_every_gradient_equal_transformers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(family="bert", **SIZES, **HEADS[kind]).resolve()
    model = theirs(kind, config)
    torch.manual_seed(2)
    batch = {"tokens": torch.randint(0, 61, (3, 9)), "token_types": torch.randint(0, 2, (3, 9))}
    batch["positions"] = torch.arange(9).expand(3, 9)
    found = model(input_ids=batch["tokens"], token_type_ids=batch["token_types"]).logits
    weights = logical(config, {k: v.detach() for k, v in model.state_dict(keep_vars=True).items()})
    used = {k: v.clone().requires_grad_() for k, v in weights.items()}
    scores = reference_encoder.scores(dataclasses.asdict(config), used, batch)
    scores = scores[:, 0] if config.pooler else scores  # they pool the first token only
    assert (scores - found).abs().max() <= 1e-10 * found.abs().max()
    probe = torch.randn_like(found)
    (found * probe).sum().backward()
    (scores * probe).sum().backward()
    slopes = {k: v.grad if v.grad is not None else torch.zeros_like(v)
              for k, v in model.state_dict(keep_vars=True).items()}  # fmt: skip
    for key, value in logical(config, slopes).items():
        assert (used[key].grad - value).abs().max() <= 1e-10 * max(value.abs().max(), 1e-3), key


def test_losses_equal_their_formulas() -> None:
    torch.manual_seed(3)
    scores, mask = torch.randn(2, 4, 1, dtype=torch.float64), torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]]).bool()
    batch = {"mask": mask, "targets": torch.randn(2, 4).double(), "old_values": torch.randn(2, 4).double()}
    value = scores[..., 0]
    pairs = [(value[0, 0], value[0, 3]), (value[1, 1], value[1, 2])]
    want = -sum(torch.log(torch.sigmoid(chosen - rejected)) for chosen, rejected in pairs) / 2
    assert torch.allclose(reference_encoder.reward(scores, batch), want)
    total = 0.0
    for i, j in mask.nonzero().tolist():
        v, old, target = (float(x[i, j]) for x in (value, batch["old_values"], batch["targets"]))
        near = min(max(v, old - reference_encoder.CLIP), old + reference_encoder.CLIP)
        total += max((v - target) ** 2, (near - target) ** 2) / 2
    assert reference_encoder.critic(scores, batch).item() == pytest.approx(total / 4)


def test_it_imports_nothing_but_other_referees() -> None:
    tree = ast.parse(Path(reference_encoder.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if name.startswith("megallm")} == {
        "megallm.oracle.reference", "megallm.oracle.reference_mla", "megallm.oracle.reference_moe",
        "megallm.oracle.reference_dropout", "megallm.oracle.reference_trainers",
    }  # fmt: skip


# Negative controls: the ranks do something else than the row says, and the comparison must see it.

SPOILED = {
    "a causal mask left on": ("encoder-tp2", {"overrides": {"causal": True}}),
    "a causal mask left on, ring": ("encoder-cp2-ring", {"overrides": {"causal": True}}),
    "a loss over tokens that were not hidden": ("encoder-dp2-masked-rank", {"mask": "full"}),
    "pre-norm": ("encoder", {"overrides": {"norm_place": "pre"}}),
    "another activation": ("encoder-tp2-sp", {"overrides": {"activation": "gelu"}}),
    "a diffusion loss without its weights": ("diffusion-dp2-cp2", {"loss": "cross_entropy"}),
    "a critic that is not clipped": ("critic-tp2-sp-cp2", {"loss": "regression"}),
}


def spoiled_rank(row: Row, changes: dict[str, Any]) -> compare.RankRecord:
    """Train another row than the one that is judged, on the same tokens."""
    return train_rank(replace(row, **changes), frozenset())


@pytest.mark.parametrize("what", SPOILED)
def test_an_encoder_or_a_loss_that_is_not_that_of_the_row_is_noticed(what: str) -> None:
    name, changes = SPOILED[what]
    row = row_named(name)
    if "overrides" in changes:
        changes = {"overrides": dict(row.overrides) | changes["overrides"]}
    records = run_ranks(row.layout.world, spoiled_rank, row, changes)
    if changes.get("overrides", {}).get("norm_place"):
        for record in records:  # the one parameter that the row's model has not
            for name in ("final_norm.weight", "final_norm.bias"):
                record.shards.pop(name)
                for held in (record.initial, record.final, *(step.grads for step in record.steps)):
                    held[:] = [piece for piece in held if piece[0] != name]
    verdict = Verdict(row)
    judge(verdict, records)
    assert not verdict.passed
    assert verdict.loss > 1e-6


def test_random_rows_draw_encoders_and_every_head() -> None:
    rows = table.sample_rows(300, seed=5)
    assert {row.model for row in rows} == set(table.MODELS)
    assert {row.loss_name for row in rows} == {loss for losses in table.LOSSES.values() for loss in losses}
    assert {row.loss_name for row in rows} <= set(objectives.LOSSES)
