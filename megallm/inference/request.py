"""What `megallm generate` and `megallm chat` ask for. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from megallm.base.errors import UsageError

PRECISIONS = ("fp32", "bf16", "fp64")


@dataclass(frozen=True)
class GenerateRequest:
    """Prompts and how to continue them; `output` is a JSON Lines file for the rows, None prints
    the texts.
    """

    model: str
    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 64
    temperature: float = 0.0  # 0: the likeliest token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    repetition_penalty: float = 1.0  # 1: none
    stop: tuple[str, ...] = ()  # texts that end an answer
    seed: int = 0
    batch: int = 16  # prompts decoded together
    precision: str | None = None  # None: the one that the weights were saved in
    output: str | None = None
    tokenizer: str | None = None  # None: the one that belongs to the model
    adapter: str | None = None  # a folder of PEFT's, or a run that wrote one
    q_beta: float = 0.0  # how much Q heads weigh beside the logits (ILQL)

    def check(self) -> None:
        """Raise UsageError for a value outside its range."""
        known = " or ".join(PRECISIONS)
        for flag, value, fine, rule in (
            ("--max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("--temperature", self.temperature, 0 <= self.temperature < float("inf"), "at least 0"),
            ("--top-k", self.top_k, self.top_k >= 0, "at least 0 (0: all)"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "greater than 0 and at most 1"),
            ("--repetition-penalty", self.repetition_penalty,
             0 < self.repetition_penalty < float("inf"), "greater than 0 (1: none)"),
            ("--stop", self.stop, all(self.stop), "a text of at least one character"),
            ("--q-beta", self.q_beta, 0 <= self.q_beta < float("inf"), "at least 0 (0: off)"),
            ("--seed", self.seed, self.seed >= 0, "at least 0"),
            ("--batch", self.batch, self.batch >= 1, "at least 1"),
            ("--precision", self.precision, self.precision in (None, *PRECISIONS), known),
        ):  # fmt: skip
            if not fine:
                raise UsageError(f"{flag} is {value}; it must be {rule}.")
