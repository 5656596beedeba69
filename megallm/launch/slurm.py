"""The batch script of a run on Slurm, and its submission."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megallm.base.errors import UsageError

SCRIPT = "launch.sbatch"  # in the run folder
LAUNCHERS = ("srun", "torchrun")
_TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d(:\d\d)?)?")
_NAME = re.compile(r"[\w.,+-]+")
_SUBMIT_SECONDS = 60.0


@dataclass(frozen=True)
class SlurmJob:
    """What a batch script asks of Slurm, and what it runs.

    `words` are those of the command that trains: verb, configuration, settings. `python`, `folder`
    (of the run), `cwd` are paths that all nodes see. With `least_nodes` below `nodes` the job goes
    on with fewer nodes when some are lost.
    """

    words: Sequence[str]
    folder: Path
    cwd: Path
    python: str
    nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    least_nodes: int | None = None
    signal_seconds: int = 180
    launcher: str = "srun"

    @property
    def world(self) -> int:
        """Returns the number of ranks on all nodes."""
        return self.nodes * self.ranks_per_node

    @property
    def elastic(self) -> bool:
        """Returns whether it goes on with fewer nodes."""
        return self.least_nodes is not None and self.least_nodes < self.nodes

    def faults(self) -> Iterator[str]:
        """Yields a sentence for each value that Slurm, or we, cannot use."""
        counts = {
            "--nodes": (self.nodes, 1),
            "--ranks-per-node": (self.ranks_per_node, 1),
            "--gpus-per-node": (self.gpus_per_node, 0),
            "--cpus-per-task": (self.cpus_per_task, 1),
            "--signal-seconds": (self.signal_seconds, 1),
            "--min-nodes": (self.least_nodes, 1),
        }
        for option, (value, low) in counts.items():
            if value is not None and value < low:
                yield f"{option} is {value}; it must be an integer of at least {low}."
        if self.least_nodes is not None and self.least_nodes > self.nodes:
            yield f"--min-nodes is {self.least_nodes}, more than the {self.nodes} of --nodes."
        if self.elastic and self.launcher == "torchrun":
            yield "--min-nodes goes with --launcher srun, which can leave a lost node out."
        if self.gpus_per_node and self.ranks_per_node > self.gpus_per_node:
            yield (
                f"--ranks-per-node is {self.ranks_per_node}, but --gpus-per-node is "
                f"{self.gpus_per_node}: every rank needs a GPU of its own."
            )
        if self.time is not None and not _TIME.fullmatch(self.time):
            yield (
                f"--time is '{self.time}'; Slurm takes minutes (90), hours:minutes:seconds "
                "(24:00:00) or days-hours (2-12)."
            )
        for option, value in (("--partition", self.partition), ("--account", self.account)):
            if value is not None and not _NAME.fullmatch(value):
                yield f"{option} is '{value}'; a name has letters, digits and . , + - _ only."

    def script(self) -> str:
        """Returns the text of the batch script. Errors: UsageError for values that cannot be."""
        faults = list(self.faults())
        if faults:
            raise UsageError(" ".join(faults))
        values = {
            "SCRIPT": shlex.quote(str(self.folder / SCRIPT)),
            "DIRECTIVES": "\n".join(self._directives()),
            "CWD": shlex.quote(str(self.cwd)),
            "PYTHON": shlex.quote(self.python),
            "RUN": shlex.quote(str(self.folder)),
            "WORDS": shlex.join(self.words),
            "NODES": str(self.nodes),
            "LEAST": str(self.least_nodes or self.nodes),
            "RANKS": str(self.ranks_per_node),
            "STEP": _STEPS[self.launcher],
        }
        return re.sub(r"@([A-Z]+)@", lambda found: values[found[1]], _SCRIPT)

    def _directives(self) -> Iterator[str]:
        name = re.sub(r"[^\w.-]", "_", self.folder.name)
        nodes = f"{self.least_nodes}-{self.nodes}" if self.elastic else str(self.nodes)
        options = {
            "job-name": f"megallm-{name}",
            "nodes": nodes,
            # With a number of tasks Slurm gives the fewest nodes; whole nodes have room for all.
            "ntasks-per-node": None if self.elastic else self.ranks_per_node,
            "gpus-per-node": self.gpus_per_node or None,
            "cpus-per-task": self.cpus_per_task,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "signal": f"USR1@{self.signal_seconds}",
            "open-mode": "append",
            "chdir": self.cwd,
            "output": self.folder / "logs/slurm-%j.out",
        }
        for name, value in options.items():
            if value is not None:
                yield f"#SBATCH --{name}={_quoted(str(value))}"
        if self.elastic:
            yield "#SBATCH --exclusive"


def _quoted(value: str) -> str:
    """Returns a value as sbatch reads it: in quotes where it has spaces."""
    return f'"{value}"' if re.search(r"\s", value) else value


def write_script(job: SlurmJob) -> Path:
    """Write the batch script into the run folder, which is made when missing; returns its path."""
    path = job.folder / SCRIPT
    (job.folder / "logs").mkdir(parents=True, exist_ok=True)
    path.write_text(job.script(), encoding="utf-8")
    path.chmod(0o755)
    return path


def submit(path: Path) -> str:
    """Returns the number of the job that a batch script becomes. Errors: UsageError where there is
    no Slurm, and with Slurm's words where it refuses.
    """
    if shutil.which("sbatch") is None:
        raise UsageError(
            f"There is no sbatch on this machine, so {path} is written and not submitted: run "
            f"`sbatch {path}` on a node that submits jobs, or load the module of Slurm."
        )
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(path)],
            capture_output=True,
            text=True,
            check=False,
            timeout=_SUBMIT_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise UsageError(
            f"sbatch has not answered for {_SUBMIT_SECONDS:g} s: is slurmctld up (`sinfo`)? "
            f"{path} is written."
        ) from error
    if done.returncode:
        said = " ".join(done.stderr.split()).removeprefix("sbatch: ")
        raise UsageError(f"sbatch refused {path}: {said}")
    return done.stdout.strip().partition(";")[0]


# Ranks: tasks of one step, or one torchrun a node. $ranks, $nodes: those that are left.
_STEPS = {
    "srun": """\
    # --wait: when one rank has left, the others get a minute to finish saving.
    # --overlap: a step of which a node was lost counts as running for a while.
    srun --overlap --no-kill --wait=60 --kill-on-bad-exit=0 --nodes="${#hosts[@]}" --ntasks="$ranks" \\
        --ntasks-per-node="$ranks_per_node" \\
        --nodelist="$(IFS=,; echo "${hosts[*]}")" \\
        "$python" -m megallm "${words[@]}" "${layout[@]}" &""",
    "torchrun": """\
    # SIGUSR1 is for the ranks, which get it from Slurm as well; torchrun itself would die of it.
    export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) python ranks_per_node
    srun --wait=60 --nodes="${#hosts[@]}" --ntasks="${#hosts[@]}" --ntasks-per-node=1 bash -c '
        trap "" USR1
        exec "$python" -m megallm.launch.torchrun --nnodes="$SLURM_JOB_NUM_NODES" \\
            --node-rank="$SLURM_NODEID" --nproc-per-node="$ranks_per_node" \\
            --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" -m megallm "$@"' \\
        torchrun "${words[@]}" &""",
}

_SCRIPT = r"""#!/bin/bash
# Written by `megallm launch --slurm`. It may be changed, and submitted again: sbatch @SCRIPT@
# The run goes on from the newest valid checkpoint of its folder, whatever ended it before.
@DIRECTIVES@
# A job that is preempted, or whose first node is lost, is queued again as the same job:
#SBATCH --requeue
# A lost node ends the ranks, but not the job:
#SBATCH --no-kill

