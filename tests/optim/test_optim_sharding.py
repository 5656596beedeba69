"""Rules over shards: checkpoints of any state at any layout, matrices that stay whole, parameter groups."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megallm.base.errors import InternalError, UsageError
from megallm.checkpoint import store
from megallm.checkpoint.reader import CheckpointReader
from megallm.engine.engine import Engine
from megallm.losses.language import NextToken
from megallm.models.config import ModelConfig
from megallm.optim import zero as zero_module
from megallm.optim.buckets import ALIGN, Bucket, BucketParam, ParamGroup, plan_buckets
from megallm.optim.config import GroupConfig, OptimConfig, ZeroConfig
from megallm.optim.groups import check_groups, matches, param_group
from megallm.optim.rules import column_factor, row_factor
from megallm.oracle import reference
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import Shard
from tests.engine.tiny import MODEL, batches, config_of, engine_of, share, state_of, worst
from tests.optim import test_zero
from tests.ranks import run_ranks

RULES = {
    "muon": OptimConfig("muon", momentum=0.7),
    "adafactor": OptimConfig("adafactor", weight_decay=0.1),
    "lion": OptimConfig("lion"),
    "sgd": OptimConfig("sgd", momentum=0.7, nesterov=True),
}
UNEVEN = replace(MODEL, ffn_hidden_size=41)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def leg(
    layout: Layout, zero: int, optim: OptimConfig, source: Path | None, target: Path, first: int = 0, steps: int = 2
) -> None:
    """Train `steps` from step `first`, from the checkpoint `source` or the start, and save."""
    mesh = Mesh.start(layout)
    engine = engine_of(mesh, model=UNEVEN, optim=optim, zero=ZeroConfig(zero))
    if source is not None:
        for flats in engine.optimizer.states.values():
            for flat in flats.values():
                flat.fill_(torch.nan)
        with CheckpointReader(source) as reader:
            engine.load(reader)
    for step in range(first, first + steps):
        engine.train_step(share(batches(4, seed=step), mesh), NextToken(), 0.01)
    store.save(target, first + steps, list(engine.parts()), {"engine": engine.counters()}, mesh)


def saved(folder: Path) -> dict[str, Tensor]:
    path, _ = store.latest(folder)
    with CheckpointReader(path) as reader:
        return {name: reader.read(name) for name in reader.names()}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((Layout(dp=2), 1), (Layout(tp=2), 0)),
        ((Layout(tp=2), 0), (Layout(dp=3), 3)),
        ((Layout(pp=2), 0), (Layout(dp=2, tp=2), 2)),
    ],
    ids=["dp2-zero1-to-tp2", "tp2-to-dp3-zero3", "pp2-to-dp2-tp2-zero2"],
)
def test_state_saved_at_one_layout_goes_on_at_another(rule, before, after, tmp_path):
    optim = RULES[rule]
    (first, stage), (second, other) = before, after
    run_ranks(first.world, leg, first, stage, optim, None, tmp_path / "a")
    source, _ = store.latest(tmp_path / "a")
    run_ranks(second.world, leg, second, other, optim, source, tmp_path / "b", 2, 0)
    assert worst(saved(tmp_path / "b"), saved(tmp_path / "a")) == 0.0, "what is loaded is what was saved, bit for bit"
    if second.dp < 3:  # which divide the microbatches
        run_ranks(second.world, leg, second, other, optim, source, tmp_path / "c", 2)
        run_ranks(1, leg, Layout(), 0, optim, None, tmp_path / "whole", 0, 4)
        assert worst(saved(tmp_path / "c"), saved(tmp_path / "whole")) <= 1e-9


@pytest.mark.parametrize("rule", ["sgd", "adagrad", "rmsprop", "lion"])
def test_zero_1_gives_the_bits_of_data_parallelism(rule):
    """Members and ranges begin where vectorised loops do, so an element's update does not depend on the layout."""
    optim = OptimConfig(rule, clip=0.0)
    plain, sharded = (
        run_ranks(2, test_zero.train, Layout(dp=2), replace(test_zero.config(ZeroConfig(stage)), optim=optim))[0][0]
        for stage in (0, 1)
    )
    assert test_zero.same(plain, sharded)


