"""Rates of preprocessing and of the stream: megabytes per second of CPU, and peak memory, beside other tools.

python bench/data.py --tokenizer DIR [--input F.jsonl] [--megabytes 200] [--megatron CHECKOUT] [--json F]

A checkout of Megatron-LM of the end of 2024 runs beside Python 3.11 (it wants the modules six and pkg_resources).

Each candidate is a process of its own, children included; CPU seconds do not depend on how busy the machine is as
wall-clock does, but caches and hyperthreads are shared, so run it alone. Without --input the text is the Python sources
of the installed packages, cut into documents of 6,000 characters. Every output is compared with the first one's bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
Candidate = tuple[str, list[str], Path]
DOCUMENT = 6000

PER_DOCUMENT = """
import json, sys
import numpy as np, tokenizers
from megallm.data.text.tokenizer import load
source, spec, output = sys.argv[1:]
eod = load(spec).eod
tokenizer = tokenizers.Tokenizer.from_file(spec + "/tokenizer.json")
tokenizer.encode_special_tokens = True
with open(source) as lines, open(output + "_text_document.bin", "wb") as out:
    for line in lines:
        ids = tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
        out.write(np.array([*ids, eod] if ids else [], np.uint16).tobytes())
"""


@dataclass
class Measured:
    """One candidate: megabytes of input per second of CPU (children included), wall-clock, memory of the largest
    process, and whether its `.bin` has the bytes of the first candidate's."""

    name: str
    mb_per_cpu_second: float
    cpu_seconds: float
    wall_seconds: float
    peak_mb: float
    same_bytes: bool | None = None


def measured(name: str, command: list[str], megabytes: float) -> Measured:
    """Run a command to its end."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    begin = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{name} failed:\n{errors.decode(errors='replace')[-2000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return Measured(name, megabytes / cpu, cpu, time.monotonic() - begin, usage.ru_maxrss / 1000)


FAST = {
    "megallm, gigatoken": ["--backend", "gigatoken"],
    "megallm, gigatoken, 2 workers": ["--backend", "gigatoken", "--workers", "2"],
}
SLOW = {
    "megallm, gigatoken": ["--backend", "gigatoken"],  # once more, on the shorter input
    "megallm, tokenizers": ["--backend", "tokenizers"],
    "megallm, tokenizers, 2 workers": ["--backend", "tokenizers", "--workers", "2"],
}


def ours(options: dict[str, list[str]], source: str, spec: str, folder: Path) -> Iterator[Candidate]:
    """(name, command, the `.bin` it writes)."""
    for name, words in options.items():
        output = folder / name.replace(", ", "-").replace(" ", "-")
        command = [sys.executable, "-m", "megallm", "preprocess", "--input", source, "--output", str(output)]
        command += ["--tokenizer", spec, "--append-eod", "--overwrite", *words]
        yield name, command, Path(f"{output}_text_document.bin")


def others(source: str, spec: str, folder: Path, megatron: str | None) -> Iterator[Candidate]:
    """The same of other tools."""
    output = folder / "per-document"
    yield (
        "tokenizers, document by document",
        [sys.executable, "-c", PER_DOCUMENT, source, spec, str(output)],
        Path(f"{output}_text_document.bin"),
    )
    if megatron:
        output = folder / "megatron"
        command = [sys.executable, f"{megatron}/tools/preprocess_data.py", "--input", source, "--output-prefix"]
        command += [str(output), "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", spec]
        yield "Megatron-LM", [*command, "--append-eod", "--workers", "1"], Path(f"{output}_text_document.bin")


def compare(found: Iterator[Candidate], source: str) -> list[Measured]:
    """Run candidates on one input and print a row of each; their bytes are compared with the first one's."""
    megabytes, first, rows = os.path.getsize(source) / 1e6, None, []
    print(f"\n{megabytes:.0f} MB")
    print(f"{'candidate':<34} {'MB/cpu-s':>9} {'cpu s':>8} {'wall s':>8} {'peak MB':>8}  same .bin")
    for label, command, output in found:
        row = measured(label, command, megabytes)
        with output.open("rb") as data:  # not in memory: a child begins with the peak of its parent
            digest = hashlib.file_digest(data, "sha256").hexdigest()
        first = first or digest
        row.same_bytes = digest == first
        output.unlink()
        rows.append(row)
        print(
            f"{row.name:<34} {row.mb_per_cpu_second:>9.1f} {row.cpu_seconds:>8.2f} {row.wall_seconds:>8.2f} "
            f"{row.peak_mb:>8.0f}  {'yes' if row.same_bytes else 'NO'}", flush=True,
        )  # fmt: skip
    return rows


