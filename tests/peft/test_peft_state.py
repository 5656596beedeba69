"""Adapters beside each other, reference models, and checkpoints of adapters alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megallm.base.errors import CheckpointError, UsageError
from megallm.checkpoint import store
from megallm.checkpoint.reader import CheckpointReader
from megallm.convert.weights import HfReader
from megallm.engine.engine import Engine
from megallm.losses.language import NextToken
from megallm.optim.config import OptimConfig
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.parallel.recompute import TOKEN_KEYS
from megallm.peft.checkpoint import base_reference, load, trained_parts
from megallm.peft.config import PeftConfig
from megallm.peft.export import export
from megallm.peft.inject import param_groups, prepare_adapters, prepare_all
from megallm.peft.reference import off, using
from megallm.peft.start import fill, resolve, start_from_base
from tests.engine.tiny import MODEL, SEEN, batches, config_of, share
from tests.peft.hf import model_of, save
from tests.ranks import run_ranks

LORA = PeftConfig("lora", dim=3)
REF = PeftConfig("lora", dim=3, name="ref")


def engine_with(*configs: PeftConfig, optim: OptimConfig = SEEN, frozen=(), **options: Any) -> Engine:
    prepared = prepare_all(list(configs), MODEL, seed=3, frozen=frozen)
    engine = Engine.build(config_of(optim=optim, **options), Mesh.single(), prepared)
    start_from_base(engine)
    return engine


def scores(engine: Engine) -> torch.Tensor:
    return torch.stack(engine.log_probs(batches(2)))


def stepped(engine: Engine, count: int = 1) -> Engine:
    for step in range(count):
        engine.train_step(batches(2, seed=step), NextToken(), 0.05)
    return engine


@pytest.mark.parametrize("config", [
    LORA, PeftConfig("lora", ("all-linear", "lm_head", "embed_tokens"), dim=3), PeftConfig("lora", dora=True)
])  # fmt: skip
def test_it_starts_as_the_base_bit_for_bit(config):
    base = Engine.build(config_of(), Mesh.single())
    expected = scores(base)
    engine, in_head = engine_with(config), "lm_head" in config.targets
    if in_head:  # one product of wider matrices: its sums may be rounded otherwise
        torch.testing.assert_close(scores(engine), expected, rtol=1e-14, atol=1e-14)
    else:
        assert torch.equal(scores(engine), expected)
    stepped(engine)
    assert not torch.equal(scores(engine), expected)
    with off(engine):
        assert torch.equal(scores(engine), expected)
    assert not torch.equal(scores(engine), expected)


def test_the_adapter_of_a_tied_head_leaves_the_embedding():
    engine = engine_with(PeftConfig("lora", ("lm_head",), dim=3))
    before = engine.model.stages[0].embedding.weight.clone()
    stepped(engine, 2)
    assert torch.equal(engine.model.stages[0].embedding.weight, before)
    assert engine.model.stages[0].head.adapter["default"].lora_B.abs().max() > 0


def test_an_adapter_is_the_reference_of_another():
    engine = engine_with(LORA, REF, frozen=("ref",))
    with using(engine, "default"):
        before = scores(engine)
        stepped(engine, 2)
        after = scores(engine)
    frozen = [m.name for b in engine.parameters.flat if b.frozen for m in b.plan.members]
    assert any(".adapter.ref." in name for name in frozen)
    with using(engine, "ref"):
        assert torch.equal(scores(engine), before)
    assert not torch.equal(after, before)
    with pytest.raises(UsageError, match="no adapter 'other'"), using(engine, "other"):
        pass


def test_no_reference_where_the_base_is_trained():
    engine = engine_with(PeftConfig("lora", dim=3, modules_to_save=("*norm",)))
    with pytest.raises(UsageError, match="modules_to_save"), off(engine):
        pass


def test_lora_plus_scales_the_rate_of_b():
    config = PeftConfig("lora", dim=3, lr_b=16.0)
    sgd = OptimConfig(rule="sgd", clip=0.0)
    moved = []
    for groups in ((), param_groups(config)):
        optim = OptimConfig(rule=sgd.rule, clip=0.0, groups=groups)
        engine = stepped(engine_with(config, optim=optim))
        moved.append(dict(engine.model.stages[0].named_parameters()))
    for name, x in moved[0].items():
        if name.endswith("lora_B"):
            torch.testing.assert_close(moved[1][name], 16 * x)
    assert param_groups(LORA) == ()


def test_dropout_needs_numbers_of_samples_and_is_off_without_gradients():
    engine = engine_with(PeftConfig("lora", dim=3, dropout=0.5))
    expected = scores(engine_with(LORA))
    assert torch.equal(scores(engine), expected)
    with pytest.raises(UsageError, match="samples"):
        stepped(engine)
    assert TOKEN_KEYS.get() is None


def trained(layout: Layout, folder: str, base: str, more: int) -> list:
    """Train from a folder's base, save adapters alone, go on; or resume there when `more` is 0."""
    mesh = Mesh.start(layout) if layout.world > 1 else Mesh.single()
    with HfReader(base) as source:
        config = config_of(source.model)
        engine = Engine(config, mesh, prepare_adapters(PeftConfig("lora", dim=2, dora=True), source.model))
        if more:
            engine.fill(source)
            start_from_base(engine)
    if more:
        for step in range(2):
            engine.train_step(share(batches(4, tokens=16, seed=step), mesh), NextToken(), 0.05)
        meta = {"engine": engine.counters(), "base": base_reference(base, mesh)}
        store.save(folder, 2, list(trained_parts(engine)), meta, mesh)
    else:
        with CheckpointReader(Path(folder) / "step-00000002") as reader:
            load(engine, reader)
    engine.train_step(share(batches(4, tokens=16, seed=2), mesh), NextToken(), 0.05)
    return [(p.name, p.offset, p.tensor.clone()) for p in engine.parts()]


