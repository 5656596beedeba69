#!/usr/bin/env bash
# A model that adds right now and then learns to do so from rewards alone:  bash examples/08_grpo/run.sh [key=value ...]
# Settings are those of grpo.yaml, such as layout.tp=2 or rl.algorithm=dr_grpo. It writes to examples/08_grpo/work and goes
# on where it was stopped; RESULT.md is written anew from what was measured. To start anew: rm -r that folder.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/08_grpo
work=$here/work
bash tools/install.sh
python=.venv/bin/python
megallm=.venv/bin/megallm

if ! [ -e $work/held_out.jsonl ]; then $python $here/make_data.py $work; fi
echo "1/4 SFT: a policy that is right now and then"
$megallm sft $here/sft.yaml
echo "2/4 how good it is"
before=$($python $here/score.py $work/sft $work/held_out.jsonl)
echo "greedy, at temperature 1: $before"
echo "3/4 GRPO"
$megallm grpo $here/grpo.yaml "$@"
echo "4/4 what came out"
after=$($python $here/score.py $work/grpo $work/held_out.jsonl)
$python $here/result.py "$before" "$after" $work/grpo > $here/RESULT.md
cat $here/RESULT.md
