"""Multi-token prediction: which labels count, what must not leak into the loss, and what generation does without it."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megallm.base.config import replace
from megallm.inference.answer import Answer, Ending
from megallm.inference.generator import Generator
from megallm.inference.samples import Request
from megallm.inference.sampling import Sampling
from megallm.losses import language
from megallm.losses.language import NextToken, shift_mask
from megallm.models import decoder, mla
from megallm.models.build import place_parameters
from megallm.models.config import ModelConfig
from megallm.models.mtp import shift_labels
from megallm.models.stages import StageSpan
from megallm.oracle.compare import RankRecord, Verdict, judge, run_row, train_rank
from megallm.oracle.table import Row, row_named
from megallm.parallel import tensor
from megallm.parallel.mesh import Mesh
from megallm.training.config import PretrainConfig
from megallm.training.supervised import mtp_losses
from megallm.training.validate import find_problems
from tests.engine.tiny import engine_of
from tests.models.test_mla import SIZES, latent_weights
from tests.ranks import pool, run_ranks

TINY = ModelConfig(num_layers=2, hidden_size=24, ffn_hidden_size=40, num_heads=4, vocab_size=61, init_std=0.3)


# Labels and masks


@pytest.mark.parametrize("seed", range(30))
def test_labels_ahead_stay_inside_their_document(seed: int) -> None:
    draw = random.Random(seed)
    length, ahead = draw.randint(1, 40), draw.randint(1, 5)
    ends = sorted({0, length, *draw.choices(range(length), k=draw.randint(0, 6))})
    counts = torch.rand(1, length) < 0.7
    text = torch.randint(1, 1000, (length + 1,))
    labels = text[1:][None]
    got = shift_mask({"mask": counts, "cu_seqlens": torch.tensor(ends, dtype=torch.int32)}, ahead)
    moved = shift_labels(labels, ahead)
    for i in range(length):
        document = max(e for e in ends if e <= i)
        inside = i + ahead < length and max(e for e in ends if e <= i + ahead) == document
        assert got[0, i] == (inside and bool(counts[0, i + ahead]))
        if got[0, i]:
            assert moved[0, i] == text[i + ahead + 1]
    assert got.shape == moved.shape == labels.shape


def test_each_term_has_its_own_count_and_share_of_the_weight() -> None:
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False  # padding
    batch = {"mask": mask}
    loss = NextToken(depth=2, weight=0.5)
    assert {name: int(n) for name, n in loss.counts(batch).items()} == {"loss": 10, "mtp_1": 8, "mtp_2": 6}
    ones = {name: torch.full((2, 6), -1.0) for name in ("log_prob", "mtp_1", "mtp_2")}
    terms = {name: float(value) for name, value in loss(ones, batch).losses.items()}
    assert terms == {"loss": 10.0, "mtp_1": 8 * 0.25, "mtp_2": 6 * 0.25}


# Negative controls: the oracle's row fails when the mask or a gradient is wrong


def verdict_of(row: Row, records: list[RankRecord]) -> Verdict:
    verdict = Verdict(row)
    judge(verdict, records)
    return verdict


def passes(row: Row) -> bool:
    return verdict_of(row, [train_rank(row, frozenset())]).passed


def shifted_only(batch: dict[str, Tensor], ahead: int) -> Tensor:
    """A mask that forgets where documents end."""
    return F.pad(batch["mask"], (0, ahead))[:, ahead:]


def not_shifted(batch: dict[str, Tensor], ahead: int) -> Tensor:
    """The mask of the next token for further ones."""
    return batch["mask"]


def labels_too_far(labels: Tensor, ahead: int) -> Tensor:
    return shift_labels(labels, ahead + 1)


def test_a_loss_over_padding_or_across_documents_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    row = dataclasses.replace(row_named("mtp-packed"), steps=1, seq_len=12)
    assert passes(row)
    for wrong in (shifted_only, not_shifted):
        monkeypatch.setattr(language, "shift_mask", wrong)
        assert not passes(row), wrong.__name__
    monkeypatch.undo()
    monkeypatch.setattr(decoder, "shift_labels", labels_too_far)
    assert not passes(row)


def train_with_latents_counted_twice(row: Row) -> RankRecord:
    """On a rank: gradients of the matrices down to the latents are summed over tp although each rank has them whole."""
    real = tensor.sequence_partial
    for module in (mla, tensor):
        module.sequence_partial = lambda mesh, sp: ("tp",)
    try:
        return train_rank(row, frozenset())
    finally:
        for module in (mla, tensor):
            module.sequence_partial = real


def test_latent_gradients_summed_twice_are_noticed() -> None:
    row = dataclasses.replace(row_named("mla-tp2"), steps=1)
    verdict = verdict_of(row, run_ranks(2, train_with_latents_counted_twice, row))
    wrong = {name for name, error in verdict.grads.items() if error > 1e-9}
    made = {"q_down", "q_latent_norm", "kv_down", "kv_latent_norm", "k_rope"}
    assert {name.split(".")[-2] for name in wrong} == made


def test_an_embedding_of_the_last_stage_that_is_not_summed_is_noticed() -> None:
    """An untied model: first and last stage hold the embedding because further tokens are embedded on the last."""
    row = dataclasses.replace(row_named("mtp-pp2"), steps=1)
    verdict = run_row(pool(), row, frozenset({"grads.tie"}))
    assert not verdict.passed and verdict.problem is None
    assert {name for name, error in verdict.grads.items() if error > 1e-9} == {"embedding.weight"}


# Against transformers


def test_a_depth_equals_that_of_transformers() -> None:
    layers = pytest.importorskip("transformers.modeling_layers")
    if "MtpLayer" not in vars(layers):
        pytest.skip("this release of transformers has no layer for multi-token prediction")
    deepseek = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = dataclasses.replace(TINY, mla=SIZES, mtp={"depth": 1}, norm_eps=1e-6).resolve()
    made = deepseek.DeepseekV3Config(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        q_lora_rank=10, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=10, rms_norm_eps=1e-6,
        first_k_dense_replace=9, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(4)
    theirs = layers.MtpLayer(made, deepseek.DeepseekV3DecoderLayer, deepseek.DeepseekV3RMSNorm, 0)
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, mean=0.1, std=0.4)
    state, block = theirs.state_dict(), theirs.mtp_block
    ours = {
        "embedding_norm.weight": state["enorm.weight"], "hidden_norm.weight": state["hnorm.weight"],
        "projection.weight": state["eh_proj.weight"], "norm.weight": state["post_norm.weight"],
        "block.attention_norm.weight": block.input_layernorm.weight,
        "block.mlp_norm.weight": block.post_attention_layernorm.weight,
        "block.mlp.gate_up.weight": torch.stack((block.mlp.gate_proj.weight, block.mlp.up_proj.weight)),
        "block.mlp.down.weight": block.mlp.down_proj.weight,
    }  # fmt: skip
    ours |= {f"block.attention.{k}": v for k, v in latent_weights(block.self_attn.state_dict(), SIZES, 4).items()}
    stage = decoder.Stage(config, Mesh.single(), StageSpan(0, 2, True, True))
    depth = stage.mtp["0"]
    place_parameters(depth, ours)
    hidden, embedded, positions = torch.randn(2, 11, 24), torch.randn(2, 11, 24), torch.arange(11).expand(2, 11)
    mask = torch.full((11, 11), -torch.inf).triu(1)[None, None]
    tables = deepseek.DeepseekV3RotaryEmbedding(made)(hidden, positions)
    want = theirs(embedded, hidden, tables, mask, positions, None)
    places = stage.attention_inputs(positions, torch.float32)
    assert (depth(hidden, embedded, places) - want).abs().max() <= 1e-5 * want.abs().max()
    assert (depth(embedded, hidden, places) - want).abs().max() > 1e-2 * want.abs().max()


# Beside training


def continuation(config: ModelConfig) -> list[int]:
    """Greedy, from initial values that depend on names only."""
    model = engine_of(model=config.resolve(), seed=1).model
    request = Request(0, [5, 9, 30], Answer(Ending(10, frozenset())))
    Generator(model, 1).generate([request], Sampling(max_new_tokens=10, temperature=0.0))
    return request.answer.tokens


@pytest.mark.parametrize("kind", ["deepseek", "heads"])
def test_generation_ignores_further_tokens(kind: str) -> None:
    assert continuation(dataclasses.replace(TINY, mtp={"depth": 2, "kind": kind})) == continuation(TINY)


def test_a_depth_beyond_the_row_is_refused() -> None:
    model = dataclasses.replace(TINY, mtp={"depth": 8})
    config = replace(PretrainConfig(model=model), {"data.sources": {"p": 1.0}, "data.seq_len": 8})
    (problem,) = find_problems(config, 1)
    assert problem.rule == "further" and "model.mtp.depth=7 or data.seq_len=9" in str(problem)
    for fix in problem.fixes:
        assert not find_problems(replace(config, fix), 1)


def test_losses_are_reported_without_their_weight() -> None:
    @dataclasses.dataclass
    class Stats:
        losses: dict[str, float]

    mtp = dataclasses.replace(TINY, mtp={"depth": 2, "weight": 0.5}).resolve().mtp
    found = mtp_losses(Stats({"loss": 3.0, "mtp_1": 1.0, "mtp_2": 1.5}), mtp.depth, mtp.weight)
    assert found == {"train/mtp_loss": 5.0, "train/mtp_1_loss": 4.0, "train/mtp_2_loss": 6.0}
    assert mtp_losses(Stats({"loss": 3.0}), mtp.depth, mtp.weight) == {}
