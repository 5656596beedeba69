"""What a teacher gives to a student, both engines: its hidden states and its piece of the head, or
its top k.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megallm.base.errors import UsageError
from megallm.engine.engine import Engine
from megallm.models.decoder import Stage
from megallm.ops.cross_entropy import Projection
from megallm.ops.divergence import Tail
from megallm.parallel.divergence import Teacher
from megallm.parallel.pipeline import Batch
from megallm.parallel.units import run_unit
from megallm.parallel.vocab import Wanted


def compare_with(
    student: Engine, teacher: Engine | None, beta: float, tail: Tail = "rest"
) -> None:
    """Give the student's head its output `divergence`: generalised JSD with `beta` from a teacher.

    A live `teacher` is an engine on the same mesh with the same vocabulary, which makes
    `teacher_hidden` of each batch (`hidden_states`); the student itself stands for its base without
    adapters. None stands for stored log-probs, `teacher_ids` and `teacher_log_probs` `[B, T, K]` of
    each batch. The teacher's piece of the head's matrix stays whole on the ranks that compare.
    Collective over the ranks that divide the teacher's weights. Raises UsageError for another
    vocabulary.
    """
    head = None
    if teacher is not None and teacher is not student:
        sizes = student.config.model.vocab_size, teacher.config.model.vocab_size
        if sizes[0] != sizes[1]:
            raise UsageError(
                f"The student has {sizes[0]} tokens and its teacher {sizes[1]}: a divergence "
                "compares two distributions over the same vocabulary."
            )
        head = _head_copy(teacher)
    stage = _last_stage(student)
    if stage is not None:
        stage.teacher = Teacher(beta, tail, head)


def hidden_states(teacher: Engine, batches: Sequence[Batch]) -> list[Batch]:
    """Returns the microbatches with `teacher_hidden`, what the teacher's head would multiply: `[n,
    D]` of this rank's tokens that count, as they are of a student at the same layout, and only on
    ranks with the head. Forward passes only; collective over the world.
    """
    found = _lessons(teacher, batches, Wanted(("hidden",)))
    return [
        batch if each is None else batch | {"teacher_hidden": each["hidden"]}
        for batch, each in zip(batches, found, strict=True)
    ]


def teacher_top_k(
    teacher: Engine, batches: Sequence[Batch], k: int, temperature: float = 1.0
) -> list[tuple[Tensor, Tensor] | None]:
    """Returns of each microbatch ids int64 and wide log-probs `[B, T, k]` of the likeliest entries,
    0 where the mask is False, on one rank of each replica and None on the others. Forward passes
    only; collective over the world.
    """
    found = _lessons(teacher, batches, Wanted(("top",), temperature, k))
    first = not any(teacher.mesh.coords[axis] for axis in ("cp", "tp"))
    return [(each["ids"], each["log_probs"]) if each and first else None for each in found]


def _lessons(
    teacher: Engine, batches: Sequence[Batch], wanted: Wanted
) -> list[dict[str, Tensor] | None]:
    def outputs_of(outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return next(iter(outputs.values())), outputs

    placed = [teacher.on_device(batch) for batch in batches]
    results = teacher.model.run_schedule(placed, outputs_of, wanted).results
    return [results.get(micro) for micro in range(len(batches))]


def _last_stage(engine: Engine) -> Stage | None:
    return engine.model.stages.get(engine.model.placement.num_stages - 1)


def _head_copy(teacher: Engine) -> Projection | None:
    """This rank's piece of the head; None on ranks without it."""
    stage = _last_stage(teacher)
    if stage is None:
        return None

    def copied(x: Tensor) -> tuple[Tensor, ...]:
        parts = stage.head_weight, stage.head_bias
        return tuple(part.detach().clone() for part in parts if part is not None)

    with torch.no_grad():
        nothing = torch.empty(0, device=teacher.mesh.device)
        return Projection(*run_unit(stage.units, stage.head_keys, copied, nothing))
