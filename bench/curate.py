"""What curation finds and misses on labelled data, and how fast it is beside datatrove.

usage: bench/curate.py MEASURE RAW [--megabytes N]
  RAW is the folder of JSONL files that examples/03_data/corpus.py writes (documents with package, path, label).
  MEASURE: languages  near  pii  contamination  edited  toxicity  rates
Every measure prints one JSON object. `rates` runs each system in a process of its own on the same sample and reports
processor seconds and peak resident memory of that process, start-up included; datatrove runs its Gopher quality
and repetition filters and the four stages of its MinHash deduplication (it needs spacy).
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402

from megallm.curate import pii, run, text  # noqa: E402
from megallm.curate.config import (  # noqa: E402
    CurateConfig,
    DecontaminateConfig,
    InputConfig,
    LanguageConfig,
    NearConfig,
    PiiConfig,
    QualityConfig,
    ToxicityConfig,
)
from megallm.curate.decontaminate import Decontaminate  # noqa: E402
from megallm.curate.document import Document, DocumentBatch  # noqa: E402
from megallm.curate.language import Language  # noqa: E402
from megallm.curate.near import band_hashes, jaccard, shingles  # noqa: E402
from megallm.curate.toxicity import Toxicity  # noqa: E402


def rows_of(raw: Path, pattern: str = "*", every: int = 1) -> Iterator[dict[str, str]]:
    for path in sorted(raw.glob(f"{pattern}.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            yield from (json.loads(line) for number, line in enumerate(file) if number % every == 0)


def languages(raw: Path, _: float) -> dict[str, Any]:
    """Accuracy against the language of package or path, whole documents and beginnings of them."""
    step = Language(LanguageConfig())
    # The handbook's and the kernel's translations keep whole pages in English, so their folders are no labels.
    held = [
        row
        for row in rows_of(raw, every=7)
        if row["label"] and row["package"] != "debian-handbook" and "/translations/" not in row["path"]
    ]
    right: dict[str, Counter[bool]] = defaultdict(Counter)
    wrong: Counter[str] = Counter()
    for row in held:
        for name, size in (("60 characters", 60), ("300 characters", 300), ("whole", 10**9)):
            begin = len(row["text"]) // 3
            piece = row["text"] if size == 10**9 else row["text"][begin : begin + size]
            found = step.identify(piece)[0]
            right[name][found == row["label"]] += 1
            if size == 10**9 and found != row["label"]:
                wrong[f"{row['label']} taken for {found}"] += 1
    shares = {name: round(counts[True] / counts.total(), 4) for name, counts in right.items()}
    return {"documents": len(held), "languages": len({row["label"] for row in held}), "accuracy": shares,
            "most frequent errors": dict(wrong.most_common(6))}  # fmt: skip


def near(raw: Path, _: float) -> dict[str, Any]:
    """Sibling packages: for each pair of the same path its true Jaccard similarity, and what bands and steps do."""
    pairs: dict[str, dict[str, str]] = defaultdict(dict)
    for group in ("installation-guide-*", "libreoffice-help-en-*"):
        for row in rows_of(raw, group):
            key = re.sub(r"(installation-guide|libreoffice-help-en)-\w+", r"\1", row["path"])
            key = re.sub(r"/en-(US|GB)/", "/en/", key)
            pairs[key][row["package"]] = row["text"]
    chosen = [key for number, key in enumerate(sorted(pairs)) if len(pairs[key]) > 1 and number % 5 == 0]
    texts = [(key, package, body) for key in chosen for package, body in pairs[key].items()]
    config = NearConfig()
    sets = [shingles(text.Analysis([body]), config.ngram)[0] for _, _, body in texts]
    values, offsets = np.concatenate(sets), np.concatenate([[0], np.cumsum([len(own) for own in sets])])
    used = np.diff(offsets) > 0
    bands = band_hashes(values, np.append(offsets[:-1][used], len(values)), config.bands, config.rows)
    row_of = np.cumsum(used) - 1
    seen: dict[str, Counter[bool]] = defaultdict(Counter)
    by_key: dict[str, list[int]] = defaultdict(list)
    for number, (key, _, _) in enumerate(texts):
        if used[number]:
            by_key[key].append(number)
    for own in by_key.values():
        for i, a in enumerate(own):
            for b in own[i + 1 :]:
                value = jaccard(values[offsets[a] : offsets[a + 1]], values[offsets[b] : offsets[b + 1]])
                bucket = "1" if value == 1 else f"{int(value * 10) / 10:.1f}-{int(value * 10) / 10 + 0.1:.1f}"
                seen[bucket][bool((bands[row_of[a]] == bands[row_of[b]]).any())] += 1
    return {
        "pairs": sum(counts.total() for counts in seen.values()),
        "found by bands": {name: f"{seen[name][True]}/{seen[name].total()}" for name in sorted(seen)},
        "deleted": _deletions([body for _, _, body in texts]),
    }


def _deletions(texts: list[str]) -> dict[str, Any]:
    """The whole step on the texts: how similar each deleted document is to the kept one that it is said to copy,
    computed anew from sets of word 5-grams as strings."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "in.jsonl"
        source.write_text("".join(json.dumps({"id": k, "text": body}) + "\n" for k, body in enumerate(texts)))
        config = CurateConfig(InputConfig((str(source),), id_key="id"), ("near",))
        run.run(config, Path(scratch) / "out")
        ledger = [json.loads(line) for line in (Path(scratch) / "out" / run.LEDGER).read_text().splitlines()]
    dropped = [row for row in ledger if row["action"] == "drop"]
    similarity = [_similarity(texts[int(row["id"])], texts[int(row["note"]["of"])]) for row in dropped]
    return {"documents": len(texts), "deleted": len(dropped), "lowest true similarity": round(min(similarity), 4),
            "deleted below 0.5": sum(value < 0.5 for value in similarity)}  # fmt: skip


