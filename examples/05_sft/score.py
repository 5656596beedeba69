"""What transformers (and PEFT) make of a folder: loss of the answers and answers that are exactly right.

python score.py NAME MODEL TASKS.jsonl SCORES.jsonl [--adapter FOLDER]     appends one line to SCORES.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import transformers

LONGEST = 12  # tokens of an answer


def load(model: str, adapter: str | None) -> torch.nn.Module:
    """The model in float32, with an adapter of PEFT's where one is given."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        import peft

        loaded = peft.PeftModel.from_pretrained(loaded, adapter)
    return loaded.eval()


@torch.no_grad()
def score(model: torch.nn.Module, words: transformers.PreTrainedTokenizerBase, rows: list[dict]) -> dict:
    """Nats per token of the answers with their end of turn, and the share of greedy answers that equal the known
    one.
    """
    end = words.convert_tokens_to_ids("<|im_end|>")
    nats = tokens = right = 0.0
    for row in rows:
        question, answer = row["messages"]
        text = words.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
        prompt = words(text, add_special_tokens=False)["input_ids"]
        whole = words(text + answer["content"], add_special_tokens=False)["input_ids"] + [end]
        logits = model(torch.tensor([whole])).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(whole[1:]), reduction="none")
        nats += float(losses[len(prompt) - 1 :].sum())
        tokens += len(whole) - len(prompt)
        given = model.generate(input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
                               max_new_tokens=LONGEST, do_sample=False, eos_token_id=end, pad_token_id=end)  # fmt: skip
        right += words.decode(given[0, len(prompt) :], skip_special_tokens=True).strip() == answer["content"]
    return {"nats": nats / tokens, "exact": right / len(rows), "tasks": len(rows)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("model")
    parser.add_argument("tasks", type=Path)
    parser.add_argument("scores", type=Path)
    parser.add_argument("--adapter")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.tasks.read_text().splitlines()]
    words = transformers.AutoTokenizer.from_pretrained(args.model)
    found = {"name": args.name, **score(load(args.model, args.adapter), words, rows)}
    print(f"{args.name}: {found['nats']:.3f} nats a token, {found['exact']:.1%} of {found['tasks']} exactly right")
    with args.scores.open("a") as file:
        file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
