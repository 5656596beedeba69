#!/usr/bin/env bash
# Break runs on purpose: bash tests/chaos.sh [kills | hangs] [--count N] [--seed S]
# Without arguments: every row of tests/chaos, then 20 kills and 20 hangs. kills: SIGKILL of ranks, supervisors and
# writers at random phases; the final state must be the quiet run's. hangs: random ranks stop in random phases; prints
# how many were blamed right, and how long detection and restart took.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$PWD/.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false NO_COLOR=1 PYTHONPATH=$PWD
if [ $# -gt 0 ]; then
  exec "$python" -m tests.chaos.puppeteer "$@"
fi
"$python" -m pytest -q tests/chaos
"$python" -m tests.chaos.puppeteer kills --count 20
"$python" -m tests.chaos.puppeteer hangs --count 20
