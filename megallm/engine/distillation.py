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
from megallm.parallel import comm
from megallm.parallel.divergence import Teacher
from megallm.parallel.pipeline import Batch
from megallm.parallel.shard import piece
from megallm.parallel.units import run_unit
from megallm.parallel.vocab import Wanted

READ = ("tokens", "labels", "positions", "mask", "cu_seqlens")  # of a batch, by any model


def compare_with(student: Engine, teacher: Engine | None, beta: float, tail: Tail = "rest") -> None:
    """Give the student's head its output `divergence`: generalised JSD with `beta` from a teacher.

    A live `teacher` is an engine with the same vocabulary, on the student's mesh or on another one
    over the same ranks, which makes `teacher_hidden` of each batch (`hidden_states`); the student
    itself stands for its base without adapters. None stands for stored log-probs, `teacher_ids` and
    `teacher_log_probs` `[B, T, K]` of each batch. The teacher's piece of the head's matrix stays
    whole on the ranks that compare. Collective over the world. Raises UsageError for another
    vocabulary.
    """
    head, stage = None, _last_stage(student)
    _check_head(student, "student")
    if teacher is not None and teacher is not student:
        _check_head(teacher, "teacher")
        sizes = student.config.model.vocab_size, teacher.config.model.vocab_size
        if sizes[0] != sizes[1]:
            raise UsageError(
                f"The student has {sizes[0]} tokens and its teacher {sizes[1]}: a divergence "
                "compares two distributions over the same vocabulary."
            )
        head = _head_copy(teacher)
        if teacher.mesh is not student.mesh:
            head = _resharded_head(teacher, head, student)
    if stage is not None:
        stage.teacher = Teacher(beta, tail, head)


def _check_head(engine: Engine, who: str) -> None:
    """Errors: UsageError for logits that are not the product of hidden states and a matrix."""
    model = engine.config.model
    for key in ("logit_cap", "logits_scaling"):
        if vars(model)[key] is not None:
            raise UsageError(
                f"The {who} has model.{key} {vars(model)[key]:g}: the divergence is computed from "
                "hidden states and the head's matrix, and does not know it. Models without it can "
                "be distilled."
            )


def hidden_states(teacher: Engine, batches: Sequence[Batch], student: Engine) -> list[Batch]:
    """Returns the microbatches with `teacher_hidden`, what the teacher's head would multiply: `[n,
    D]` of this rank's tokens that count, only on ranks with the student's head. Forward passes
    only; collective over the world.

    On another mesh the teacher reads the microbatches of all data ranks, its own share of them, and
    the hidden states of each come to every rank, one microbatch after the other.
    """
    if teacher.mesh is not student.mesh:
        return _from_another_mesh(teacher, batches, student)
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
    _check_head(teacher, "teacher")
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


# A teacher on another mesh over the same ranks


def _from_another_mesh(teacher: Engine, batches: Sequence[Batch], student: Engine) -> list[Batch]:
    """`hidden_states`, where the teacher's ranks hold other tokens than the student's."""
    lists = [{name: batch[name].tolist() for name in READ if name in batch} for batch in batches]
    whole = [_batch_of(one) for one in student.all(lists)]
    count, size = len(whole), teacher.mesh.data.size
    nobody = whole[0] | {"mask": torch.zeros_like(whole[0]["mask"])}
    whole += [nobody] * (-count % size)
    found = _lessons(teacher, teacher.mine(whole), Wanted(("whole_hidden",)))
    sources, each = _holders(teacher), len(whole) // size
    first = student.mesh.data.rank * len(batches)
    made = list(batches)
    for number, batch in enumerate(whole[:count]):
        mask, (owner, place) = batch["mask"].flatten(), divmod(number, each)
        shape = int(mask.sum()), teacher.config.model.hidden_size
        x = torch.empty(shape, dtype=teacher.model.dtype, device=teacher.mesh.device)
        if teacher.mesh.rank == sources[owner, 0]:
            x.copy_(found[place]["whole_hidden"].flatten(0, 1)[mask.to(x.device)])
        comm.broadcast_(x, teacher.mesh.world, sources[owner, 0])
        stage = _last_stage(student)
        if stage is not None and first <= number < first + len(batches):
            own = _own_tokens(x, batch["mask"], stage)
            made[number - first] = batches[number - first] | {"teacher_hidden": own}
    return made


def _batch_of(lists: dict[str, list]) -> Batch:
    types = {"mask": torch.bool, "cu_seqlens": torch.int32}
    return {name: torch.tensor(x, dtype=types.get(name, torch.int64)) for name, x in lists.items()}


def _holders(teacher: Engine) -> dict[tuple[int, int], int]:
    """(data rank, tp rank) -> the rank with that piece of the teacher's head and the whole rows of
    that data rank; collective over the world.
    """
    mesh = teacher.mesh
    here = _last_stage(teacher) is not None and mesh.cp.rank == 0
    gathered = mesh.gather_json([mesh.data.rank, mesh.tp.rank, mesh.rank] if here else None)
    table = mesh.broadcast_json(gathered)
    return {(data, tp): rank for data, tp, rank in filter(None, table)}


def _own_tokens(x: Tensor, mask: Tensor, stage: Stage) -> Tensor:
    """Those `[n, D]` of this cp rank, of all `[N, D]` that count in the rows of a mask `[B, T]`."""
    numbers = (mask.flatten().cumsum(0) - 1).view(mask.shape)
    own = stage.context.local(numbers)[stage.context.local(mask)]
    return x.index_select(0, own.to(x.device))


def _resharded_head(
    teacher: Engine, piece_here: Projection | None, student: Engine
) -> Projection | None:
    """This rank's piece of the teacher's head as the student's vocabulary is divided; one piece of
    the teacher's at a time is here besides.
    """
    model, mesh, sources = teacher.config.model, teacher.mesh, _holders(teacher)
    own = piece(model.vocab_size, student.mesh.tp.size, student.mesh.tp.rank)
    shapes = [(model.hidden_size,)] + [()] * model.head_bias
    parts: list[list[Tensor]] = [[] for _ in shapes]
    for tp in range(mesh.tp.size):
        begin, end = piece(model.vocab_size, mesh.tp.size, tp)
        for number, shape in enumerate(shapes):
            x = torch.empty(end - begin, *shape, dtype=teacher.model.dtype, device=mesh.device)
            if mesh.rank == sources[0, tp]:
                x.copy_(piece_here[number])
            comm.broadcast_(x, mesh.world, sources[0, tp])
            low, high = max(begin, own[0]) - begin, min(end, own[1]) - begin
            parts[number].append(x[low : max(low, high)].clone())
    if _last_stage(student) is None:
        return None
    return Projection(*(torch.cat(each) for each in parts))
