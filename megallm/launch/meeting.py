"""How ranks meet at a store before their process group: who is missing, who belongs to another run,
and who runs other code or settings.

Every rank leaves a record signed with the run's token; rank 0 looks at all of them and leaves a
verdict that all read. The keys of the process group that follows hang on a word that rank 0 draws,
so that nobody outside of the meeting can have written them before. No torch: a store is what has
`set`, `get` and `check`.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import hmac
import json
import os
import platform
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from megallm.base.errors import MegallmError, PeerLost, UsageError
from megallm.launch.environment import RankEnv

POLL_SECONDS, GRACE_SECONDS, MAX_NAMED = 0.05, 10.0, 8
RUN_KEY = "megallm/run"
KINDS: dict[str, type[MegallmError]] = {"lost": PeerLost, "usage": UsageError}


class Store(Protocol):
    """What this needs of torch's stores."""

    def set(self, key: str, value: str) -> None:
        """Set a value."""

    def get(self, key: str) -> bytes:
        """Returns a value, waiting for it."""

    def check(self, keys: list[str]) -> bool:
        """Returns whether all the keys are there."""


def meet(store: Store, env: RankEnv, alike: Mapping[str, str], seconds: float) -> str:
    """Wait until every rank is there and has the same `alike`; collective over the world. Returns
    a word that only this meeting knows, the prefix of what follows.

    Errors, the same on every rank: `PeerLost` when ranks are missing after `seconds` or the store
    is another run's, `UsageError` for ranks that differ.
    """
    deadline, meeting = time.monotonic() + seconds, f"meet/{_public(env)}/{env.attempt}"
    _check_run(store, env, deadline)
    own = {"rank": env.rank, "host": socket.gethostname(), "pid": os.getpid(), "alike": dict(alike)}
    store.set(f"{meeting}/peer/{env.rank}", _sign(own, env.token))
    if env.rank == 0:
        verdict = _judge(store, env, meeting, deadline)
        store.set(f"{meeting}/verdict", _sign(verdict, env.token))
    else:
        verdict = _await_verdict(store, env, meeting, deadline)
    if "error" in verdict:
        raise KINDS[verdict["kind"]](verdict["error"])
    return str(verdict["word"])


def _public(env: RankEnv) -> str:
    """A name of the run that tells nothing of its token."""
    return hashlib.sha256(f"megallm run {env.token}".encode()).hexdigest()[:12]


def _sign(value: dict[str, Any], token: str) -> str:
    body = json.dumps(value, sort_keys=True)
    return json.dumps({"body": body, "mac": _mac(body, token)})


def _mac(body: str, token: str) -> str:
    return hmac.new(token.encode(), body.encode(), hashlib.sha256).hexdigest()


def _verified(data: bytes, token: str, whose: str) -> dict[str, Any]:
    try:
        signed = json.loads(data)
        body, mac = str(signed["body"]), str(signed["mac"])
        if hmac.compare_digest(mac, _mac(body, token)):
            found: dict[str, Any] = json.loads(body)
            return found
    except (ValueError, KeyError, TypeError) as error:
        raise PeerLost(f"{whose} in the store is damaged: {_STRANGER}") from error
    raise PeerLost(f"{whose} in the store is not signed by this run: {_STRANGER}")


_STRANGER = (
    "another program writes into it. Use a network that only this job reaches, or another "
    "MASTER_PORT."
)


def _check_run(store: Store, env: RankEnv, deadline: float) -> None:
    """Refuse the store of another run."""
    if env.rank == 0 and not store.check([RUN_KEY]):
        store.set(RUN_KEY, _public(env))
    if not _until(lambda: store.check([RUN_KEY]), deadline):
        return  # rank 0 is missing, which is told with the others
    found = store.get(RUN_KEY).decode(errors="replace")
    if found != _public(env):
        raise PeerLost(
            f"Rank {env.rank} met another run at {env.host}:{env.port} (run {found}, this one is "
            f"{_public(env)}): two jobs use one port. Give each its own MASTER_PORT."
        )


