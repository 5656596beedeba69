"""Rules about precision and about what is kept of a forward pass. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megallm.models.compute import PARTS
from megallm.models.config import ModelConfig
from megallm.ops import backends
from megallm.ops.low_precision import RECIPES, Fp8Options, LossScaleOptions
from megallm.run.config import JobConfig, TrainConfig
from megallm.training.rules.problem import Facts, Problem, Rules

_DEFAULTS = TrainConfig()
TE_RECIPES = ("delayed", "tensorwise", "blockwise")  # those that Transformer Engine has too


def precision(facts: Facts) -> Iterator[Problem]:
    """Yields what is wrong with train.loss_scale, train.fp8, train.recompute* and train.offload."""
    config, model = facts.config, facts.model
    yield from _loss_scale(config.train)
    yield from _unused_fp8(config.train)
    if config.train.precision == "fp8":
        yield from _fp8_layers(config.train.fp8, model)
        yield from _fp8_backend(config)
    yield from _recompute(config, model)


def _loss_scale(train: TrainConfig) -> Iterator[Problem]:
    scale = train.loss_scale
    if train.precision != "fp16" and scale != _DEFAULTS.loss_scale:
        sentence = (
            f"train.loss_scale is of train.precision fp16; the precision is {train.precision}."
        )
        yield Problem(
            "loss_scale", sentence, ({"train.precision": "fp16"}, _back("train.loss_scale", scale))
        )
    elif scale.minimum > scale.initial:
        sentence = (
            f"train.loss_scale.minimum {scale.minimum:g} is greater than train.loss_scale.initial "
        )
        yield Problem(
            "loss_scale",
            sentence + f"{scale.initial:g}.",
            ({"train.loss_scale.minimum": scale.initial},),
        )


def _unused_fp8(train: TrainConfig) -> Iterator[Problem]:
    """Keys of train.fp8 that nothing reads."""
    changed = _back("train.fp8", train.fp8)
    if train.precision != "fp8":
        if changed:
            sentence = (
                f"{next(iter(changed))} is of train.precision fp8; the precision is "
                f"{train.precision}."
            )
            yield Problem("fp8", sentence, ({"train.precision": "fp8"}, changed))
        return
    recipe = RECIPES[train.fp8.recipe]
    reads = {"history": recipe.delayed, "margin": recipe.scaled == "tensor"}
    for name, read in reads.items():
        key = f"train.fp8.{name}"
        if key in changed and not read:
            sentence = (
                f"{key} is {getattr(train.fp8, name)}, which train.fp8.recipe "
                f"{train.fp8.recipe} does not use."
            )
            yield Problem("fp8", sentence, ({key: changed[key]}, {"train.fp8.recipe": "delayed"}))


def _fp8_layers(fp8: Fp8Options, model: ModelConfig) -> Iterator[Problem]:
    layers = model.num_layers
    if fp8.bf16_first + fp8.bf16_last >= layers:
        sentence = (
            f"train.fp8.bf16_first {fp8.bf16_first} and train.fp8.bf16_last "
            f"{fp8.bf16_last} leave none of the "
        )
        sentence += f"{layers} layers (model.num_layers) in FP8."
        fixes: list[dict[str, Any]] = [{"train.precision": "bf16"} | _back("train.fp8", fp8)]
        if fp8.bf16_last < layers - 1:
            fixes.insert(0, {"train.fp8.bf16_first": layers - 1 - fp8.bf16_last})
        yield Problem("fp8_layers", sentence, tuple(fixes))


def _back(section: str, given: Fp8Options | LossScaleOptions) -> dict[str, Any]:
    """The defaults of those keys of a section that say something else."""
    plain = type(given)()
    return {
        f"{section}.{name}": value
        for name, value in vars(plain).items()
        if getattr(given, name) != value
    }


def _fp8_backend(config: JobConfig) -> Iterator[Problem]:
    fp8, ours = config.train.fp8, {"train.fp8.backend": "megallm"}
    if fp8.backend != "transformer_engine":
        return
    if backends.version("transformer_engine") is None:
        sentence = (
            f"train.fp8.backend is transformer_engine, {backends.missing('transformer_engine')}."
        )
        yield Problem("fp8_backend", sentence, (ours,))
    if fp8.recipe not in TE_RECIPES:
        sentence = (
            f"train.fp8.backend transformer_engine has no recipe {fp8.recipe}; it has "
            f"{', '.join(TE_RECIPES)}."
        )
        yield Problem("fp8_backend", sentence, (ours, {"train.fp8.recipe": "tensorwise"}))
    if config.layout.schedule.startswith("zb"):
        sentence = (
            f"layout.schedule {config.layout.schedule} puts weight gradients off, "
            "which train.fp8.backend "
        )
        fixes = (ours, {"layout.schedule": "1f1b", "layout.chunks": 1})
        yield Problem("fp8_backend", sentence + "transformer_engine does not do.", fixes)


def _recompute(config: JobConfig, model: ModelConfig) -> Iterator[Problem]:
    train, plain = config.train, {"train.recompute_modules": _DEFAULTS.recompute_modules}
    modules = train.recompute_modules
    if train.recompute != "selective":
        if modules != _DEFAULTS.recompute_modules:
            sentence = (
                "train.recompute_modules says what train.recompute selective makes "
                "again; train.recompute is "
            )
            yield Problem(
                "recompute",
                sentence + f"{train.recompute}.",
                ({"train.recompute": "selective"}, plain),
            )
        if train.recompute == "none" and train.recompute_layers is not None:
            sentence = (
                f"train.recompute_layers is {train.recompute_layers}, but "
                "train.recompute none makes nothing "
            )
            yield Problem(
                "recompute",
                sentence + "again.",
                ({"train.recompute_layers": None}, {"train.recompute": "full"}),
            )
        return
    if not modules:
        sentence = "train.recompute_modules is empty: selective makes nothing again."
        yield Problem("recompute", sentence, (plain, plain | {"train.recompute": "none"}))
    kept = tuple(dict.fromkeys(part for part in modules if PARTS[part] not in modules))
    if kept != modules:
        sentence = (
            f"train.recompute_modules {list(modules)} names something twice: attention "
            "contains core, mlp "
        )
        yield Problem(
            "recompute", sentence + "contains activation.", ({"train.recompute_modules": kept},)
        )
    if "norm" in modules:
        yield from _norms(config, model, tuple(part for part in modules if part != "norm"))


def _norms(config: JobConfig, model: ModelConfig, others: tuple[str, ...]) -> Iterator[Problem]:
    """Where making norms again would free nothing."""
    fix: dict[str, Any] = {"train.recompute_modules": others}
    if not others:
        fix = {"train.recompute": "none", "train.recompute_modules": _DEFAULTS.recompute_modules}
    head = "train.recompute_modules has norm, "
    if config.layout.sp and config.layout.tp > 1:
        sentence = "whose output layout.sp gathers over tp: what is kept is the gathered copy."
        yield Problem("recompute_norm", head + sentence, (fix, {"layout.sp": False}))
    if config.train.offload:
        yield Problem(
            "recompute_norm",
            head + "which does not go together with train.offload.",
            (fix, {"train.offload": False}),
        )
    if config.train.precision == "fp8":
        yield Problem(
            "recompute_norm",
            head + "but linears in FP8 keep their inputs in FP8, not the norms' outputs.",
            (fix,),
        )
    if model.norm_place == "post":
        yield Problem(
            "recompute_norm",
            head + "but with model.norm_place post their outputs are the residual stream.",
            (fix,),
        )


RULES = Rules(
    resolved={
        precision: (
            "layout.tp",
            "model.num_layers",
            "train.fp8.bf16_first",
            "train.fp8.bf16_last",
        )
    }
)