def test_factors_have_the_shape_of_rows_and_columns():
    shard = Shard((2, 6, 4), split={1: "tp"}, partial=("tp",))
    assert (row_factor(shard).full, row_factor(shard).split) == ((2, 6), {1: "tp"})
    assert (column_factor(shard).full, column_factor(shard).split) == ((2, 4), {})
    shard = Shard((8, 2, 6, 4), split={0: "ep", 3: "tp"})
    assert (row_factor(shard).full, row_factor(shard).split) == ((8, 2, 6), {0: "ep"})
    assert (column_factor(shard).full, column_factor(shard).split) == ((8, 2, 4), {0: "ep", 2: "tp"})


# --- matrices stay whole ---------------------------------------------------------------------------------------------


MUON = ParamGroup("muon")
members = st.lists(
    st.tuples(st.integers(1, 12), st.integers(1, 40), st.booleans()).map(
        lambda t: (t[0], t[1] * (ALIGN if t[2] else 1), t[2])
    ),
    min_size=1,
    max_size=12,
).map(
    lambda rows: [
        BucketParam(f"m{i}", n * size, "layers.0", param_group=MUON, whole=size if cut else n * size)
        for i, (n, size, cut) in enumerate(rows)
    ]
)


def check_plan(bucket: Bucket, shards: int) -> int:
    """No matrix across a boundary, nothing twice, all there; the elements of one range."""
    each = bucket.numel // shards
    assert each * shards == bucket.numel and each % ALIGN == 0
    last = 0
    for member, offset in zip(bucket.members, bucket.offsets, strict=True):
        assert offset >= last and offset % ALIGN == 0
        last = offset + member.numel
        for begin in range(offset, last, member.whole):
            assert begin // each == (begin + member.whole - 1) // each, (member, offset, each)
    assert last <= bucket.numel
    held = [cut for rank in range(shards) for cut in bucket.slices(*bucket.shard_range(shards, rank))]
    assert sum(cut.end - cut.begin for cut in held) == sum(member.numel for member in bucket.members)
    return each


@settings(deadline=None, max_examples=150)
@given(members, st.integers(1, 9))
def test_no_matrix_lies_across_two_ranges_and_ranges_are_fair(some, shards):
    for bucket in plan_buckets(some, 8, shards, bucket_bytes=4096):
        each = check_plan(bucket, shards)
        fair = max(sum(m.space for m in bucket.members) / shards, max(m.atomic_size for m in bucket.members))
        long = {member.atomic_size for member in bucket.members if member.space > fair}  # stacks over several ranges
        assert len(long) > 1 or each <= 2 * fair + ALIGN


def test_a_boundary_through_a_matrix_is_seen_by_the_check():
    """The control: the ranges that rules on single elements get cut matrices."""
    some = [BucketParam(f"m{i}", 480, "layers.0", param_group=MUON) for i in range(3)]
    (bucket,) = plan_buckets(some, 8, 2)
    cut = Bucket(tuple(replace(m, whole=480) for m in bucket.members), bucket.offsets, bucket.numel)
    with pytest.raises(AssertionError):
        check_plan(cut, 2)


def test_a_stack_of_experts_is_shared_out_evenly():
    """64 experts of two matrices over 8 ranks: sixteen matrices each, and nothing is left over."""
    stack = BucketParam("experts", 64 * 2 * 96, "layers.0", param_group=MUON, whole=96)
    (bucket,) = plan_buckets([stack], 8, 8, by_unit=True)
    assert check_plan(bucket, 8) == 16 * 96


def llama_block(hidden: int, ffn: int, kv: int, layers: int) -> list[BucketParam]:
    """The hidden matrices of Llama blocks as Muon's members."""
    shapes = {"q": (1, hidden * hidden), "kv": (2, kv * hidden), "o": (1, hidden * hidden)}
    shapes |= {"gate_up": (2, ffn * hidden), "down": (1, ffn * hidden)}
    return [
        BucketParam(f"layers.{i}.{name}", n * size, f"layers.{i}", param_group=MUON, whole=size)
        for i in range(layers)
        for name, (n, size) in shapes.items()
    ]


@pytest.mark.parametrize(("shards", "waste"), [(2, 0.08), (4, 0.08), (8, 0.08), (16, 0.08), (64, 0.08)])
def test_ranges_of_a_real_model_are_nearly_even(shards, waste):
    """What whole matrices cost beside equal shares: Llama 3 8B, buckets over layers (stages 1 and 2)."""
    blocks = llama_block(4096, 14336, 1024, 32)
    planned = plan_buckets(blocks, 4, shards)
    for bucket in planned:
        check_plan(bucket, shards)
    assert sum(bucket.numel for bucket in planned) <= (1 + waste) * sum(member.numel for member in blocks)


