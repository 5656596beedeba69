"""Who shares the embedding of the first and the last stage."""

from __future__ import annotations

from megallm.parallel.mesh import Axis, Mesh
from megallm.parallel.schedule import Placement


def tie_axis(mesh: Mesh, placement: Placement, tied: bool) -> Axis:
    """Returns the holders of the first and the last stage, size 1 when nothing is shared;
    collective over pp.
    """
    first, last = placement.rank_of(0), placement.rank_of(placement.num_stages - 1)
    if not tied or first == last:
        return Axis("tie")
    ends = (mesh.pp.ranks[first], mesh.pp.ranks[last])
    here = mesh.rank in ends
    group = mesh.pp.group
    if mesh.pp.size > 2:
        group = mesh.group(ends if here else (mesh.rank,))  # as many groups on every rank
    if not here:
        return Axis("tie")
    return Axis("tie", ends.index(mesh.rank), 2, ends, group, mesh.pp.broken)