def _until(condition: Callable[[], bool], deadline: float) -> bool:
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _judge(store: Store, env: RankEnv, meeting: str, deadline: float) -> dict[str, Any]:
    peers: dict[int, dict[str, Any]] = {}
    missing = list(range(env.world))
    try:
        while missing:
            for rank in list(missing):
                key = f"{meeting}/peer/{rank}"
                if store.check([key]):
                    missing.remove(rank)
                    peers[rank] = _verified(store.get(key), env.token, f"The record of rank {rank}")
            if missing and time.monotonic() > deadline:
                return {"kind": "lost", "error": _absent(env, missing)}
            time.sleep(POLL_SECONDS * bool(missing))
    except PeerLost as error:
        return {"kind": "lost", "error": str(error)}
    differing = peer_differences(peers)
    if differing:
        table = "".join(f"\n    {line}" for line in differing)
        return {
            "kind": "usage",
            "error": f"The ranks are not alike; rank 0 has something else "
            f"than these:{table}\nStart all of them from one installation and with one "
            "command.",
        }
    return {"word": secrets.token_hex(8)}


def _await_verdict(store: Store, env: RankEnv, meeting: str, deadline: float) -> dict[str, Any]:
    key = f"{meeting}/verdict"
    if _until(lambda: store.check([key]), deadline + GRACE_SECONDS):
        return _verified(store.get(key), env.token, "What rank 0 says")
    missing = [rank for rank in range(env.world) if not store.check([f"{meeting}/peer/{rank}"])]
    return {"kind": "lost", "error": _absent(env, missing or [0])}


def _absent(env: RankEnv, missing: Sequence[int]) -> str:
    named = ", ".join(f"rank {rank}{_where(env, rank)}" for rank in missing[:MAX_NAMED])
    more = f" and {len(missing) - MAX_NAMED} more" if len(missing) > MAX_NAMED else ""
    return (
        f"have {env.world - len(missing)} of {env.world} ranks, missing {named}{more}. They did "
        f"not come to {env.host}:{env.port} in time (launch.meet_seconds): look at their logs, "
        "and whether that name and port can be reached from there."
    )


def _where(env: RankEnv, rank: int) -> str:
    if env.hosts:
        return f" (host {env.hosts[rank]})"
    if env.one_host:
        return ""
    return f" (node {rank // env.local_world})"


def peer_differences(peers: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Returns a line for each rank that is not like rank 0: what differs."""
    first, found = peers[0]["alike"], []
    for rank, peer in sorted(peers.items()):
        odd = [
            f"{key} is {peer['alike'].get(key, 'missing')}, not {first.get(key, 'missing')}"
            for key in sorted({*first, *peer["alike"]})
            if first.get(key) != peer["alike"].get(key)
        ]
        if odd:
            found.append(f"rank {rank} (host {peer['host']}): {'; '.join(odd)}")
    return found


@functools.cache
def installation() -> dict[str, str]:
    """Returns what must be the same on all hosts: a hash of the package's code, and versions."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return {
        "code of megallm": digest.hexdigest()[:12],
        "torch": metadata.version("torch"),
        "Python": platform.python_version(),
    }


def digest_of(text: str) -> str:
    """Returns a short hash of a setting, to compare."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def listen(env: RankEnv) -> socket.socket:
    """Returns the socket on which rank 0's store will answer: on the interface of `env.host` where
    that is one of this machine, else on all. Errors: `PeerLost` when the port is taken, with who
    holds it.
    """
    backlog = max(128, env.world)
    try:
        return socket.create_server((env.host, env.port), backlog=backlog)
    except OSError as error:
        taken = error
    if taken.errno not in _IN_USE:  # an address that is translated, or a name of another host
        try:
            return socket.create_server(("", env.port), backlog=backlog)
        except OSError as error:
            taken = error
    raise PeerLost(
        f"Rank 0 cannot listen at {env.host}:{env.port}: {_plain(taken)}"
        f"{_owner_words(env.port)}. Set MASTER_PORT to a free port on every node, or leave it out "
        "where the launcher chooses one."
    ) from taken


_IN_USE = (errno.EADDRINUSE, errno.EACCES)


def _plain(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)


def _owner_words(port: int) -> str:
    owner = port_owner(port)
    if owner is None:
        return ""
    if owner == 0:
        return " by a process that this user cannot see"
    try:
        words = Path(f"/proc/{owner}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        words = ""
    return f" by process {owner}{f' ({words[:120]})' if words else ''}"


def port_owner(port: int) -> int | None:
    """Returns the process that listens on a TCP port of this machine; None when nobody does, 0 when
    it cannot be seen.
    """
    inodes = set()
    for name in ("tcp", "tcp6"):
        try:
            rows = Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, rows):
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    if not inodes:
        return None
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if any(os.readlink(fd) in inodes for fd in (folder / "fd").iterdir()):
                    return int(folder.name)
            except OSError:
                continue
    return 0
