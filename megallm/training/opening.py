"""What a run says when it starts."""

from __future__ import annotations

from megallm.base.errors import UsageError
from megallm.engine.engine import Engine
from megallm.engine.footprint import plan_bytes
from megallm.engine.state import count_params
from megallm.run.config import JobConfig


def opening(config: JobConfig, engine: Engine, begin: str) -> str:
    """Returns one line about what starts or goes on; `begin` is a clause about the weights.
    Collective over the world. Errors: UsageError when nothing is trained.
    """
    layout, sizes = engine.mesh.layout, count_params(engine)
    if not sizes.trained:
        raise UsageError(
            "No parameter is trained: what freeze and optim.groups name is all that there is. "
            "Leave out a pattern, or add adapters (peft.method)."
        )
    size = f"{config.model.num_params() / 1e6:.1f}M parameters"
    if config.model.moe.num_experts:
        size += f" ({config.model.num_params(active=True) / 1e6:.1f}M for a token)"
    if sizes.frozen:
        share = sizes.trained / sizes.all
        more = sizes.all > config.model.num_params()
        size += f" and adapters, {sizes.all / 1e6:.1f}M in all" * more
        size += f", {sizes.trained / 1e6:.3g}M trained ({share:.2%}); on a rank "
        size += "; ".join(plan_bytes(engine).lines())
    where = f"tp={layout.tp} pp={layout.pp} dp={layout.dp}{' sp' if config.layout.sp else ''}"
    where += f" ep={layout.ep}" * (layout.ep > 1)
    where += (
        f" cp={layout.cp} {config.layout.cp_kind}" * (layout.cp > 1) + f" {config.train.precision}"
    )
    return (
        f"{begin}: {config.model.family}, {size}, {where}, {config.train.steps} steps, "
        f"run folder {config.run.dir}"
    )
