"""Independent float64 losses of fine-tuning in ordinary torch, one sequence after another.

Nothing of megallm but sibling referees is imported. `scores` are logits `[B, T, V]` or values `[B,
T, 1]`; a batch is the global one, in which what belongs to a sequence stands at each of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Batch = Mapping[str, Tensor]
BETA, CENTER, NLL, MIXED = 0.3, 0.05, 0.4, (0.8, 0.3)  # of preferences and rewards
GOOD, BAD = 1.3, 0.7  # weights of KTO's two kinds of answers
HEAT, LOW, HIGH, KL, ENTROPY = 0.7, 0.3, 0.4, 0.2, 0.05  # of policies: temperature, clip, terms
SIMPO_BETA, SIMPO_GAMMA = 2.0, 0.6
AWR_BETA, AWR_MOST, AWR_VALUE = 0.8, 2.5, 0.6  # of weighted regression: temperature, largest weight, values
DISCOUNT, EXPECTILE, CQL, LIKELY = 0.9, 0.7, 0.3, 0.5  # of ILQL


def sequences(batch: Batch) -> Iterator[tuple[int, Tensor]]:
    """(row, places) of each row, or of each of its documents, in order."""
    rows, length = batch["tokens"].shape
    for row in range(rows):
        numbers = batch.get("documents")
        number = torch.zeros(length) if numbers is None else numbers[row]
        for one in number.unique():
            yield row, (number == one).nonzero()[:, 0]


def pairs(batch: Batch) -> Iterator[tuple[tuple[int, Tensor], tuple[int, Tensor]]]:
    """The sequences two by two, where a token of either counts."""
    found = list(sequences(batch))
    for first, second in zip(found[::2], found[1::2], strict=True):
        if any(batch["mask"][row, places].any() for row, places in (first, second)):
            yield first, second


def log_probs(scores: Tensor, batch: Batch, heat: float = 1.0) -> Tensor:
    """`[B, T]`, of the labels, 0 where the mask is False."""
    chosen = torch.log_softmax(scores / heat, -1).gather(-1, batch["labels"][..., None])[..., 0]
    return chosen * batch["mask"]


def dft(scores: Tensor, batch: Batch) -> Tensor:
    """Each label weighed by its probability (arXiv 2508.05629)."""
    found = log_probs(scores, batch)
    return -(found.detach().exp() * found).sum() / batch["mask"].sum()


def bradley_terry(scores: Tensor, batch: Batch) -> Tensor:
    """-log sigmoid of the margin less what it should be, and the squared sum of both scores."""
    value, total, count = scores[..., 0] * batch["mask"], 0.0, 0
    for (row, places), (other, others) in pairs(batch):
        chosen, rejected = value[row, places].sum(), value[other, others].sum()
        wanted = batch["margin"][row, places[0]] - batch["margin"][other, others[0]]
        total = total - F.logsigmoid(chosen - rejected - wanted)
        total = total + CENTER * (chosen + rejected) ** 2
        count += 1
    return total / count


def _gaps(scores: Tensor, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """The gap of the log-ratios of each pair, and what their scores should differ by."""
    ratio = log_probs(scores, batch) - batch["ref_log_probs"] * batch["mask"]
    found = [(ratio[a, x].sum() - ratio[b, y].sum(), batch["margin"][a, x[0]] - batch["margin"][b, y[0]])
             for (a, x), (b, y) in pairs(batch)]  # fmt: skip
    return [gap for gap, _ in found], [wanted for _, wanted in found]


def dpo(scores: Tensor, batch: Batch) -> Tensor:
    """Equation 7 of arXiv 2305.18290, with margins."""
    gaps, wanted = _gaps(scores, batch)
    return torch.log1p(torch.exp(torch.stack(wanted) - BETA * torch.stack(gaps))).mean()


def dpo_mixed(scores: Tensor, batch: Batch) -> Tensor:
    """DPO and IPO, and the likelihood of the chosen answers over their tokens."""
    gaps = torch.stack(_gaps(scores, batch)[0])
    wanted = torch.stack(_gaps(scores, batch)[1])
    found, likely, tokens = log_probs(scores, batch), 0.0, 0
    for row, places in list(sequences(batch))[::2]:
        likely = likely + found[row, places].sum()
        tokens += int(batch["mask"][row, places].sum())
    each = -MIXED[0] * F.logsigmoid(BETA * gaps - wanted) + MIXED[1] * (gaps - 0.5 / BETA) ** 2
    return each.mean() - NLL * likely / max(tokens, 1)


def simpo(scores: Tensor, batch: Batch) -> Tensor:
    """Equation 6 of arXiv 2405.14734, with margins."""
    found, each = log_probs(scores, batch), []
    for sides in pairs(batch):
        chosen, rejected = (
            found[row, places].sum() / max(int(batch["mask"][row, places].sum()), 1)
            for row, places in sides
        )
        margin = [batch["margin"][row, places[0]] for row, places in sides]
        logit = SIMPO_BETA * (chosen - rejected) - SIMPO_GAMMA - margin[0] + margin[1]
        each.append(-F.logsigmoid(logit))
    return torch.stack(each).mean()


def _counted(batch: Batch) -> Iterator[tuple[int, Tensor]]:
    """The sequences in which a token counts."""
    yield from ((row, at) for row, at in sequences(batch) if batch["mask"][row, at].any())


def kto(scores: Tensor, batch: Batch) -> Tensor:
    """Equation 8 of arXiv 2402.01306; the reference point is data."""
    ratio, each = log_probs(scores, batch) - batch["ref_log_probs"] * batch["mask"], []
    for row, places in _counted(batch):
        away = BETA * (ratio[row, places].sum() - batch["reference_point"][row, places[0]])
        good = bool(batch["desirable"][row, places[0]])
        each.append(GOOD * (1 - torch.sigmoid(away)) if good else BAD * (1 - torch.sigmoid(-away)))
    return torch.stack(each).mean()


def _policy(scores: Tensor, batch: Batch, together: bool, by_token: bool) -> Tensor:
    """Clipped ratios, k3 weighed by the ratio, entropy; averaged over tokens, or over sequences of
    the means over their tokens."""
    found, probability = log_probs(scores, batch, HEAT), torch.softmax(scores / HEAT, -1)
    entropy = -torch.special.xlogy(probability, probability).sum(-1)
    sums, sizes = [], []
    for row, places in _counted(batch):
        places = places[batch["mask"][row, places]]
        drift = found[row, places] - batch["old_log_probs"][row, places]
        ratio = torch.exp(drift.mean().expand_as(drift) if together else drift)
        advantage = batch["advantages"][row, places[0]]
        near = torch.clamp(ratio, 1 - LOW, 1 + HIGH)
        away = batch["ref_log_probs"][row, places] - found[row, places]
        each = -torch.minimum(ratio * advantage, near * advantage)
        sums.append((each + KL * (torch.exp(away) - 1 - away) * ratio).sum())
        sizes.append(len(places))
    counts = torch.tensor(sizes, dtype=torch.float64)
    loss = torch.stack(sums).sum() / counts.sum() if by_token else (torch.stack(sums) / counts).mean()
    return loss - ENTROPY * entropy[batch["mask"]].mean()


def grpo(scores: Tensor, batch: Batch) -> Tensor:
    """Equation 3 of arXiv 2402.03300."""
    return _policy(scores, batch, together=False, by_token=False)


def dapo(scores: Tensor, batch: Batch) -> Tensor:
    """The same averaged over tokens (arXiv 2503.14476)."""
    return _policy(scores, batch, together=False, by_token=True)


def gspo(scores: Tensor, batch: Batch) -> Tensor:
    """One ratio a sequence (arXiv 2507.18071)."""
    return _policy(scores, batch, together=True, by_token=False)


def awr(scores: Tensor, batch: Batch) -> Tensor:
    """Equation 5 of arXiv 1910.00177 with weights of at most AWR_MOST."""
    weights = torch.clamp(torch.exp(batch["advantages"] / AWR_BETA), max=AWR_MOST)
    return -(weights * log_probs(scores, batch)).sum() / batch["mask"].sum()


def awr_value(scores: Tensor, batch: Batch) -> Tensor:
    """The same with the return less a value, which is fitted to it."""
    value, known = scores[..., -1], batch["mask"]
    away = batch["returns"] - value
    fit = AWR_VALUE / 2 * (away[known] ** 2).mean()
    return fit + awr(scores[..., :-1], {**batch, "advantages": away.detach()})


def ilql(scores: Tensor, batch: Batch) -> Tensor:
    """Equations 2 to 5 of arXiv 2206.11871 and the likelihood of the data, a token after the other."""
    vocab = (scores.shape[-1] - 1) // 3
    logits, value, first, second = scores.split([vocab, 1, vocab, vocab], -1)
    each = []
    for row, places in _counted(batch):
        places = places[batch["mask"][row, places]].tolist()
        for at, then in zip(places, [*places[1:], None], strict=True):
            now, taken = value[row, at, 0], batch["labels"][row, at]
            after = 0.0 if then is None else float(value[row, then, 0].detach())
            wanted = batch["rewards"][row, at] + DISCOUNT * after
            loss = sum((q[row, at, taken] - wanted) ** 2 for q in (first, second))
            away = batch["target_q"][row, at] - now
            loss = loss + (EXPECTILE if away.item() >= 0 else 1 - EXPECTILE) * away**2
            for weight, one in ((CQL, first), (CQL, second), (LIKELY, logits)):
                loss = loss + weight * (torch.logsumexp(one[row, at], -1) - one[row, at, taken])
            each.append(loss)
    return torch.stack(each).mean()


def _jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Equation 1 of arXiv 2306.13649, and the two divergences at its ends, of probabilities."""
    mixture = beta * teacher + (1 - beta) * student

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p * torch.log(p / q)).sum(-1)

    if beta in (0.0, 1.0):
        return kl(teacher, student) if beta == 0.0 else kl(student, teacher)
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def _live(scores: Tensor, batch: Batch, beta: float, nll: float = 0.0) -> Tensor:
    student, teacher = (torch.softmax(x / HEAT, -1) for x in (scores, batch["teacher_scores"]))
    each = _jsd(student, teacher, beta) - nll * log_probs(scores, batch, HEAT)
    return each[batch["mask"]].mean()


