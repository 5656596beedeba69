"""Independent float64 adapters in ordinary torch: each matrix with its adapter merged into it, or
what stands beside the model written out.

Nothing of megallm but sibling referees is imported. Weights hold adapters under their logical
names, `MODULE.adapter.default.PARAMETER`; `options` are the fields of the section `peft`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megallm.oracle.reference_encoder import LOSSES, scores
from megallm.oracle.reference_moe import Notes

Weights = Mapping[str, Tensor]
Options = Mapping[str, Any]
Config = Mapping[str, Any]
Batch = Mapping[str, Tensor]
MARK = ".adapter.default."


def _adapters(weights: Weights) -> dict[tuple[str, str], dict[str, Tensor]]:
    """The parameters of each adapter by (module, place in its stack): `{("layers.0.mlp.down", "0"):
    {"lora_A": ...}}`."""
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, value in weights.items():
        module, mark, rest = name.partition(MARK)
        if mark:
            place, _, leaf = rest.rpartition(".")
            found.setdefault((module, place), {})[leaf] = value
    return found


def _scale(options: Options, dim: int, module: str) -> float:
    """What the product of the low-rank matrices is multiplied by."""
    if options["method"] == "adalora":
        return options["alpha"] / (options["init_dim"] + 1e-5)
    patterns = options.get("alpha_pattern", {})
    alpha = patterns["*.o"] if "*.o" in patterns and module.endswith(".o") else options["alpha"]
    return alpha / dim**0.5 if options.get("rs") else alpha / dim


def _change(options: Options, module: str, own: Mapping[str, Tensor]) -> Tensor:
    """`s B A`, or `s B diag(E) A`; of all experts at once, `(X, *stack, out, in)`."""
    a, b = own["lora_A"], own["lora_B"]
    scale = _scale(options, a.shape[-2], module)
    a = a * own["lora_E"] if "lora_E" in own else a
    if a.dim() == 3:
        a = a.view(a.shape[0], *[1] * (b.dim() - 3), *a.shape[1:])
    return scale * (b @ a)


def lengths(options: Options, weights: Weights) -> dict[str, Tensor]:
    """The length of each row of the changed matrix, for every magnitude of DoRA."""
    found = {}
    for (module, place), own in _adapters(weights).items():
        if "lora_magnitude_vector" in own:
            base = weights[f"{module}.weight"]
            matrix = base.view(-1, *base.shape[-2:])[int(place)] + _change(options, module, own)
            found[f"{module}{MARK}{place}.lora_magnitude_vector"] = matrix.detach().norm(dim=1)
    return found


def merged(options: Options, weights: Weights) -> dict[str, Tensor]:
    """Weights of the plain model that computes the same."""
    made = {name: value for name, value in weights.items() if MARK not in name}
    rows = lengths(options, weights)
    for (module, place), own in _adapters(weights).items():
        if "lora_A" in own:
            tied = module == "head" and "head.weight" not in made
            name = f"{module}.weight"
            base = weights["embedding.weight"] if tied else made[name]
            change = _change(options, module, own)
            if base.shape == change.shape:
                stack = [base + change]
            else:
                stack = list(base.view(-1, *base.shape[-2:]).unbind())
                stack[int(place)] = stack[int(place)] + change
            magnitude = own.get("lora_magnitude_vector")
            if magnitude is not None:
                at = int(place) if len(stack) > 1 else 0
                length = rows[f"{module}{MARK}{place}.lora_magnitude_vector"]
                stack[at] = stack[at] * (magnitude / length)[:, None]
            made[name] = torch.stack(stack).view_as(base)
        elif "lora_embedding_A" in own:
            change = own["lora_embedding_B"] @ own["lora_embedding_A"]
            _keep_head(made)
            scale = _scale(options, len(own["lora_embedding_A"]), module)
            made["embedding.weight"] = made["embedding.weight"] + scale * change.T
        elif "ia3_l" in own:
            _rescale(made, module, place, own["ia3_l"])
    return made


def _keep_head(made: dict[str, Tensor]) -> None:
    """A tied head stays that of the base."""
    made.setdefault("head.weight", made["embedding.weight"])


def _rescale(made: dict[str, Tensor], module: str, place: str, vector: Tensor) -> None:
    """(IA)3: the rows of a matrix and its bias, or the columns of `down`."""
    if module.endswith(".scale"):
        name = module.removesuffix("scale") + "down.weight"
        made[name] = made[name] * vector[..., None, :]
        return
    for name, shaped in ((f"{module}.weight", vector[:, None]), (f"{module}.bias", vector)):
        if name in made:
            base, dims = made[name], shaped.dim()
            stack = list(base.reshape(-1, *base.shape[-dims:]).unbind())
            stack[int(place)] = stack[int(place)] * shaped
            made[name] = torch.stack(stack).view_as(base)


def adapted_scores(
    options: Options, config: Config, weights: Weights, batch: Batch, notes: Notes | None
) -> Tensor:
    """What `reference_encoder.scores` gives, of the model with its adapter."""
    own = _adapters(weights)
    plain = merged(options, weights)
    if options["method"] == "prefix":
        plain |= {name: value for name, value in weights.items() if ".prefix.adapter." in name}
        moved = {"positions": batch["positions"] + options["virtual_tokens"]}
        return scores(config, plain, {**batch, **moved}, notes)
    if options["method"] in ("houlsby", "parallel"):
        plain |= {name: value for name, value in weights.items() if ".after_" in name}
    if options["method"] not in ("prompt", "p-tuning"):
        return scores(config, plain, batch, notes)
    rows = _prompt(own["prompt", ""])
    _keep_head(plain)
    plain["embedding.weight"] = torch.cat((plain["embedding.weight"], rows))
    made = []
    for row in range(len(batch["tokens"])):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        longer, places = _with_prompt(one, len(rows), config["vocab_size"])
        made.append(scores(config, plain, longer, None)[:, places])
    return torch.cat(made)


def _prompt(own: Mapping[str, Tensor]) -> Tensor:
    """Rows `[P, D]`, free or made by three linears."""
    x = own["embedding"]
    for number in range(3):
        if f"weight_{number}" in own:
            x = F.linear(x if number == 0 else F.relu(x), own[f"weight_{number}"], own[f"bias_{number}"])
    return x


def _with_prompt(one: Batch, count: int, vocab: int) -> tuple[dict[str, Tensor], list[int]]:
    """One row whose texts begin with the entries from `vocab` on; where its own tokens are."""
    length = one["tokens"].shape[1]
    numbers = one["documents"][0].tolist() if "documents" in one else [1] * length
    tokens, positions, documents, places = [], [], [], []
    for i in range(length):
        if i == 0 or numbers[i] != numbers[i - 1]:
            tokens += range(vocab, vocab + count)
            positions += range(count)
            documents += [numbers[i]] * count
        places.append(len(tokens))
        tokens.append(int(one["tokens"][0, i]))
        positions.append(int(one["positions"][0, i]) + count)
        documents.append(numbers[i])
    made = {"tokens": tokens, "positions": positions, "documents": documents}
    return {name: torch.tensor(values)[None] for name, values in made.items()}, places


def adapted_loss(name: str, options: Options) -> Callable[..., Tensor]:
    """Returns the loss of a model with an adapter and a batch, for `reference.Trainer`."""

    def loss(config: Config, weights: Weights, batch: Batch, notes: Notes | None = None) -> Tensor:
        notes = notes or Notes(batch["mask"], batch.get("documents"))
        found = LOSSES[name](adapted_scores(options, config, weights, batch, notes), batch)
        if options["method"] == "adalora":  # its gradient, and nothing of its value
            term = options.get("orthogonal", 0.5) * _crookedness(weights)
            found = found + term - term.detach()
        return found + notes.loss()

    return loss


def _crookedness(weights: Weights) -> Tensor:
    """The mean distance of A A^T and B^T B from the unit matrix."""
    found = []
    for own in _adapters(weights).values():
        for x in (own["lora_A"], own["lora_B"].T):
            found.append((x @ x.T - torch.eye(len(x), dtype=x.dtype)).square().sum().sqrt())
    return torch.stack(found).mean()


@dataclass
class Budget:
    """AdaLoRA's allocation of ranks after each update (arXiv 2303.10512, algorithm 1)."""

    options: Options
    total: int
    felt: dict[str, Tensor] = field(default_factory=dict)
    doubt: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, weights: dict[str, Tensor], grads: Weights, count: int) -> dict[str, Tensor]:
        """Returns the weights after the update `count`, with E of what goes set to zero."""
        first, last, end = self.options["warmup_steps"], self.options["dim"], self.total
        end -= self.options["final_steps"]
        beta = 0.85
        for name in grads if count < end else ():
            now = (weights[name] * grads[name]).abs()
            self.felt[name] = beta * self.felt.get(name, 0.0) + (1 - beta) * now
            away = (now - self.felt[name]).abs()
            self.doubt[name] = beta * self.doubt.get(name, 0.0) + (1 - beta) * away
        modules = sorted({name.rpartition(".")[0] for name in grads})
        if first < count <= end:
            left = (1 - (count - first) / (end - first)) ** 3
            budget = int(((self.options["init_dim"] - last) * left + last) * len(modules))
            scores = {module: self._scores(module) for module in modules}
            ranked = torch.cat(list(scores.values())).sort(descending=True).values
            self.kept = {module: (s >= ranked[budget - 1]) for module, s in scores.items()}
        gone = {f"{m}.lora_E": weights[f"{m}.lora_E"] * kept[:, None] for m, kept in self.kept.items()}
        return weights | gone

    def _scores(self, module: str) -> Tensor:
        a, b, e = (
            self.felt[f"{module}.{leaf}"] * self.doubt[f"{module}.{leaf}"]
            for leaf in ("lora_A", "lora_B", "lora_E")
        )
        return e[:, 0] + a.mean(1) + b.mean(0)
