"""Ranks that meet at a store: who is missing, who is another run's, who differs, and whose port it is."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from megallm.base.errors import PeerLost, UsageError
from megallm.launch.environment import RankEnv, all_hosts, hosts_of_ranks
from megallm.launch.meeting import RUN_KEY, listen, meet, port_owner
from tests.launch.test_start import ROOT, free_port, torchrun

ENV = RankEnv(world=3, local_world=1, host="n1", port=9, token="secret")


class Kept:
    """A store in this process."""

    def __init__(self, **values: str) -> None:
        self.values = {key: value.encode() for key, value in values.items()}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


def meet_all(ranks, store=None, seconds=0.5, alike=None, env=ENV) -> list:
    """What each rank gets: a word or an error."""
    store, found = store or Kept(), {}

    def one(rank: int) -> None:
        try:
            found[rank] = meet(store, replace(env, rank=rank), (alike or {}).get(rank, {"code": "a"}), seconds)
        except (PeerLost, UsageError) as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[rank] for rank in ranks]


def test_all_get_one_word_that_nobody_knew(monkeypatch):
    first, second = meet_all(range(3)), meet_all(range(3))
    assert len({*first}) == len({*second}) == 1 and first != second


def test_the_missing_rank_is_named_on_every_rank():
    """Row 29."""
    hosts = ("n1", "n2", "n3")
    said = meet_all([0, 1], env=replace(ENV, hosts=hosts))
    assert {str(error).partition(".")[0] for error in said} == {
        "have 2 of 3 ranks, missing rank 2 (host n3)"
    } and all(isinstance(error, PeerLost) for error in said)
    assert "missing rank 2 (node 2)" in str(meet_all([0, 1])[0])


def test_a_missing_rank_0_is_named(monkeypatch):
    monkeypatch.setattr("megallm.launch.meeting.GRACE_SECONDS", 0.1)
    assert "have 2 of 3 ranks, missing rank 0 (node 0)" in str(meet_all([1, 2])[0])


def test_another_run_is_refused():
    """Row 31: a rank of another job comes to this one's store; this one's own are not disturbed."""
    store = Kept()
    stranger = replace(ENV, token="other")
    words = []
    thread = threading.Thread(target=lambda: words.extend(meet_all(range(3), store, 20.0)))
    thread.start()
    while RUN_KEY not in store.values:
        time.sleep(0.01)
    (said,) = meet_all([1], store, 5.0, env=stranger)
    thread.join(60)
    assert isinstance(said, PeerLost) and "two jobs use one port" in str(said)
    assert len(words) == 3 and isinstance(words[0], str)


def test_a_poisoned_store_is_refused():
    """Row 31: a record that is not signed with the run's token."""

    class Poisoned(Kept):
        def set(self, key: str, value: str) -> None:
            super().set(key, value.replace('"mac": "', '"mac": "0') if key.endswith("peer/2") else value)

    said = meet_all(range(3), Poisoned())
    assert all("record of rank 2 in the store is not signed by this run" in str(error) for error in said)


def test_ranks_that_differ_are_a_table():
    """Row 75."""
    said = meet_all(range(3), alike={2: {"code": "b", "torch": "9"}})
    assert all(isinstance(error, UsageError) for error in said)
    assert "code is b, not a; torch is 9, not missing" in str(said[0]) and "rank 2 (host" in str(said[1])


def test_a_taken_port_names_its_process():
    """Row 30."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert port_owner(port) == os.getpid()
        with pytest.raises(PeerLost, match=f"Address already in use by process {os.getpid()}"):
            listen(RankEnv(host="127.0.0.1", port=port))
    assert port_owner(port) is None
    with listen(RankEnv(host="127.0.0.1", port=port)) as server:
        assert server.getsockname()[0] == "127.0.0.1"  # not every interface
    with listen(RankEnv(host="192.0.2.1", port=port)) as server:  # an address that is not ours
        assert server.getsockname()[0] == "0.0.0.0"


def test_hosts_of_ranks():
    assert all_hosts("n[03-05,9],m1") == ["n03", "n04", "n05", "n9", "m1"]
    assert hosts_of_ranks("n[1-2],m", "2(x2),1", 5) == ("n1", "n1", "n2", "n2", "m")
    assert hosts_of_ranks("n1", "2", 3) == ()


CODE = """
import sys
import torch
from megallm.launch.environment import detect
from megallm.launch.group import process_group
from megallm.base.errors import MegallmError
try:
    with process_group(detect(), meet_seconds=float(sys.argv[1])):
        torch.distributed.barrier()
        print("met")
except MegallmError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def start_rank(rank: int, world: int, port: int, seconds: float, **more: str) -> subprocess.Popen:
    environment = os.environ | torchrun(rank) | {"WORLD_SIZE": str(world), "MASTER_PORT": str(port)} | more
    return subprocess.Popen(
        [sys.executable, "-c", CODE, str(seconds)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )


def test_one_of_two_processes_comes():
    """Rows 29 and 31 with real processes: a rank alone names the other; ranks of two jobs do not meet."""
    ranks = [start_rank(0, 2, free_port(), 2.0)]
    port = free_port()
    ranks += [start_rank(0, 2, port, 30.0), start_rank(1, 2, port, 30.0, MEGALLM_RUN_TOKEN="other")]
    try:
        alone = ranks[0].communicate(timeout=90)[0]
        assert ranks[0].returncode == 69 and "have 1 of 2 ranks, missing rank 1" in alone, alone
        other = ranks[2].communicate(timeout=90)[0]
        assert ranks[2].returncode == 69 and "met another run" in other, other
        own = start_rank(1, 2, port, 30.0)
        ranks.append(own)
        assert own.communicate(timeout=90)[0] == "met\n"
        assert ranks[1].communicate(timeout=90)[0] == "met\n"
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
