"""Which rank of how many this process is, as torchrun, srun or our own launcher says it. No torch.

This package and `cli` are the only places that read environment variables.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from megallm.base.errors import UsageError

LOOPBACK = "127.0.0.1"
TOKEN = "MEGALLM_RUN_TOKEN"  # a secret that signs the meeting of the ranks, the same on each


@dataclass(frozen=True)
class RankEnv:
    """One rank's place. `host:port` is where rank 0 answers; `listen_fd` is its socket when our
    launcher made it.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    host: str = LOOPBACK
    port: int = 0
    listen_fd: int | None = None
    launcher: str = "local"  # local | torchrun | srun
    agent_store: bool = False  # torchrun's agent already listens at host:port
    attempt: int = 0  # how often the ranks were restarted; keeps their keys in a store apart
    token: str = ""  # known to the ranks of this run only: signs what they leave in the store
    hosts: tuple[str, ...] = ()  # of each rank, where the launcher says so

    @property
    def one_host(self) -> bool:
        """All ranks run on this machine."""
        return self.local_world == self.world


def detect(environ: Mapping[str, str] = os.environ) -> RankEnv | None:
    """Returns this process's place when torchrun or srun started it, else None; UsageError when it
    is told only half.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _torchrun(environ)
    batch_script = environ.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in environ
    if "SLURM_PROCID" in environ and "SLURM_NTASKS" in environ and not batch_script:
        return _slurm(environ)
    return None


def job_end(environ: Mapping[str, str] = os.environ) -> float | None:
    """Returns when Slurm ends this job, in seconds since 1970; None without Slurm, or a limit."""
    text = environ.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdigit() and "SLURM_JOB_ID" in environ else None


def thread_count(local_world: int, environ: Mapping[str, str] = os.environ) -> int:
    """Returns threads of one rank: OMP_NUM_THREADS when the user set it, else this process's cores
    divided by the ranks.
    """
    given = environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) >= 1:
        return int(given)
    return max(1, len(os.sched_getaffinity(0)) // local_world)


def gpu_of(visible: int, env: RankEnv, node: str) -> int | None:
    """Returns the number of a rank's GPU among the `visible` ones of its process on `node`; None:
    the CPU, where no GPU is visible.

    Under srun a task may be given its one GPU alone (`--gpus-per-task=1`); the ranks of other
    launchers see all those of the node. Raises UsageError where GPUs are too few for the ranks.
    """
    if visible >= env.local_world:
        return env.local_rank
    if visible == 1 and env.launcher == "srun":
        return 0
    if visible == 0:
        return None
    raise UsageError(
        f"The node {node} shows {visible} GPU{'s' * (visible > 1)} to its {env.local_world} ranks: "
        "each needs one of its own. Start as many ranks as there are GPUs, or train on the CPU "
        "with CUDA_VISIBLE_DEVICES= in the environment."
    )


def uses_shared_memory(environ: Mapping[str, str] = os.environ) -> bool:
    """Returns whether groups of one host may exchange tensors of the CPU over shared memory:
    MEGALLM_COLLECTIVES is `auto` (the default), or `gloo` for gloo in any case.
    """
    given = environ.get("MEGALLM_COLLECTIVES", "auto")
    if given not in ("auto", "gloo"):
        raise UsageError(
            f"The environment variable MEGALLM_COLLECTIVES is '{given}'; it can be auto or gloo."
        )
    return given == "auto"


def use_loopback() -> None:
    """Let gloo talk over the loopback device (all ranks on one host), unless the user named
    another.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _torchrun(environ: Mapping[str, str]) -> RankEnv:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if missing:
        raise UsageError(
            f"RANK and WORLD_SIZE are set, but {' and '.join(missing)} not: start with torchrun, "
            "or unset RANK and WORLD_SIZE to let megallm start its own ranks."
        )
    world = _integer(environ, "WORLD_SIZE", 1)
    rank = _integer(environ, "RANK", 0)
    return _checked(
        RankEnv(
            rank=rank,
            world=world,
            local_rank=_integer(environ, "LOCAL_RANK", 0, rank),
            local_world=_integer(environ, "LOCAL_WORLD_SIZE", 1, world),
            host=environ["MASTER_ADDR"],
            port=_integer(environ, "MASTER_PORT", 1),
            launcher="torchrun",
            agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=_integer(environ, "TORCHELASTIC_RESTART_COUNT", 0, 0),
            token=environ.get(TOKEN) or environ.get("TORCHELASTIC_RUN_ID", ""),
        )
    )


