"""training.validate: over a grid of layouts, what is accepted divides and what is refused says how to repair it."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest

from megallm.base.config import get, load, replace
from megallm.base.errors import UsageError
from megallm.convert.hf_config import read_config, write_config
from megallm.models.config import ModelConfig
from megallm.optim.config import GroupConfig
from megallm.parallel import zigzag
from megallm.run.config import JobConfig
from megallm.training import validate
from megallm.training.config import PretrainConfig
from megallm.training.config import SegmentConfig as Segment
from megallm.training.rules import pretrain
from megallm.training.rules.problem import WORLD
from megallm.training.rules.ranges import RANGES, Range
from megallm.training.validate import check, find_problems, nearest_layouts

MODEL = ModelConfig(
    family="llama", num_layers=4, hidden_size=64, num_heads=8, num_kv_heads=2, vocab_size=300, ffn_hidden_size=96
)
GOOD = replace(PretrainConfig(model=MODEL), {"data.sources": {"p": 1.0}, "data.seq_len": 32})


def apply(config: PretrainConfig, world: int | None, fix: dict) -> tuple[PretrainConfig, int | None]:
    values = {key: value for key, value in fix.items() if key != WORLD}
    return replace(config, values), fix.get(WORLD, world)


def assert_fixes_hold(config: PretrainConfig, world: int | None, vocab: int | None = None) -> set[str]:
    """Each fix of each problem makes that rule pass; returns the broken rules."""
    problems = find_problems(config, world, vocab)
    for problem in problems:
        for fix in problem.fixes:
            again = find_problems(*apply(config, world, fix), vocab)
            keys = {other.key for other in again if other.rule == problem.rule and other.key == problem.key}
            assert not keys, f"{problem} -> {fix} -> {[str(other) for other in again]}"
    return {problem.rule for problem in problems}


def assert_refused(rule: str, values: dict, sentence: str) -> None:
    """GOOD with these values breaks this rule alone, is told so in these words, and each fix mends it."""
    config = replace(GOOD, values)
    with pytest.raises(UsageError) as caught:
        check(config)
    assert sentence in str(caught.value)
    assert assert_fixes_hold(config, None) == {rule}


def grid():
    axes = product((1, 2, 3, 4, 5, 8), (1, 2, 3, 5), (None, 1, 2, 3), (1, 4, 6, 8, 12), (6, 16), (1, 2), (False, True))
    for tp, pp, dp, world, global_batch, micro_batch, sp in axes:
        values = {"layout.tp": tp, "layout.pp": pp, "layout.dp": dp, "layout.sp": sp}
        values |= {"train.global_batch": global_batch, "train.micro_batch": micro_batch}
        yield replace(GOOD, values), world


def test_grid_of_layouts():
    accepted = refused = 0
    broken: set[str] = set()
    for config, world in grid():
        layout, train = config.layout, config.train
        ranks = layout.tp * layout.pp
        dp = layout.dp if layout.dp is not None else world // ranks
        fits = (
            ranks * dp == world
            and 8 % layout.tp == 0
            and layout.pp <= 4
            and train.global_batch % (train.micro_batch * max(dp, 1)) == 0
            and not (layout.sp and 32 % layout.tp)
        )
        if fits:
            accepted += 1
            resolved = check(config, world)
            assert resolved.layout.grid().world == world and resolved.layout.dp == dp
            assert resolved.model.num_heads % layout.tp == 0
            assert resolved.train.global_batch % (resolved.train.micro_batch * dp) == 0
        else:
            refused += 1
            rules = assert_fixes_hold(config, world)
            assert rules, config
            broken |= rules
    assert accepted + refused >= 2000 and accepted >= 100
    assert broken == {"world", "heads", "layers", "batch", "sequence"}


def fits_context(cp: int, kind: str, ulysses: int | None, heads: int) -> bool:
    """Whether the parallel model would take it, asked of the model's own code."""
    try:
        zigzag.ulysses_degree(kind, cp, heads, ulysses)
    except UsageError:
        return False
    return ulysses is None or kind == "hybrid"


