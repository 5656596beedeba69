"""CPU seconds and peak memory of a step of LoRA and of DPO: ours beside PEFT on transformers.

The same base weights, the same start of the adapters, the same tokens, AdamW without clipping, one thread; losses of
the first steps must agree. In bf16 the frozen base is bf16 in both, and PEFT's adapters fp32, as PEFT makes them. Each
system is a process of its own; rounds run A B B A and a ratio is that of a round (`bench/ratio.py`). Memory is the peak
of the process above what it had after its imports.

    python bench/posttrain.py [--cases lora-15M lora-135M dpo-15M] [--precision bf16] [--rounds 5] [--json]

`lora` trains every label of full rows; `sft` rows of uneven lengths, of which the second half counts, packed by us
and padded by transformers; `dpo` the second half of full rows, with the reference by the adapter switched off; `qlora`
is our LoRA with the base in 4 bit beside PEFT's with the base in fp32. On transformers' side this is what TRL's
trainers do by default: whole logits, then the loss of the labels.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ratio import NOISY, Workers, abba, machine, paired_ratio, peak_bytes, resident_bytes

SHAPES = {
    "15M": {"num_layers": 6, "hidden_size": 384, "ffn_hidden_size": 1024, "num_heads": 6, "num_kv_heads": 3,
            "vocab_size": 8192},
    "135M": {"num_layers": 30, "hidden_size": 576, "ffn_hidden_size": 1536, "num_heads": 9, "num_kv_heads": 3,
             "vocab_size": 49152, "tie_embeddings": True},
}  # fmt: skip
# Rows and tokens of a microbatch.
CASES = {
    "lora-15M": (4, 256), "sft-15M": (8, 256), "qlora-15M": (4, 256), "dpo-15M": (8, 128), "lora-135M": (1, 256),
    "sft-135M": (4, 256), "dpo-135M": (2, 128),
}  # fmt: skip
LR, BETA, DIM, ALPHA, SEED = 1e-3, 0.1, 16, 32.0, 1
THEIRS = {
    "attention.q": ["self_attn.q_proj"], "attention.kv": ["self_attn.k_proj", "self_attn.v_proj"],
    "attention.o": ["self_attn.o_proj"], "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down": ["mlp.down_proj"], "attention_norm": ["input_layernorm"], "mlp_norm": ["post_attention_layernorm"],
}  # fmt: skip
Step = Callable[[int], float]


def model_config(size: str) -> Any:
    from megallm.models.config import ModelConfig

    return ModelConfig(family="llama", max_positions=1024, norm_eps=1e-6, **SHAPES[size]).resolve()


def tokens_of(case: str, step: int) -> Any:
    """`[rows, T + 1]` of a step; eight steps that repeat."""
    import torch

    (rows, length), size = CASES[case], case.rpartition("-")[2]
    draw = torch.Generator().manual_seed(step % 8)
    return torch.randint(SHAPES[size]["vocab_size"], (rows, length + 1), generator=draw)


def lengths(case: str, step: int) -> Any:
    """How many tokens each row of a step has."""
    import torch

    rows, most = CASES[case]
    draw = torch.Generator().manual_seed(100 + step % 8)
    if case.startswith("sft"):
        return torch.randint(most // 8, most + 1, (rows,), generator=draw)
    return torch.full((rows,), most)


def answers(case: str, step: int) -> Any:
    """Which labels `[rows, T]` count."""
    import torch

    ends, places = lengths(case, step)[:, None], torch.arange(CASES[case][1])
    return (places < ends) & (places >= (0 if "lora" in case else ends // 2))


def ours(case: str, precision: str) -> Step:
    """The engine, as `megallm sft` and `megallm dpo` drive it."""
    import torch

    from megallm.engine.engine import Engine
    from megallm.launch.process import keep_memory
    from megallm.losses.language import NextToken
    from megallm.losses.preference import Preference
    from megallm.parallel.mesh import Mesh
    from megallm.peft.inject import prepare_adapters
    from megallm.peft.reference import off

    keep_memory()
    wanted = peft_config(case)
    prepare = prepare_adapters(wanted, model_config(case.rpartition("-")[2]))
    engine = Engine.build(engine_config(case, precision), Mesh.single(), prepare)
    dpo = case.startswith("dpo")
    loss = Preference(beta=BETA) if dpo else NextToken()
    positions = torch.arange(CASES[case][1]).expand(CASES[case])

    def step(number: int) -> float:
        text, mask = tokens_of(case, number), answers(case, number)
        batch = {"tokens": text[:, :-1], "labels": text[:, 1:], "positions": positions, "mask": mask}
        if case.startswith("sft"):
            ends = lengths(case, number)
            batch = {name: x[positions < ends[:, None]][None] for name, x in batch.items()}
            batch["cu_seqlens"] = torch.cat((ends.new_zeros(1), ends.cumsum(0))).to(torch.int32)
        if dpo:
            with off(engine):
                batch["ref_log_probs"] = engine.log_probs([batch])[0]
        return engine.train_step([batch], loss, LR).loss

    return step


def peft_config(case: str) -> Any:
    from megallm.peft.config import PeftConfig

    return PeftConfig("lora", dim=DIM, alpha=ALPHA, quantize="nf4" if case.startswith("qlora") else "none")


def engine_config(case: str, precision: str) -> Any:
    from megallm.engine.config import EngineConfig
    from megallm.models.compute import ComputeConfig
    from megallm.optim.config import OptimConfig

    optim = OptimConfig(clip=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    compute = ComputeConfig(precision=precision)
    return EngineConfig(model_config(case.rpartition("-")[2]), optim=optim, compute=compute, seed=SEED)


def their_model(case: str) -> Any:
    """transformers' Llama with our weights, PEFT's LoRA with the start of our adapters."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from megallm.models.build import initial_values
    from megallm.models.compute import ComputeConfig
    from megallm.models.parallel_model import ParallelModel
    from megallm.parallel.config import LayoutConfig
    from megallm.parallel.mesh import Mesh
    from megallm.peft.inject import prepare_adapters

    config = model_config(case.rpartition("-")[2])
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads, tie_word_embeddings=config.tie_embeddings,
            max_position_embeddings=config.max_positions, rope_theta=config.rope_theta,
        )
    )  # fmt: skip
    targets = [name.rpartition(".")[2] for names in THEIRS.values() for name in names if "proj" in name]
    theirs = get_peft_model(theirs, LoraConfig(r=DIM, lora_alpha=ALPHA, target_modules=targets))
    params = dict(theirs.named_parameters())
    wanted = prepare_adapters(peft_config("lora"), config)
    with torch.no_grad():
        entries = ParallelModel(config, LayoutConfig(), ComputeConfig(), Mesh.single(), wanted).entries()
        for name, _, shard, _ in entries:
            value = initial_values(name, shard, (0,) * len(shard.full), shard.full, SEED)
            names = their_names(name)
            for one, part in zip(names, value if len(names) > 1 else [value], strict=True):
                params.pop(one).copy_(part)
    if params:
        raise ValueError(f"no initial weights for {', '.join(params)}")
    return theirs


