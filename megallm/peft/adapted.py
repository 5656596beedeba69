"""A model with an adapter, opened to be read: a run that holds adapters alone, or a base and a
folder of PEFT's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from megallm.base.errors import CheckpointError, UsageError
from megallm.checkpoint.reader import CheckpointReader
from megallm.convert.folder import is_model_folder
from megallm.convert.weights import Cast, HfReader, WeightSource, stored_model
from megallm.models.config import ModelConfig
from megallm.parallel.mesh import Mesh
from megallm.peft.checkpoint import check_base, open_base
from megallm.peft.config import PeftConfig
from megallm.peft.files import CONFIG
from megallm.peft.inject import Prepare, prepare_adapters
from megallm.peft.reading import AdapterFolder
from megallm.peft.sources import Joined


class AdaptedModel(NamedTuple):
    """The weights of a resolved `model`: `reader` is its run or Hugging Face folder, and says which
    tokenizer it has; `base` and `adapter` have its tensors, the adapter's as `config` says.
    """

    reader: CheckpointReader | HfReader
    model: ModelConfig
    base: WeightSource
    adapter: WeightSource | None = None
    config: PeftConfig | None = None

    @property
    def source(self) -> WeightSource:
        """Returns the tensors of base and adapter together."""
        return self.base if self.adapter is None else Joined(self.adapter, self.base)

    @property
    def prepare_adapters(self) -> Prepare | None:
        """Returns what makes the slots of a stage that the adapter goes into; None without one."""
        return None if self.config is None else prepare_adapters(self.config, self.model)


def config_of(reader: CheckpointReader) -> PeftConfig:
    """Returns what the adapters of a checkpoint are. Errors: CheckpointError."""
    try:
        told = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in reader.meta["peft"].items()
        }
        return replace(PeftConfig(**told), adapter=None)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{reader.folder} does not say which adapters it holds ({error})."
        ) from error


def adapter_folder(path: str) -> str:
    """Returns the folder of PEFT's that a path stands for: itself, or the one that a run left."""
    inner = Path(path) / "adapter"
    return str(inner) if (inner / CONFIG).is_file() else path


@contextmanager
def open_adapted(
    place: Path, adapter: str | None, mesh: Mesh | None = None
) -> Iterator[AdaptedModel]:
    """Yields the model of a Hugging Face or step folder, with the adapter of a folder of PEFT's, or
    that of the step itself; plain without either. Collective over the world where there is a mesh.

    Errors: UsageError for an adapter of another model, and for two of them; CheckpointError for a
    base that is not there any more.
    """
    with ExitStack() as stack:
        if is_model_folder(place):
            reader: CheckpointReader | HfReader = stack.enter_context(HfReader(place))
            base, model = reader, reader.model
        else:
            reader = stack.enter_context(CheckpointReader(place))
            base, model = Cast(reader), stored_model(reader)
            if "base" in reader.meta:
                if adapter is not None:
                    raise UsageError(
                        f"{place} has adapters of its own, beside the base model "
                        f"{reader.meta['base'].get('path')}: leave --adapter out, or name the base."
                    )
                folder = check_base(reader.meta["base"], str(place), mesh)
                own, base = base, stack.enter_context(open_base(folder, model))
                yield AdaptedModel(reader, model, base, own, config_of(reader))
                return
        if adapter is None:
            yield AdaptedModel(reader, model, base)
            return
        found = AdapterFolder(adapter_folder(adapter), model)
        yield AdaptedModel(reader, model, base, found, found.config)