def test_grid_of_context_parallel_layouts():
    axes = product((1, 2, 4), (1, 2, 3, 4, 6, 8), zigzag.KINDS, (None, 2, 3, 4), (False, True), (20, 24, 32, 48))
    accepted, refused = 0, set()
    for tp, cp, kind, ulysses, sp, seq_len in axes:
        values = {"layout.tp": tp, "layout.cp": cp, "layout.cp_kind": kind, "layout.cp_ulysses": ulysses}
        config = replace(GOOD, values | {"layout.sp": sp, "data.seq_len": seq_len})
        splits = seq_len % (2 * cp) == 0 or cp == 1
        if fits_context(cp, kind, ulysses, 8 // tp) and splits and (not sp or seq_len // cp % tp == 0):
            local = [sum(span.end - span.begin for span in zigzag.spans(seq_len, cp, rank)) for rank in range(cp)]
            assert set(local) == {seq_len // cp}
            if seq_len % (2 * cp * (tp if sp else 1)) == 0 or cp == 1:
                accepted += 1
                check(config)
                continue
        rules = assert_fixes_hold(config, None)
        assert rules, config
        refused |= rules
    assert accepted > 300
    assert refused == {"sequence", "context", "cp_ulysses"}


def test_nearest_layouts_keep_context_parallelism():
    wish = replace(GOOD, {"layout.tp": 3, "layout.cp": 2, "train.global_batch": 16})
    close = nearest_layouts(wish, 8)
    assert [layout["layout.cp"] for layout in close] == [2, 2, 1]
    for layout in close:
        assert not find_problems(replace(wish, layout), 8)


def test_nearest_layouts_fit_and_are_named():
    refused = 0
    for config, world in list(grid())[::17]:
        for layout in nearest_layouts(config, world):
            assert not find_problems(replace(config, layout), world)
        if find_problems(config, world):
            refused += 1
    assert refused > 50
    wish = replace(GOOD, {"layout.tp": 3, "train.global_batch": 16})
    with pytest.raises(UsageError) as caught:
        check(wish, 8)
    assert (
        "Layouts of 8 processes that fit: layout.pp=1 layout.dp=2 layout.tp=4; layout.pp=1 layout.dp=4 layout.tp=2;"
        in str(caught.value)
    )
    assert nearest_layouts(replace(GOOD, {"train.global_batch": 7}), 5) == []


def test_a_folder_is_not_read_again_for_every_layout(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(write_config(MODEL.resolve(), "float32", {})))
    reads: list[Path] = []
    monkeypatch.setattr(validate, "read_config", lambda path: reads.append(path) or read_config(path))
    wish = {"layout.tp": 3, "train.global_batch": 16}
    found = nearest_layouts(replace(GOOD, wish | {"model": ModelConfig(hf=str(tmp_path))}), 8)
    assert found == nearest_layouts(replace(GOOD, wish), 8) and len(found) == 3
    assert reads == [tmp_path]


BROKEN = [
    ("starts", {"model.hf": "a", "model.init": "b"}, "model.hf and model.init both name the weights to start from"),
    ("ranges", {"data.fim.rate": 1.5}, "data.fim.rate is 1.5; it must be at least 0 and at most 1."),
    ("segments", {"data.segments": (Segment(), Segment())}, "data.segments[0] has no until_tokens"),
    (
        "segments",
        {"data.segments": (Segment(until_tokens=9), Segment(until_tokens=9))},
        "data.segments[1].until_tokens is 9; it must be greater than 9, where the segment begins.",
    ),
    ("segments", {"data.segments": (Segment(sources={"q": 1.0}),)}, "names q, which data.sources does not have."),
    ("segments", {"data.segments": (Segment(sources={"p": 0.0}),)}, "has no source with a weight above 0."),
    ("segments", {"data.segments": (Segment(seq_len=0),)}, "data.segments[0].seq_len is 0; it must be at least 1."),
    ("segments", {"data.segments": (Segment(fim_rate=2.0),)}, "fim_rate is 2; it must be between 0 and 1."),
    ("segments", {"data.order": "megatron", "data.fim.rate": 0.5}, "data.fim.rate 0.5 needs data.order stream."),
    (
        "segments",
        {"data.fim.rate": 0.5, "data.fim.form": "context", "data.packing": "concat"},
        "data.fim.form context needs packing best_fit",
    ),
    (
        "sequence",
        {"layout.tp": 2, "layout.sp": True, "data.segments": (Segment(seq_len=33),)},
        "layout.sp splits data.segments[0].seq_len 33 over layout.tp 2",
    ),
    ("ranges", {"data.masking.rate": 0.0}, "data.masking.rate is 0.0; it must be greater than 0 and at most 1."),
    ("objective", {"data.objective": "mlm"}, "Nearest valid: model.causal=false or data.objective=next_token."),
    ("objective", {"data.objective": "diffusion"}, "the model looks back only."),
    ("objective", {"model.causal": False}, "Nearest valid: data.objective=mlm or model.causal=true."),
    ("objective", {"model.family": "bert"}, "the model sees the next token"),
    ("objective", {"model.head": "value"}, "gives no probabilities of tokens, which megallm pretrain learns."),
    (
        "objective",
        {"model.head": "classification", "model.num_labels": 4},
        "Nearest valid: model.head=lm model.num_labels=null.",
    ),
    (
        "objective",
        {"data.objective": "mlm", "model.causal": False, "data.segments": (Segment(fim_rate=0.5),)},
        "data.fim.rate rearranges texts for data.objective next_token, not for mlm.",
    ),
    (
        "objective",
        {"data.objective": "mlm", "model.causal": False, "data.masking.random": 0.3},
        "together at most 1. Nearest valid: data.masking.random=0.2.",
    ),
    (
        "objective",
        {"data.masking.whole_word": True},
        "data.masking.whole_word is True, which data.objective next_token does not read. Nearest valid: "
        "data.masking.whole_word=false.",
    ),
    (
        "objective",
        {"data.objective": "diffusion", "model.causal": False, "data.masking.rate": 0.3, "data.masking.token": "7"},
        "data.masking.rate is 0.3, which data.objective diffusion does not read.",
    ),
    ("choices", {"model.head": "mlmm"}, "Nearest valid: model.head=mlm."),
    ("choices", {"model.norm_place": "front"}, "must be one of pre, output, both, post."),
    ("model", {"model.head": "classification"}, "model.head classification needs model.num_labels"),
    ("ranges", {"layout.tp": 0}, "layout.tp is 0; it must be at least 1."),
    ("ranges", {"train.steps": -5}, "train.steps is -5; it must be at least 1 and at most"),
    ("ranges", {"optim.lr": 0.0}, "optim.lr is 0.0; it must be greater than 0."),
    ("ranges", {"optim.schedule": "wsd", "optim.decay_fraction": 1.5}, "it must be greater than 0 and at most 1."),
    ("ranges", {"data.seed": 2**32}, "it must be at least 0 and at most"),
    ("ranges", {"model.num_layers": 0}, "model.num_layers is 0"),
    ("ranges", {"model.num_heads": -8}, "model.num_heads is -8"),
    ("ranges", {"model.vocab_size": 0}, "model.vocab_size is 0"),
    (
        "choices",
        {"optim.rule": "adamv"},
        "optim.rule is 'adamv'; it must be one of adamw, adam, sgd, adagrad, rmsprop, lion, adafactor, muon. Nearest",
    ),
    ("choices", {"optim.schedule": "cosin"}, "Nearest valid: optim.schedule=cosine."),
    ("choices", {"model.norm": "rms"}, "Nearest valid: model.norm=rmsnorm."),
    ("betas", {"optim.betas": (0.9, 1.0)}, "optim.betas are [0.9, 1.0]"),
    (
        "unused",
        {"optim.rule": "lion", "optim.eps": 1e-8},
        "optim.eps is given, but optim.rule lion does not read it; it reads lr, betas, weight_decay. Nearest valid: "
        "optim.eps=null.",
    ),
    ("unused", {"optim.decay_shape": "sqrt"}, "optim.schedule cosine does not read it"),
    ("ranges", {"optim.rule": "sgd", "optim.momentum": 1.0}, "it must be at least 0 and less than 1."),
    ("choices", {"optim.rule": "muon", "optim.update_scale": "rsm"}, "Nearest valid: optim.update_scale=rms."),
    ("nesterov", {"optim.rule": "sgd", "optim.nesterov": True}, "Nearest valid: optim.nesterov=false or"),
    ("groups", {"optim.groups": (GroupConfig("/(/"),)}, "optim.groups[0].match is no regular expression"),
    ("groups", {"optim.groups": (GroupConfig(),)}, "optim.groups[0].match is empty; give a pattern of logical names"),
    ("groups", {"optim.groups": (GroupConfig("*"), GroupConfig("*", -1.0))}, "optim.groups[1].lr_scale is -1;"),
    ("min_lr", {"optim.min_lr": 1.0}, "optim.min_lr 1 is greater than optim.lr 0.0003."),
    (
        "warmup",
        {"optim.warmup_steps": 1000},
        "must be less than train.steps 1000. Nearest valid: optim.warmup_steps=999",
    ),
    ("stop_at", {"train.stop_at": 1001}, "train.stop_at 1001 lies beyond train.steps 1000."),
    ("split", {"data.split": "0,1,1"}, "leaves nothing for training"),
    ("split", {"data.split": "a,b"}, "data.split 'a,b' is not usable"),
    ("split", {"data.split": "1,0,0", "eval.every": 5}, "leaves nothing for validation"),
    ("sources", {"data.sources": {}}, "data.sources is empty"),
    ("sources", {"data.sources": {"p": 0.0}}, "data.sources.p is 0.0; a weight must be greater than 0."),
    ("sources", {"data.sources": {"p": None}}, "data.sources.p has no weight, which data.order stream needs"),
    (
        "sources",
        {"data.sources": {"p": None, "q": 2.0}, "data.order": "megatron"},
        "data.sources.p has no weight, but others have: give all of them one, or none.",
    ),
    ("sources", {"data.valid_sources": {"p": -1.0}, "data.split": "1"}, "data.valid_sources.p is -1.0; a weight must"),
    ("valid_sources", {"data.valid_sources": {"q": 1.0}}, "Nearest valid: data.split=100,0,0 or"),
    ("samples", {"data.samples": 9000}, "data.samples is 9000, which data.order stream does not read."),
    (
        "samples",
        {"data.samples": 7999, "data.order": "megatron"},
        "data.samples is 7999, but the run reads 8000. Nearest valid: data.samples=8000 or data.samples=null.",
    ),
    ("samples", {"data.surplus": 0.1}, "data.surplus is 0.1, which data.order stream does not read."),
    *(
        ("placeholder", {key: value}, f"{key} {shown} stands for something that is to be filled in")
        for key, value, shown in (
            ("run.dir", "$3", "$3"), ("run.dir", "runs/`date`", "runs/`date`"), ("data.tokenizer", "MOCK", "MOCK"),
            ("data.sources", {"${DATA}": 1.0}, "${DATA}"), ("data.sources", {"/path/to/x": 1.0}, "/path/to/x"),
            ("data.tokenizer", "<path>/tokenizer.model", "<path>/tokenizer.model"),
        )
    ),
    ("heads", {"layout.tp": 3, "train.global_batch": 9}, "Nearest valid: layout.tp=2 or layout.tp=4."),
    ("head_size", {"model.head_size": 7}, "it must be even. Nearest valid: model.head_size=6 or model.head_size=8."),
    ("widths", {"layout.tp": 8, "model.ffn_hidden_size": 4}, "a rank would hold nothing"),
    ("layers", {"layout.pp": 5}, "Nearest valid: layout.pp=4 or model.num_layers=5."),
    ("layers", {"layout.pp": 2, "layout.stages": "Et|L"}, "does not fit: it has 1 layers t"),
    ("schedule", {"layout.schedule": "zb-v", "layout.pp": 2}, "Nearest valid: layout.chunks=2 or"),
    ("schedule", {"layout.schedule": "interleaved", "layout.pp": 2, "layout.group": 1}, "valid: layout.group=2."),
    ("zero", {"zero.bf16_grads": True}, "Nearest valid: zero.bf16_grads=false."),
    ("schedule", {"layout.group": 4}, "Nearest valid: layout.group=null."),
    ("zero", {"zero.shard_size": 2}, "zero.stage 0 divides nothing"),
    ("zero", {"zero.shard_size": 3, "zero.stage": 1, "layout.dp": 4}, "zero.shard_size=2 or zero.shard_size=4."),
    ("tree", {"train.determinism": "tree", "zero.stage": 2}, "Nearest valid: zero.stage=1 or train.determinism=none."),
    (
        "tree",
        {"train.determinism": "tree", "layout.cp": 3, "data.seq_len": 24},
        "Nearest valid: layout.cp=2 or layout.cp=4 or train.determinism=none.",
    ),
    ("tree", {"train.determinism": "tree", "train.global_batch": 6}, "train.global_batch=4 or train.global_batch=8 or"),
    ("batch", {"train.micro_batch": 3}, "Nearest valid: train.global_batch=6 or train.global_batch=9 or"),
    ("sequence", {"layout.cp": 2, "data.seq_len": 30}, "data.seq_len=28 or data.seq_len=32 or layout.cp=1."),
    (
        "sequence",
        {"layout.cp": 4, "layout.tp": 2, "layout.sp": True, "data.seq_len": 24},
        "multiple of 2 x layout.cp 4 x layout.tp 2 (layout.sp) = 16: a context-parallel rank holds two equal chunks of "
        "each row. Nearest valid: data.seq_len=16 or data.seq_len=32 or layout.cp=3.",
    ),
    (
        "context",
        {"layout.cp": 4, "layout.tp": 4, "layout.cp_kind": "ulysses"},
        "Nearest valid: layout.cp=2 or layout.cp_kind=ring layout.cp_ulysses=null.",
    ),
    ("context", {"layout.cp": 2, "layout.cp_kind": "hybrid"}, "Nearest valid: layout.cp_kind=ring"),
    (
        "context",
        {"layout.cp": 8, "layout.cp_kind": "hybrid", "layout.cp_ulysses": 3},
        "Nearest valid: layout.cp_ulysses=2 or layout.cp_ulysses=4 or layout.cp_kind=ring",
    ),
    ("cp_ulysses", {"layout.cp": 4, "layout.cp_ulysses": 2}, "Nearest valid: layout.cp_ulysses=null."),
    ("sequence", {"layout.tp": 8, "layout.sp": True, "data.seq_len": 36}, "data.seq_len=32 or data.seq_len=40 or"),
    (
        "positions",
        {"model.family": "gpt2", "data.seq_len": 1025},
        "data.seq_len 1025 is greater than model.max_positions",
    ),
    (
        "further",
        {"model.mtp.depth": 32},
        "model.mtp.depth 32 looks further ahead than a row of 32 tokens reaches. Nearest valid: model.mtp.depth=31 or",
    ),
    ("experts", {"layout.ep": 2, "layout.tp": 2}, "Nearest valid: layout.ep=1 or model.moe.num_experts=2."),
    ("experts", {"layout.ep": 2}, "the model has no experts (model.moe.num_experts 0). Nearest valid: layout.ep=1."),
    (
        "experts",
        {"model.moe.num_experts": 6, "layout.tp": 4, "layout.ep": 3},
        "layout.ep 3 does not divide the 4 ranks of a pipeline stage, dp 1 x cp 1 x tp 4, which are cut into groups "
        "that each hold every expert. Nearest valid: layout.ep=2 or layout.dp=3.",
    ),
    (
        "experts",
        {"model.moe.num_experts": 6, "layout.tp": 4, "layout.ep": 4},
        "Nearest valid: layout.ep=2 or model.moe.num_experts=4 or model.moe.num_experts=8.",
    ),
    ("experts", {"model.moe.num_experts": 4, "train.determinism": "tree"}, "Nearest valid: train.determinism=none."),
    (
        "expert_sizes",
        {"model.moe.num_experts": 4, "model.moe.top_k": 5},
        "Nearest valid: model.moe.top_k=4 or model.moe.num_experts=5.",
    ),
    (
        "expert_sizes",
        {"model.moe.num_experts": 6, "model.moe.num_groups": 4},
        "Nearest valid: model.moe.num_groups=3 or model.moe.num_groups=6.",
    ),
    (
        "expert_sizes",
        {"model.moe.num_experts": 4, "model.moe.num_groups": 2, "model.moe.top_groups": 3},
        "Nearest valid: model.moe.top_groups=2.",
    ),
    (
        "expert_sizes",
        {"model.moe.num_experts": 8, "model.moe.num_groups": 4, "model.moe.top_k": 3},
        "Nearest valid: model.moe.top_k=2 or model.moe.top_groups=2.",
    ),
    (
        "router",
        {"model.moe.num_experts": 4, "model.moe.top_k": 1},
        "gets no gradient from the loss and never learns to choose. Nearest valid: model.moe.norm_topk_prob=false or "
        "model.moe.top_k=2.",
    ),
    (
        "sections",
        {"model.moe.aux_coef": 0.1},
        "model.moe.aux_coef is given, but model.moe.num_experts is 0 and nothing reads it. "
        "Nearest valid: model.moe.aux_coef=null.",
    ),
    ("sections", {"model.mla.value_head_size": 8}, "but model.mla.kv_lora_dim is 0 and nothing reads it."),
    ("sections", {"model.mtp.kind": "heads"}, "but model.mtp.depth is 0 and nothing reads it."),
    (
        "sections",
        {"model.moe.num_experts": 4, "model.moe.bias_rate": 0.01},
        "model.moe.bias_rate is given, but model.moe.selection_bias is false and nothing reads it.",
    ),
    ("sections", {"model.moe.num_experts": 4, "model.moe.drop": "position"}, "but model.moe.capacity is null"),
    (
        "sections",
        {"model.moe.num_experts": 4, "model.moe.first_dense": 9},
        "model.moe.first_dense 9 leaves no layer for the experts",
    ),
    ("ranges", {"model.moe.num_experts": 4, "model.moe.capacity": 1e300}, "at most 1000000"),
    ("choices", {"model.moe.num_experts": 4, "model.moe.score": "softmx"}, "Nearest valid: model.moe.score=softmax."),
    (
        "ranges",
        {"model.moe.num_experts": 4, "model.moe.aux_coef": -1.0},
        "model.moe.aux_coef is -1.0; it must be at least 0.",
    ),
    ("model", {"model.moe.num_experts": 4, "model.bias": True}, "model.bias is true, which is of dense layers"),
    ("model", {"model.num_kv_heads": 3}, "is not a multiple of model.num_kv_heads 3"),
    ("model", {"model.hidden_size": None}, "The model lacks model.hidden_size"),
    ("model", {"model.preset": "lama3-8b"}, "Did you mean 'llama3-8b'?"),
]


@pytest.mark.parametrize(("rule", "values", "sentence"), BROKEN, ids=[f"{row[0]}-{i}" for i, row in enumerate(BROKEN)])
def test_each_rule(rule, values, sentence):
    assert_refused(rule, values, sentence)


@pytest.mark.parametrize("values", [
    {"model.preset": "deepseek-v3", "model.moe.num_experts": 0, "model.mtp.depth": 0},
    {"model.moe.num_experts": 4, "model.moe.selection_bias": True, "model.moe.bias_rate": 0.01},
    {},
])  # fmt: skip
def test_what_a_check_filled_in_passes_another(values):
    """Ranks and later runs read the resolved configuration: keys that a preset gives are not taken for a person's."""
    config = replace(PretrainConfig() if "model.preset" in values else GOOD, values)
    config = replace(config, {"data.sources": GOOD.data.sources, "data.seq_len": GOOD.data.seq_len})
    once = check(config)
    assert check(once) == once


# rules that are tested with their trainers
OWN_TESTS = ("precision", "finetune", "preference", "grpo", "offline", "distill")


def test_every_rule_has_a_row():
    files = [Path(validate.__file__), *sorted(Path(pretrain.__file__).parent.glob("*.py"))]
    texts = [path.read_text() for path in files if path.stem not in OWN_TESTS]
    names = {name for text in texts for name in re.findall(r'Problem\(\s*"(\w+)"', text)}
    tested = {row[0] for row in BROKEN} | {"world", "vocabulary"}
    assert names == tested


def test_world():
    config = replace(GOOD, {"layout.tp": 2, "layout.dp": 3, "train.global_batch": 24})
    assert check(config).layout.dp == 3
    with pytest.raises(UsageError, match=r"8 processes, but layout pp 1 x cp 1 x tp 2 x dp 3 needs 6\."):
        check(config, 8)
    with pytest.raises(
        UsageError, match=r"3 processes are not a multiple of .* = 2\. Nearest valid: --nproc 2 or --nproc 4"
    ):
        check(replace(GOOD, {"layout.tp": 2}), 3)
    with pytest.raises(UsageError, match="--nproc is 0"):
        check(GOOD, 0)


def test_vocabulary_against_the_tokenizer():
    with pytest.raises(UsageError, match="model.vocab_size 300 is smaller than the tokenizer's 301"):
        check(GOOD, tokenizer_vocab=301)
    assert assert_fixes_hold(GOOD, None, 301) == {"vocabulary"}
    assert check(replace(GOOD, {"model.vocab_size": None}), tokenizer_vocab=257).model.vocab_size == 257


def test_kv_heads_fewer_than_tp_are_allowed():
    assert check(replace(GOOD, {"layout.tp": 8}), 8).layout.tp == 8


def test_all_problems_at_once():
    values = {"layout.tp": 3, "layout.pp": 9, "optim.warmup_steps": 5000, "log.every": 0, "eval.every": -1}
    with pytest.raises(UsageError) as caught:
        check(replace(GOOD, values))
    text = str(caught.value)
    assert text.startswith("5 problems")
    for key in values:
        assert key in text


def test_resolved_values():
    resolved = check(replace(GOOD, {"run.seed": 7}), 4)
    assert (resolved.layout.dp, resolved.data.seed, resolved.model.head_size) == (4, 7, 8)
    assert check(resolved, 4) == resolved


def test_every_ranged_key_exists_and_defaults_are_inside():
    defaults = PretrainConfig()
    for key, allowed in (RANGES | pretrain.RULES.ranges).items():
        value = get(defaults, key)
        assert value is None or allowed.nearest(value, None) == value
    assert str(Range(above=0, high=1)) == "greater than 0 and at most 1"


def test_number_of_config_fields_keeps_the_budget():
    from megallm.base.config import leaves

    assert len(list(leaves(PretrainConfig))) <= 250


def test_fast_and_without_torch(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from megallm.base.config import load\n"
        "from megallm.training.config import PretrainConfig\n"
        "from megallm.training.validate import check\n"
        "check(load(PretrainConfig, None, ['model.preset=gpt2', 'data.sources.p=1', 'layout.tp=4']), 8)\n"
    )
    before = child_seconds()
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    ours, before = child_seconds() - before, child_seconds()
    subprocess.run([sys.executable, "-c", "import numpy, yaml"], check=True, timeout=120)
    assert ours < 10 * (child_seconds() - before), "about twice what two of its imports take"


def child_seconds() -> float:
    """CPU time of all ended children."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_shipped_defaults_with_a_preset_are_valid():
    check(load(PretrainConfig, None, ["model.preset=gpt2", "data.sources.p=1"]))


@dataclass(frozen=True)
class OtherConfig(JobConfig):
    """The configuration of a trainer without a row: no rules of its own."""


def test_the_rules_of_every_trainer_hold_for_a_configuration_of_any():
    other = OtherConfig(model=MODEL)
    assert type(check(other, 4)) is OtherConfig and check(other, 4).layout.dp == 4
    broken = replace(other, {"layout.tp": 3, "optim.warmup_steps": 5000, "run.dir": "<runs>", "eval.every": -1})
    assert {problem.rule for problem in find_problems(broken, None)} == {"heads", "warmup", "placeholder", "ranges"}
    assert {problem.rule for problem in find_problems(replace(GOOD, {"data.sources": {}}), None)} == {"sources"}
