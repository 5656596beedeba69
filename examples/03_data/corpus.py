"""Raw documents of unpacked Debian packages as JSONL: HTML, plain text, POD and manual pages, with what the package
says about each (language, package), so that a curation can be measured on them.

usage: corpus.py ROOT OUTPUT      ROOT/PACKAGE/usr/... -> OUTPUT/PACKAGE.jsonl.gz {text, package, path, label}
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from megallm.curate.html import text_of_html

ENGLISH = ("linux-doc", "python3", "postgresql-doc", "git-doc", "perl-doc", "debian-policy", "manpages-dev")
SUFFIX = re.compile(r"^(?:manpages|debian-reference|libreoffice-help)-([a-z]{2})(?:-[a-z]{2})?$")
HANDBOOK = re.compile(r"/debian-handbook/html/([a-z]{2})-")
GUIDE = re.compile(r"/installation-guide-[a-z0-9]+/([a-z]{2})(?:_[A-Z]{2})?/")
MAN = re.compile(r"/man/(?:[a-zA-Z_]+/)?man\d")
ROFF_SKIPPED = re.compile(r"^[.'](?!\s*(?:SH|SS|B|I|BR|RB|IR|RI|BI|IB|TP|IP)\b).*$", re.MULTILINE)
ROFF_HEADING = re.compile(r"^\.\s*(?:SH|SS)\s+(.*)$", re.MULTILINE)
ROFF_BREAK = re.compile(r"^\.\s*(?:TP|IP).*$", re.MULTILINE)
ROFF_FONT = re.compile(r"^\.\s*(B|I|BR|RB|IR|RI|BI|IB)\s+(.*)$", re.MULTILINE)
ROFF_ESCAPE = re.compile(r"\\f(?:\[[A-Z]*\]|.)|\\[&,/|^%]|\\s[-+]?\d|\\\*\([A-Z]{2}")
BLANKS = re.compile(r"\n{3,}")
MIN_CHARS = 200


def plain_of_roff(text: str) -> str:
    """The words of a manual page's source; layout is lost."""
    text = re.sub(r'^[.\']?\\".*$|\\".*$', "", text, flags=re.MULTILINE)
    text = ROFF_HEADING.sub(r"\n\n\1\n", text)
    text = ROFF_BREAK.sub("\n", ROFF_FONT.sub(lambda match: match[2].replace('"', ""), text))
    text = ROFF_SKIPPED.sub("", text)
    text = ROFF_ESCAPE.sub("", text).replace(r"\-", "-").replace(r"\(aq", "'").replace(r"\e", "\\").replace(r"\ ", " ")
    return BLANKS.sub("\n\n", text).strip()


def label_of(package: str, path: str) -> str:
    """The language that package or path declare, "" where neither does."""
    if package.startswith(ENGLISH):
        return "" if "/translations/" in path else "en"
    for pattern, text in ((SUFFIX, package), (HANDBOOK, path), (GUIDE, path)):
        match = pattern.search(text)
        if match:
            return match[1]
    return ""


def documents(root: Path, package: str) -> Iterator[dict[str, str]]:
    for path in sorted((root / package).rglob("*")):
        name = str(path.relative_to(root / package))
        suffix = path.suffix.lower()
        if path.is_symlink() or not path.is_file() or path.name.startswith("changelog"):
            continue
        manual = MAN.search(name) is not None
        if not manual and suffix not in (".html", ".txt", ".pod") and not name.endswith(".txt.gz"):
            continue
        data = gzip.decompress(path.read_bytes()) if suffix == ".gz" else path.read_bytes()
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            continue
        text = text_of_html(text) if suffix == ".html" else plain_of_roff(text) if manual else text
        if len(text) >= MIN_CHARS:
            yield {"text": text, "package": package, "path": name, "label": label_of(package, f"/{name}")}


def main() -> None:
    root, output = Path(sys.argv[1]), Path(sys.argv[2])
    output.mkdir(parents=True, exist_ok=True)
    total = 0
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        target = output / f"{folder.name}.jsonl.gz"
        if target.exists():
            continue
        count = size = 0
        temporary = target.with_suffix(".tmp")
        with gzip.open(temporary, "wt", encoding="utf-8", compresslevel=1) as file:
            for row in documents(root, folder.name):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count, size = count + 1, size + len(row["text"].encode())
        temporary.replace(target)
        total += size
        sys.stdout.write(f"{folder.name}: {count} documents, {size / 1e6:.1f} MB\n")
    sys.stdout.write(f"{total / 1e6:.1f} MB in all\n")


if __name__ == "__main__":
    main()