def held(layout: Layout, stage: int) -> list[tuple[str, int, int]]:
    """Which matrices this rank orthogonalises: name, first and last of its stack."""
    engine = engine_of(Mesh.start(layout), model=UNEVEN, optim=RULES["muon"], zero=ZeroConfig(stage))
    found = []
    for bucket in engine.parameters.flat:
        if bucket.plan.rule == "muon":
            for cut in engine.parameters.slices(bucket):
                rows, columns = engine.parameters.shapes[cut.member.name][-2:]
                found.append((cut.member.name, cut.begin // (rows * columns), cut.end // (rows * columns)))
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_tensor_parallel_ranks_plan_alike_however_uneven_their_pieces(stage):
    """Otherwise they would gather different matrices; and no matrix is worked on by two data ranks."""
    first, second, third, fourth = run_ranks(4, held, Layout(dp=2, tp=2), stage)
    assert first == second and third == fourth
    work = [(name, i) for name, begin, end in first + third for i in range(begin, end)]
    assert len(work) == len(set(work)) == 2 * 7 and first and third


def muon_on_pieces(layout: Layout) -> str:
    """Muon where the plan lets ranges cut matrices."""
    original = zero_module.whole_elements
    zero_module.whole_elements = lambda *args: 0
    try:
        model = replace(MODEL, num_layers=3)  # the middle is inside a layer
        engine = engine_of(Mesh.start(layout), model=model, optim=RULES["muon"], zero=ZeroConfig(1))
        engine.train_step(share(batches(2), engine.mesh), NextToken(), 0.01)
    except InternalError as error:
        return str(error)
    finally:
        zero_module.whole_elements = original
    return ""


def test_muon_refuses_pieces_of_matrices():
    """The control: ranges that cut matrices are an error on every rank, not a wrong update."""
    assert all("matrices" in sentence for sentence in run_ranks(2, muon_on_pieces, Layout(dp=2)))


# --- groups ----------------------------------------------------------------------------------------------------------

GROUPS = (
    GroupConfig("*.mlp.*", lr_scale=0.5, weight_decay=0.0),
    GroupConfig("/layers.0.*norm/", frozen=True),
    GroupConfig("*.attention.kv.weight", weight_decay=0.7),
    GroupConfig("*norm*", lr_scale=2.0, weight_decay=0.2),
)
GROUPED = OptimConfig(betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3, clip=0.05, groups=GROUPS)


def grouped_training(layout: Layout, zero: int) -> tuple[list[float], dict[str, Tensor]]:
    mesh = Mesh.start(layout)
    engine = engine_of(mesh, optim=GROUPED, zero=ZeroConfig(zero))
    norms = [engine.train_step(share(batches(4, seed=s), mesh), NextToken(), 0.02).grad_norm for s in range(3)]
    return norms, test_zero.whole_weights(engine)


def torch_groups() -> tuple[list[float], dict[str, Tensor]]:
    start = state_of(engine_of(optim=OptimConfig("sgd")))
    weights = {name: x.clone().requires_grad_() for name, x in start.items()}
    rest = [n for n in weights if not any(matches(g.match, n) for g in GROUPS)]
    sets = [(n, 0.02, 0.3 if reference.decays(n) else 0.0) for n in rest]
    sets += [(n, 0.01, 0.0) for n in weights if ".mlp." in n]
    sets += [(n, 0.02, 0.7) for n in weights if n.endswith("kv.weight")]
    sets += [(n, 0.04, 0.2) for n in weights if "norm" in n and not n.startswith("layers.0")]
    frozen = weights.keys() - {n for n, _, _ in sets}
    assert len(frozen) == 4 and all("norm" in n for n in frozen)
    optimizer = torch.optim.AdamW(
        [{"params": [weights[n]], "lr": lr, "weight_decay": wd} for n, lr, wd in sets], betas=(0.8, 0.9), eps=1e-6
    )
    norms = []
    for step in range(3):
        whole = {key: torch.cat([b[key] for b in batches(4, seed=step)]) for key in batches(1)[0]}
        optimizer.zero_grad()
        reference.masked_loss(asdict(MODEL), weights, whole).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_([weights[n] for n, _, _ in sets], 0.05)))
        optimizer.step()
    return norms, {name: x.detach() for name, x in weights.items()}


