"""The section `peft` of a run's configuration: LoRA and other adapters, trained beside a base. No
torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from megallm.optim.groups import pattern_problem

ALL_LINEAR = "all-linear"


Method = Literal[
    "none", "lora", "adalora", "ia3", "prefix", "prompt", "p-tuning", "houlsby", "parallel"
]  # fmt: skip


@dataclass(frozen=True)
class PeftConfig:
    """Adapters beside a frozen base model; keys that only one method reads say which."""

    method: Method = "none"  # none: every parameter is trained
    targets: tuple[str, ...] = (ALL_LINEAR,)  # q_proj, *.mlp.down, /regex/, embed_tokens; all-linear: all but the head
    dim: int = 16  # lora: the rank r; adalora: what a matrix keeps at the end, on the average
    alpha: float = 32.0  # lora: the product B A is scaled by alpha / dim
    rs: bool = False  # lora: by alpha / sqrt(dim) (rsLoRA, arXiv 2312.03732)
    dora: bool = False  # lora: magnitude and direction apart (DoRA, arXiv 2402.09353)
    lr_b: float = 1.0  # lora: learning rate of B as a multiple of that of A (LoRA+, arXiv 2402.12354: 16)
    dropout: float = 0.0  # lora: share of the inputs of A set to zero in training
    rank_pattern: dict[str, int] = field(default_factory=dict)  # lora: another dim where a name matches
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # lora: another alpha where a name matches
    modules_to_save: tuple[str, ...] = ()  # modules of the base trained in full beside adapters: lm_head, *norm
    adapter: str | None = None  # a folder of PEFT's that the adapter starts from; null: from the seed
    name: str = "default"  # of the adapter, in names of parameters
    quantize: Literal["none", "nf4"] = "none"  # nf4: the frozen matrices of the blocks in 4 bit (QLoRA)
    virtual_tokens: int = 20  # prefix, prompt, p-tuning: tokens in front of every text
    hidden: int = 64  # houlsby, parallel: width of the bottleneck; p-tuning: of the MLP that makes the prompt
    init_dim: int | None = None  # adalora: the rank at the start; null: 1.5 times dim
    warmup_steps: int = 0  # adalora: updates before ranks are taken away
    final_steps: int = 0  # adalora: last updates, with the ranks that are left
    interval: int = 1  # adalora: updates from one allocation of ranks to the next
    betas: tuple[float, float] = (0.85, 0.85)  # adalora: of the averages of sensitivity and of its uncertainty
    orthogonal: float = 0.5  # adalora: weight of the regulariser that keeps A and B orthogonal

    @property
    def begins_as_base(self) -> bool:
        """Whether a model computes with its new adapters what it does without them."""
        other = ("prefix", "prompt", "p-tuning", "houlsby")
        return self.adapter is None and self.method not in other

    @property
    def first_dim(self) -> int:
        """The rank that adapters are made with."""
        adapts = self.method == "adalora"
        return (self.init_dim or self.dim * 3 // 2) if adapts else self.dim

    def problems(self, prefix: str = "peft") -> Iterator[str]:
        """Yields a sentence for each value that cannot be used."""
        if self.dim < 1 or any(dim < 1 for dim in self.rank_pattern.values()):
            yield f"{prefix}.dim and the values of {prefix}.rank_pattern must be at least 1."
        if self.first_dim < self.dim:
            yield (
                f"{prefix}.init_dim is {self.init_dim}; at least {prefix}.dim {self.dim} is needed."
            )
        if not all(0 < beta < 1 for beta in self.betas) or self.orthogonal < 0:
            yield f"{prefix}.betas must lie between 0 and 1, and {prefix}.orthogonal not below 0."
        for key in ("virtual_tokens", "hidden", "interval"):
            if vars(self)[key] < 1:
                yield f"{prefix}.{key} is {vars(self)[key]}; it must be at least 1."
        if self.quantize != "none" and self.method == "none":
            yield f"{prefix}.quantize is {self.quantize}: set {prefix}.method, such as lora."
        if not 0.0 <= self.dropout < 1.0:
            yield f"{prefix}.dropout is {self.dropout:g}; it must be at least 0 and below 1."
        if not self.lr_b > 0:
            yield f"{prefix}.lr_b is {self.lr_b:g}; it must be greater than 0."
        if not self.name.isidentifier():
            yield f"{prefix}.name is {self.name!r}; write letters, digits and _, such as default."
        if self.method != "none" and not self.targets:
            yield f"{prefix}.targets is empty; write all-linear, or names such as q_proj."
        named = {"targets": self.targets, "modules_to_save": self.modules_to_save}
        named |= {"rank_pattern": (*self.rank_pattern,), "alpha_pattern": (*self.alpha_pattern,)}
        for key, patterns in named.items():
            for pattern in patterns:
                problem = pattern_problem(pattern)
                if problem is not None:
                    yield f"{prefix}.{key}: '{pattern}' {problem}."
