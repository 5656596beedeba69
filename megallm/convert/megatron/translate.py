"""A Megatron-LM launch script as a configuration of megallm. Nothing of the script is run. No torch.

`FLAGS` is the whole knowledge: each flag of Megatron-LM with what it becomes here. `docs/from_megatron.md` is made
from it by `markdown`. Where a flag is absent, Megatron-LM's default is written out, since megallm's often differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from megallm.base.errors import UsageError
from megallm.convert.megatron.data import translate_data, translate_tokenizer
from megallm.convert.megatron.flags import DROPPED, FLAGS, READ, SET, Flag
from megallm.convert.megatron.shell import Shell, read_script, unresolved
from megallm.convert.megatron.translation import Translation, Values, shown_values, unfilled_word
from megallm.ops.low_precision import RECIPES


def translate(source: str, name: str) -> Translation:
    """Returns what the words of a script (or the flags themselves) become. Errors: UsageError
    without any flag.
    """
    shell = read_script(source, name)
    program, words = _arguments(shell)
    found = Translation(given=_flags(words))
    if not found.given:
        raise UsageError(f"{name} holds no flags of Megatron-LM; give a launch script, or the flags as one text.")
    if re.search("bert|t5|mamba|retro|ict|vision|vlm|mimo|biencoder", Path(program).name):
        found.problems.append(f"The script runs {program}: only what pretrain_gpt.py does is translated.")
    if shell.branches:
        lines = ", ".join(map(str, shell.branches[:10]))
        found.problems.append(
            f"Flags are set inside an `if`, a `case` or a loop, in line {lines}: every branch was read, and the later "
            "one wins. Look whether that is what you run."
        )
    for flag, values in found.given.items():
        _translate_flag(flag, values, found)
    for rule in _RULES:
        rule(found)
    found.problems = list(dict.fromkeys(found.problems))  # several rules may read one flag
    return found


def _arguments(shell: Shell) -> tuple[str, list[str]]:
    """The Python file that a script runs and the words behind it (of the last such command with flags).

    Without one, all its words; where these hold no flags, as in a file that others `source`, its variables'.
    """
    program, best = "", []
    for command in shell.commands:
        words = [part for word in command for part in (word.split() if ".py " in word else [word])]  # bash -c "..."
        ends = [index for index, word in enumerate(words) if word.endswith(".py")]
        if ends and any(word.startswith("--") for word in words[ends[-1] :]):
            program, best = words[ends[-1]], words[ends[-1] + 1 :]
    if not best:
        best = [word for words in shell.commands for word in words]
    if not any(word.startswith("--") for word in best):
        texts = [" ".join(values).split() for values in shell.variables.values()]
        best = [word for words in texts if any(word.startswith("--") for word in words) for word in words]
    return program, best


def _flags(words: Iterable[str]) -> Values:
    """Flags with their values, in order; a repeated flag keeps its last values, as argparse does."""
    found: Values = {}
    current: list[str] | None = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            flag, equals, value = word.partition("=")
            current = [value.strip("'\"")] if equals else []
            found.pop(flag, None)
            found[flag] = current
        elif current is not None and word not in ("(", ")"):
            current.append(word.strip("'\""))
    return found


def _translate_flag(flag: str, values: list[str], found: Translation) -> None:
    row = TABLE.get(flag)
    if row is None:
        found.problems.append(f"{flag}{shown_values(values)}: not in the table; look in docs/from_megatron.md.")
        return
    missing = [value for value in values if unfilled_word(value)]
    if missing and row.kind in (SET, READ):
        why = "the script computes {} when it runs" if unresolved(missing[0]) else "{} is a placeholder"
        found.problems.append(f"{flag}{shown_values(values)}: {why.format(missing[0])}; fill it in.")
        if row.kind == SET:
            return
    if row.kind == DROPPED:
        if row.harmless not in (shown_values(values).strip(), "*"):
            found.problems.append(f"{flag}{shown_values(values)}: {row.note}.")
    elif row.kind == SET and row.value is not None:
        found.config[row.key] = row.value
    elif row.kind == SET:
        _set_from(flag, row, found)


def _set_from(flag: str, row: Flag, found: Translation) -> None:
    if row.choices:
        text = found.text(flag)
        if text in row.choices:
            found.config[row.key] = row.choices[text]
        else:
            found.problems.append(f"{flag} {text}: megallm has {', '.join(row.choices)} only.")
        return
    value = found.text(flag) if row.text else found.number(flag)
    if value is not None:
        found.config[row.key] = value


# What depends on several flags. Each rule reads `given` and writes `config` and `problems`.

Rule = Callable[[Translation], None]
_RULES: list[Rule] = []


def _rule(function: Rule) -> Rule:
    _RULES.append(function)
    return function


@_rule
def _defaults(found: Translation) -> None:
    """Megatron-LM's defaults where its flag is absent."""
    for key, value in {
        "model.norm": "layernorm", "model.norm_eps": 1e-5, "model.activation": "gelu", "model.bias": True,
        "model.qk_norm": False, "model.tie_embeddings": True, "model.init_std": 0.02, "model.positions": "learned",
        "data.split": "969,30,1", "data.order": "megatron", "run.seed": 1234, "train.precision": "fp32",
        "optim.rule": "adamw", "optim.min_lr": 0.0, "optim.weight_decay": 0.01, "optim.clip": 1.0,
        "optim.schedule": "linear", "eval.every": 1000, "eval.batches": 100, "log.every": 100,
    }.items():  # fmt: skip
        found.config.setdefault(key, value)
    if found.config["optim.rule"] == "sgd":
        found.config["optim.momentum"] = found.number("--sgd-momentum", 0.9)
        return
    found.config["optim.betas"] = [found.number("--adam-beta1", 0.9), found.number("--adam-beta2", 0.999)]
    found.config["optim.eps"] = found.number("--adam-eps", 1e-8)


