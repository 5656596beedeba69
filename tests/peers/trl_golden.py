"""Losses and gradients of TRL 1.16 on fixed log-probs, written to trl_golden.json.

Runs in an environment of its own (requirements.txt beside this file):

    python -m venv /tmp/peers && /tmp/peers/bin/pip install -r tests/peers/requirements.txt
    /tmp/peers/bin/python tests/peers/trl_golden.py [--output FILE]

Each trainer of TRL is built as a user builds it, on a tiny model. Its own loss then runs on outputs
that we hand it, float64 leaves, so that the loss and its gradient with respect to every log-prob (or
logit, or score) are those of TRL's code and of nothing else.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

OUTPUT = Path(__file__).with_name("trl_golden.json")
ROWS, TOKENS, CLASSES = 8, 6, 5
QUIET = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
    "disable_tqdm": True, "per_device_train_batch_size": ROWS,
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefgh"])}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip


class Outputs:
    """A model that answers with the outputs it was given, whatever it is asked."""

    def __init__(self, **outputs: torch.Tensor):
        self.outputs = SimpleNamespace(**outputs)
        self.config = config()

    def __call__(self, *args, **kwargs) -> SimpleNamespace:
        return self.outputs


def numbers(x: torch.Tensor) -> list:
    return x.detach().tolist()


class Cases:
    """Inputs of a fixed seed, rounded so that JSON says them exactly."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(20)
        draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
        near = lambda x, scale: (x + scale * draw(*x.shape)).round(decimals=4)  # noqa: E731
        self.policy = -draw(ROWS, TOKENS).abs().mul(1.5).round(decimals=4)
        self.reference, self.old = near(self.policy, 0.8), near(self.policy, 0.3)
        self.rollout = near(self.old, 0.2)
        self.reference_sums = draw(ROWS).mul(4).sub(8).round(decimals=3)  # in another order, for aot
        self.entropy = draw(ROWS, TOKENS).abs().round(decimals=4)
        self.mask = torch.tensor(
            [
                [0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0], [1, 0, 1, 1, 1, 0],
                [0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1],
            ]
        )  # fmt: skip
        self.advantages = draw(ROWS).round(decimals=3)
        self.logits = draw(ROWS, TOKENS, CLASSES).round(decimals=3)
        self.teacher_logits = draw(ROWS, TOKENS, CLASSES).round(decimals=3)
        self.labels = torch.randint(0, CLASSES, (ROWS, TOKENS), generator=random)
        self.scores = draw(ROWS).mul(2).round(decimals=3)

    def inputs(self) -> dict:
        return {name: numbers(x) for name, x in vars(self).items()}


def ran(loss: torch.Tensor, leaf: torch.Tensor) -> dict:
    (gradient,) = torch.autograd.grad(loss, leaf)
    return {"loss": loss.item(), "gradient": numbers(gradient)}


def short(x, digits: int = 12):
    """The same structure with so many digits a number."""
    if isinstance(x, dict):
        return {key: short(value, digits) for key, value in x.items()}
    if isinstance(x, list):
        return [short(value, digits) for value in x]
    return float(f"{x:.{digits}g}") if isinstance(x, float) else x


def with_prompt(x: torch.Tensor, fill: float = 0) -> torch.Tensor:
    """A column for the token before the first label."""
    return torch.cat([torch.full_like(x[:, :1], fill), x], dim=1)


def fused(log_prob: torch.Tensor, mask: torch.Tensor, entropy: torch.Tensor) -> Outputs:
    """The outputs of TRL's fused head: log-probs are 0 where no label counts."""
    return Outputs(
        log_probs=log_prob * mask, entropy=entropy, mean_logits=entropy, is_top1=mask.bool(),
        log_sum_sq_probs=entropy,
    )  # fmt: skip


# Pairs. TRL's batch is all chosen answers, then all rejected ones: the even and the odd rows of ours.

ORDER = torch.cat([torch.arange(0, ROWS, 2), torch.arange(1, ROWS, 2)])
DPO = {
    **{kind: {} for kind in (
        "sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
        "apo_down", "discopop", "sigmoid_norm",
    )},
    "exo_pair": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.2},
    "aot-smoothed": {"loss_type": ["aot", "aot_unpaired"], "loss_weights": [1.0, 1.0], "label_smoothing": 0.1},
    "mixture": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.3, 1.0]},
}  # fmt: skip


