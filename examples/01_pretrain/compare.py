"""Does the model know more than word frequencies? python compare.py RUN [--margin NATS]

Compares the held-out loss of a finished run with the cross-entropy of a unigram model (token frequencies of the
training split, add-one smoothing) on the very same held-out tokens. Exit code 1 when the margin is not met.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from megallm.base.config import load
from megallm.base.errors import MegallmError
from megallm.data.batches import Share
from megallm.data.indexed.dataset import IndexedDataset
from megallm.data.megatron import order
from megallm.training.config import PretrainConfig
from megallm.training.reading import held_out_readers


def held_out_labels(config: PretrainConfig) -> np.ndarray:
    """The tokens that the run's held-out loss is the mean over: `eval.batches` global batches of the held-out split."""
    readers = held_out_readers(config, Share(config.train.global_batch, config.train.micro_batch))
    if readers is None:
        raise ValueError("the run has no held-out data: eval.batches or the validation share of data.split is 0.")
    reader = readers()
    batches = [arrays for step in range(1, config.eval.batches + 1) for arrays in reader.batches(step)]
    return np.concatenate([arrays["labels"][arrays["mask"]] for arrays in batches])


def training_counts(config: PretrainConfig) -> np.ndarray:
    """How often each token of the vocabulary occurs in the training split, int64 [V]."""
    counts = np.zeros(config.model.vocab_size, np.int64)
    for prefix in config.data.sources:
        source = IndexedDataset(prefix)
        for sequence in range(*order.split_range(config.data.split, "train", len(source))):
            counts += np.bincount(source.get(sequence), minlength=len(counts))
    return counts


def unigram_nats(counts: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross-entropy of `labels` under the add-one-smoothed frequencies of `counts`."""
    log_probs = np.log(counts + 1.0) - np.log(counts.sum() + len(counts))
    return float(-log_probs[labels].mean())


def held_out_loss(run: Path) -> tuple[int, float]:
    """Step and value of the last `val/loss` of a run's metrics."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row for row in rows if row.get("val/loss") is not None]
    if not evaluated:
        raise ValueError(f"{run}/metrics.jsonl has no val/loss: was the run finished, with eval.batches above 0?")
    return evaluated[-1]["step"], evaluated[-1]["val/loss"]


def main() -> int:
    parser = argparse.ArgumentParser(description="held-out loss of a run beside a unigram model's")
    parser.add_argument("run", type=Path, help="run folder of `megallm pretrain`")
    parser.add_argument("--margin", type=float, default=0.7, help="nats that the model must be ahead (default 0.7)")
    args = parser.parse_args()
    try:
        config = load(PretrainConfig, args.run / "run.yaml")
        step, loss = held_out_loss(args.run)
        counts, labels = training_counts(config), held_out_labels(config)
    except (MegallmError, OSError, ValueError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    unigram = unigram_nats(counts, labels)
    met = unigram - loss >= args.margin
    print(f"cross-entropy of the same {labels.size:,} held-out tokens, nats a token:")
    print(f"  {unigram:.4f}  unigram frequencies of the {counts.sum():,} training tokens, add-one smoothing")
    print(f"  {loss:.4f}  the model after step {step} (perplexity {np.exp(loss):.1f})")
    print(f"  {unigram - loss:.4f}  margin, wanted {args.margin}: {'met' if met else 'NOT MET'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
