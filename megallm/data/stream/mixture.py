"""Which source the next row comes from: Tijdeman's chairman assignment, whose state is a count per
source. Pure.

After any number n of rows each source i has had n w_i rows up to an error below 1 - 1/(2K - 2), K
the number of sources, and no rule can promise less (Tijdeman, "The chairman assignment problem",
Discrete Mathematics 32, 1980).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any

from megallm.base.errors import UsageError

_PARTS = (
    1 << 48
)  # weights are rounded to whole parts of their sum, so that all that follows is exact


def whole_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """Returns weights as integers in the same proportions to 2^-48; sources of weight 0 are left
    out. Errors: `UsageError`.
    """
    if not all(0 <= weight < inf for weight in weights.values()) or not any(weights.values()):
        raise UsageError(
            f"Sources need finite weights >= 0, at least one of them > 0; got {dict(weights)}."
        )
    total = sum(weights.values())
    return {
        name: max(1, round(weight / total * _PARTS))
        for name, weight in weights.items()
        if weight > 0
    }


class Mixture:
    """Draws the names of sources; `taken` is how often each was drawn so far."""

    def __init__(
        self, weights: Mapping[str, float], taken: Mapping[str, int] | None = None
    ) -> None:
        self.weights = whole_weights(weights)
        self.taken = {name: (taken or {}).get(name, 0) for name in self.weights}
        self.total = sum(self.weights.values())
        self.drawn = sum(self.taken.values())

    def draw(self) -> str:
        """Returns the next source: of those that are owed enough, the one due first; ties to the
        first named.
        """
        if len(self.weights) == 1:
            (best,) = self.weights
        else:
            best = self._earliest()
        self.drawn += 1
        self.taken[best] += 1
        return best

    def _earliest(self) -> str:
        """In S_n = {i : w_i n - c_i >= 1/(2K - 2)} the least (1 - 1/(2K - 2) - (w_i n - c_i)) /
        w_i, in integers.
        """
        scale = 2 * len(self.weights) - 2
        least = self.total  # 1/(2K - 2) when everything is multiplied by `scale * total`
        limit = scale * self.total - least
        n, best, top, bottom = self.drawn + 1, "", 0, 1
        for name, weight in self.weights.items():
            debt = scale * (weight * n - self.taken[name] * self.total)
            if debt >= least and (not best or (limit - debt) * bottom < top * weight):
                best, top, bottom = name, limit - debt, weight
        return best

    def state(self) -> dict[str, Any]:
        """Counts that `restore` takes back."""
        return {"weights": self.weights, "taken": self.taken}

    @staticmethod
    def restore(weights: Mapping[str, float], state: Mapping[str, Any]) -> Mixture:
        """Returns the mixture of `state` if it had these weights, else a new one."""
        wanted = whole_weights(weights)
        return Mixture(weights, state["taken"] if state.get("weights") == wanted else None)