def dpo(cases: Cases, folder: str) -> dict:
    found = {}
    data = Dataset.from_list([{"prompt": "a", "chosen": "bc", "rejected": "cd"}] * ROWS)
    for name, options in DPO.items():
        options = {"loss_type": [name], "beta": 0.3} | options
        trainer = trl.DPOTrainer(
            f"{folder}/model",
            args=trl.DPOConfig(folder, **QUIET, **options),
            train_dataset=data,
            processing_class=tokenizer(),
        )
        trainer.model.train()
        trainer.precompute_ref_logps = True  # the reference's sums come in the batch
        leaf = cases.policy.clone().requires_grad_()
        sums = (cases.reference * cases.mask).sum(-1)
        sums = cases.reference_sums if name.startswith("aot") else sums
        chosen, rejected = sums[ORDER].chunk(2)
        batch = {
            "input_ids": with_prompt(cases.labels, 3)[ORDER],
            "attention_mask": with_prompt(torch.ones_like(cases.mask), 1)[ORDER],
            "completion_mask": with_prompt(cases.mask)[ORDER],
            "ref_chosen_logps": chosen,
            "ref_rejected_logps": rejected,
        }
        model = fused(leaf[ORDER], cases.mask[ORDER], cases.entropy[ORDER])
        found[name] = {"options": options} | ran(trainer._compute_loss(model, batch, False), leaf)
        metrics = trainer._metrics["train"]
        found[name]["metrics"] = {key: metrics[key][0] for key in metrics if key.startswith(("rewards/", "logps/"))}
    return found


def kto(cases: Cases, folder: str) -> dict:
    found = {}
    data = Dataset.from_list([{"prompt": "a", "completion": "bc", "label": i % 2 == 0} for i in range(ROWS)])
    for name, options in {
        "kto": {}, "weighted": {"desirable_weight": 1.33, "undesirable_weight": 0.8},
        "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired"},
    }.items():  # fmt: skip
        trainer = trl.KTOTrainer(
            f"{folder}/model",
            args=trl.KTOConfig(folder, **QUIET, beta=0.3, **options),
            train_dataset=data,
            processing_class=tokenizer(),
        )
        trainer.model.train()
        trainer.precompute_ref_logps = True
        leaf = cases.policy.clone().requires_grad_()
        # Answers of other prompts have log-probs of their own; here those of `rollout` and `old`.
        given, ref = (cases.old * cases.mask).sum(-1), (cases.rollout * cases.mask).sum(-1)
        if (given - ref).mean() < 0:
            given, ref = ref, given
        trainer._compute_kl_logps = lambda *args, given=given, on=trainer: given if on.calculate_KL else None
        batch = {
            "input_ids": with_prompt(cases.labels, 3),
            "attention_mask": with_prompt(torch.ones_like(cases.mask), 1),
            "completion_mask": with_prompt(cases.mask),
            "label": torch.arange(ROWS) % 3 != 1,
            "ref_logps": (cases.reference * cases.mask).sum(-1),
            "ref_KL_logps": ref,
        }
        model = fused(leaf, cases.mask, cases.entropy)
        found[name] = {"options": {"beta": 0.3} | options}
        found[name] |= ran(trainer._compute_loss(model, batch, False), leaf)
        found[name]["kl"] = {"policy": numbers(given), "reference": numbers(ref)}
        found[name]["z0"] = trainer._metrics["train"]["kl"][0]
    return found