set -uo pipefail
cd @CWD@ || exit 73
python=@PYTHON@
run=@RUN@
words=(@WORDS@)
most_nodes=@NODES@ least_nodes=@LEAST@ ranks_per_node=@RANKS@
MAX_RESTARTS=${MAX_RESTARTS:-100}   # of the job; restarts without a new checkpoint: 3
CHECK_SECONDS=${CHECK_SECONDS:-30}  # between two looks at whether lost nodes are back

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
[ -n "${SLURM_CPUS_PER_TASK:-}" ] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
given_address=${MASTER_ADDR:-}

# The newest checkpoint.
newest() { ls -1 "$run/checkpoints" 2> /dev/null | grep -E '^step-[0-9]+$' | tail -n 1; }
# The nodes of this job that answer: Slurm takes lost ones out of the job.
answering() {
    local name state
    for name in $(scontrol show hostnames "$(squeue -h -j "$SLURM_JOB_ID" -o %N)"); do
        state=$(sinfo -h -N -n "$name" -o %T | head -n 1)
        case $state in *'*' | down* | drain* | fail* | '') ;; *) echo "$name" ;; esac
    done
}
# Ask the ranks to save and leave when there is a new checkpoint and enough nodes are idle again.
await_nodes() {
    local seen idle
    seen=$(newest)
    while sleep "$CHECK_SECONDS"; do
        [ "$(newest)" = "$seen" ] && continue
        idle=$(sinfo -h -p "$SLURM_JOB_PARTITION" -t idle -o %D | awk '{n += $1} END {print n + 0}')
        [ $((${#hosts[@]} + idle)) -ge $most_nodes ] || continue
        echo "job $SLURM_JOB_ID: $most_nodes nodes can be had again"
        scancel --signal=USR1 "$SLURM_JOB_ID"
        return
    done
}
queue_again() {
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_RESTARTS" ]; then
        echo "job $SLURM_JOB_ID: $1, but already started again $MAX_RESTARTS times" >&2
        exit $status
    fi
    echo "job $SLURM_JOB_ID: $1; queued again"
    scontrol requeue "$SLURM_JOB_ID"
    exit $status
}

stuck=0 status=75
while :; do
    before=$(newest) layout=()
    mapfile -t hosts < <(answering)
    [ ${#hosts[@]} -ge $least_nodes ] || queue_again "${#hosts[@]} of its nodes answer"
    ranks=$((${#hosts[@]} * ranks_per_node))
    if [ ${#hosts[@]} -lt $most_nodes ]; then
        # Fewer replicas, the same global batch and order of data.
        most_ranks=$((most_nodes * ranks_per_node))
        fit=$("$python" -m megallm launch --fit $ranks --max-ranks $most_ranks "${words[@]}") || exit $?
        read -r ranks fit <<< "$fit"
        read -r -a layout <<< "$fit"
        hosts=("${hosts[@]:0:$(((ranks + ranks_per_node - 1) / ranks_per_node))}")
    fi
    export MASTER_ADDR=${given_address:-${hosts[0]}}
    echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): ${#hosts[@]} nodes, $ranks ranks ${layout[*]}"
@STEP@
    step=$! watcher=
    if [ ${#hosts[@]} -lt $most_nodes ]; then
        await_nodes &
        watcher=$!
    fi
    wait $step
    status=$?
    [ -n "$watcher" ] && kill "$watcher" 2> /dev/null
    case $status in
    75) queue_again saved ;;                    # the time is nearly over, or somebody sent a signal
    0 | 2 | 65 | 73 | 74 | 77 | 130) exit $status ;;  # done; or starting again would not help
    esac
    # A rank or a node was lost, or it hung: start again, unless that brings nothing.
    saved=$(newest)
    if [ "$saved" = "$before" ]; then stuck=$((stuck + 1)); else stuck=0; fi
    if [ $stuck -ge 3 ]; then
        echo "job $SLURM_JOB_ID: ended with $status three times without a new checkpoint" >&2
        exit $status
    fi
    echo "job $SLURM_JOB_ID: ended with $status; starting again from ${saved:-the beginning}"
done
"""