def head(source: str, target: Path, megabytes: int) -> str:
    """The first lines of a file, about so many megabytes of them."""
    with open(source, "rb") as lines, target.open("wb") as out:
        out.writelines(lines.readlines(megabytes * 1_000_000))
    return str(target)


def make_input(path: Path, megabytes: int) -> None:
    """Python sources as JSONL; begins again from the first file when they do not suffice."""
    written, number = 0, 0
    names = sorted(Path(sysconfig.get_path("purelib")).rglob("*.py"))
    with path.open("w", encoding="utf-8") as out:
        while written < megabytes * 1_000_000:
            text = names[number % len(names)].read_text(encoding="utf-8", errors="ignore")
            number += 1
            for begin in range(0, len(text), DOCUMENT):
                written += out.write(json.dumps({"text": text[begin : begin + DOCUMENT]}, ensure_ascii=False) + "\n")


def figures_of_the_stream(folder: Path) -> dict[str, float]:
    """Seconds of CPU: the index of 10M documents, rows planned, draws of the blend, and going on from a state."""
    import numpy as np

    from megallm.data.indexed.dataset import IndexedDataset, IndexedWriter
    from megallm.data.stream.mixture import Mixture
    from megallm.data.stream.plan import Reading, StreamPlan, StreamSegment
    from megallm.data.stream.source import DocumentSource
    from megallm.data.stream.stream import Stream

    found: dict[str, float] = {}
    lengths = np.random.RandomState(1).lognormal(0.5, 1, 10_000_000).astype(np.int32) + 1
    prefix = str(folder / "ten-million")
    with IndexedWriter(prefix, np.dtype("<u1")) as writer:
        writer.add(np.zeros(int(lengths.sum()), np.uint8), lengths)
        begin = time.process_time()
        writer.commit()
        found["index_of_10m_documents_written"] = time.process_time() - begin
    begin = time.process_time()
    IndexedDataset(prefix)
    found["index_of_10m_documents_opened"] = time.process_time() - begin
    lengths = np.random.RandomState(1).lognormal(6, 1.2, 100_000).astype(np.int32) + 1
    prefix = str(folder / "documents")
    with IndexedWriter(prefix, np.dtype("<u1")) as writer:
        writer.add(np.zeros(int(lengths.sum()), np.uint8), lengths)
        writer.commit()
    plan = StreamPlan((StreamSegment(0, {prefix: 1.0}, Reading(2048)),), seed=1)
    stream = Stream(plan, {prefix: DocumentSource(prefix, plan)})
    begin = time.process_time()
    rows = [stream.take(64) for _ in range(300)]
    found["rows_planned_per_second"] = 64 * len(rows) / (time.process_time() - begin)
    tokens = sum(end - start for step in rows for row in step for _, start, end in row.spans)
    found["best_fit_fill_at_2048"] = tokens / (64 * len(rows) * 2048)
    state = stream.state()
    begin = time.process_time()
    Stream(plan, {prefix: DocumentSource(prefix, plan)}, state).take(1)
    found["seconds_to_go_on_from_a_state"] = time.process_time() - begin
    for sources in (2, 8, 64):
        mixture = Mixture({str(i): i + 1.0 for i in range(sources)})
        begin = time.process_time()
        for _ in range(20_000):
            mixture.draw()
        found[f"draws_per_second_from_{sources}_sources"] = 20_000 / (time.process_time() - begin)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="folder with a tokenizer.json")
    parser.add_argument("--input", metavar="F.jsonl", help="documents with the key text")
    parser.add_argument("--megabytes", type=int, default=200, help="size of the made input (default 200)")
    parser.add_argument("--slow-megabytes", type=int, default=10, help="of it, for the slow candidates (default 10)")
    parser.add_argument("--megatron", metavar="CHECKOUT", help="also run Megatron-LM's tools/preprocess_data.py")
    parser.add_argument("--json", metavar="F", help="write the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = args.input or str(folder / "input.jsonl")
        if not args.input:
            make_input(Path(source), args.megabytes)
        rows = compare(ours(FAST, source, args.tokenizer, folder), source)
        short = head(source, folder / "short.jsonl", args.slow_megabytes)
        slow = [*ours(SLOW, short, args.tokenizer, folder), *others(short, args.tokenizer, folder, args.megatron)]
        rows += compare(iter(slow), short)
        stream = figures_of_the_stream(folder)
        print()
        for label, value in stream.items():
            print(f"{label.replace('_', ' '):<40} {value:,.3f}")
        if args.json:
            found = {"preprocess": [asdict(row) for row in rows], "stream": stream}
            Path(args.json).write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
