#!/usr/bin/env bash
# Run the tests, setting everything up first on a fresh machine: bash tests/run.sh [--quick] [pytest arguments]
# Without arguments: the whole default suite, after the tests that read by the extension's sample order on its numpy
# twins. --quick: the files of tests/quick.txt, which touch every package. Both run in two processes, each with whole
# files; JOBS=N sets their number, 0 is one process without pytest-xdist.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/install.sh test
bash tests/install_facilities.sh
python=$PWD/.venv/bin/python
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
# A process that dies ends the run: pytest-xdist 3.8 waits for ever for the tests that it had.
parallel=(-n "${JOBS:-2}" --dist loadfile --no-loadscope-reorder --max-worker-restart=0)
if [ "${1:-}" = --quick ]; then
  exec "$python" -m pytest -q "${parallel[@]}" "${@:2}" @tests/quick.txt
fi
if [ $# -gt 0 ]; then
  exec "$python" -m pytest -q -rs "$@"
fi
# A limit for the whole, so that a test that never ends still leaves a summary.
limited=(timeout --foreground --signal=INT --kill-after=60 4500)
status=0
"$python" -m pytest -q --without-extension tests/data/test_{data_bounds,data_megatron_blends,data_order,data_objective,data_rows,data_samples,data_state_cache,data_stream,chat_engine,chat_reader}.py || status=$?
"${limited[@]}" "$python" -m pytest -q -rfEs "${parallel[@]}" || status=$?
exit $status