@_rule
def _precision(found: Translation) -> None:
    """FP8's recipe and fp16's loss scale; their flags mean nothing in another precision."""
    config = found.config
    if "--fp8-format" in found.given:  # beside --bf16, which is its other half, in any order
        config["train.precision"] = "fp8"
        recipe, form = found.text("--fp8-recipe", "delayed"), found.text("--fp8-format")
        if recipe in RECIPES:
            config["train.fp8.recipe"] = recipe
            kind = RECIPES[recipe].gradients
            if (form == "e4m3") != (kind == "e4m3"):
                found.problems.append(f"--fp8-format {form}: gradients of the recipe {recipe} are {kind} here.")
            if RECIPES[recipe].delayed:
                config["train.fp8.history"] = found.number("--fp8-amax-history-len", 1)
        else:
            found.problems.append(f"--fp8-recipe {recipe}: megallm has {', '.join(RECIPES)}.")
        config["train.fp8.margin"] = found.number("--fp8-margin", 0)
        if "--first-last-layers-bf16" in found.given:
            config["train.fp8.bf16_first"] = found.number("--num-layers-at-start-in-bf16", 1)
            config["train.fp8.bf16_last"] = found.number("--num-layers-at-end-in-bf16", 1)
    if config["train.precision"] == "fp16":
        if "--loss-scale" in found.given:
            found.problems.append(f"--loss-scale {found.text('--loss-scale')}: the scale is always dynamic.")
        config["train.loss_scale.initial"] = min(float(found.number("--initial-loss-scale", 2.0**32)), 2.0**24)
        config["train.loss_scale.minimum"] = float(found.number("--min-loss-scale", 1.0))
        config["train.loss_scale.growth_steps"] = int(found.number("--loss-scale-window", 1000))


@_rule
def _model(found: Translation) -> None:
    config = found.config
    if config["model.positions"] == "rope":
        config.setdefault("model.rope_theta", 10000.0)
    hidden, heads = config.get("model.hidden_size"), config.get("model.num_heads")
    if "model.ffn_hidden_size" not in config and hidden:
        gated = config["model.activation"] == "swiglu"
        config["model.ffn_hidden_size"] = int(4 * hidden * 2 / 3 / 64) * 64 if gated else 4 * hidden
    if heads:
        grouped = "--group-query-attention" in found.given
        config["model.num_kv_heads"] = found.number("--num-query-groups", 1) if grouped else heads
    if "--window-size" in found.given:
        sizes = " ".join(found.given["--window-size"]).replace("(", "").replace(")", "").replace(",", " ").split()
        if len(sizes) == 2 and sizes[0].isdigit() and sizes[1] == "0":
            config["model.sliding_window"] = int(sizes[0]) + 1
        else:
            found.problems.append(
                f"--window-size{shown_values(found.given['--window-size'])}: only `N,0` has a counterpart."
            )
    for flag in ("--attention-dropout", "--hidden-dropout"):
        if found.number(flag, 0.1) != 0:
            given = found.text(flag, "0.1 (its default)")
            found.problems.append(f"{flag} {given}: megallm has no dropout.")
    if "--no-position-embedding" in found.given and config["model.positions"] != "rope":
        found.problems.append("--no-position-embedding: a model without positions has no counterpart.")


