"""Losses and gradients of TRL 1.16 (tests/peers/trl_golden.json), in one microbatch, split and packed.

`tests/peers/trl_golden.py` has written the file by running TRL's own trainers in an environment of
their own; with MEGALLM_PEERS=PYTHON, the interpreter of such an environment, it is written anew and
compared.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megallm.losses.advantage import combine_rewards, decoupled_advantages, group_advantages, leave_one_out
from megallm.losses.policy import policy_loss
from megallm.losses.preference import Kto, Preference, cpo_loss, orpo_loss, reference_point, simpo_loss
from megallm.losses.reward import BradleyTerry
from megallm.ops.divergence import generalized_jsd
from tests.losses.averages import averaged, packed, split

PEERS = Path(__file__).parents[1] / "peers"
GOLDEN = json.loads((PEERS / "trl_golden.json").read_text(encoding="utf-8"))
INPUTS = {
    name: torch.tensor(x) if name in ("mask", "labels") else torch.tensor(x, dtype=torch.float64)
    for name, x in GOLDEN["inputs"].items()
}
MASK = INPUTS["mask"].bool()
SHAPES = ("whole", "split", "packed")


def micros(outputs, batch, shape, *ends):
    if shape == "packed":
        return [packed(outputs, batch)]
    return split(outputs, batch, *(ends if shape == "split" else ()))


def close(loss, leaf, want, tolerance=1e-5):
    (gradient,) = torch.autograd.grad(loss, leaf)
    theirs = torch.tensor(want["gradient"], dtype=torch.float64)
    assert loss.item() == pytest.approx(want["loss"], rel=tolerance)
    assert (gradient - theirs).abs().max() <= tolerance * theirs.abs().max()


def reported(report, want):
    for name, value in want.items():
        if name in report:
            assert report[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def dpo(name):
    options = GOLDEN["dpo"][name]["options"]
    kinds, weights = options["loss_type"], options.get("loss_weights", [1.0])
    # TRL's "sft" among several losses is the likelihood of the chosen answers, over their tokens.
    nll = dict(zip(kinds, weights, strict=True)).get("sft", 0.0)
    named = [(kind, weight) for kind, weight in zip(kinds, weights, strict=True) if kind != "sft"]
    return Preference(
        tuple(kind for kind, _ in named),
        tuple(weight for _, weight in named),
        beta=options["beta"],
        label_smoothing=options.get("label_smoothing", 0.0),
        nll=nll,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", GOLDEN["dpo"])
def test_pairs(name, shape):
    if name.startswith("aot") and shape == "split":
        pytest.skip("sorting couples the pairs of a microbatch")
    leaf = INPUTS["policy"].clone().requires_grad_()
    reference = INPUTS["reference_sums" if name.startswith("aot") else "reference"]
    batch = {"mask": MASK, "ref_log_probs": reference}
    loss, report = averaged(dpo(name), micros({"log_prob": leaf}, batch, shape, 2))
    close(loss, leaf, GOLDEN["dpo"][name])
    reported(report, GOLDEN["dpo"][name]["metrics"])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", GOLDEN["kto"])
def test_kto(name, shape):
    want = GOLDEN["kto"][name]
    point = reference_point(*(torch.tensor(want["kl"][key]) for key in ("policy", "reference")))
    assert float(point) == pytest.approx(want["z0"] or float(point), rel=1e-5) and point > 0
    options = dict(want["options"])
    kind = options.pop("loss_type", "kto")
    leaf = INPUTS["policy"].clone().requires_grad_()
    batch = {
        "mask": MASK,
        "ref_log_probs": INPUTS["reference"],
        "desirable": torch.arange(len(MASK)) % 3 != 1,
        "reference_point": point.double().expand(len(MASK)),
    }
    loss, _ = averaged(Kto(kind, **options), micros({"log_prob": leaf}, batch, shape, 1))
    close(loss, leaf, want)


def reference_free(name):
    options = dict(GOLDEN["reference_free"][name]["options"])
    beta, smoothing = options["beta"], options.get("label_smoothing", 0.0)
    if name == "orpo":
        return orpo_loss(beta)
    kind, alpha = options["loss_type"], options["cpo_alpha"]
    if kind == "simpo":
        return simpo_loss(beta, options["simpo_gamma"], nll=alpha)
    kind = "cdpo" if smoothing else kind
    return replace(cpo_loss(beta, alpha), kind=kind, label_smoothing=smoothing,
                   length_normalized=kind == "ipo")  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", GOLDEN["reference_free"])
def test_pairs_without_a_reference(name, shape):
    leaf = INPUTS["logits"].clone().requires_grad_()
    log_prob = torch.log_softmax(leaf, -1).gather(-1, INPUTS["labels"][..., None])[..., 0]
    batch = {"mask": MASK}
    if name == "orpo":  # TRL's likelihood is that of every token that attention sees
        batch = {"mask": torch.ones_like(MASK), "answer_mask": MASK}
    loss, report = averaged(reference_free(name), micros({"log_prob": log_prob}, batch, shape, 2))
    close(loss, leaf, GOLDEN["reference_free"][name])
    reported(report, GOLDEN["reference_free"][name]["metrics"])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", GOLDEN["reward"])
def test_rewards(name, shape):
    want = GOLDEN["reward"][name]
    leaf = INPUTS["scores"].clone().requires_grad_()
    mask = torch.zeros_like(MASK)
    last = MASK.shape[1] - 1 - MASK.flip(-1).long().argmax(-1)
    mask[torch.arange(len(mask)), last] = True
    batch = {"mask": mask}
    if want["margin"]:
        margin = torch.tensor(want["margin"], dtype=torch.float64)
        batch["margin"] = torch.stack([margin, torch.zeros_like(margin)], dim=1).flatten()
    value = leaf[:, None].expand(mask.shape)
    loss, _ = averaged(BradleyTerry(want["center"]), micros({"value": value}, batch, shape, 2))
    close(loss, leaf, want)


def policy(name):
    options = GOLDEN["grpo"][name]["options"]
    level = options.get("importance_sampling_level", "token")
    changes = {} if level == "token" else {"level": level}
    named = {"loss_type": "rloo"} | options
    low = options["epsilon"]
    return policy_loss(
        named["loss_type"],
        low=low,
        high=options.get("epsilon_high", low),
        length=16,
        beta=options.get("beta", 0.0),
        kl="k3_is" if options.get("use_bias_correction_kl", True) else "k3",
        dual_clip=options.get("delta"),
        entropy_coef=options.get("entropy_coef", 0.0),
        opsm=options.get("off_policy_mask_threshold"),
        temperature=options.get("temperature", 1.0),
        **changes,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", GOLDEN["grpo"])
def test_policies(name, shape):
    loss = policy(name)
    leaf = INPUTS["policy"].clone().requires_grad_()
    batch = {
        "mask": MASK,
        "advantages": INPUTS["advantages"],
        "old_log_probs": INPUTS["old"],
        "ref_log_probs": INPUTS["reference"],
        "rollout_log_probs": INPUTS["rollout"],
    }
    log_prob = leaf
    if loss.temperature != 1:
        leaf = INPUTS["logits"].clone().requires_grad_()
        log_probs = torch.log_softmax(leaf / loss.temperature, -1)
        log_prob = log_probs.gather(-1, INPUTS["labels"][..., None])[..., 0]
        batch["old_log_probs"] = log_prob.detach()
    outputs = {"log_prob": log_prob, "entropy": INPUTS["entropy"]}
    found, report = averaged(loss, micros(outputs, batch, shape, 1, 4))
    close(found, leaf, GOLDEN["grpo"][name])
    reported(report, GOLDEN["grpo"][name].get("metrics", {}))


def test_advantages_of_rewards_that_may_be_none():
    golden = GOLDEN["advantages"]
    table, weights = golden["rewards"], golden["weights"]
    rewards, groups = combine_rewards(table, weights), np.arange(8) // 4
    ours = {
        **{scale: group_advantages(rewards, groups, scale) for scale in ("group", "batch", "none")},
        "decoupled": decoupled_advantages(table, weights, groups),
        "rloo": leave_one_out(rewards, groups),
    }
    for name, want in golden["advantages"].items():
        np.testing.assert_allclose(ours[name], want, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("beta", GOLDEN["distill"])
def test_divergences(beta):
    want = GOLDEN["distill"][beta]
    leaf = INPUTS["logits"].clone().requires_grad_()
    student, teacher = (torch.log_softmax(x / want["temperature"], -1) for x in (leaf, INPUTS["teacher_logits"]))
    loss = (generalized_jsd(student, teacher, float(beta)) * MASK).sum() / MASK.sum()
    close(loss, leaf, want)


def test_a_wrong_loss_is_seen():
    """Negative controls: a pair in the other order, counts doubled, another clip."""
    leaf = INPUTS["policy"].clone().requires_grad_()
    outputs = {"log_prob": leaf, "entropy": INPUTS["entropy"]}
    pairs = {"mask": MASK, "ref_log_probs": INPUTS["reference"]}
    swapped = torch.arange(len(MASK)).view(-1, 2).flip(-1).flatten()
    rows = {name: x[swapped] for name, x in pairs.items()}
    want = GOLDEN["dpo"]["sigmoid"]["loss"]
    loss, _ = averaged(dpo("sigmoid"), [({"log_prob": leaf[swapped]}, rows)])
    assert abs(loss.item() - want) > 1e-2

    class Doubled(Preference):
        def counts(self, batch):
            return {name: 2 * n for name, n in super().counts(batch).items()}

    loss, _ = averaged(Doubled(beta=0.3), [(outputs, pairs)])
    assert loss.item() == pytest.approx(want / 2)
    batch = {"mask": MASK, "advantages": INPUTS["advantages"], "old_log_probs": INPUTS["old"]}
    loss, _ = averaged(replace(policy("grpo"), high=0.3), [(outputs, batch)])
    assert abs(loss.item() - GOLDEN["grpo"]["grpo"]["loss"]) > 1e-3


@pytest.mark.skipif("MEGALLM_PEERS" not in os.environ, reason="MEGALLM_PEERS names no interpreter that has TRL")
def test_the_file_is_what_trl_says(tmp_path):
    output = tmp_path / "golden.json"
    command = [os.environ["MEGALLM_PEERS"], str(PEERS / "trl_golden.py"), "--output", str(output)]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    fresh = json.loads(output.read_text(encoding="utf-8"))
    assert fresh.keys() == GOLDEN.keys()
    for section in fresh.keys() - {"versions"}:
        assert flat(fresh[section]) == pytest.approx(flat(GOLDEN[section]), rel=1e-5, abs=1e-7), section


def flat(x, path=""):
    """Numbers by their path."""
    if isinstance(x, (dict, list)):
        items = x.items() if isinstance(x, dict) else enumerate(x)
        return {key: value for name, y in items for key, value in flat(y, f"{path}/{name}").items()}
    return {path: x} if isinstance(x, float) else {}
