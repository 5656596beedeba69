"""The process that sends the rows of a run to one tracker. No torch.

Arguments: the tracker's name, the run folder, the project, the process to die with. It ends when
its standard input does and everything is sent. What a library raises ends it: the run starts
another one.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import yaml

from megallm.base import optional
from megallm.base.redact import redacted
from megallm.base.stopping import die_with, stop_signals
from megallm.run.runfolder import RunFolder
from megallm.run.trackers import Sent

POLL_SECONDS = 1.0
WITHOUT = "leave it out of log.trackers"


class Tracker(Protocol):
    """What a dashboard's library must do: take the numbers of a step, and end."""

    def send(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TrackedRun:
    """What a tracker is told of the run: where it is, its name, id, project and configuration."""

    def __init__(self, folder: Path, project: str, identity: str) -> None:
        self.folder, self.project, self.id = folder, project, identity
        self.name = folder.resolve().name
        text = RunFolder(folder).config.read_text(encoding="utf-8")
        self.config: dict[str, Any] = redacted(yaml.safe_load(text))


class Wandb:
    """W&B, online or offline as WANDB_MODE says."""

    def __init__(self, run: TrackedRun) -> None:
        wandb = optional.need("wandb", WITHOUT)
        self.run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow",
            dir=str(run.folder),
            config=run.config,
            settings=wandb.Settings(console="off"),
        )

    def send(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class Mlflow:
    """MLflow: the server of MLFLOW_TRACKING_URI, else files in RUN/mlruns."""

    def __init__(self, run: TrackedRun) -> None:
        mlflow = optional.need("mlflow", WITHOUT)
        self.entities = optional.need("mlflow.entities", WITHOUT)
        variables = optional.need("mlflow.environment_variables", WITHOUT)
        if not mlflow.is_tracking_uri_set():
            variables.MLFLOW_ALLOW_FILE_STORE.set(True)
            mlflow.set_tracking_uri((run.folder.resolve() / "mlruns").as_uri())
        self.client = mlflow.MlflowClient()
        experiment = self.client.get_experiment_by_name(run.project)
        number = experiment.experiment_id if experiment else self._create(run.project)
        found = self.client.search_runs([number], f"tags.megallm = '{run.id}'", max_results=1)
        tags = {"megallm": run.id, "mlflow.runName": run.name}
        self.run = (found[0] if found else self.client.create_run(number, tags=tags)).info.run_id
        if not found:
            flat = list(_flat(run.config))
            params = [self.entities.Param(key, value[:500]) for key, value in flat]
            for begin in range(0, len(params), 100):
                self.client.log_batch(self.run, params=params[begin : begin + 100])

    def _create(self, project: str) -> str:
        return str(self.client.create_experiment(project))

    def send(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        rows = [self.entities.Metric(key, value, now, step) for key, value in values.items()]
        self.client.log_batch(self.run, metrics=rows)

    def close(self) -> None:
        self.client.set_terminated(self.run)


class Trackio:
    """trackio: its local database, where TRACKIO_DIR says."""

    def __init__(self, run: TrackedRun) -> None:
        self.trackio = optional.need("trackio", WITHOUT)
        name = f"{run.name}-{run.id}"
        self.trackio.init(
            project=run.project, name=name, resume="allow", config=run.config, auto_log_gpu=False
        )

    def send(self, step: int, values: Mapping[str, float]) -> None:
        self.trackio.log(dict(values), step=step)

    def close(self) -> None:
        self.trackio.finish()


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
}


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def row_numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics of a row that are numbers."""
    return {
        key: float(value)
        for key, value in row.items()
        if "/" in key and isinstance(value, int | float) and not isinstance(value, bool)
    }


def new_rows(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """Yields the whole lines that a file has from where it stands; half of one is read later."""
    while True:
        place, line = file.tell(), file.readline()
        if not line.endswith(b"\n"):
            file.seek(place)
            return
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                yield row


def send_new(tracker: Tracker, file: BinaryIO, sent: Sent) -> None:
    """Send the rows that the tracker has not had; each is written down when it has been sent."""
    for row in new_rows(file):
        step = row.get("step")
        if type(step) is int and step > sent.step:
            tracker.send(step, row_numbers(row))
            sent.keep(step, sent.id)


def main() -> None:
    """Send until standard input ends; dies with rank 0. Signals of the run are not its own."""
    name, folder, project, parent = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    die_with(parent)
    for number in (*stop_signals(), signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)
    sent = Sent(folder, name)
    sent.keep(sent.step, sent.id or secrets.token_hex(4))
    tracker = TRACKERS[name](TrackedRun(folder, project, sent.id))
    ended = False
    with RunFolder(folder).metrics.open("rb") as file:
        while not ended:
            ended = bool(select.select([sys.stdin], [], [], POLL_SECONDS)[0])
            send_new(tracker, file, sent)
    tracker.close()


if __name__ == "__main__":
    main()