@_rule
def _stretch(found: Translation) -> None:
    """Rotary positions made slower: Llama 3.1's form, by one factor, or YaRN's beside latent attention."""
    latent = found.number("--rotary-scaling-factor", 1.0) if "--multi-latent-attention" in found.given else 1.0
    one = found.number("--rotary-seq-len-interpolation-factor")
    if "--use-rope-scaling" in found.given:
        factor = found.number("--rope-scaling-factor", 8.0)
        values = {"scaling": "llama3", "factor": factor, "low_factor": 1.0, "high_factor": 4.0, "positions": 8192}
    elif one:
        values = {"scaling": "linear", "factor": one}
    elif latent > 1 and found.text("--rope-type", "yarn") == "yarn":
        sizes = {"mscale": found.number("--mscale", 1.0), "mscale_all_dim": found.number("--mscale-all-dim", 0.0)}
        values = {"scaling": "yarn", "factor": latent, "positions": 4096} | sizes
    else:
        return
    found.config |= {f"model.rope_{key}": value for key, value in values.items()}


@_rule
def _latent(found: Translation) -> None:
    """Latent attention and further predicted tokens, with Megatron-LM's defaults."""
    if "--multi-latent-attention" in found.given:
        for flag, key, default in (
            ("--kv-lora-rank", "kv_lora_dim", 32),
            ("--q-lora-rank", "q_lora_dim", 0),
            ("--qk-head-dim", "nope_head_size", 128),
            ("--qk-pos-emb-head-dim", "rope_head_size", 64),
            ("--v-head-dim", "value_head_size", 128),
        ):
            found.config[f"model.mla.{key}"] = found.number(flag, default)
        found.config.pop("model.head_size", None)
        found.config["model.qk_norm"] = False  # their flag norms the latents, which is always done here
    if found.number("--mtp-num-layers"):
        found.config["model.mtp.depth"] = found.number("--mtp-num-layers")
        found.config["model.mtp.weight"] = found.number("--mtp-loss-scaling-factor", 0.1)
    found.config["model.family"] = _family(found.config)


@_rule
def _experts(found: Translation) -> None:
    """Experts; without --num-experts their other flags mean nothing."""
    config = found.config
    if not found.number("--num-experts"):
        for key in [key for key in config if key.startswith("model.moe.")]:
            del config[key]
        return
    config["model.moe.num_experts"] = found.number("--num-experts")
    config.setdefault("model.moe.top_k", 2)
    sigmoid = config.get("model.moe.score") == "sigmoid"  # whose scores are always scaled to a sum of 1
    config["model.moe.norm_topk_prob"] = sigmoid or "--moe-router-pre-softmax" not in found.given
    balance = found.given.get("--moe-router-load-balancing-type", ["aux_loss"])
    config["model.moe.aux_coef"] = 0.0 if balance == ["none"] else found.number("--moe-aux-loss-coeff", 0.0)
    if balance != ["seq_aux_loss"] and config["model.moe.aux_coef"]:
        found.problems.append(
            f"--moe-router-load-balancing-type{shown_values(balance)}: here the balancing loss "
            "is that of each sequence, Megatron-LM's seq_aux_loss."
        )
    layers = "".join(found.given.get("--moe-layer-freq", ["1"])).replace(" ", "")
    dense = re.fullmatch(r"\(?\[0\]\*(\d+)\+\[1\]\*\d+\)?", layers)
    if dense is not None:
        config["model.moe.first_dense"] = int(dense[1])
    elif layers.isdigit():
        config["model.moe.every"] = int(layers)
    else:
        found.problems.append(f"--moe-layer-freq {layers}: write model.moe.first_dense and model.moe.every.")


def _family(config: dict[str, Any]) -> str:
    """The family whose switches are nearest; every switch is written out beside it."""
    if config["model.norm"] == "layernorm":
        return "gpt2"
    if config["model.qk_norm"]:
        return "qwen3"
    if config.get("model.qkv_bias") and not config["model.bias"]:
        return "qwen2"
    return "mistral" if config.get("model.sliding_window") else "llama"


@_rule
def _layout(found: Translation) -> None:
    config = found.config
    per_chunk = found.number("--num-layers-per-virtual-pipeline-stage")
    if per_chunk and config.get("model.num_layers"):
        config["layout.chunks"] = int(config["model.num_layers"] / config.get("layout.pp", 1) / per_chunk)
    if config.get("layout.chunks", 1) > 1:
        config["layout.schedule"] = "interleaved"
    sharding = found.text("--data-parallel-sharding-strategy")
    if sharding or found.given.keys() & {"--use-torch-fsdp2", "--use-custom-fsdp", "--use-megatron-fsdp"}:
        config["zero.stage"] = max(TABLE["--data-parallel-sharding-strategy"].choices.get(sharding, 3),
                                   int("--use-distributed-optimizer" in found.given))  # fmt: skip
    if config.get("layout.stages"):
        config["layout.stages"] = config["layout.stages"].replace(",", "")


