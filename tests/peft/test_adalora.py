"""AdaLoRA takes ranks away as PEFT does, at every layout, over all pipeline stages at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megallm.base.errors import UsageError
from megallm.checkpoint import store
from megallm.checkpoint.reader import CheckpointReader
from megallm.engine.engine import Engine
from megallm.losses.language import NextToken
from megallm.models.config import ModelConfig
from megallm.optim.config import OptimConfig
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.peft.adalora import attach, plan_budget
from megallm.peft.config import PeftConfig
from megallm.peft.inject import prepare_adapters
from tests.engine.tiny import batches, config_of, share, state_of
from tests.ranks import run_ranks

MODEL = ModelConfig(
    family="llama", num_layers=4, hidden_size=24, ffn_hidden_size=28, num_heads=4, num_kv_heads=2,
    vocab_size=61, max_positions=64, init_std=0.2,
).resolve()  # fmt: skip
CONFIG = PeftConfig(
    "adalora", ("q_proj", "k_proj", "down_proj"), dim=2, init_dim=4, alpha=8.0,
    warmup_steps=1, final_steps=1,
)  # fmt: skip
STEPS = 4
PLAIN = OptimConfig(rule="sgd", momentum=0.0, clip=0.0, weight_decay=0.0)


def built(mesh: Mesh, changes: dict[str, Any]) -> Engine:
    config = config_of(MODEL, PLAIN, **changes)
    engine = Engine.build(config, mesh, prepare_adapters(CONFIG, MODEL))
    attach(engine, CONFIG, STEPS)
    return engine


def run(engine: Engine, steps: range) -> list[tuple[float, ...]]:
    numbers = []
    for step in steps:
        given = share(batches(2, rows=1, tokens=16, seed=step), engine.mesh)
        stats = engine.train_step(given, NextToken(), 0.5)
        numbers.append((stats.loss, stats.grad_norm, *stats.metrics.values()))
    return numbers


def trained(layout: Layout, changes: dict[str, Any], off: str = "") -> tuple[list, list]:
    broken = frozenset({off} if off else ())
    mesh = Mesh.start(layout, broken=broken) if layout.world > 1 else Mesh.single()
    engine = built(mesh, changes)
    numbers = run(engine, range(STEPS))
    return numbers, [(p.name, p.offset, p.tensor.clone()) for p in engine.parts()]


LAYOUTS: dict[str, tuple[Layout, dict[str, Any]]] = {
    "tp4": (Layout(tp=4), {}),
    "tp2-sp-pp2-recompute": (Layout(tp=2, pp=2), {"sp": True, "recompute": "full"}),
    "dp2-zero3": (Layout(dp=2), {"zero": 3}),
    "cp2-zero2": (Layout(cp=2), {"zero": 2}),
    "zb-v": (Layout(pp=2), {"schedule": "zb-v", "chunks": 2}),
}


@pytest.fixture(scope="module")
def alone() -> tuple[list, dict[str, Tensor]]:
    numbers, parts = trained(Layout(), {})
    return numbers, {name: tensor for name, _, tensor in parts}


def assert_same(alone: tuple[list, dict[str, Tensor]], results: list[tuple[list, list]]) -> None:
    numbers, whole = alone
    for ours, pieces in results:
        for step, want in zip(ours, numbers, strict=True):
            assert step == pytest.approx(want, rel=1e-9)
        for name, offset, tensor in pieces:
            box = tuple(slice(a, a + n) for a, n in zip(offset, tensor.shape, strict=True))
            torch.testing.assert_close(tensor, whole[name][box], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", LAYOUTS)
def test_trains_as_in_one_process(name, alone):
    layout, changes = LAYOUTS[name]
    assert_same(alone, run_ranks(layout.world, trained, layout, changes))


@pytest.mark.parametrize(
    ("name", "off"),
    [("tp4", "adalora.gram"), ("tp2-sp-pp2-recompute", "adalora.scores"), ("dp2-zero3", "adalora.scores")],
)
def test_without_a_sum_it_is_wrong(name, off, alone):
    """Negative controls: Gram matrices of split rows, scores of other ranks and other stages."""
    layout, changes = LAYOUTS[name]
    with pytest.raises(AssertionError):
        assert_same(alone, run_ranks(layout.world, trained, layout, changes, off))


def test_the_budget_is_met_and_ranks_differ(alone):
    numbers, whole = alone
    kept = [int((x != 0).sum()) for name, x in whole.items() if name.endswith("lora_E") and "optim." not in name]
    assert sum(kept) == CONFIG.dim * len(kept) == 24 and len(set(kept)) > 1
    assert [step[3] for step in numbers] == [48.0, 27.0, 24.0, 24.0]


def test_the_budget_is_a_cubic():
    config = replace(CONFIG, dim=8, init_dim=12, warmup_steps=10, final_steps=20, interval=5)
    plan = [plan_budget(step, 100, 3, config) for step in range(1, 101)]
    assert plan[9] == (36, False) and plan[79] == (24, True) and plan[99] == (24, False)
    assert plan[44] == (int(12 * 0.5**3 + 24), True) and plan[45][1] is False
    assert all(a[0] >= b[0] for a, b in zip(plan, plan[1:], strict=False))
    engine = Engine.build(config_of(MODEL, PLAIN), Mesh.single(), prepare_adapters(config, MODEL))
    with pytest.raises(UsageError, match="warmup_steps"):
        attach(engine, config, 30)


def saved(root: str) -> None:
    engine = built(Mesh.start(Layout(tp=2)), {})
    run(engine, range(2))
    store.save(root, 2, list(engine.parts()), {"engine": engine.counters()}, engine.mesh)


def test_resumes_at_another_layout(tmp_path, alone):
    run_ranks(2, saved, str(tmp_path))
    engine = built(Mesh.single(), {})
    with CheckpointReader(store.latest(tmp_path)[0]) as reader:
        engine.load(reader)
    assert run(engine, range(2, STEPS))[-1] == pytest.approx(alone[0][-1], rel=1e-9)
    for name, tensor in state_of(engine).items():
        torch.testing.assert_close(tensor, alone[1][name], rtol=1e-7, atol=1e-12)


def test_as_peft(tmp_path: Path):
    """The same weights, ranks and logits as PEFT's own allocator and regulariser, and its files."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from megallm.convert.weights import HfReader
    from megallm.peft.files import write_folder
    from megallm.peft.reading import AdapterFolder
    from megallm.peft.sources import Joined, TensorSource

    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=28, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.2, tie_word_embeddings=False,
    )).save_pretrained(tmp_path / "base")  # fmt: skip
    settings = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=list(CONFIG.targets), init_r=4, target_r=2,
        lora_alpha=8, tinit=1, tfinal=1, deltaT=1, total_step=STEPS,
    )  # fmt: skip
    load = transformers.LlamaForCausalLM.from_pretrained
    theirs = peft.get_peft_model(load(tmp_path / "base", dtype=torch.float32), settings)
    theirs.save_pretrained(tmp_path / "start")
    with HfReader(tmp_path / "base") as reader:
        start = AdapterFolder(tmp_path / "start", reader.model)
        made = replace(CONFIG, targets=start.config.targets)
        engine = Engine.build(config_of(reader.model, PLAIN), Mesh.single(), prepare_adapters(made, reader.model))
        engine.fill(Joined(start, reader))
    attach(engine, made, STEPS)
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.5)
    for step in range(1, STEPS + 1):
        batch = batches(1, tokens=16, seed=step)[0]
        engine.train_step([batch], NextToken(), 0.5)
        labels = batch["labels"].masked_fill(~batch["mask"], -100)
        theirs(input_ids=batch["tokens"], labels=labels, shift_labels=labels).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    held = {name: x.float() for name, x in state_of(engine).items() if not name.startswith("optim.")}
    (tmp_path / "ours").mkdir()
    write_folder(tmp_path / "ours", TensorSource(held), made, engine.config.model, str(tmp_path / "base"))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, wanted = (AdapterFolder(tmp_path / name, engine.config.model) for name in ("ours", "theirs"))
    assert ours.names() == wanted.names()
    for name in ours.names():
        x = torch.empty(ours.info(name)[0])
        y = torch.empty_like(x)
        ours.read_into(name, (0,) * x.dim(), x)
        wanted.read_into(name, (0,) * y.dim(), y)
        assert torch.equal(x == 0, y == 0)
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)
    loaded = peft.PeftModel.from_pretrained(load(tmp_path / "base", dtype=torch.float32), tmp_path / "ours")
    with torch.no_grad():
        want, got = (m.eval()(input_ids=batch["tokens"]).logits for m in (theirs, loaded))
    assert (want - got).abs().max() < 1e-3
