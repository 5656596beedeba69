#!/usr/bin/env bash
# Run the tests, setting everything up first on a fresh machine: bash tests/run.sh [pytest arguments]
# The tests of the data order run twice: on the numpy twins first, then with the C++ extension in the whole suite.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/install.sh test
bash tests/install_facilities.sh
python=$PWD/.venv/bin/python
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
status=0
if [ $# -eq 0 ]; then
  "$python" -m pytest -q --without-extension tests/data || status=$?
fi
"$python" -m pytest -q -rs "$@" || status=$?
exit $status