@_rule
def _batch(found: Translation) -> None:
    config = found.config
    config.setdefault("train.micro_batch", 1)
    if "train.global_batch" not in config:
        config["train.global_batch"] = config["train.micro_batch"]
        found.problems.append(
            "--global-batch-size is absent: Megatron-LM takes micro batch x data-parallel ranks; "
            "set train.global_batch to that."
        )
    samples = int(found.number("--train-samples") or 0)
    if samples:
        config["train.steps"] = _per_step(found, "--train-samples")
        if samples > config["train.steps"] * config["train.global_batch"]:
            config["data.samples"] = samples  # the order of the data is made for all of them
    if "train.steps" not in config and "--train-samples" not in found.given:
        found.problems.append("--train-iters is absent: train.steps has to be given.")
    exit_at = found.number("--exit-interval")
    if exit_at and exit_at < config.get("train.steps", exit_at):
        config["train.stop_at"] = exit_at


def _per_step(found: Translation, flag: str) -> int:
    """A number of samples as a number of steps."""
    return int((found.number(flag) or 0) // found.config["train.global_batch"])


@_rule
def _schedule(found: Translation) -> None:
    config = found.config
    steps = config.get("train.steps")
    horizon = found.number("--lr-decay-iters", steps)
    if "--lr-decay-samples" in found.given:
        horizon = _per_step(found, "--lr-decay-samples")
    if steps and horizon and horizon != steps and config["optim.schedule"] != "constant":
        remedy = (
            f"For the same curve set train.steps={int(horizon)} and train.stop_at={int(steps)}; for the same order of "
            f"the data then data.samples={int(steps * config['train.global_batch'])}."
            if horizon > steps
            else f"Megatron-LM goes on at --min-lr after step {int(horizon)}; here the decay takes until the last step."
        )
        found.problems.append(f"The learning rate decays over {int(horizon)} steps of {int(steps)}. {remedy}")
    if "--lr-warmup-samples" in found.given:
        config["optim.warmup_steps"] = _per_step(found, "--lr-warmup-samples")
    share = found.number("--lr-warmup-fraction")
    if share and horizon:
        config["optim.warmup_steps"] = int(share * horizon)
    last = found.number("--lr-wsd-decay-iters")
    if config["optim.schedule"] == "wsd" and steps:
        if last is None:
            found.problems.append("--lr-decay-style WSD without --lr-wsd-decay-iters: optim.decay_fraction stays 0.2.")
        else:
            config["optim.decay_fraction"] = last / max(1, steps - config.get("optim.warmup_steps", 0))
        if found.text("--lr-wsd-decay-style", "exponential") != "linear":
            found.problems.append("--lr-wsd-decay-style: the last part falls linearly here.")


_rule(translate_data)
_rule(translate_tokenizer)


@_rule
def _saving(found: Translation) -> None:
    save, load = found.text("--save"), found.text("--load")
    if load and load != save and not unfilled_word(load):
        found.problems.append(
            f"--load {load}: a run goes on from its own folder (run.dir); Megatron-LM's checkpoints are not read. "
            "Convert them to a Hugging Face folder and give it as model.hf."
        )
    if "--save-interval" not in found.given:
        found.config["checkpoint.every"] = 0
    found.config["checkpoint.keep"] = 0


# Writing.


def translation_yaml(found: Translation, name: str) -> str:
    """Returns the configuration, with what could not be mapped as comments above it."""
    tree: dict[str, Any] = {}
    for key, value in found.config.items():
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    ordered = {section: tree[section] for section in _SECTIONS if section in tree}
    head = [f"# From {name} by `megallm config --from-megatron-args`; check it with `megallm config FILE`."]
    head += ["# Not mapped:"] if found.problems else ["# Everything was mapped."]
    head += [f"#   {' '.join(problem.split())}" for problem in found.problems]
    body = yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
    return "\n".join(head) + "\n" + body


_SECTIONS = ("run", "model", "layout", "zero", "data", "train", "optim", "checkpoint", "eval", "log")
TABLE: dict[str, Flag] = {name: row for row in FLAGS for name in row.names}


def markdown() -> str:
    """Returns the table of docs/from_megatron.md."""
    lines = ["| Megatron-LM | megallm | note |", "|---|---|---|"]
    for row in FLAGS:
        names = ", ".join(f"`{name}`" for name in row.names)
        lines.append(f"| {names} | {row.shown()} | {row.note} |")
    return "\n".join(lines) + "\n"
