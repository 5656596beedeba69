"""(IA)3, prefix, prompt and P-tuning go to PEFT's folders and come from them: the same logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megallm.base.errors import UsageError
from megallm.convert.weights import HfReader
from megallm.engine.engine import Engine
from megallm.inference.answer import Answer, Ending
from megallm.inference.generator import Generator
from megallm.inference.samples import Request
from megallm.inference.sampling import Sampling
from megallm.losses.language import NextToken
from megallm.models.config import ModelConfig
from megallm.parallel.mesh import Mesh
from megallm.peft.config import PeftConfig
from megallm.peft.files import write_folder
from megallm.peft.inject import prepare_adapters
from megallm.peft.reading import AdapterFolder
from megallm.peft.sources import Joined, TensorSource
from tests.engine.tiny import batches, config_of, state_of

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
# Trainable parameters in PEFT: 2 layers, hidden 64, ffn 96, keys of 2 x 16.
COUNTS = {"ia3": 320, "prefix": 384, "prompt": 192, "p-tuning": 5440}
TOKENS = torch.tensor([[5, 9, 2, 7, 11, 3, 1, 8], [4, 4, 6, 1, 2, 9, 9, 10]])


def theirs(method: str) -> peft.PeftConfig:
    common = {"task_type": "CAUSAL_LM"}
    return {
        "ia3": lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            **common,
        ),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **common),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **common),
        "p-tuning": lambda: peft.PromptEncoderConfig(
            num_virtual_tokens=3, encoder_hidden_size=32, **common
        ),
    }[method]()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny Llama as transformers writes it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def log_probs_of(module: nn.Module) -> Tensor:
    """Of each next token, by a model of transformers or PEFT."""
    with torch.no_grad():
        logits = module.eval()(input_ids=TOKENS).logits[:, -TOKENS.shape[1] :]
    return logits.log_softmax(-1)[:, :-1].gather(-1, TOKENS[:, 1:, None])[..., 0]


def ours_of(engine: Engine) -> Tensor:
    rows, length = TOKENS[:, 1:].shape
    batch = {"tokens": TOKENS[:, :-1], "labels": TOKENS[:, 1:]}
    batch |= {"positions": torch.arange(length).expand(rows, -1)}
    return engine.log_probs([batch | {"mask": torch.ones(rows, length, dtype=torch.bool)}])[0]


def hugging_face(base: Path) -> nn.Module:
    return transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)


def engine_of(base: Path, config: PeftConfig, adapter: AdapterFolder | None = None) -> Engine:
    """Ours with the base's weights, and an adapter from the seed or from a folder."""
    with HfReader(base) as reader:
        model: ModelConfig = reader.model
        made = config_of(model, precision="fp32")
        engine = Engine.build(made, Mesh.single(), prepare_adapters(config, model))
        engine.fill(reader if adapter is None else Joined(adapter, reader))
    return engine


@pytest.mark.parametrize("method", COUNTS)
def test_ours_in_peft(method, base, tmp_path):
    config = PeftConfig(method, virtual_tokens=3, hidden=32)
    engine = engine_of(base, config)
    engine.train_step(batches(2, tokens=8), NextToken(), 0.05)
    held = {name: x for name, x in state_of(engine).items() if not name.startswith("optim.")}
    trained = [x.numel() for name, x in held.items() if ".adapter." in name]
    assert sum(trained) == COUNTS[method]
    write_folder(tmp_path, TensorSource(held), config, engine.config.model, str(base))
    loaded = peft.PeftModel.from_pretrained(hugging_face(base), tmp_path)
    want, got = ours_of(engine), log_probs_of(loaded)
    assert (want - got).abs().max() <= 1e-5
    assert (log_probs_of(hugging_face(base)) - got).abs().max() > 1e-2


@pytest.mark.parametrize("method", COUNTS)
def test_theirs_in_ours(method, base, tmp_path):
    torch.manual_seed(1)
    model = peft.get_peft_model(hugging_face(base), theirs(method))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == COUNTS[method]
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    want = log_probs_of(model)
    model.save_pretrained(tmp_path)
    with HfReader(base) as reader:
        adapter = AdapterFolder(tmp_path, reader.model)
    engine = engine_of(base, adapter.config, adapter)
    assert (want - ours_of(engine)).abs().max() <= 1e-5
    # Negative control: the positions of the text count, and so does each tensor.
    held = {name: x for name, x in state_of(engine).items() if not name.startswith("optim.")}
    wrong = TensorSource({name: x * (1.1 if ".adapter." in name else 1) for name, x in held.items()})
    engine.fill(wrong)
    assert (want - ours_of(engine)).abs().max() > 1e-4


def test_bottlenecks_come_back(base, tmp_path):
    config = PeftConfig("houlsby", hidden=5)
    engine = engine_of(base, config)
    engine.train_step(batches(2, tokens=8), NextToken(), 0.05)
    held = {name: x for name, x in state_of(engine).items() if not name.startswith("optim.")}
    write_folder(tmp_path, TensorSource(held), config, engine.config.model, str(base))
    adapter = AdapterFolder(tmp_path, engine.config.model)
    assert adapter.config.hidden == 5 and adapter.config.method == "houlsby"
    assert torch.equal(ours_of(engine_of(base, adapter.config, adapter)), ours_of(engine))


def test_what_peft_has_no_place_for(base, tmp_path):
    latent = ModelConfig(
        family="llama", num_layers=1, hidden_size=24, num_heads=4, vocab_size=61, max_positions=64,
        mla={"kv_lora_dim": 7, "nope_head_size": 3, "rope_head_size": 4, "value_head_size": 5},
    ).resolve()  # fmt: skip
    config = PeftConfig("prefix", virtual_tokens=3)
    engine = Engine.build(config_of(latent), Mesh.single(), prepare_adapters(config, latent))
    with pytest.raises(UsageError, match="latent"):
        write_folder(tmp_path, TensorSource(state_of(engine)), config, latent, None)


@pytest.mark.parametrize("method", ["prefix", "prompt", "p-tuning"])
def test_generates_what_peft_generates(base, tmp_path, method):
    """Greedy answers to prompts of two lengths, from an adapter of PEFT's, one after another."""
    torch.manual_seed(2)
    module = peft.get_peft_model(hugging_face(base), theirs(method)).eval()
    module.save_pretrained(tmp_path)
    adapter = AdapterFolder(tmp_path, HfReader(base).model)
    engine = engine_of(base, adapter.config, adapter)
    prompts = [[5, 9, 2, 7], [11, 3, 1, 8, 6, 4]]
    requests = [Request(n, prompt, Answer(Ending(12))) for n, prompt in enumerate(prompts)]
    made = Generator(engine.model).generate(requests, Sampling(temperature=0.0))
    for prompt, sample in zip(prompts, made, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            given = module.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        assert sample.tokens == given[0, -12:].tolist()
