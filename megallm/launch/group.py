"""The process group of a started rank: made once, always destroyed (without that, gloo may abort at
exit).
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from megallm.base import shared_memory
from megallm.base.errors import PeerLost, UsageError
from megallm.launch.environment import RankEnv, gpu_of, use_loopback, uses_shared_memory


def rank_device(env: RankEnv) -> torch.device:
    """Returns the GPU of this rank, or the CPU on a node without GPUs; see `gpu_of`."""
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = gpu_of(visible, env, socket.gethostname())
    return torch.device("cpu") if number is None else torch.device("cuda", number)


@contextmanager
def process_group(env: RankEnv, timeout_seconds: float = 600.0) -> Iterator[torch.device]:
    """Join the world of `env` (collective over it) and leave at the end; yields this rank's device.

    A world of one makes no group. Raises PeerLost when not all ranks arrive in time.
    """
    device = rank_device(env)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if env.world == 1:
        yield device
        return
    start_process_group(env, timeout_seconds, device)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def start_process_group(env: RankEnv, timeout_seconds: float, device: torch.device) -> None:
    """Start the process group (`init_process_group`) over `env`: nccl beside gloo on GPUs, on CPUs
    shared memory within a host and gloo between hosts; see `process_group`.
    """
    if env.one_host:
        use_loopback()
    timeout = timedelta(seconds=timeout_seconds)
    try:
        store = dist.TCPStore(
            env.host,
            env.port,
            env.world,
            is_master=env.rank == 0 and not env.agent_store,
            timeout=timeout,
            master_listen_fd=env.listen_fd,
        )
        _check_alike(dist.PrefixStore(f"devices/{env.attempt}", store), env, device)
        dist.init_process_group(
            _backend(device),
            store=dist.PrefixStore(f"megallm/{env.attempt}", store),
            rank=env.rank,
            world_size=env.world,
            timeout=timeout,
        )
    except (dist.DistError, RuntimeError) as error:
        raise PeerLost(
            f"Rank {env.rank} of {env.world} did not meet the others at {env.host}:{env.port} "
            f"within {timeout_seconds:g} s: {str(error).splitlines()[0]}"
        ) from error


def _backend(device: torch.device) -> str:
    if device.type == "cuda":
        return "cpu:gloo,cuda:nccl"
    return shared_memory.register() if uses_shared_memory() else "gloo"


def _check_alike(store: dist.Store, env: RankEnv, device: torch.device) -> None:
    """Refuse a world in which some ranks found GPUs and others not: their groups would never meet.
    """
    if env.rank == 0:
        store.set("kind", device.type)
    first = store.get("kind").decode()
    if first != device.type:
        raise UsageError(
            f"Rank {env.rank} on the node {socket.gethostname()} has the device {device.type}, "
            f"rank 0 {first}: all need the same. Is a driver missing there, or a "
            "CUDA_VISIBLE_DEVICES set?"
        )