def reference_free(cases: Cases, folder: str) -> dict:
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    data = Dataset.from_list([{"prompt": "a", "chosen": "bc", "rejected": "cd"}] * ROWS)
    ids, mask = with_prompt(cases.labels, 3)[ORDER], with_prompt(cases.mask)[ORDER]
    batch = {}
    for side, rows in (("chosen", slice(0, ROWS // 2)), ("rejected", slice(ROWS // 2, ROWS))):
        batch |= {
            f"{side}_input_ids": ids[rows],
            f"{side}_labels": ids[rows].masked_fill(mask[rows] == 0, -100),
            f"{side}_attention_mask": torch.ones_like(ids[rows]),
        }
    found = {}
    for name, kind, options in (
        ("cpo", "sigmoid", {"cpo_alpha": 0.7}),
        ("cpo-smoothed", "sigmoid", {"cpo_alpha": 0.0, "label_smoothing": 0.1}),
        ("cpo-hinge", "hinge", {"cpo_alpha": 0.0, "beta": 0.2}),
        ("cpo-ipo", "ipo", {"cpo_alpha": 0.0}),
        ("simpo", "simpo", {"cpo_alpha": 0.0, "simpo_gamma": 0.6}),
        ("cpo-simpo", "simpo", {"cpo_alpha": 0.4, "simpo_gamma": 0.6}),
        ("orpo", None, {}),
    ):  # fmt: skip
        options = {"beta": 0.3} | ({"loss_type": kind} if kind else {}) | options
        trainer_class, config_class = (CPOTrainer, CPOConfig) if kind else (ORPOTrainer, ORPOConfig)
        trainer = trainer_class(
            f"{folder}/model",
            args=config_class(folder, **QUIET, **options),
            train_dataset=data,
            processing_class=tokenizer(),
        )
        leaf = cases.logits.clone().requires_grad_()
        # Logits of the token before each label; those after the last label are never read.
        logits = torch.cat([leaf, torch.zeros_like(leaf[:, :1])], dim=1)[ORDER]
        loss, metrics = trainer.get_batch_loss_metrics(Outputs(logits=logits), dict(batch))
        metrics = {key: x for key, x in metrics.items() if key.startswith(("rewards/", "logps/"))}
        found[name] = {"options": options, "metrics": metrics} | ran(loss, leaf)
    return found


def reward(cases: Cases, folder: str) -> dict:
    found = {}
    data = Dataset.from_list([{"chosen": "abc", "rejected": "acd"}] * ROWS)
    one = config()
    one.num_labels = 1
    for name, center, margin in (("plain", None, None), ("both", 0.01, [0.5, 1.25, 0.0, -0.25])):
        trainer = trl.RewardTrainer(
            LlamaForSequenceClassification(one),
            args=trl.RewardConfig(folder, **QUIET, center_rewards_coefficient=center),
            train_dataset=data,
            processing_class=tokenizer(),
        )
        leaf = cases.scores.clone().requires_grad_()
        batch = {"attention_mask": torch.ones(ROWS, TOKENS)}
        if margin:
            batch["margin"] = torch.tensor(margin, dtype=torch.float64)
        loss = trainer.compute_loss(Outputs(logits=leaf[ORDER][:, None]), batch)
        found[name] = {"center": center or 0.0, "margin": margin} | ran(loss, leaf)
    return found


GRPO = {
    "grpo": {}, "bnpo": {}, "dr_grpo": {}, "dapo": {"epsilon_high": 0.28},
    "cispo": {"epsilon_high": 1.1}, "sapo": {},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.03,
             "epsilon_high": 0.04},
    "grpo-delta": {"loss_type": "grpo", "delta": 1.3},
    "grpo-kl": {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False},
    "grpo-kl-corrected": {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": True},
    "grpo-entropy": {"loss_type": "grpo", "entropy_coef": 0.2},
    "grpo-opsm": {"loss_type": "grpo", "off_policy_mask_threshold": 0.02},
    "dapo-temperature": {"loss_type": "dapo", "temperature": 0.7},
}  # fmt: skip


def grpo(cases: Cases, folder: str) -> dict:
    found = {}
    data = Dataset.from_list([{"prompt": "ab"}] * ROWS)
    for name, options in GRPO.items():
        options = {"loss_type": name, "beta": 0.0, "epsilon": 0.2, "temperature": 1.0} | options
        trainer = trl.GRPOTrainer(
            f"{folder}/model",
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=trl.GRPOConfig(folder, **QUIET, num_generations=ROWS, max_completion_length=16, **options),
            train_dataset=data,
        )
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        batch = {
            "prompt_ids": torch.full((ROWS, 1), 3),
            "prompt_mask": torch.ones(ROWS, 1, dtype=torch.long),
            "completion_ids": cases.labels,
            "completion_mask": torch.ones_like(cases.mask),
            "tool_mask": cases.mask,
            "advantages": cases.advantages,
            "old_per_token_logps": cases.old,
            "ref_per_token_logps": cases.reference,
            "sampling_per_token_logps": cases.rollout,
            "num_items_in_batch": cases.mask.sum(),
        }
        if name == "dapo-temperature":
            leaf = cases.logits.clone().requires_grad_()
            log_probs = torch.log_softmax(leaf / trainer.temperature, -1)
            log_prob = log_probs.gather(-1, cases.labels[..., None])[..., 0]
            batch["old_per_token_logps"] = log_prob.detach()
            model = fused(log_prob, torch.ones_like(cases.mask), cases.entropy)
        else:
            leaf = cases.policy.clone().requires_grad_()
            model = fused(leaf, torch.ones_like(cases.mask), cases.entropy)
        loss = trainer._compute_loss(model, batch)
        found[name] = {"options": options} | ran(loss, leaf)
        metrics = trainer._metrics["train"]
        found[name]["metrics"] = {key: metrics[key][0] for key in metrics if len(metrics[key]) == 1}
    return found


# What TRL's trainers make of rewards: 2 groups of 4, two functions, None where there is NaN.

REWARDS = [
    [1.0, 0.5], [0.0, None], [None, None], [2.0, -1.0],
    [0.5, 0.25], [None, 1.0], [1.5, None], [0.0, 0.0],
]  # fmt: skip
WEIGHTS = [1.0, 0.5]


def advantages(cases: Cases, folder: str) -> dict:
    found = {}
    table = torch.tensor([[float("nan") if x is None else x for x in row] for row in REWARDS], dtype=torch.float64)
    data = Dataset.from_list([{"prompt": "ab"}] * ROWS)
    for name, options in {
        "group": {}, "batch": {"scale_rewards": "batch"}, "none": {"scale_rewards": "none"},
        "decoupled": {"multi_objective_aggregation": "normalize_then_sum"}, "rloo": None,
    }.items():  # fmt: skip
        rloo = options is None
        trainer_class, config_class = (trl.RLOOTrainer, trl.RLOOConfig) if rloo else (trl.GRPOTrainer, trl.GRPOConfig)
        trainer = trainer_class(
            f"{folder}/model",
            reward_funcs=[lambda completions, **_: [0.0] * len(completions)] * 2,
            args=config_class(
                folder, **QUIET, num_generations=4, max_completion_length=4, beta=0.0,
                reward_weights=WEIGHTS, **(options or {}),
            ),
            train_dataset=data,
        )  # fmt: skip
        trainer.model.train()
        trainer._calculate_rewards = lambda *args, **kwargs: table
        batch = trainer._generate_and_score_completions([{"prompt": "ab"}] * ROWS)
        found[name] = numbers(batch["advantages"].double())
    return {"rewards": REWARDS, "weights": WEIGHTS, "advantages": found}


def rloo(cases: Cases, folder: str) -> dict:
    trainer = trl.RLOOTrainer(
        f"{folder}/model",
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.RLOOConfig(folder, **QUIET, num_generations=ROWS, beta=0.0, epsilon=0.4),
        train_dataset=Dataset.from_list([{"prompt": "ab"}] * ROWS),
    )
    trainer.model.train()
    leaf = cases.policy.clone().requires_grad_()
    batch = {
        "prompt_ids": torch.full((ROWS, 1), 3),
        "prompt_mask": torch.ones(ROWS, 1, dtype=torch.long),
        "completion_ids": cases.labels,
        "completion_mask": cases.mask,
        "advantages": cases.advantages,
        "old_logps": (cases.old * cases.mask).sum(-1),
    }
    model = fused(leaf, torch.ones_like(cases.mask), cases.entropy)
    return {"rloo": {"options": {"epsilon": 0.4}} | ran(trainer._compute_loss(model, batch), leaf)}


def distill(cases: Cases) -> dict:
    from trl.experimental.gkd import GKDTrainer

    found = {}
    labels = cases.labels.masked_fill(cases.mask == 0, -100)
    for beta in (0.0, 0.1, 0.5, 1.0):
        leaf = cases.logits.clone().requires_grad_()
        loss = GKDTrainer.generalized_jsd_loss(leaf, cases.teacher_logits, labels, beta=beta, temperature=0.9)
        found[str(beta)] = {"temperature": 0.9} | ran(loss, leaf)
    return found


def lines(golden: dict) -> str:
    """JSON with one line a case."""
    parts = []
    for section, cases in golden.items():
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
        parts.append(f" {json.dumps(section)}: {{\n{rows}\n }}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    cases = Cases()
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config()).save_pretrained(f"{folder}/model")
        tokenizer().save_pretrained(f"{folder}/model")
        golden = {
            "versions": {m.__name__: m.__version__ for m in (trl, transformers, torch)},
            "inputs": cases.inputs(),
            "dpo": dpo(cases, folder),
            "kto": kto(cases, folder),
            "reference_free": reference_free(cases, folder),
            "reward": reward(cases, folder),
            "grpo": grpo(cases, folder) | rloo(cases, folder),
            "advantages": advantages(cases, folder),
            "distill": distill(cases),
        }
    parser.parse_args().output.write_text(lines(short(golden)), encoding="utf-8")


if __name__ == "__main__":
    main()