@pytest.mark.parametrize(("layout", "zero"), [(Layout(), 0), (Layout(dp=2), 1), (Layout(dp=2), 3)], ids=str)
def test_groups_equal_torchs_parameter_groups(layout, zero):
    norms, weights = torch_groups()
    for ours, mine in run_ranks(layout.world, grouped_training, layout, zero):
        assert ours == pytest.approx(norms, rel=1e-10)
        assert worst(mine, weights) <= 1e-10


def test_the_first_matching_group_counts():
    shard = Shard((4, 4))
    name = "layers.0.mlp.down.weight"
    config = replace(GROUPED, groups=(GroupConfig("layers.0.*", 3.0), *GROUPS)).resolve()
    assert param_group(config, name, shard) == ParamGroup("adamw", 0.3, 3.0, False)
    assert param_group(GROUPED.resolve(), name, shard) == ParamGroup("adamw", 0.0, 0.5, False)


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ((GroupConfig("*.mpl.*"),), r"groups\[0\].match '\*.mpl.\*' takes no parameter: no parameter has such a name"),
        (
            (GroupConfig("*mlp*"), GroupConfig("*.mlp.down.*")),
            r"groups\[1\].* all it matches belongs to an earlier group",
        ),
        ((GroupConfig("/^head/"),), "no parameter has such a name"),
    ],
)
def test_a_group_that_takes_nothing_is_refused(groups, sentence):
    with pytest.raises(UsageError, match=sentence):
        engine_of(optim=OptimConfig(groups=groups))


def refused(layout: Layout, pattern: str) -> str:
    try:
        engine_of(Mesh.start(layout), optim=OptimConfig(groups=(GroupConfig(pattern),)))
    except UsageError as error:
        return str(error)
    return ""


def test_groups_are_judged_by_the_whole_model_and_not_by_a_stage():
    assert run_ranks(2, refused, Layout(pp=2), "layers.1.mlp.*") == ["", ""]
    assert all("takes no parameter" in sentence for sentence in run_ranks(2, refused, Layout(pp=2), "layers.9.*"))


def test_check_groups_names_parameters_of_the_model():
    with pytest.raises(UsageError, match="The model has, for example, a.weight, b.weight"):
        check_groups(OptimConfig(groups=(GroupConfig("c.*"),)), ["b.weight", "a.weight"])


# --- memory ----------------------------------------------------------------------------------------------------------


def state_elements(layout: Layout, rule: str, zero: int) -> int:
    """Elements of optimizer state on this rank."""
    model = ModelConfig(
        num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_hidden_size=64, vocab_size=64,
        tie_embeddings=True,
    ).resolve()  # fmt: skip
    engine = Engine.build(config_of(model, OptimConfig(rule), zero=zero, precision="fp32"), Mesh.start(layout))
    flat = sum(x.numel() for flats in engine.optimizer.states.values() for x in flats.values())
    return flat + sum(held.tensor.numel() for held in engine.optimizer.state())


@pytest.mark.parametrize("zero", [0, 1])
def test_state_elements_follow_the_table(zero):
    """docs/optimizers.md: elements of state for a matrix of R x C; vectors are a rounding error."""
    d, f, v, kv = 32, 64, 64, 16
    block = [(d, d), (kv, d), (kv, d), (d, d), (f, d), (f, d), (d, f)]
    hidden, vectors = 2 * sum(r * c for r, c in block), 5 * d
    embedding, ranks = v * d, 2 if zero else 1
    wanted = {
        "adamw": 2 * (hidden + embedding + vectors) / ranks,
        "lion": (hidden + embedding + vectors) / ranks,
        "muon": (hidden + 2 * embedding + 2 * vectors) / ranks,
        "adafactor": 2 * sum(r + c for r, c in block) + v + d + vectors / ranks,
        "sgd": 0,
    }
    for rule, count in wanted.items():
        measured = run_ranks(ranks, state_elements, Layout(dp=ranks), rule, zero)
        assert all(count <= got <= count * 1.05 + 128 for got in measured), (rule, count, measured)
