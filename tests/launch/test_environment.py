"""Which rank this is, from the variables of torchrun and srun; half an environment is an error, not a hang."""

from __future__ import annotations

import pytest

from megallm.base.errors import UsageError
from megallm.launch.environment import (
    RankEnv,
    detect,
    first_host,
    gpu_of,
    rendezvous_port,
    tasks_per_node,
    thread_count,
)  # fmt: skip

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_NODELIST": "node[07-08]",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
}


def test_nothing_set():
    assert detect({}) is None
    assert detect({"WORLD_SIZE": "2"}) is None


def test_torchrun():
    env = detect(TORCHRUN)
    assert env == RankEnv(5, 8, 1, 4, "n1", 29500, None, "torchrun", agent_store=True, attempt=2)
    assert not env.one_host


def test_torchrun_wins_over_slurm_which_may_have_started_it():
    assert detect(SLURM | TORCHRUN).launcher == "torchrun"


def test_slurm():
    env = detect(SLURM)
    assert env == RankEnv(
        3, 4, 1, 2, "node07", rendezvous_port(1234, 0), None, "srun", token="slurm 1234.0",
        hosts=("node07", "node07", "node08", "node08"),
    )  # fmt: skip


def test_slurm_with_the_least_it_needs():
    names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODELIST")
    env = detect({name: SLURM[name] for name in names} | {"SLURM_LOCALID": "3"})
    assert (env.rank, env.world, env.local_rank, env.host) == (3, 4, 3, "node07")


def test_a_batch_script_is_not_a_rank():
    script = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"} | {"ENVIRONMENT": "BATCH"}
    assert detect(script) is None
    assert detect(SLURM | {"ENVIRONMENT": "BATCH"}) is not None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"MASTER_PORT": ""}, "MASTER_PORT not"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT is 'x'; it must be an integer of at least 1"),
        ({"RANK": "8"}, "rank 8 of 8"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1'"),
        ({"LOCAL_RANK": "4"}, "local rank 4 of 4"),
    ],
)
def test_a_broken_torchrun_environment(change, sentence):
    with pytest.raises(UsageError, match=sentence):
        detect(TORCHRUN | change)


def test_slurm_without_a_node_list():
    with pytest.raises(UsageError, match="SLURM_NODELIST"):
        detect({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"})


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-4,7],m2", "n1"),
        ("n[03-05]", "n03"),
        ("n[9,3]-ib", "n9-ib"),
        ("r[1-2]c[3-4]", "r1c3"),
        ("a-b.example.org,c", "a-b.example.org"),
    ],
)
def test_first_host(text, host):
    assert first_host(text) == host


def test_tasks_per_node():
    assert [tasks_per_node("2(x3),1", node) for node in range(4)] == [2, 2, 2, 1]
    assert tasks_per_node("8", 0) == 8


def test_ports_are_unprivileged_and_not_ephemeral():
    ports = {rendezvous_port(job, step) for job in range(0, 100_000, 37) for step in (0, 1)}
    assert min(ports) >= 10_000 and max(ports) < 30_000 and len(ports) > 1000


def test_thread_count():
    assert thread_count(10**6, {}) == 1
    assert thread_count(1, {}) >= thread_count(2, {}) >= 1
    assert thread_count(4, {"OMP_NUM_THREADS": "3"}) == 3
    assert thread_count(10**6, {"OMP_NUM_THREADS": "all"}) == 1


@pytest.mark.parametrize(
    ("visible", "local_rank", "local_world", "launcher", "number"),
    [
        (0, 3, 4, "srun", None), (4, 3, 4, "srun", 3), (8, 3, 4, "torchrun", 3), (1, 0, 1, "local", 0),
        (1, 5, 8, "srun", 0),  # srun --gpus-per-task=1
    ],
)  # fmt: skip
def test_a_rank_takes_its_gpu(visible, local_rank, local_world, launcher, number):
    env = RankEnv(local_rank, local_world, local_rank, local_world, launcher=launcher)
    assert gpu_of(visible, env, "n7") == number


@pytest.mark.parametrize(("visible", "launcher"), [(2, "srun"), (1, "torchrun"), (3, "local"), (1, "local")])
def test_too_few_gpus_are_an_error_that_names_the_node(visible, launcher):
    words = f"The node n7 shows {visible} GPUs? to its 4 ranks"
    with pytest.raises(UsageError, match=words):
        gpu_of(visible, RankEnv(1, 4, 1, 4, launcher=launcher), "n7")
