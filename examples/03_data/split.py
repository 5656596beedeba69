"""The kept documents of a curation as one JSONL file for English and one for the other languages.

usage: split.py KEPT_FOLDER OUTPUT_FOLDER
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path


def main() -> None:
    kept, output = Path(sys.argv[1]), Path(sys.argv[2])
    output.mkdir(parents=True, exist_ok=True)
    counts = {"english": 0, "other": 0}
    files = {name: open(output / f"{name}.jsonl", "w", encoding="utf-8") for name in counts}  # noqa: SIM115
    for path in sorted(kept.glob("part-*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as source:
            for line in source:
                name = "english" if json.loads(line)["language"] == "en" else "other"
                files[name].write(line)
                counts[name] += 1
    for file in files.values():
        file.close()
    sys.stdout.write(f"{counts}\n")


if __name__ == "__main__":
    main()
