"""Losses and gradients of TRL 1.16's SFT and reward trainers as a whole, written to trl_trainers.json.

Runs in the environment of trl_golden.py:

    /tmp/peers/bin/python tests/peers/trl_trainers.py [--output FILE]

Each trainer is built as a user builds it, on a tiny Llama whose weights `value` says. The batches are
those of its own data loader, the losses those of its `compute_loss`, divided as its training loop
divides them, and the gradients those of all weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from trl_golden import QUIET, short, tokenizer

OUTPUT = Path(__file__).with_name("trl_trainers.json")
SIZES = {
    "vocab_size": 11, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
ENDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
TEXTS = [("ab", "cdefg"), ("abcd", "h"), ("h", "gfab"), ("cab", "bb")]
PAIRS = [("abc", "abd", 0.5), ("hgf", "hgfedcb", -0.25), ("ca", "cb", 1.25), ("bdfh", "b", 0.0)]


def weights(model: torch.nn.Module) -> torch.nn.Module:
    """The model in float64 with the values that tests/losses/test_trl_trainers.py gives ours."""
    model = model.double()
    with torch.no_grad():
        for number, (_, param) in enumerate(sorted(model.named_parameters())):
            places = torch.arange(param.numel(), dtype=torch.float64)
            param.copy_((0.4 * torch.sin(places * (1.3 + 0.1 * number) + number)).view_as(param))
            if param.dim() == 1:
                param.add_(1)
    return model


def gradients(model: torch.nn.Module) -> dict:
    return {name: param.grad.tolist() for name, param in model.named_parameters()}


def plain(batch: dict) -> dict:
    return {name: x.tolist() for name, x in batch.items() if isinstance(x, torch.Tensor)}


SFT = {
    "completion": {}, "everything": {"completion_only_loss": False}, "dft": {"loss_type": "dft"},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
}  # fmt: skip


def sft(folder: str) -> dict:
    data = Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in TEXTS])
    found = {}
    for name, options in SFT.items():
        quiet = QUIET | {"per_device_train_batch_size": len(TEXTS)} | options
        trainer = trl.SFTTrainer(
            weights(LlamaForCausalLM(LlamaConfig(**SIZES, **ENDS))),
            args=trl.SFTConfig(folder, **quiet),
            train_dataset=data,
            processing_class=tokenizer(),
        )
        model, total = trainer.model.train(), 0.0
        batches = list(trainer.get_train_dataloader())
        trainer.current_gradient_accumulation_steps = len(batches)
        count = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
        for batch in batches:
            loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
            loss.backward()
            total += loss.item()
        found[name] = {"batches": [plain(batch) for batch in batches], "loss": total, "gradients": gradients(model)}
    return found


def reward(folder: str) -> dict:
    found = {}
    for name, center in (("plain", None), ("both", 0.05)):
        rows = [{"chosen": chosen, "rejected": rejected} for chosen, rejected, _ in PAIRS]
        if center:
            rows = [row | {"margin": margin} for row, (_, _, margin) in zip(rows, PAIRS, strict=True)]
        trainer = trl.RewardTrainer(
            weights(LlamaForSequenceClassification(LlamaConfig(**SIZES, **ENDS, num_labels=1))),
            args=trl.RewardConfig(folder, **QUIET, center_rewards_coefficient=center),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
        )
        (batch,) = trainer.get_train_dataloader()
        given = plain(batch)
        loss = trainer.compute_loss(trainer.model.train(), dict(batch))
        loss.backward()
        found[name] = {"center": center or 0.0, "batches": [given], "loss": loss.item()}
        found[name]["gradients"] = gradients(trainer.model)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    with tempfile.TemporaryDirectory() as folder:
        golden = {"sft": sft(folder), "reward": reward(folder)}
    for cases in golden.values():
        for case in cases.values():
            for name, gradient in case["gradients"].items():
                case["gradients"][name] = short(gradient, 8)
    golden = {"versions": {m.__name__: m.__version__ for m in (trl, transformers, torch)}, "sizes": SIZES} | golden
    parser.parse_args().output.write_text(json.dumps(golden) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
