"""What a run with adapters does besides: the base model stays as it is, and checkpoints hold what
is trained alone, with the base by its path and hash.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megallm.base.errors import CheckpointError
from megallm.checkpoint.reader import CheckpointReader
from megallm.convert.hf_config import read_config
from megallm.engine.config import EngineConfig
from megallm.engine.engine import Engine, Mesh, Part, Prepare
from megallm.models.config import VOCABULARY_HEADS, ModelConfig
from megallm.models.decoder import Stage
from megallm.optim.config import GroupConfig
from megallm.peft import adalora, inject, start
from megallm.peft.checkpoint import base_reference, open_base, trained_parts
from megallm.peft.config import PeftConfig
from megallm.peft.dropout import drop_hidden
from megallm.peft.export import export
from megallm.peft.noise import add_noise
from megallm.peft.sources import Joined
from megallm.training.finetune import FinetuneConfig
from megallm.training.starting import check_source, model_of
from megallm.training.weights import build_engine, starting_weights

FOLDER = "adapter"  # of the run: PEFT's form of what was trained


class FrozenBase:
    """Builds the engine of a run on conversations, and says what its checkpoints hold.

    `meta` is what they remember: `base` names the weights that adapters stand on, `peft` what the
    adapters are. Both are empty where all is trained. `further` changes a stage after the
    adapters are in their slots.
    """

    def __init__(self, config: FinetuneConfig, further: Prepare | None = None) -> None:
        self.config, self.further = config, further
        self.peft = _with_head(start.resolve(config.peft, config.model), config.model)
        self.meta: dict[str, Any] = {}

    @property
    def adapted(self) -> bool:
        """Returns whether anything is trained beside a frozen base."""
        return self.peft.method != "none"

    @property
    def engine_config(self) -> EngineConfig:
        """Returns that of the run with the param groups of what is frozen and of the method before
        those of `optim.groups`.
        """
        engine = self.config.engine
        frozen = tuple(GroupConfig(match=pattern, frozen=True) for pattern in self.config.freeze)
        groups = (*frozen, *inject.param_groups(self.peft), *engine.optim.groups)
        return dataclasses.replace(engine, optim=dataclasses.replace(engine.optim, groups=groups))

    def prepare(self, stage: Stage) -> None:
        """Fill the slots of a stage and freeze the rest; see `Engine.build`."""
        if self.adapted:
            inject.prepare_adapters(self.peft, self.config.model, self.config.run.seed)(stage)
        if self.further is not None:
            self.further(stage)

    def build(self, mesh: Mesh, found: Path | None) -> tuple[Engine, str]:
        """Returns the engine with the weights that the run starts or goes on with, and a clause
        that says which; collective over the world.

        Errors: `CheckpointError` where the base is not there any more, or has other weights.
        """
        if not self.adapted:
            return build_engine(self.engine_config, mesh, found, self.prepare)
        self.meta["peft"] = json.loads(json.dumps(dataclasses.asdict(self.peft)))
        engine = Engine(self.engine_config, mesh, self.prepare)
        if self.peft.method == "adalora":
            adalora.attach(engine, self.peft, self.config.train.steps)
        if found is not None:
            return engine, self._resume(engine, found)
        with starting_weights(self.config.model, mesh) as weights:
            start.fill(engine, weights.source, [self.peft])
            self.meta["base"] = base_reference(weights.folder, mesh)
            return engine, f"{weights.begin} with new adapters ({self.peft.method})"

    def _resume(self, engine: Engine, found: Path) -> str:
        """Fill the base and then what is trained."""
        with ExitStack() as stack:
            reader = stack.enter_context(CheckpointReader(found))
            folder = self._base_of(reader, engine.mesh)
            base = stack.enter_context(open_base(folder, self.config.model))
            engine.load(Joined(reader, base))
            return f"resumed at step {reader.step} with adapters ({self.peft.method}) of {folder}"

    def _base_of(self, reader: CheckpointReader, mesh: Mesh) -> Path:
        """Returns the folder of the base that a checkpoint stands on: where it was, or where the
        configuration says that it is now.
        """
        base = reader.meta.get("base")
        if not isinstance(base, dict):
            raise CheckpointError(f"{reader.folder} names no base model for its adapters.")
        model = self.config.model
        for folder in dict.fromkeys((base["path"], model.hf or model.init)):
            if Path(folder).is_dir():
                self.meta["base"] = base_reference(folder, mesh)
                if self.meta["base"]["xxh3_128"] == base["xxh3_128"]:
                    return Path(folder)
        raise CheckpointError(
            f"{reader.folder} holds adapters of the base model {base['path']} (hash "
            f"{base['xxh3_128']}), which is not there any more, or has other weights now: put back "
            "those that the run began with, there or where model.hf or model.init says."
        )

    def parts(self, engine: Engine) -> Iterator[Part]:
        """Yields what this rank owns of a checkpoint."""
        return trained_parts(engine) if self.adapted else engine.parts()

    def export(self, engine: Engine) -> None:
        """Write what was trained to RUN/adapter as PEFT has it; collective over the world."""
        if self.adapted:
            folder = Path(self.config.run.dir) / FOLDER
            export(engine, self.peft, folder, self.config.model.hf, overwrite=True)


def in_training_only(alpha: float, dropout: float, seed: int) -> Prepare:
    """Returns what puts NEFTune's noise on the embeddings of a stage, and dropout into it; each of
    the two for a number above 0.
    """

    def add(stage: Stage) -> None:
        if alpha:
            add_noise(stage, alpha, seed)
        if dropout:
            drop_hidden(stage, dropout, seed)

    return add


def _with_head(peft: PeftConfig, model: ModelConfig) -> PeftConfig:
    """Returns the adapters' configuration with a head of classes or values, and values beside a
    head, trained in full: they are new, and frozen they would stay as the seed made them.
    """
    new = {"head": model.head not in VOCABULARY_HEADS, "critic": model.critic is not None}
    more = [name for name, here in new.items() if here and name not in peft.modules_to_save]
    if peft.method == "none" or not more:
        return peft
    return dataclasses.replace(peft, modules_to_save=(*peft.modules_to_save, *more))


def frozen_engine(
    config: FinetuneConfig, source: str | None, key: str, mesh: Mesh, same_model: bool = True
) -> Engine:
    """Returns an engine with the weights that the run starts from, or with those of `source` (a
    Hugging Face folder, a run or a step of one), none of them trained; collective over the world.

    `key` of the configuration names `source`.
    `same_model`: `source` has the sizes of the run's model; otherwise it has its own. Nothing of it
    is updated: its weights are always divided, and gradients are summed in no order.
    """
    if source is not None:
        check_source(key, source)
        place = "hf" if (Path(source) / "config.json").is_file() else "init"
        model = config.model
        if not same_model:
            known = read_config(Path(source)).model if place == "hf" else model_of(source)
            model = known.resolve()
            layout = dataclasses.replace(config.layout, stages=None)
            config = dataclasses.replace(config, layout=layout)
        model = dataclasses.replace(model.described, **{place: source})
        config = dataclasses.replace(config, model=model, peft=type(config.peft)())
    zero = dataclasses.replace(config.zero, stage=3)
    train = dataclasses.replace(config.train, determinism="none")
    frozen = {"freeze": ("*",), "optim": type(config.optim)(), "zero": zero, "train": train}
    return FrozenBase(dataclasses.replace(config, **frozen)).build(mesh, None)[0]