def their_names(name: str) -> list[str]:
    """The parameters of PEFT's model that one of ours is, or is a stack of."""
    top, base = "base_model.model.", {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
    stem = name.partition(".")[0]
    if stem in base:
        return [f"{top}{base[stem]}.weight"]
    _, layer, rest = name.split(".", 2)
    at = f"{top}model.layers.{layer}."
    if ".adapter." in rest:
        module, _, leaf = rest.partition(".adapter.default.")
        member, _, matrix = leaf.partition(".")
        return [f"{at}{THEIRS[module][int(member)]}.{matrix}.default.weight"]
    module = rest.removesuffix(".weight")
    inner = ".base_layer" if "proj" in THEIRS[module][0] else ""
    return [f"{at}{one}{inner}.weight" for one in THEIRS[module]]


def transformers(case: str, precision: str) -> Step:
    """PEFT's model under torch's AdamW."""
    import torch
    import torch.nn.functional as F

    model = their_model(case).train()
    for param in model.parameters():
        if precision == "bf16" and not param.requires_grad:
            param.data = param.data.bfloat16()
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    def log_probs(text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=text[:, :-1], use_cache=False).logits.float()
        chosen = torch.log_softmax(logits, -1).gather(-1, text[:, 1:, None])[..., 0]
        return (chosen * mask).sum(-1)

    def step(number: int) -> float:
        text, mask = tokens_of(case, number), answers(case, number)
        if case.startswith("dpo"):
            with torch.no_grad(), model.disable_adapter():
                reference = log_probs(text, mask)
            chosen, rejected = (log_probs(text, mask) - reference).view(-1, 2).unbind(1)
            loss = -F.logsigmoid(BETA * (chosen - rejected)).mean()
        else:
            longest = int(lengths(case, number).max())
            seen = torch.arange(longest) < lengths(case, number)[:, None]
            ids, labels = text[:, :longest], text[:, 1 : longest + 1].masked_fill(~mask[:, :longest], -100)
            logits = model(input_ids=ids, attention_mask=seen.long(), use_cache=False).logits.float()
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def serve(system: str, case: str, precision: str) -> None:
    """Answer each line `{"steps": n}` with losses, CPU seconds and the peak of memory."""
    import sys

    import torch

    import megallm.engine.engine
    import megallm.peft.inject  # so that everything is imported before memory is counted

    if system != "megallm":
        import peft
        import transformers as _library

        assert peft and _library
    assert megallm
    torch.set_num_threads(1)
    before = resident_bytes()
    step, number = (ours if system == "megallm" else transformers)(case, precision), 0
    for line in sys.stdin:
        losses, begin = [], time.process_time()
        for _ in range(json.loads(line)["steps"]):
            losses.append(step(number))
            number += 1
        told = {"losses": losses, "seconds": time.process_time() - begin, "peak": peak_bytes() - before}
        print(json.dumps(told), flush=True)


def compare(case: str, precision: str, rounds: int, folder: Path) -> dict[str, Any]:
    """One case: the ratio of times, memory of both, and A/A of ours when there are rounds to spare."""
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "HF_HUB_OFFLINE": "1"}
    command = [__file__, "--cases", case, "--precision", precision, "--serve"]
    with (
        Workers([*command, "megallm"], [0], folder, env) as mine,
        Workers([*command, "transformers"], [0], folder, env) as theirs,
    ):
        first = [system.ask(steps=3)[0] for system in (mine, theirs)]
        gap = max(abs(a - b) for a, b in zip(*(each["losses"] for each in first), strict=True))
        if gap > (2e-3 if precision == "fp32" else 5e-2) and not case.startswith("qlora"):
            raise SystemExit(f"{case}: losses differ by {gap:.1e}: {[each['losses'] for each in first]}")

        def seconds(system: Workers) -> Callable[[], float]:
            return lambda: system.ask(steps=1)[0]["seconds"]

        ratio = paired_ratio(abba(seconds(mine), seconds(theirs), rounds))
        same = paired_ratio(abba(seconds(mine), seconds(mine), max(2, rounds // 2)))
        peaks = [system.ask(steps=1)[0]["peak"] / 2**20 for system in (mine, theirs)]
    return {
        "case": case, "precision": precision, "ratio": ratio.median, "low": ratio.low, "high": ratio.high,
        "loss_gap": gap, "mib": peaks[0], "their_mib": peaks[1], "memory_ratio": peaks[1] / peaks[0],
        "same": same.median,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["lora-15M", "sft-15M", "qlora-15M", "dpo-15M"])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    for name in ("--rank", "--core", "--store"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.cases[0], args.precision)
        return
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for case in args.cases:
            one = compare(case, args.precision, args.rounds, Path(folder))
            found.append(one)
            if not args.json:
                noisy = " (noisy)" if abs(one["same"] - 1) > NOISY else ""
                print(
                    f"{case:<10} {args.precision} time {one['ratio']:.2f}x [{one['low']:.2f}, {one['high']:.2f}], "
                    f"memory {one['mib']:.0f} of {one['their_mib']:.0f} MiB ({one['memory_ratio']:.2f}x less), "
                    f"losses within {one['loss_gap']:.0e}, A/A {one['same']:.2f}{noisy}", flush=True,
                )  # fmt: skip
    if args.json:
        print(json.dumps({"machine": machine(), "cases": found}, indent=1))


if __name__ == "__main__":
    main()
