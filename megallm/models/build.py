"""Build the stages of this rank and give their parameters their values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megallm.base.rng import key_of, normal_box, uniform_box
from megallm.models.compute import ComputeConfig
from megallm.models.config import ModelConfig
from megallm.models.decoder import Stage
from megallm.models.stages import head_work, plan_stages
from megallm.parallel.config import LayoutConfig
from megallm.parallel.mesh import Mesh
from megallm.parallel.schedule import Placement
from megallm.parallel.shard import Shard, named_shards


def build_stages(
    config: ModelConfig,
    mesh: Mesh,
    layout: LayoutConfig,
    compute: ComputeConfig,
    placement: Placement,
) -> dict[int, Stage]:
    """Returns this rank's stages, earliest first, with parameters on the meta device;
    `place_parameters` gives them storage.
    """
    spans = plan_stages(config.num_layers, placement.num_stages, layout.stages, head_work(config))
    stages: dict[int, Stage] = {}
    for stage in sorted(placement.stages_of(mesh.pp.rank)):
        share = (
            stages[0].embedding
            if spans[stage].last and config.embeds_last and 0 in stages
            else None
        )
        stages[stage] = Stage(config, mesh, spans[stage], layout, compute, share)
    return stages


def initial_values(
    name: str, shard: Shard, offset: tuple[int, ...], shape: tuple[int, ...], seed: int
) -> Tensor:
    """Returns a box of a parameter's start, float64, a function of (seed, name, element): the same
    at any layout.
    """
    if shard.init.kind == "constant":
        return torch.full(shape, shard.init.value, dtype=torch.float64)
    key, init = key_of(seed, "init", name), shard.init
    if init.kind == "uniform":
        values = torch.from_numpy(uniform_box(key, shard.full, offset, shape))
        return values.mul_(2 * init.value).sub_(init.value)
    return torch.from_numpy(normal_box(key, shard.full, offset, shape)).mul_(init.std)


def place_parameters(model: nn.Module, storage: dict[str, Tensor]) -> None:
    """Replace the meta parameters by `storage[name]` (views into buckets keep their memory).

    A parameter that needed no gradient needs none afterwards.
    """
    for name, param, _ in list(named_shards(model)):
        module_path, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_path)
        module.register_parameter(leaf, nn.Parameter(storage[name], param.requires_grad))
