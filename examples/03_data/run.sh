#!/usr/bin/env bash
# From Debian's documentation packages to a curated corpus and a model that reads it with a curriculum:
#   bash examples/03_data/run.sh
# Downloads about 210 MB of packages with apt-get (nothing is installed from them), makes 285 MB of raw text in a
# dozen languages, curates it, opens the way to its report, preprocesses what is kept and trains a few steps.
# Everything lands in examples/03_data/work; started again it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/03_data
work=$PWD/$here/work
packages="linux-doc-6.1 python3.11-doc postgresql-doc-15 perl-doc git-doc debian-policy debian-handbook
  debian-reference-en debian-reference-de debian-reference-fr debian-reference-it debian-reference-es
  debian-reference-pt debian-reference-ja debian-reference-zh-cn
  installation-guide-amd64 installation-guide-i386 installation-guide-arm64
  manpages manpages-dev manpages-de manpages-fr manpages-es manpages-it manpages-nl manpages-pl manpages-pt-br
  manpages-ru manpages-ja manpages-zh
  libreoffice-help-en-us libreoffice-help-en-gb libreoffice-help-de libreoffice-help-fr"
say() { printf '\n[%3d s] %s\n' "$SECONDS" "$1"; }

say "1/6 install megallm with what curation needs into .venv"
bash tools/install.sh data
megallm=$PWD/.venv/bin/megallm
python=$PWD/.venv/bin/python
mkdir -p "$work/debs" "$work/root"

say "2/6 packages"
for package in $packages; do
  if ! [ -e "$work/root/$package" ]; then
    if ! (cd "$work/debs" && apt-get -o APT::Sandbox::User="$(id -un)" download -qq "$package"); then
      echo "run.sh: apt-get cannot download $package; this example needs a Debian 12 with its package lists (apt-get update)." >&2
      exit 65
    fi
    rm -rf "$work/root/$package.part"
    dpkg-deb -x "$work/debs/$package"_*.deb "$work/root/$package.part"
    mv "$work/root/$package.part" "$work/root/$package"
  fi
done

say "3/6 raw documents"
$python $here/corpus.py "$work/root" "$work/raw"

say "4/6 curate"
(cd $here && $megallm curate curate.yaml --output work/curated --workers 2)
echo "report: $here/work/curated/report.html"

say "5/6 tokenizer and token files"
if ! [ -e "$work/data/prepared" ]; then
  $python $here/split.py "$work/curated/kept" "$work/kept"
  cat "$work/kept/english.jsonl" "$work/kept/other.jsonl" | awk 'NR % 20 == 0' > "$work/kept/sample.jsonl"
  $megallm tokenizer train --input "$work/kept/sample.jsonl" --vocab-size 8192 --output "$work/tokenizer" --overwrite
  mkdir -p "$work/data"
  for part in english other; do
    $megallm preprocess --input "$work/kept/$part.jsonl" --output "$work/data/$part" --tokenizer "$work/tokenizer" \
      --append-eod --workers 2 --overwrite
  done
  touch "$work/data/prepared"
fi

say "6/6 train with a curriculum: weights and length change after 12 steps"
$megallm data stream $here/config.yaml --steps 11:13
$megallm pretrain $here/config.yaml --nproc 1
say "done: report $here/work/curated/report.html, run $here/work/run"
