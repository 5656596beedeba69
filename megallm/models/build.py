"""Build the stage of this rank and give its parameters their values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megallm.base.rng import key_of, normal_box
from megallm.models.config import ModelConfig
from megallm.models.decoder import Stage, StageOptions
from megallm.models.stages import plan_stages
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import Shard, named_shards


def build_stage(config: ModelConfig, mesh: Mesh, options: StageOptions) -> Stage:
    """This rank's stage with parameters on the meta device; `place_parameters` gives them storage."""
    return Stage(config, mesh, plan_stages(config.num_layers, mesh.pp.size)[mesh.pp.rank], options)


def initial_values(name: str, shard: Shard, offset: tuple[int, ...], shape: tuple[int, ...], seed: int) -> Tensor:
    """The box of a parameter's starting values, float64, a function of (seed, name, element): the same at any layout."""
    if shard.init.kind == "constant":
        return torch.full(shape, shard.init.value, dtype=torch.float64)
    values = normal_box(key_of(seed, "init", name), shard.full, offset, shape)
    return torch.from_numpy(values).mul_(shard.init.std)


def place_parameters(model: nn.Module, storage: dict[str, Tensor]) -> None:
    """Replace the meta parameters by `storage[name]` (views into buckets keep their memory)."""
    for name, _, _ in list(named_shards(model)):
        module_path, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_path)
        module.register_parameter(leaf, nn.Parameter(storage[name]))


def initialise(model: nn.Module, mesh: Mesh, seed: int, into: dict[str, Tensor]) -> None:
    """Write this rank's initial values into `into[name]`, one tensor at a time."""
    for name, _, shard in named_shards(model):
        box = shard.box(mesh.layout, mesh.coords)
        into[name].copy_(initial_values(name, shard, box.offset, box.shape, seed))
