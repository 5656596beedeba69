"""Fills the slots of a model with the adapters of a configuration, and freezes the rest.

A method is a row of METHODS: a function that puts its adapters into one stage on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from operator import attrgetter

from torch import nn

from megallm.base.config import raise_problems
from megallm.models.config import ModelConfig
from megallm.models.decoder import Stage
from megallm.models.heads import VocabularyHead
from megallm.models.parallel_model import Prepare
from megallm.optim.config import GroupConfig
from megallm.parallel.tensor import ADAPTER, Adaptable, Linear
from megallm.peft import adalora, bottleneck, ia3, lora, prompts
from megallm.peft.config import ALL_LINEAR, PeftConfig
from megallm.peft.dropout import Dropout, watch_tokens
from megallm.peft.injection import Injection
from megallm.peft.slots import put, slots_of
from megallm.peft.targets import HEAD, find_modules, find_targets, match_targets

FillMethod = Callable[[Stage, Injection], None]


def fill_lora(stage: Stage, injection: Injection) -> None:
    """Put LoRA and its kin beside each target of the stage."""
    config, seed = injection.config, injection.seed
    for name, targets in groupby(injection.chosen, attrgetter("module")):
        base = slot_at(stage, name)
        if base is None:
            continue
        members = []
        for target in targets:
            owner = stage if target.kind == HEAD else base
            dropout = Dropout.of(config.dropout, seed, f"{name}[{target.member}]", owner)
            members.append((target, lora.LowRankOptions.of(config, target, dropout)))
        is_head = isinstance(base, VocabularyHead)
        head = lora.LowRankHead(stage, members[0][1]) if is_head else None
        made = lora.low_rank_of(base, members) if head is None else head
        put(base, config.name, made)
    if config.dropout:
        watch_tokens(stage)


METHODS: dict[str, FillMethod] = {
    "lora": fill_lora,
    "adalora": adalora.fill_adalora,
    "ia3": ia3.fill_ia3,
    "prefix": prompts.fill_prefix,
    "prompt": prompts.fill_prompt,
    "p-tuning": prompts.fill_prompt,
    "houlsby": bottleneck.fill_bottleneck,
    "parallel": bottleneck.fill_bottleneck,
}


def quantize(stage: Stage) -> None:
    """Hold every frozen matrix of the blocks in 4 bit (QLoRA); embeddings, the head and routers
    stay as they are."""
    for name, module in stage.named_modules():
        in_block = name.startswith(("layers.", "mtp.")) and ADAPTER not in name
        if in_block and isinstance(module, Linear) and not module.weight.requires_grad:
            module.quantize()


def prepare_adapters(config: PeftConfig, model: ModelConfig, seed: int = 0) -> Prepare:
    """Returns what `Engine.build` calls with each stage on the meta device: fills slots with new
    adapters, freezes everything else but `modules_to_save`.

    `model` is resolved, `seed` is the run's. Raises UsageError for values that cannot be used and
    for targets that the model does not have.
    """
    return prepare_all([config], model, seed)


def prepare_all(
    configs: Sequence[PeftConfig], model: ModelConfig, seed: int = 0, frozen: Collection[str] = ()
) -> Prepare:
    """Returns the same with several adapters at once, of different names; those named in `frozen`
    are never trained. All are in use until `reference.using` says otherwise.
    """
    raise_problems([problem for config in configs for problem in config.problems()])
    wanted = [config for config in configs if config.method != "none"]
    injections = [plan_injection(config, model, seed) for config in wanted]
    saved = {name for config in wanted for name in saved_modules(config, model)}

    def fill(stage: Stage) -> None:
        if not injections:
            return
        stage.requires_grad_(False)
        for injection in injections:
            METHODS[injection.config.method](stage, injection)
        for _, module in slots_of(stage):
            for name in frozen:
                if name in module.adapter:
                    module.adapter[name].requires_grad_(False)
        for name, module in stage.named_modules():
            if name in saved:
                module.requires_grad_(True)
        if any(config.quantize == "nf4" for config in wanted):
            quantize(stage)

    return fill


def plan_injection(config: PeftConfig, model: ModelConfig, seed: int) -> Injection:
    """Choose the targets. Raises UsageError."""
    found = find_targets(model)
    if config.method == "ia3" and config.targets == (ALL_LINEAR,):
        chosen = ia3.usual_targets(found)
    else:
        chosen = match_targets(config.targets, found)
    if config.method == "lora":
        lora.check_targets(config, model, chosen)
    return Injection(config, model, tuple(chosen), seed)


def saved_modules(config: PeftConfig, model: ModelConfig) -> list[str]:
    """Returns the logical names of the base's modules that are trained in full."""
    found = match_targets(config.modules_to_save, find_modules(model), "peft.modules_to_save")
    return [target.module for target in found]


def slot_at(stage: Stage, name: str) -> Adaptable | None:
    """Returns the module of this logical name with a slot; None where another stage has it.

    A tied head without anything of its own gets a module, so that its adapter has a place.
    """
    if name == "head" and stage.span.last and stage.head is None:
        stage.head = VocabularyHead(stage.config, stage.mesh, stage.sp)
    if name == "embedding" and not stage.span.first:
        return None
    found: dict[str, nn.Module] = dict(stage.named_modules())
    return found.get(name)


def param_groups(config: PeftConfig) -> tuple[GroupConfig, ...]:
    """Returns the groups that a method adds before those of `optim.groups`: LoRA+'s rate of B."""
    if config.method != "lora" or config.lr_b == 1.0:
        return ()
    return (GroupConfig(match=r"/\.lora_(embedding_)?B$/", lr_scale=config.lr_b),)
