"""What an engine is built from: the sections of a configuration that it reads, as they are. No
torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megallm.models.compute import ComputeConfig
from megallm.models.config import ModelConfig
from megallm.optim.config import OptimConfig, ZeroConfig
from megallm.parallel.config import LayoutConfig


@dataclass(frozen=True)
class EngineConfig:
    """`model` is resolved. The sizes of the axes are those of the mesh; of `layout` the engine
    reads how ranks work together (sp, schedule, chunks, stages, cp_kind, ...).
    """

    model: ModelConfig
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    seed: int = 1234
