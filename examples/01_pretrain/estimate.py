"""How long will the example train here? python estimate.py CONFIG [key=value ...]

Trains its model on random tokens in one process for three microbatches and multiplies the CPU time of the fastest by
their number and by `SHARE`, over as many cores as the ranks can use.
"""

from __future__ import annotations

import os
import sys
import time

import torch

from megallm.base.config import load
from megallm.base.errors import MegallmError
from megallm.engine.engine import Engine
from megallm.losses.language import NextToken
from megallm.parallel.mesh import Mesh
from megallm.training.config import PretrainConfig
from megallm.training.validate import check

# CPU time of all ranks, with messages and evaluation, over that of one process for the same tokens:
# the run of RESULT.md took about 320 s to train where one process needs 220 s.
SHARE = 1.45


def seconds_of_one_microbatch(config: PretrainConfig) -> float:
    """CPU time of the fastest of three, in one process with one thread; `config` is of one rank."""
    torch.set_num_threads(1)
    engine = Engine.build(config.engine, Mesh.single())
    tokens = torch.randint(config.model.vocab_size, (config.train.micro_batch, config.data.seq_len + 1))
    positions = torch.arange(config.data.seq_len).expand(len(tokens), -1)
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "positions": positions}
    batch["mask"] = torch.ones_like(positions, dtype=torch.bool)
    spent = []
    for _ in range(3):
        begin = time.process_time()
        engine.train_step([batch], NextToken(), 1e-4)
        spent.append(time.process_time() - begin)
    return min(spent)


def main(path: str, settings: list[str]) -> None:
    ranks = check(load(PretrainConfig, path, settings)).layout.grid().world
    alone = ("layout.tp=1", "layout.pp=1", "layout.dp=1", "layout.cp=1", "layout.sp=false")
    config = check(load(PretrainConfig, path, [*settings, *alone]))
    micros = config.train.steps * config.train.global_batch // config.train.micro_batch
    cores = min(ranks, len(os.sched_getaffinity(0)))
    minutes = SHARE * seconds_of_one_microbatch(config) * micros / cores / 60
    print(f"{config.train.steps} steps will take about {max(minutes, 0.1):.1f} minutes on the {cores} "
          f"core{'s' * (cores > 1)} used here, if nothing else runs on them.")  # fmt: skip


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2:])
    except MegallmError as error:
        print(f"megallm: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
