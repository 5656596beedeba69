"""Merged adapters: PEFT's merge_and_unload on files, and the same model in a running engine."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from megallm.base.errors import UsageError
from megallm.cli import main as cli
from megallm.convert.weights import HfReader
from megallm.engine.engine import Engine
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.peft.inject import prepare_adapters
from megallm.peft.merge import merge, unmerge
from megallm.peft.reading import AdapterFolder
from megallm.peft.sources import Joined
from tests.engine.tiny import config_of
from tests.peft.hf import hf_log_probs, log_probs, save
from tests.ranks import run_ranks

MERGED = ("dora, ranks and alphas", "both ends", "tied head", "fused, transposed", "experts", "modules in full")


@pytest.mark.parametrize("name", MERGED)
def test_a_merged_folder_is_merge_and_unload(name, tmp_path, capsys):
    import peft
    import transformers

    saved = save(name, tmp_path)
    out = tmp_path / "merged"
    code = cli.main(
        ["merge", "--model", str(saved.base), "--adapter", str(saved.adapter), "--output", str(out)]
    )
    assert code == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert done["dtype"] == "float32"
    auto = transformers.AutoModelForCausalLM
    ours = auto.from_pretrained(out, dtype=torch.float32)
    assert float((hf_log_probs(ours, saved.text) - saved.log_probs).abs().max()) < 1e-5
    if name == "tied head":
        assert not ours.config.tie_word_embeddings
        assert torch.equal(*(m.get_input_embeddings().weight for m in (ours, auto.from_pretrained(saved.base))))
        return
    plain = auto.from_pretrained(saved.base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, saved.adapter).merge_and_unload().state_dict()
    for key, x in ours.state_dict().items():
        torch.testing.assert_close(x, theirs[key], rtol=1e-5, atol=1e-6)


def test_the_output_is_not_overwritten(tmp_path, capsys):
    saved = save("two of a stack", tmp_path)
    words = ["merge", "--model", str(saved.base), "--adapter", str(saved.adapter), "--output"]
    assert cli.main([*words, str(saved.adapter)]) == 2
    assert cli.main([*words, str(tmp_path / "new"), "--adapter", str(saved.base)]) == 2
    assert not (tmp_path / "new").exists()
    assert "adapter_config.json" in capsys.readouterr().err


def switched(layout: Layout, base: str, adapter: str, text: Any, options: dict[str, Any]) -> tuple:
    """Differences of log-probabilities: adapted to theirs, merged to adapted; the bits afterwards."""
    mesh = Mesh.start(layout) if layout.world > 1 else Mesh.single()
    with HfReader(base) as source:
        read = AdapterFolder(adapter, source.model)
        engine = Engine(
            config_of(source.model, **options), mesh, prepare_adapters(read.config, source.model)
        )
        engine.fill(Joined(read, source))
    before = [(held.name, held.tensor.clone()) for held in engine.state()]
    adapted = log_probs(engine, text)
    kept = merge(engine)
    merged = log_probs(engine, text)
    unmerge(engine, kept)
    same = all(torch.equal(x, held.tensor) for (_, x), held in zip(before, engine.state(), strict=True))
    back = torch.equal(log_probs(engine, text), adapted)
    return adapted, float((merged - adapted).abs().max()), bool(kept), same and back


@pytest.mark.parametrize(
    ("name", "layout", "options"),
    [
        ("dora, ranks and alphas", Layout(tp=4), {}),
        ("dora, ranks and alphas", Layout(dp=2, tp=2), {"zero": 3}),
        ("both ends", Layout(tp=2, pp=2), {"sp": True}),
        ("experts", Layout(dp=2, tp=2, ep=4), {"sp": True}),
    ],
)
def test_an_engine_merges_and_goes_back(name, layout, options, tmp_path):
    saved = save(name, tmp_path)
    text = saved.text.repeat(1, 2)[:, :17]
    arguments = (str(saved.base), str(saved.adapter), text)
    whole, gap, *_ = switched(Layout(), *arguments, {})
    assert gap < 1e-12
    for adapted, moved, kept, same in run_ranks(layout.world, switched, layout, *arguments, options):
        assert float((adapted - whole).abs().max()) < 1e-11
        assert moved < 1e-12 and kept and same


def test_a_tied_head_is_not_merged_in_place(tmp_path):
    saved = save("tied head", tmp_path)
    with HfReader(saved.base) as source:
        read = AdapterFolder(saved.adapter, source.model)
        engine = Engine(config_of(source.model), Mesh.single(), prepare_adapters(read.config, source.model))
        engine.fill(Joined(read, source))
    with pytest.raises(UsageError, match="tied to the embedding"):
        merge(engine)