def test_adapters_alone_are_saved_and_resumed_at_another_layout(tmp_path):
    model_of("llama", tmp_path / "base")
    base, folder = str(tmp_path / "base"), str(tmp_path / "run")
    on = {name: x for name, _, x in trained(Layout(), folder, base, more=1)}
    again = {name: x for name, _, x in trained(Layout(), folder, base, more=0)}
    assert on.keys() == again.keys() and all(torch.equal(on[name], x) for name, x in again.items())
    for pieces in run_ranks(4, trained, Layout(tp=2, pp=2), folder, base, 0):
        for name, offset, x in pieces:
            box = tuple(slice(a, a + n) for a, n in zip(offset, x.shape, strict=True))
            torch.testing.assert_close(x, on[name][box], rtol=1e-8, atol=1e-11)
    with CheckpointReader(Path(folder) / "step-00000002") as reader:
        assert all(".adapter." in name for name in reader.names())
    step = sum(f.stat().st_size for f in (tmp_path / "run/step-00000002").glob("*.safetensors"))
    assert step < (tmp_path / "base/model.safetensors").stat().st_size


def exported(layout: Layout, base: str, adapter: str, out: str) -> None:
    """Start from a folder of PEFT's and write it again."""
    mesh = Mesh.start(layout) if layout.world > 1 else Mesh.single()
    with HfReader(base) as source:
        config = resolve(PeftConfig("lora", adapter=adapter, lr_b=4.0), source.model)
        assert config.lr_b == 4.0
        zero = 3 if layout.dp > 1 else 0
        engine = Engine(config_of(source.model, zero=zero), mesh, prepare_adapters(config, source.model))
        fill(engine, source, [config])
    export(engine, config, Path(out), base)
    with pytest.raises(UsageError, match="out"):
        export(engine, config, Path(out), base)


@pytest.mark.parametrize("layout", [Layout(tp=4), Layout(pp=2, tp=2), Layout(dp=2, tp=2)])
@pytest.mark.parametrize("name", ["dora, ranks and alphas", "experts"])
def test_every_layout_writes_the_same_folder(name, layout, tmp_path):
    saved, out = save(name, tmp_path), tmp_path / "out"
    run_ranks(4, exported, layout, str(saved.base), str(saved.adapter), str(out))
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (out, saved.adapter))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[key].double()) for key, x in ours.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


def test_another_base_is_refused(tmp_path):
    model_of("llama", tmp_path / "base")
    trained(Layout(), str(tmp_path / "run"), str(tmp_path / "base"), more=1)
    model = model_of("llama", tmp_path / "other")
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="other weights"):
        trained(Layout(), str(tmp_path / "run"), str(tmp_path / "base"), more=0)
    (tmp_path / "base").rename(tmp_path / "gone")
    with (
        HfReader(tmp_path / "gone") as source,
        CheckpointReader(tmp_path / "run/step-00000002") as reader,
        pytest.raises(CheckpointError, match="not there"),
    ):
        load(Engine(config_of(source.model), Mesh.single(), prepare_adapters(LORA, source.model)), reader)