def _slurm(environ: Mapping[str, str]) -> RankEnv:
    world = _integer(environ, "SLURM_NTASKS", 1)
    rank = _integer(environ, "SLURM_PROCID", 0)
    nodes = (
        environ.get("SLURM_STEP_NODELIST")
        or environ.get("SLURM_NODELIST")
        or environ.get("SLURM_JOB_NODELIST")
    )
    if not nodes:
        raise UsageError(
            "SLURM_PROCID and SLURM_NTASKS are set, but SLURM_NODELIST not: start the ranks with "
            "srun."
        )
    job, step = _integer(environ, "SLURM_JOB_ID", 0, 0), _integer(environ, "SLURM_STEP_ID", 0, 0)
    tasks = (
        environ.get("SLURM_STEP_TASKS_PER_NODE")
        or environ.get("SLURM_TASKS_PER_NODE")
        or str(world)
    )
    here = _integer(environ, "SLURM_NODEID", 0, 0)
    return _checked(
        RankEnv(
            rank=rank,
            world=world,
            local_rank=_integer(environ, "SLURM_LOCALID", 0, rank),
            local_world=tasks_per_node(tasks, here),
            host=environ.get("MASTER_ADDR") or first_host(nodes),
            port=_integer(environ, "MASTER_PORT", 1, rendezvous_port(job, step)),
            launcher="srun",
            token=environ.get(TOKEN) or f"slurm {job}.{step}",
            hosts=hosts_of_ranks(nodes, tasks, world),
        )
    )


def first_host(nodelist: str) -> str:
    """Maps `"n[03-05,9],m1"` -> `"n03"`: Slurm's compressed host list, its first name."""
    first = re.split(r",(?![^\[]*\])", nodelist.strip())[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def all_hosts(nodelist: str) -> list[str]:
    """Maps `"n[03-05,9],m1"` -> `["n03", "n04", "n05", "n9", "m1"]`: Slurm's compressed list."""
    found: list[str] = []
    for part in re.split(r",(?![^\[]*\])", nodelist.strip()):
        names = [""]
        for fixed, inside in re.findall(r"([^\[]+)|\[([^\]]*)\]", part):
            numbers = [fixed] if fixed else _numbers(inside)
            names = [name + number for name in names for number in numbers]
        found += names
    return found


def _numbers(text: str) -> list[str]:
    """Maps `"03-05,9"` -> `["03", "04", "05", "9"]`."""
    found: list[str] = []
    for run in text.split(","):
        first, _, last = run.partition("-")
        if last and first.isdigit() and last.isdigit():
            found += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        else:
            found.append(run)
    return found


def hosts_of_ranks(nodelist: str, tasks: str, world: int) -> tuple[str, ...]:
    """Returns the host of each rank where Slurm fills one node after the other, as it does unless
    told otherwise; nothing where the numbers do not fit.
    """
    hosts = all_hosts(nodelist)
    found = [host for n, host in enumerate(hosts) for _ in range(tasks_per_node(tasks, n))]
    return tuple(found) if len(found) == world else ()


def tasks_per_node(text: str, node: int) -> int:
    """Maps `"2(x3),1"` -> tasks of one node: `2(x3)` stands for three nodes of two."""
    counts: list[int] = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(repeat or 1)
    return counts[node] if node < len(counts) else counts[-1]


def rendezvous_port(job: int, step: int) -> int:
    """Returns a port that every rank of a job step computes alike, below the range of ephemeral
    ports.
    """
    return 10_000 + (job * 31 + step) % 20_000


def _integer(environ: Mapping[str, str], name: str, low: int, default: int | None = None) -> int:
    text = environ.get(name, "" if default is None else str(default))
    if not text.isdigit() or int(text) < low:
        raise UsageError(
            f"The environment variable {name} is '{text}'; it must be an integer of at least {low}."
        )
    return int(text)


def _checked(env: RankEnv) -> RankEnv:
    if env.rank >= env.world or env.local_rank >= env.local_world:
        raise UsageError(
            f"The environment says rank {env.rank} of {env.world}, local rank {env.local_rank} of "
            f"{env.local_world}: a rank must be less than the number of ranks."
        )
    return env