def _similarity(a: str, b: str) -> float:
    first, second = ({tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in (_words(a), _words(b)))
    return len(first & second) / max(len(first | second), 1)


def _words(body: str) -> list[str]:
    low, words = text.lowered(body + "\n"), text.Analysis([body]).words
    return [low[b:e] for b, e in zip(words.begin.tolist(), words.end.tolist(), strict=True)]


def generated_pii(chance: random.Random) -> Iterator[tuple[str, str]]:
    """(kind, written form) of strings with right checksums."""
    import phonenumbers

    def digits(count: int) -> str:
        return "".join(chance.choices("0123456789", k=count))

    def letters(count: int) -> str:
        return "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=count))

    domain = f"{letters(7)}.{chance.choice(['com', 'org', 'de', 'co.uk'])}"
    yield "email", f"{letters(6)}.{letters(5)}{chance.choice(['', digits(2)])}@{domain}"
    tail = ".".join(str(chance.randint(1, 254)) for _ in range(3))
    yield "ip", f"{chance.choice([81, 93, 104, 151, 185, 203])}.{tail}"
    yield "ip", f"2001:{chance.randint(0x400, 0xCFF):x}:{chance.randint(1, 0xFFFF):x}::{chance.randint(1, 0xFFFF):x}"
    bank = f"{chance.choice(['DE', 'GB', 'FR'])}"
    body = {"DE": digits(18), "GB": letters(4).upper() + digits(14), "FR": digits(23)}[bank]
    check = 98 - int("".join(str(int(char, 36)) for char in f"{body}{bank}00")) % 97
    code = f"{bank}{check:02d}{body}"
    grouped = " ".join(code[i : i + 4] for i in range(0, len(code), 4))
    yield "iban", chance.choice([code, grouped, code.lower(), grouped.lower()])
    number = chance.choice(["4", "51", "55", "62"]) + digits(15)
    number = number[:15]
    number += next(digit for digit in "0123456789" if pii.luhn(number + digit))
    yield "card", chance.choice([number, " ".join(number[i : i + 4] for i in range(0, 16, 4))])
    blank = chance.choice("- ")
    yield "ssn", blank.join((str(chance.randint(100, 665)), f"{chance.randint(1, 99):02d}",
                             f"{chance.randint(1, 9999):04d}"))  # fmt: skip
    for region in ("FR", "JP", "GB", "DE"):
        kind = phonenumbers.PhoneNumberType.MOBILE if chance.random() < 0.5 else None
        example = phonenumbers.example_number_for_type(region, kind) if kind else phonenumbers.example_number(region)
        national = str(example.national_number)[:-3] + digits(3)
        parsed = phonenumbers.parse(f"+{example.country_code}{national}")
        if phonenumbers.is_valid_number(parsed):
            yield f"local phone {region}", phonenumbers.format_number(parsed, phonenumbers.PhoneNumberFormat.NATIONAL)
    region = chance.choice(["US", "DE", "FR", "GB", "IT", "ES"])
    example = phonenumbers.example_number(region)
    national = str(example.national_number)[:-3] + digits(3)
    parsed = phonenumbers.parse(f"+{example.country_code}{national}")
    if phonenumbers.is_valid_number(parsed):
        yield "phone", phonenumbers.format_number(parsed, phonenumbers.PhoneNumberFormat.INTERNATIONAL)


def pii_measure(raw: Path, _: float) -> dict[str, Any]:
    """Recall on generated strings in sentences; false positives on numbers that look alike and on real manuals."""
    step, chance = pii.Pii(PiiConfig()), random.Random(0)
    recall: dict[str, Counter[bool]] = defaultdict(Counter)
    for _round in range(300):
        for kind, written in generated_pii(chance):
            frame = chance.choice(["Please note {} for later.", "contact: {}", "({}), as agreed", "It was {}.", "'{}'",
                                   "[{}](x)", "key={}"])
            found = step.find(frame.format(written))
            begin = frame.index("{}")
            wanted = ("phone" if "phone" in kind else kind, begin, begin + len(written))
            hit = any((span.reason, span.begin, span.end) == wanted for span in found)
            recall[kind][hit] += 1
    alike: Counter[str] = Counter()
    dotted = lambda n, top: ".".join(str(chance.randint(0, top)) for _ in range(n))  # noqa: E731
    total = 0
    for _round in range(1000):
        for sentence in (
            f"see section {dotted(4, 30)} for more",
            f"{dotted(4, 20)} Overview of the parts",
            f"version {dotted(4, 99)} is out",
            f"Chapter {dotted(3, 30)}",
            f"id {chance.randint(10**14, 10**15)} of the list",
            f"on 20{chance.randint(10, 25)}-0{chance.randint(1, 9)}-11 at 12:34:56",
            f"{chance.random()} {chance.random()}",
            f"ISBN 978-{chance.randint(1, 9)}-{chance.randint(100, 999)}-{chance.randint(10000, 99999)}-7",
        ):
            total += 1
            alike.update(span.reason for span in step.find(sentence))
    real: Counter[str] = Counter()
    size = 0
    for row in rows_of(raw, "postgresql-doc-15", every=4):
        size += len(row["text"])
        real.update(span.reason for span in step.find(row["text"]))
    return {"recall": {kind: round(counts[True] / counts.total(), 4) for kind, counts in recall.items()},
            "look-alikes": total, "false positives": dict(alike),
            "found in PostgreSQL's manual": {"characters": size, **real}}  # fmt: skip


def contamination(raw: Path, _: float) -> dict[str, Any]:
    """Items of 12 to 60 words planted into documents in five forms; clean documents must stay."""
    chance = random.Random(0)
    hosts = [row["text"] for row in rows_of(raw, "python3.11-doc", every=3)]
    sources = [row["text"] for row in rows_of(raw, "postgresql-doc-15", every=3)]
    items = []
    for body in sources:
        words = body.split()
        if len(words) > 200:
            at = chance.randrange(50, len(words) - 100)
            items.append(" ".join(words[at : at + chance.randint(12, 60)]))
    items = items[:300]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "set.jsonl"
        path.write_text("".join(json.dumps({"question": item}) + "\n" for item in items))
        step = Decontaminate(DecontaminateConfig(sets=(str(path),)))
    forms = {
        "exact": lambda item: item,
        "re-cased": lambda item: item.swapcase(),
        "re-spaced": lambda item: re.sub(" ", lambda _: chance.choice(["  ", "\n", "\t "]), item),
        "punctuation changed": lambda item: re.sub(r"[,.;:]", "", item) + "!",
        "one word in ten replaced": lambda item: re.sub(
            r"\S+", lambda word: "other" if chance.random() < 0.1 else word[0], item
        ),
        "full width": lambda item: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in item),
        "a zero-width space in every word": lambda item: re.sub(r"(\w)(\w)", "\\1\u200b\\2", item),
        "accents, decomposed": lambda item: re.sub("[aeiou]", lambda found: f"{found[0]}\u0301", item),
        "the middle word changed": lambda item: re.sub(
            rf"^((?:\S+\s+){{{len(item.split()) // 2}}})\S+", r"\1zebra", item
        ),
        "first half (from 6 words to 30)": lambda item: " ".join(item.split()[: len(item.split()) // 2]),
    }  # fmt: skip
    out: dict[str, Any] = {"items": len(items)}
    for name, form in forms.items():
        texts = [f"{chance.choice(hosts)[:1500]}\n{form(item)}\n{chance.choice(hosts)[:500]}" for item in items]
        verdicts = step.judge(DocumentBatch([Document(str(k), body, "", k) for k, body in enumerate(texts)]))
        out[name] = round(sum(verdict.action == "drop" for verdict in verdicts) / len(items), 4)
    clean = step.judge(DocumentBatch([Document(str(k), body, "", k) for k, body in enumerate(hosts[:400])]))
    out["clean documents dropped"] = f"{sum(verdict.action == 'drop' for verdict in clean)}/{len(clean)}"
    return out


def edited(raw: Path, _: float) -> dict[str, Any]:
    """Sentences of an evaluation set with words changed, planted into other questions of the same makers: RAW holds
    test.jsonl and train.jsonl with the key `question` (github.com/openai/grade-school-math, grade_school_math/data)."""
    sets = {name: [json.loads(line)["question"] for line in (raw / f"{name}.jsonl").read_text("utf-8").splitlines()]
            for name in ("test", "train")}  # fmt: skip
    sentences = [part for text in sets["test"] for part in re.split(r"[.?] ", text)]
    out: dict[str, Any] = {"train questions": len(sets["train"])}
    for low, high in ((8, 9), (10, 12), (13, 16), (17, 22), (23, 30)):
        chosen = [one for one in sentences if low <= len(one.split()) <= high]
        items = random.Random(1).sample(chosen, 60)
        for share in (0.0, DecontaminateConfig.edited):
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch) / "set.jsonl"
                path.write_text("".join(json.dumps({"question": item}) + "\n" for item in items))
                step = Decontaminate(DecontaminateConfig(sets=(str(path),), edited=share))
            found = [_dropped(step, [f"{sets['train'][k]} {_changed(item, number)} {sets['train'][k + 100]}"
                                     for k, item in enumerate(items)]) for number in (0, 1, 2)]  # fmt: skip
            row = {"of 60 with 0, 1, 2 words changed": found, "of the train set": _dropped(step, sets["train"])}
            out[f"{low} to {high} words, edited={share}"] = row
    return out


def _changed(item: str, number: int) -> str:
    words = item.split()
    for k in range(number):
        words[len(words) * (k + 1) // (number + 1)] = "zebra"
    return " ".join(words)


def _dropped(step: Decontaminate, texts: list[str]) -> int:
    verdicts = step.judge(DocumentBatch([Document(str(k), body, "", k) for k, body in enumerate(texts)]))
    return sum(verdict.action == "drop" for verdict in verdicts)


def toxicity(raw: Path, _: float) -> dict[str, Any]:
    """Documents with listed words planted at 2 % are found; manuals and allowed phrases are not."""
    from megallm.curate.toxicity import _WORDS, ALLOWED

    step, chance = Toxicity(ToxicityConfig()), random.Random(0)
    bodies = [row["text"][:3000] for row in rows_of(raw, "p*-doc*", every=9) if row["label"] == "en"][:300]

    def planted(body: str, phrases: Any, every: int) -> str:
        words = body.split()
        for place in range(0, len(words), every):
            words[place] = chance.choice(phrases)
        return " ".join(words)

    out = {}
    for name, texts in (
        ("listed words at 2 %", [planted(body, _WORDS, 50) for body in bodies]),
        ("allowed phrases at 2 %", [planted(body, ALLOWED, 50) for body in bodies]),
        ("manuals as they are", bodies),
    ):
        verdicts = step.judge(DocumentBatch([Document(str(k), body, "", k) for k, body in enumerate(texts)]))
        out[name] = f"{sum(verdict.action == 'drop' for verdict in verdicts)}/{len(texts)} dropped"
    return out


def rates(raw: Path, megabytes: float) -> dict[str, Any]:
    """The same sample through our chains and through datatrove's filters and MinHash."""
    scratch = Path(tempfile.mkdtemp())
    try:
        sample, size = scratch / "in" / "sample.jsonl", 0
        sample.parent.mkdir()
        with open(sample, "w", encoding="utf-8") as file:
            for row in rows_of(raw, every=max(1, int(285 / megabytes))):
                file.write(
                    json.dumps({"text": row["text"], "id": f"{row['package']}/{row['path']}"}, ensure_ascii=False)
                    + "\n"
                )
                size += len(row["text"].encode())
        out: dict[str, Any] = {"megabytes": round(size / 1e6, 2)}
        for system in ("start-up", "whole chain", "quality + near", "datatrove"):
            command = [sys.executable, __file__, "--one", system, str(scratch)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                out[system] = done.stderr.strip().splitlines()[-1]
                continue
            out[system] = json.loads(done.stdout.splitlines()[-1])
            out[system]["MB per cpu-second"] = round(size / 1e6 / out[system]["cpu_seconds"], 2)
        return out
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def one(system: str, scratch: Path) -> None:
    """One system in this process; prints processor seconds and peak memory."""
    output = scratch / system.replace(" ", "_")
    source = InputConfig((str(scratch / "in"),), id_key="id")
    steps: dict[str, tuple[str, ...]] = {
        "whole chain": ("language", "quality", "toxicity", "exact", "near", "pii"),
        "quality + near": ("quality", "near"),
    }
    kept = None
    if system in steps:
        config = CurateConfig(
            source, steps[system], quality=QualityConfig("docs"), language=LanguageConfig(min_score=0.3)
        )
        kept = run.run(config, output)["totals"]["kept"]
    elif system == "datatrove":
        kept = _datatrove(scratch, output)
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(one.ru_utime + one.ru_stime for one in usage)
    sys.stdout.write(
        json.dumps({"cpu_seconds": round(seconds, 2), "peak_mib": usage[0].ru_maxrss // 1024, "kept": kept})
    )


def _datatrove(scratch: Path, output: Path) -> int:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig

    # Its default, xxhash, hands text where xxhash 4 wants bytes.
    config = MinhashConfig(num_buckets=14, hashes_per_bucket=8, hash_config=HashConfig(hash_fc="sha1"))
    places = {name: str(output / name) for name in ("filtered", "signatures", "buckets", "remove", "kept")}
    stages = [
        [JsonlReader(str(scratch / "in")), GopherRepetitionFilter(), GopherQualityFilter(),
         JsonlWriter(places["filtered"]), MinhashDedupSignature(places["signatures"], config=config)],
        [MinhashDedupBuckets(places["signatures"], places["buckets"], config=config)],
        [MinhashDedupCluster(places["buckets"], places["remove"], config=config)],
        [JsonlReader(places["filtered"]), MinhashDedupFilter(places["remove"]), JsonlWriter(places["kept"])],
    ]  # fmt: skip
    for number, pipeline in enumerate(stages):
        tasks = config.num_buckets if number == 1 else 1
        LocalPipelineExecutor(pipeline, tasks, 1, logging_dir=str(output / f"logs{number}")).run()
    return sum(sum(1 for _ in gzip.open(path)) for path in Path(places["kept"]).glob("*.gz"))


MEASURES = {
    "languages": languages, "near": near, "pii": pii_measure, "contamination": contamination,
    "edited": edited, "toxicity": toxicity, "rates": rates,
}  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=MEASURES)
    parser.add_argument("raw", type=Path)
    parser.add_argument("--megabytes", type=float, default=10.0)
    args = parser.parse_args()
    sys.stdout.write(json.dumps(MEASURES[args.measure](args.raw, args.megabytes), indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
