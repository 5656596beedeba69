"""Templates in the manner of Llama-3.1, Qwen3 and ChatML, tokenizers for them, and random conversations."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers import decoders as decoding

from megallm.data.chat.template import CHATML

# Headers of roles, a system turn with the date, tools in the first question, calls as JSON, <|eot_id|> at the end.
LLAMA31 = """{{- bos_token }}
{%- if date_string is not defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- set system = messages[0].content if messages and messages[0].role == "system" else "" %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " ~ date_string ~ "\\n" ~ system ~ "<|eot_id|>" }}
{%- for m in messages if m.role != "system" %}
  {%- set role = "ipython" if m.role == "tool" else m.role %}
  {{- "<|start_header_id|>" ~ role ~ "<|end_header_id|>\\n\\n" }}
  {%- if tools and loop.first %}{{- "Functions: " }}
    {%- for t in tools %}{{- t | tojson(indent=2) ~ "\\n" }}{% endfor %}
  {%- endif %}
  {%- if m.tool_calls %}
    {%- if m.tool_calls | length != 1 %}{{ raise_exception("one call at once") }}{% endif %}
    {%- set call = m.tool_calls[0].function %}
    {{- '{"name": "' ~ call.name ~ '", "parameters": ' ~ (call.arguments | tojson) ~ "}" }}
  {%- else %}{{- m.content | trim }}{% endif %}
  {{- "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{% endif %}"""

# ChatML whose past answers lose their thinking, with several calls a turn and a switch for thinking.
QWEN3 = """{%- if tools %}
{{- "<|im_start|>system\\n# Tools\\n" }}{% for t in tools %}{{ t | tojson ~ "\\n" }}{% endfor %}{{ "<|im_end|>\\n" }}
{%- endif %}
{%- set state = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == "user" %}{% set state.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
  {%- if m.role == "assistant" %}
    {%- set parts = m.content.split("</think>") %}
    {%- set thought = parts[0].split("<think>")[-1].strip() if parts | length > 1 else "" %}
    {{- "<|im_start|>assistant\\n" }}
    {%- if loop.index0 > state.last %}{{- "<think>\\n" ~ thought ~ "\\n</think>\\n\\n" }}{% endif %}
    {{- parts[-1].strip() }}
    {%- for call in m.tool_calls or [] %}
      {{- "\\n<tool_call>\\n" ~ (call.function | tojson) ~ "\\n</tool_call>" }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
  {%- else %}
    {{- "<|im_start|>" ~ m.role ~ "\\n" ~ m.content ~ "<|im_end|>\\n" }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- "<|im_start|>assistant\\n" }}
  {%- if enable_thinking is defined and not enable_thinking %}{{- "<think>\\n\\n</think>\\n\\n" }}{% endif %}
{%- endif %}"""

TEMPLATES = {"chatml": CHATML, "llama31": LLAMA31, "qwen3": QWEN3}
END = {"chatml": "<|im_end|>", "llama31": "<|eot_id|>", "qwen3": "<|im_end|>"}
SPECIALS = (
    "<|begin|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|endoftext|>",
)
WORDS = (
    "the answer is 42",
    "Grüße,",
    "漢字",
    "🙂 ok",
    "\n\n",
    "  two  spaces",
    "\t",
    "def f(x):\n    return x",
    "a",
    " ",
    "don't",
    "<|not_special|>",
    "{{ 7 }}",
    "user",
    "assistant\n",
    "...",
    "1,000.5",
    "é",
)


def make_tokenizer(folder: Path, template: str | None = None, trim: bool = False, bos: bool = False) -> str:
    """A byte-level BPE; `trim`: its offsets leave spaces out, as GPT-2's do; `bos`: it begins texts by itself."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoding.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(SPECIALS),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    built.train_from_iterator([" ".join(WORDS)] * 8 + ["system user assistant tool \n\n \n"] * 8, trainer)
    if trim:
        built.post_processor = processors.ByteLevel(trim_offsets=True)
    if bos:
        built.post_processor = processors.TemplateProcessing(
            single=["<|begin|>", "$A"], special_tokens=[("<|begin|>", 0)]
        )
    folder.mkdir(parents=True, exist_ok=True)
    built.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|begin|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


def text(random: random.Random) -> str:
    """Some words; an answer's own spaces at its ends are the template's business."""
    return "".join(random.choice(WORDS) for _ in range(random.randint(1, 8))).strip() or "x"


def conversation(random: random.Random, thinking: bool = False) -> list[dict]:
    """One to three questions with answers, sometimes with a system message, sometimes with thinking."""
    talk = [{"role": "system", "content": text(random)}] if random.random() < 0.3 else []
    for _ in range(random.randint(1, 3)):
        said = text(random)
        if thinking and random.random() < 0.7:
            said = f"<think>\n{text(random)}\n</think>\n\n{said}"
        talk += [{"role": "user", "content": text(random)}, {"role": "assistant", "content": said}]
    return talk


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)
