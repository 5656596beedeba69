#!/usr/bin/env bash
# A small model with partly wrong labels learns sums from a larger one, over a grid of beta and of the share of its
# own answers:
#   bash examples/12_distill/run.sh
# RESULT.md and right.png are written anew from what was measured. To start anew: rm -r examples/12_distill/work.
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/progress.sh
here=examples/12_distill
work=$here/work
[ -n "${NO_INSTALL:-}" ] || bash tools/install.sh
megallm=${MEGALLM:-.venv/bin/megallm}
python=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=1 # two students at once, a core each
say "data"
[ -e $work/held_out.jsonl ] || $python examples/08_grpo/make_data.py $work
[ -e $work/noisy.jsonl ] || $python $here/make_data.py $work
say "the teacher"
OMP_NUM_THREADS=2 $megallm sft $here/teacher.yaml
say "two students at once, each with a seed, in every way"
printf '%s\n' 1 2 | xargs -P 2 -I{} sh -c "$python $here/grid.py {} $work > $work/{}.log 2>&1 || { tail $work/{}.log; exit 1; }"
say "what came out"
teacher=$($python examples/08_grpo/score.py $work/teacher $work/held_out.jsonl)
$python $here/result.py $work "${teacher% *}" "$SECONDS" "bash $here/run.sh" > $work/RESULT.md
mv $work/RESULT.md $here/RESULT.md
cat $here/RESULT.md