def _stored(scores: Tensor, batch: Batch, beta: float, renormalized: bool = False) -> Tensor:
    student = torch.softmax(scores / HEAT, -1).gather(-1, batch["teacher_ids"])
    both = [student, batch["teacher_log_probs"].exp()]
    if renormalized:
        both = [x / x.sum(-1, keepdim=True) for x in both]
    else:
        both = [torch.cat((x, 1 - x.sum(-1, keepdim=True)), -1) for x in both]
    return _jsd(*both, beta)[batch["mask"]].mean()


DISTILLATION: dict[str, Callable[[Tensor, Batch], Tensor]] = {
    "distill": lambda scores, batch: _live(scores, batch, 0.5),
    "distill_forward": lambda scores, batch: _live(scores, batch, 0.0),
    "distill_reverse": lambda scores, batch: _live(scores, batch, 1.0),
    "distill_nll": lambda scores, batch: _live(scores, batch, 0.3, NLL),
    "distill_self": lambda scores, batch: _live(scores, batch, 0.7),
    "distill_stored": lambda scores, batch: _stored(scores, batch, 0.5),
    "distill_stored_reverse": lambda scores, batch: _stored(scores, batch, 1.0),
    "distill_renormalized": lambda scores, batch: _stored(scores, batch, 0.3, True),
}
TRAINER_LOSSES: dict[str, Callable[[Tensor, Batch], Tensor]] = {
    loss.__name__: loss
    for loss in (
        dft, bradley_terry, dpo, dpo_mixed, simpo, kto, grpo, dapo, gspo, awr, awr_value, ilql,
    )
} | DISTILLATION
