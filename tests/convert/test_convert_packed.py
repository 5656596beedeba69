"""Weights in 4 and 8 bit with scales are read into bf16, equal to what transformers or the rule makes of them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megallm.base.errors import CheckpointError, UsageError
from megallm.convert import convert
from megallm.convert.convert import ConvertRequest
from megallm.convert.weights import HfReader
from tests.convert.families import LAYERED
from tests.convert.test_convert_moe_layouts import CASES
from tests.convert.test_convert_parity import loaded
from tests.convert.tiny import make

GPT_OSS = next(one for one in LAYERED if one.name == "gpt-oss")
GPT_OSS = dataclasses.replace(
    GPT_OSS, arguments=GPT_OSS.arguments | {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2}
)
BLOCK = (8, 16)


def set_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.fixture
def mxfp4(tmp_path):
    """A gpt-oss whose experts are in MXFP4, and what transformers makes of them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = make(tmp_path / "hf", GPT_OSS, torch.bfloat16)
    weights, plain = load_file(folder / "model.safetensors"), {}
    draw = torch.Generator().manual_seed(2)
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = weights.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=draw)
        scales = torch.randint(119, 127, shape, dtype=torch.uint8, generator=draw)
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.bfloat16)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    set_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": []})
    return folder, plain


def test_mxfp4_is_read_as_transformers_reads_it(mxfp4, tmp_path):
    folder, plain = mxfp4
    done = convert.run(ConvertRequest("megallm", str(folder), str(tmp_path / "ours")))
    assert done["dtype"] == "bfloat16"
    convert.run(ConvertRequest("hf", str(tmp_path / "ours"), str(tmp_path / "back"), verify=True))
    back = loaded(tmp_path / "back")
    assert len(plain) == 4
    for name, want in plain.items():
        assert back[name].dtype == torch.bfloat16 and torch.equal(back[name], want), name
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())


def test_a_box_of_a_packed_tensor_is_that_part_of_it(mxfp4):
    """Ranks read boxes: rows and columns that begin inside a byte's pair and a scale's group."""
    with HfReader(mxfp4[0]) as reader:
        name = "layers.1.moe.experts.gate_up.weight"
        full, _ = reader.info(name)
        whole, part = torch.empty(full), torch.empty(2, 1, 7, 40)
        reader.read_into(name, (0, 0, 0, 0), whole)
        reader.read_into(name, (1, 1, 5, 13), part)
        assert torch.equal(part, whole[1:3, 1:2, 5:12, 13:53]) and part.unique().numel() > 8


def test_scales_of_another_shape_are_refused(mxfp4, tmp_path):
    folder, _ = mxfp4
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj_scales"
    weights[name] = weights[name][:, 1:].contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"down_proj_blocks is U8 .* with scales U8"):
        HfReader(folder)
    set_config(folder, quantization_config={"quant_method": "awq"})
    with pytest.raises(UsageError, match="quantization_config is of 'awq'; mxfp4 and fp8"):
        HfReader(folder)


def test_fp8_with_block_scales_is_read_into_bf16(tmp_path):
    folder = make(tmp_path / "hf", CASES["deepseek_v3"], torch.bfloat16)
    weights, plain = load_file(folder / "model.safetensors"), {}
    draw = torch.Generator().manual_seed(3)
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        rows, columns = weights[name].shape
        values = torch.randn(rows, columns, generator=draw).to(torch.float8_e4m3fn)
        scales = torch.rand(-(-rows // BLOCK[0]), -(-columns // BLOCK[1]), generator=draw) / 8
        weights |= {name: values, f"{name}_scale_inv": scales}
        each = torch.empty(rows, columns)
        for i in range(rows):
            for j in range(columns):
                each[i, j] = values[i, j].float() * scales[i // BLOCK[0], j // BLOCK[1]]
        plain[name] = each.to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    method = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
    set_config(folder, quantization_config=method)
    convert.run(ConvertRequest("megallm", str(folder), str(tmp_path / "ours")))
    convert.run(ConvertRequest("hf", str(tmp_path / "ours"), str(tmp_path / "back"), verify=True))
    back = loaded(tmp_path / "back")
    assert len(plain) > 20 and all(torch.equal(back[name], want) for name, want in plain.items())
