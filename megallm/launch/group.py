"""The process group of a started rank: made once, always destroyed (without that, gloo may abort at
exit).
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from megallm.base import shared_memory
from megallm.base.errors import PeerLost
from megallm.launch.environment import RankEnv, gpu_of, use_loopback, uses_shared_memory
from megallm.launch.meeting import installation, listen, meet


def rank_device(env: RankEnv) -> torch.device:
    """Returns the GPU of this rank, or the CPU on a node without GPUs; see `gpu_of`."""
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = gpu_of(visible, env, socket.gethostname())
    return torch.device("cpu") if number is None else torch.device("cuda", number)


@contextmanager
def process_group(
    env: RankEnv,
    timeout_seconds: float = 600.0,
    meet_seconds: float = 120.0,
    alike: Mapping[str, str] = {},
) -> Iterator[torch.device]:
    """Join the world of `env` (collective over it) and leave at the end; yields this rank's device.

    A world of one makes no group. Raises PeerLost when not all ranks arrive within `meet_seconds`,
    UsageError when they are not `alike`: names of what must be the same everywhere, and its values.
    """
    device = rank_device(env)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if env.world == 1:
        yield device
        return
    start_process_group(env, timeout_seconds, device, meet_seconds, alike)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def start_process_group(
    env: RankEnv,
    timeout_seconds: float,
    device: torch.device,
    meet_seconds: float = 120.0,
    alike: Mapping[str, str] = {},
) -> None:
    """Start the process group (`init_process_group`) over `env`: nccl beside gloo on GPUs, on CPUs
    shared memory within a host and gloo between hosts; see `process_group`.
    """
    if env.one_host:
        use_loopback()
    timeout = timedelta(seconds=timeout_seconds)
    same = {"device": device.type, **alike}
    if env.launcher != "local":  # forked ranks have one installation
        same |= installation()
    try:
        store = _open_store(env, meet_seconds)
        word = meet(store, env, same, meet_seconds)
        store.set_timeout(timeout)
        dist.init_process_group(
            _backend(device),
            store=dist.PrefixStore(f"megallm/{env.attempt}/{word}", store),
            rank=env.rank,
            world_size=env.world,
            timeout=timeout,
        )
    except (dist.DistError, RuntimeError) as error:
        raise PeerLost(
            f"Rank {env.rank} of {env.world} did not meet the others at {env.host}:{env.port} "
            f"within {meet_seconds:g} s{_name_trouble(env)}: {str(error).splitlines()[0]}"
        ) from error


def _backend(device: torch.device) -> str:
    if device.type == "cuda":
        return "cpu:gloo,cuda:nccl"
    return shared_memory.register() if uses_shared_memory() else "gloo"


def _open_store(env: RankEnv, seconds: float) -> dist.TCPStore:
    """Returns the store of this run; rank 0's listens on the interface of `env.host` alone, where
    it can.
    """
    serves = env.rank == 0 and not env.agent_store
    listen_fd = env.listen_fd
    if serves and listen_fd is None:
        listen_fd = listen(env).detach()
    return dist.TCPStore(
        env.host,
        env.port,
        env.world,
        is_master=serves,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
        master_listen_fd=listen_fd,
    )


def _name_trouble(env: RankEnv) -> str:
    try:
        socket.getaddrinfo(env.host, env.port)
    except OSError as error:
        return f" (the host name '{env.host}' has no address here: {error.strerror or error})"
    return ""
