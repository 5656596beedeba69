"""What `megallm generate` asks for. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from megallm.base.errors import UsageError


@dataclass(frozen=True)
class GenerateRequest:
    """Prompts and how to continue them; `output` is a JSON Lines file for the rows, None prints the texts."""

    model: str
    prompts: tuple[str, ...]
    max_new_tokens: int = 64
    temperature: float = 0.0  # 0: the likeliest token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: int = 0
    output: str | None = None

    def check(self) -> None:
        """Raise UsageError for a value outside its range."""
        for flag, value, fine, rule in (
            ("--max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("--temperature", self.temperature, 0 <= self.temperature < float("inf"), "at least 0"),
            ("--top-k", self.top_k, self.top_k >= 0, "at least 0 (0: all)"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "greater than 0 and at most 1"),
            ("--seed", self.seed, self.seed >= 0, "at least 0"),
        ):
            if not fine:
                raise UsageError(f"{flag} is {value}; it must be {rule}.")
