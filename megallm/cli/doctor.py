"""`megallm doctor`: what is installed, what is used, and whether ranks can talk to each other
here.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from typing import Any

from megallm.base import extension, optional
from megallm.base.errors import InternalError, MegallmError, UsageError
from megallm.base.version import VERSION
from megallm.cli.table import Command
from megallm.launch.environment import RankEnv, detect, thread_count, uses_shared_memory
from megallm.launch.local import run_ranks
from megallm.ops import backends
from megallm.oracle.table import row_for_layout
from megallm.parallel import startup
from megallm.parallel.schedule import place
from megallm.parallel.zigzag import ulysses_degree
from megallm.rewards.sandbox import check_sandbox

REQUIRED = (
    "torch",
    "numpy",
    "pyyaml",
    "safetensors",
    "xxhash",
    "tokenizers",
    "rich",
    "matplotlib",
    "zstandard",
)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--startup",
        metavar="k=v,..",
        help="what the ranks of a layout connect when a run starts, such as tp=8,pp=8,dp=16; "
        "checks nothing here",
    )


def _run(args: argparse.Namespace) -> int:
    if args.startup is not None:
        plan = _startup(args.startup)
        rows = [
            {"for": list(each.purposes), "ranks": len(each.ranks)} for each in plan.communicators
        ]
        lines = [f"  {row['ranks']:>6}  {', '.join(row['for'])}" for row in rows]
        told = {"world": plan.world, "seconds": plan.seconds, "communicators": rows}
        print(json.dumps(told, indent=2) if args.json else "\n".join([startup.told(plan), *lines]))
        return 0
    found = examine()
    print(json.dumps(found, indent=2) if args.json else "\n".join(_lines(found)))
    return 0 if found["ok"] else InternalError.exit_code


def _startup(text: str) -> startup.StartupPlan:
    """Returns the start-up plan of a layout as `megallm oracle --layout` takes it."""
    row = row_for_layout(text)
    degree = ulysses_degree(row.cp_kind, row.layout.cp, row.config.num_heads // row.layout.tp)
    views = [("cp", degree)]
    return startup.plan_startup(row.layout, place(row.schedule, row.layout.pp, row.chunks), views)


def examine() -> dict[str, Any]:
    """Returns versions, extension, optional libraries, machine and the loopback check, as plain
    values.
    """
    status = extension.status()
    env = detect()
    required = {name: _version(name) for name in REQUIRED}
    gloo = check_gloo()
    return {
        "ok": gloo == "ok" and all(required.values()),
        "megallm": VERSION,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "threads_of_one_rank": thread_count(1),
        "required": required,
        "optional": {
            row.distribution: {"version": optional.version(name), "for": row.purpose}
            for name, row in optional.LIBRARIES.items()
            if not row.backend and row.distribution not in REQUIRED
        },
        "backends": {name: _backend(name) for name in backends.BACKENDS},
        "extension": {"name": status.name, "loaded": status.loaded, "detail": status.detail},
        "cuda_kernels": extension.cuda().detail,
        "gpus": _gpus() if required.get("torch") else [],
        "launcher": "local" if env is None else env.launcher,
        "gloo": gloo,
        "collectives": _collectives(),
        "sandbox": _sandbox(),
    }


def _sandbox() -> str:
    """Returns "ok" where model-written code can be run, else why not."""
    try:
        check_sandbox()
    except UsageError as error:
        return str(error)
    return "ok"


def _collectives() -> str:
    """Returns what moves tensors of the CPU between ranks of this host."""
    if not uses_shared_memory():
        return "gloo (MEGALLM_COLLECTIVES=gloo)"
    if extension.collectives() is None:
        return "gloo (the extension megallm._collectives is not built)"
    return "shared memory"


def _backend(name: str) -> dict[str, str | None]:
    """Returns a row of the table of optional libraries, and the version found."""
    backend = backends.BACKENDS[name]
    return {
        "version": optional.version(name),
        "replaces": backend.purpose,
        "key": backend.key or None,
    }


def check_gloo() -> str:
    """Returns `ok` when two ranks of this machine can sum a number, else what went wrong; over what
    ranks of one host use, which meet over the loopback device as gloo does.
    """
    try:
        run_ranks(_sum, (), 2, saves=False)
    except (MegallmError, ImportError) as error:
        return str(error)
    return "ok"


def _sum(env: RankEnv) -> None:
    import torch

    from megallm.launch.group import process_group

    with process_group(env, timeout_seconds=30):
        value = torch.ones(1)
        torch.distributed.all_reduce(value)
    if value.item() != env.world:
        raise InternalError(f"The sum of {env.world} ones is {value.item()} on rank {env.rank}.")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _lines(found: dict[str, Any]) -> list[str]:
    lines = [f"megallm {found['megallm']}, Python {found['python']}, {found['platform']}"]
    lines.append(
        f"machine: {found['cores']} cores, {found['memory_gib']} GiB, GPUs: "
        f"{', '.join(found['gpus']) or 'none'}"
    )
    lines += [f"  {name:<20} {version or 'MISSING'}" for name, version in found["required"].items()]
    for name, entry in found["optional"].items():
        lines.append(f"  {name:<20} {entry['version'] or '-':<12} (optional: {entry['for']})")
    for name, entry in found["backends"].items():
        key = f", asked for by {entry['key']}" if entry["key"] else ", not used yet"
        lines.append(
            f"  {name:<20} {entry['version'] or '-':<12} (optional backend: "
            f"{entry['replaces']}{key})"
        )
    ext = found["extension"]
    lines.append(
        f"extension {ext['name']}: {'loaded' if ext['loaded'] else 'not loaded'}, {ext['detail']}"
    )
    lines.append(f"kernels for GPUs: {found['cuda_kernels']}")
    lines.append(
        f"ranks started by: {found['launcher']}; gloo between two ranks here: {found['gloo']}"
    )
    lines.append(f"tensors of the CPU between ranks of this host go over: {found['collectives']}")
    lines.append(f"sandbox for the reward 'code': {found['sandbox']}")
    return lines


COMMANDS = {"doctor": Command(_arguments, _run)}
