"""A step of GRPO and of DPO beside TRL's own trainers: the cases of bench/posttrain.py with prompts that answers share.

Ours is what `megallm grpo` and `megallm dpo` do with the answers: rows in which a prompt stands once, where that is
cheaper. Theirs is `GRPOTrainer` and `DPOTrainer` as they are, their loss on the same tokens, log-probs of the sampling
policy and advantages, then AdamW. LoRA on both sides, the reference of DPO by the adapter switched off.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

BETA, HIGH = 0.1, 0.2


class Case(NamedTuple):
    """`groups` prompts of `prompt` tokens, `count` answers of `answer` tokens to each."""

    prompt: int
    answer: int
    count: int
    groups: int


CASES = {
    "grpo-short-15M": Case(64, 48, 8, 4), "grpo-long8-15M": Case(256, 64, 8, 2),
    "grpo-long16-15M": Case(256, 64, 16, 1),
    "pairs-15M": Case(192, 64, 2, 4), "pairs-short-15M": Case(96, 96, 2, 4),
}  # fmt: skip
Step = Callable[[int], float]


def texts(case: str, vocab: int, step: int) -> tuple[Any, Any, Any]:
    """Prompts `[groups, P]`, answers `[groups, count, N]`, advantages `[groups, count]` of one of eight steps."""
    import torch

    prompt, answer, count, groups = CASES[case]
    draw = torch.Generator().manual_seed(step % 8)
    prompts = torch.randint(3, vocab, (groups, prompt), generator=draw)
    answers = torch.randint(3, vocab, (groups, count, answer), generator=draw)
    return prompts, answers, torch.randn(groups, count, generator=draw)


def ours(case: str, engine: Any, lr: float, shared_prefix: Any) -> Step:
    """The engine on rows in which answers share their prompt."""
    import numpy as np
    import torch

    from megallm.losses.policy import policy_loss
    from megallm.losses.preference import Preference
    from megallm.peft.reference import off
    from megallm.training.responses import Response, ResponseRows
    from megallm.training.shared_prefix import sharing_of

    model, (_, size, count, groups) = engine.config.model, CASES[case]
    sharing = sharing_of(shared_prefix, model, "shared_prefix")
    rows = ResponseRows(engine, count * groups, 2, False, torch.float32, sharing)
    loss = Preference(beta=BETA) if case.startswith("pairs") else policy_loss("grpo", low=HIGH, high=HIGH)
    old = [-math.log(model.vocab_size)] * size

    def step(number: int) -> float:
        prompts, answers, advantages = texts(case, model.vocab_size, number)
        drawn = []
        for group, i in np.ndindex(groups, count):
            ids = prompts[group].tolist(), answers[group, i].tolist()
            one = Response(len(drawn), group, 1, *ids, old, "stop", 0, old=old)
            one.advantages = [float(advantages[group, i])] * size
            drawn.append(one)
        batches = rows.batches(drawn)
        if case.startswith("pairs"):
            with off(engine):
                batches[0]["ref_log_probs"] = engine.log_probs(batches)[0]
        return engine.train_step(batches, loss, lr).loss

    return step


def theirs(case: str, model: Any, lr: float) -> Step:
    """TRL's trainer on `model`, PEFT's."""
    import torch
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    _, size, count, groups = CASES[case]
    vocab = model.config.vocab_size
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>")),
        pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
    )  # fmt: skip
    quiet: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "report_to": "none", "disable_tqdm": True, "beta": BETA if case.startswith("pairs") else 0.0,
    }  # fmt: skip
    if case.startswith("pairs"):
        row = {"prompt": "a", "chosen": "b", "rejected": "c"}
        args = trl.DPOConfig(**quiet, per_device_train_batch_size=groups, max_length=None)
        data = Dataset.from_list([row] * groups)
        trainer = trl.DPOTrainer(model, args=args, train_dataset=data, processing_class=words)
    else:
        args = trl.GRPOConfig(
            **quiet, per_device_train_batch_size=count * groups, num_generations=count, max_completion_length=size,
            loss_type="grpo", epsilon=HIGH,
        )  # fmt: skip
        data = Dataset.from_list([{"prompt": "a"}] * groups)
        trainer = trl.GRPOTrainer(
            model, lambda completions, **_: [0.0] * len(completions), args, data, processing_class=words
        )
        trainer.current_gradient_accumulation_steps = 1
    model = trainer.model.train()
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    def inputs(number: int) -> dict[str, torch.Tensor]:
        prompts, answers, advantages = texts(case, vocab, number)
        if case.startswith("pairs"):
            asked = prompts.repeat(2, 1)
            ids = torch.cat((asked, answers.transpose(0, 1).flatten(0, 1)), 1)  # all chosen ones first
            counted = torch.zeros_like(ids)
            counted[:, asked.shape[1] :] = 1
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": counted}
        asked, said = prompts.repeat_interleave(count, 0), answers.flatten(0, 1)
        return {
            "prompt_ids": asked, "prompt_mask": torch.ones_like(asked), "completion_ids": said,
            "completion_mask": torch.ones_like(said), "advantages": advantages.flatten(),
            "old_per_token_logps": torch.full(said.shape, -math.log(vocab)),
            "num_items_in_batch": torch.tensor(said.numel()),
        }  # fmt: skip

    def step(number: int) -> float:
        batch = inputs(number)
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step
