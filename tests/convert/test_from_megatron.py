"""Launch scripts of Megatron-LM become configurations; what does not fit is named; nothing of a script runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from megallm.base.config import leaves, loads
from megallm.base.errors import UsageError
from megallm.cli.main import main
from megallm.convert.megatron.flags import DROPPED, FLAGS, READ, SET
from megallm.convert.megatron.shell import read_script
from megallm.convert.megatron.translate import TABLE, markdown, translate, translation_yaml
from megallm.training.config import PretrainConfig
from megallm.training.validate import check

ROOT = Path(__file__).parents[2]

LLAMA = r"""#!/bin/bash
# A Llama of 7B. Don't mind the "quotes" in comments.
export CUDA_DEVICE_MAX_CONNECTIONS=1
GPUS_PER_NODE=${GPUS:-8}
NNODES=4
WORLD=$((GPUS_PER_NODE * NNODES))
SAVE=${1:-"runs/my run"}
TP=4; PP=2
SIZES=(32 4096)
MODEL_ARGS=(
    --use-mcore-models           # a comment inside an array
    --num-layers ${SIZES}
    --hidden-size 4096 --ffn-hidden-size 11008
    --num-attention-heads 32 --group-query-attention --num-query-groups 8
    --max-position-embeddings 4096 --position-embedding-type rope --rotary-base 500000
    --normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0.0 --hidden-dropout 0.0
)
TRAIN="--micro-batch-size 2 --global-batch-size $((WORLD * 4)) --train-samples 1280_000 \
       --lr 3e-4 --min-lr 3.0e-5 --lr-decay-style cosine --lr-warmup-fraction .01 --bf16"
TRAIN="$TRAIN --clip-grad 1.0 --weight-decay 0.1 --adam-beta2 0.95"
PARALLEL=(--tensor-model-parallel-size $TP --pipeline-model-parallel-size=${PP} --sequence-parallel)
PARALLEL+=(--use-distributed-optimizer --overlap-grad-reduce --num-layers-per-virtual-pipeline-stage 4)
DATA_ARGS=(
    --data-path 0.7 'data/web_text_document' 0.3 "data/code text_document"
    --split 99,1,0 --tokenizer-type HuggingFaceTokenizer --tokenizer-model tok --seed 7
)
if [ $WORLD -gt 8 ]; then
  echo "large"
fi
mkdir -p "$SAVE" && torchrun --nproc_per_node $GPUS_PER_NODE --nnodes $NNODES \
    pretrain_gpt.py \
    "${MODEL_ARGS[@]}" $TRAIN \
    ${PARALLEL[@]} "${DATA_ARGS[@]}" \
    --save "$SAVE" --load "$SAVE" --save-interval 500 --eval-interval 100 --eval-iters 5 --log-interval 10 \
    2>&1 | tee "$SAVE/log.txt"
"""


def test_a_whole_script():
    found = translate(LLAMA, "llama.sh")
    assert found.problems == []
    config = yaml.safe_load(translation_yaml(found, "llama.sh"))
    assert config == {
        "run": {"dir": "runs/my run", "seed": 7},
        "model": {
            "family": "llama", "num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 11008, "num_heads": 32,
            "num_kv_heads": 8, "max_positions": 4096, "positions": "rope", "rope_theta": 500000, "norm": "rmsnorm",
            "norm_eps": 1e-6, "activation": "swiglu", "bias": False, "tie_embeddings": False, "qk_norm": False,
            "init_std": 0.02,
        },
        "layout": {"tp": 4, "pp": 2, "sp": True, "chunks": 4, "schedule": "interleaved"},
        "zero": {"stage": 1},
        "data": {
            "sources": {"data/web_text_document": 0.7, "data/code text_document": 0.3}, "split": "99,1,0",
            "order": "megatron", "tokenizer": "tok",
        },
        "train": {"micro_batch": 2, "global_batch": 128, "steps": 10000, "precision": "bf16"},
        "optim": {
            "rule": "adamw", "lr": 3e-4, "min_lr": 3e-5, "schedule": "cosine", "warmup_steps": 100, "clip": 1,
            "weight_decay": 0.1, "eps": 1e-8, "betas": [0.9, 0.95],
        },
        "checkpoint": {"every": 500, "keep": 0},
        "eval": {"every": 100, "batches": 5},
        "log": {"every": 10},
    }  # fmt: skip


def test_what_comes_out_is_a_valid_configuration():
    text = translation_yaml(translate(LLAMA + "\n", "llama.sh"), "llama.sh")
    config = loads(PretrainConfig, text)
    checked = check(config, world=32, tokenizer_vocab=32000)
    assert checked.layout.dp == 4 and checked.model.vocab_size == 32000 and checked.model.num_kv_heads == 8
    assert checked.optim.betas == (0.9, 0.95) and checked.data.seq_len == 1024


BASE = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --train-iters 100 --global-batch-size 8 --data-path d "
QUIET = BASE + "--attention-dropout 0 --hidden-dropout 0 "


def config_of(flags: str) -> dict:
    return translate(QUIET + flags, "flags").config


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        ("", "model.num_kv_heads", 4),
        ("--group-query-attention", "model.num_kv_heads", 1),
        ("", "model.ffn_hidden_size", 256),
        ("--swiglu", "model.ffn_hidden_size", 128),
        ("--swiglu --hidden-size 4096", "model.ffn_hidden_size", 10880),
        ("", "model.family", "gpt2"),
        ("--normalization RMSNorm --add-qkv-bias --disable-bias-linear", "model.family", "qwen2"),
        ("--normalization RMSNorm --qk-layernorm --disable-bias-linear", "model.family", "qwen3"),
        ("--normalization RMSNorm --window-size 127,0", "model.sliding_window", 128),
        ("--normalization RMSNorm --window-size (127, 0)", "model.family", "mistral"),
        ("--pipeline-model-parallel-layout 'Et*2|(t|)*2,L'", "layout.stages", "Et*2|(t|)*2L"),
        ("--cp-comm-type a2a+p2p --context-parallel-size 4", "layout.cp_kind", "hybrid"),
        ("--use-torch-fsdp2", "zero.stage", 3),
        ("--use-megatron-fsdp --use-distributed-optimizer", "zero.stage", 3),
        ("--data-parallel-sharding-strategy no_shard --use-distributed-optimizer", "zero.stage", 1),
        ("--use-rope-scaling", "model.rope_factor", 8.0),
        ("--use-rope-scaling --rope-scaling-factor 32", "model.rope_factor", 32),
        ("--rotary-seq-len-interpolation-factor 4", "model.rope_scaling", "linear"),
        ("--softmax-type learnable", "model.attention_sinks", True),
        ("--num-experts 8", "model.moe.top_k", 2),
        ("--num-experts 8 --moe-router-pre-softmax", "model.moe.norm_topk_prob", False),
        ("--num-experts 8 --moe-router-pre-softmax --moe-router-score-function sigmoid", "model.moe.norm_topk_prob",
         True),
        ("--num-experts 8 --moe-layer-freq ([0]*3+[1]*58)", "model.moe.first_dense", 3),
        ("--num-experts 8 --moe-layer-freq 2", "model.moe.every", 2),
        ("--num-experts 8 --moe-router-load-balancing-type none --moe-aux-loss-coeff 1", "model.moe.aux_coef", 0),
        ("--multi-latent-attention --kv-lora-rank 512 --kv-channels 128", "model.mla.kv_lora_dim", 512),
        ("--multi-latent-attention --qk-layernorm", "model.qk_norm", False),
        ("--multi-latent-attention --rotary-scaling-factor 40", "model.rope_scaling", "yarn"),
        ("--mtp-num-layers 1", "model.mtp.weight", 0.1),
        ("--data-parallel-sharding-strategy optim_grads", "zero.stage", 2),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 18 --lr-warmup-iters 10", "optim.decay_fraction", 0.2),
        ("--lr-warmup-samples 80", "optim.warmup_steps", 10),
        ("--exit-interval 40", "train.stop_at", 40),
        ("--recompute-activations", "train.recompute", "selective"),
        ("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", "train.recompute", "full"),
        ("--fp16", "train.precision", "fp16"),
        ("--fp16", "train.loss_scale.initial", 2**24),
        ("--fp16 --initial-loss-scale 65536 --loss-scale-window 500", "train.loss_scale.growth_steps", 500),
        ("--bf16 --fp8-format hybrid --fp8-amax-history-len 1024", "train.fp8.history", 1024),
        ("--fp8-format e4m3 --fp8-recipe blockwise --bf16", "train.fp8.recipe", "blockwise"),
        ("--fp8-format hybrid --first-last-layers-bf16 --num-layers-at-end-in-bf16 2", "train.fp8.bf16_last", 2),
        ("--optimizer sgd", "optim.momentum", 0.9),
        ("--optimizer sgd", "optim.rule", "sgd"),
        ("--data-path a b c", "data.sources", {"a": None, "b": None, "c": None}),
        ("--data-path 1 a .5 b", "data.sources", {"a": 1.0, "b": 0.5}),
        ("", "checkpoint.every", 0),
        ("", "optim.schedule", "linear"),
        ("--tensorboard-dir x", "log.tensorboard", True),
        ("--lr 1e-3 --lr 2e-3", "optim.lr", 2e-3),
    ],
)  # fmt: skip
def test_flags(flags, key, value):
    assert config_of(flags)[key] == pytest.approx(value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--no-such-flag 3", "--no-such-flag 3: not in the table"),
        ("--num-experts 8 --moe-aux-loss-coeff 0.01", "balancing loss is that of each sequence"),
        ("--num-experts 8 --moe-layer-freq [0,1,1]", "--moe-layer-freq [0,1,1]: write model.moe.first_dense"),
        ("--no-position-embedding", "a model without positions"),
        ("--tokenizer-type HuggingFaceTokenizer", "--tokenizer-model is absent"),
        ("--lr-decay-iters 200", "set train.steps=200 and train.stop_at=100"),
        ("--rampup-batch-size 1 1 100", "the batch has one size"),
        ("--optimizer soap", "--optimizer soap: megallm has adam, sgd only"),
        ("--fp8-format hybrid --fp8-recipe mxfp8", "--fp8-recipe mxfp8: megallm has"),
        ("--fp8-format e4m3", "gradients of the recipe delayed are e5m2 here"),
        ("--fp16 --loss-scale 1024", "the scale is always dynamic"),
        ("--lr-decay-iters 50", "decays over 50 steps of 100"),
        ("--lr $LR", "--lr $LR: the script computes $LR"),
        ("--lr abc", "--lr abc: this is not a number"),
        ("--window-size 5,5", "only `N,0`"),
        ("--tokenizer-type GPT2BPETokenizer", "tokenizer.json"),
        ("--load elsewhere", "--load elsewhere"),
        ("--attention-dropout 0.1", "no dropout"),
        ("--recompute-num-layers 2", "--recompute-num-layers 2"),
        ("--lr-decay-style WSD", "optim.decay_fraction"),
    ],
)
def test_what_does_not_fit_is_named(flags, words):
    problems = translate(QUIET + flags, "flags").problems
    assert len(problems) == 1 + (flags == "--lr-decay-style WSD") and words in problems[0]
    assert problems[0] in translation_yaml(translate(QUIET + flags, "flags"), "flags").replace("\n#   ", "\n")
    assert translate(QUIET, "flags").problems == []


BRANCHES = """#!/bin/bash
MODE=${1:-real}
ARGS=()
if [[ $MODE == mock ]]; then
    ARGS+=("--mock-data" "--vocab-size 128")
else
    ARGS+=(
        "--data-path my_text_document"  # a word with a blank inside, split by the shell
        "--split '99,1,0'"
    )
fi
torchrun --nproc_per_node 8 pretrain_gpt.py ${ARGS[@]} --num-layers 4
"""


def test_branches_are_all_read_and_said():
    found = translate(BRANCHES, "x.sh")
    assert found.config["data.sources"] == {"my_text_document": 1.0} and found.config["data.split"] == "99,1,0"
    assert found.config["model.vocab_size"] == 128
    assert "in line 5, 7: every branch was read" in found.problems[0]
    assert "every branch" not in " ".join(translate(LLAMA, "x.sh").problems)  # its `if` sets no flags


def test_files_that_others_source_and_commands_in_a_text():
    only = "NAME=x\nMODEL_ARGS=' \\\n --num-layers 4 \\\n --hidden-size 64 '\nexport OTHER=(--lr 1e-3)\n"
    config = translate(only, "conf.sh").config
    assert (config["model.num_layers"], config["model.hidden_size"], config["optim.lr"]) == (4, 64, 1e-3)
    inside = "O='--num-layers 4 --lr 1e-3'\nsrun -l --mpi pmix bash -c \"cd x; python a/pretrain_gpt.py ${O}\"\n"
    found = translate(inside, "x.sbatch")
    assert found.config["model.num_layers"] == 4 and "--mpi" not in found.given


def test_programs_of_other_models_are_said():
    problems = translate("python pretrain_t5.py " + QUIET, "x.sh").problems
    assert len(problems) == 1 and "runs pretrain_t5.py: only what pretrain_gpt.py does" in problems[0]


def test_nested_keys_load():
    flags = "--seq-length 64 --vocab-size 96 --lr 1e-3 --disable-bias-linear --num-experts 8 --moe-layer-freq 2 "
    text = translation_yaml(translate(QUIET + flags, "x"), "x")
    config = loads(PretrainConfig, text)
    assert config.model.moe.num_experts == 8 and config.model.moe.every == 2 and config.model.bias is False


def test_defaults_that_are_missing_are_named():
    problems = " ".join(translate("--num-layers 4", "flags").problems)
    for words in ("--global-batch-size is absent", "--train-iters is absent", "--data-path is absent", "no dropout"):
        assert words in problems


def test_every_row_leads_somewhere():
    keys = set(leaves(PretrainConfig))
    for row in FLAGS:
        assert row.names and all(name.startswith("--") for name in row.names)
        if row.kind in (SET, READ):
            assert all(key in keys or key == "-" for key in row.key.split()), row
        if row.kind in (DROPPED,):
            assert row.note, row
    assert len(TABLE) == sum(len(row.names) for row in FLAGS) > 200  # no flag twice
    assert sum(len(row.names) for row in FLAGS if row.kind in (SET, READ)) >= 80


def test_the_page_holds_the_table():
    page = (ROOT / "docs/from_megatron.md").read_text()
    assert page.endswith(markdown()), "make its table anew with convert.megatron.translate.markdown()"


# Reading shell.


def words(text: str) -> list[list[str]]:
    return read_script(text, "x.sh").commands


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b\\\n  c", [["a", "b", "c"]]),
        ("a 'b  $c' \"d # e\" # f", [["a", "b  $c", "d # e"]]),
        ("A='x y'\ncmd $A \"$A\" ${A}z", [["cmd", "x", "y", "x y", "x", "yz"]]),
        ("A=(x 'y z' # no\n w)\nA+=(v)\ncmd \"${A[@]}\"", [["cmd", "x", "y z", "w", "v"]]),
        ("A=1\nA+=2\ncmd $((A*2 + 10/4))", [["cmd", "26"]]),
        ("cmd ${B:-d e} ${B} $1 ${2:-q}", [["cmd", "d", "e", "${B}", "$1", "q"]]),
        ("cmd $(rm -rf x) `id` $((x+y))", [["cmd", "$(rm", "-rf", "x)", "`id`", "$((x+y))"]]),
        ("a; b && c | d > e 2>&1", [["a"], ["b"], ["c"], ["d"]]),
        ("export A=1 B=2\ncmd $A$B", [["cmd", "12"]]),
        ("cmd a\\ b it\\'s", [["cmd", "a b", "it's"]]),
        ("A='--x 1 \\\n --y'\ncmd $A", [["cmd", "--x", "1", "--y"]]),
        ("A=('--x 1' '--y')\ncmd ${A[@]} \"${A[@]}\"", [["cmd", "--x", "1", "--y", "--x 1", "--y"]]),
        ("if true; then A=1; else A=2; fi\ncmd $A", [["if", "true"], ["fi"], ["cmd", "2"]]),
    ],
)
def test_shell_words(text, expected):
    assert words(text) == expected


@pytest.mark.parametrize("text", ["A='x\ny", "A=(\n1\n2", 'cmd "$(a'])
def test_what_never_closes_is_refused(text):
    with pytest.raises(UsageError, match=r"x.sh:1: .* never closed"):
        words(text)


def test_scripts_cannot_blow_up():
    bomb = "A=xxxxxxxxxx\n" + "".join("A=$A$A$A$A$A$A$A$A$A$A\n" for _ in range(12))
    with pytest.raises(UsageError, match="expand to more than"):
        words(bomb)
    with pytest.raises(UsageError, match="larger than"):
        words("#" * (2 << 20))
    assert words("cmd $((9**9**9))") == [["cmd", "$((9**9**9))"]]
    assert re.fullmatch(r"\d{1,40}|.*", words("cmd $((99999999999*99999999999))")[0][1])


def test_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = "X=$(touch pwned1)\nY=`touch pwned2`\ntouch pwned3\npython pretrain_gpt.py --num-layers $(touch pwned4)\n"
    translate(script, "x.sh")
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path, capsys):
    path = tmp_path / "run.sh"
    path.write_text(LLAMA.replace("--bf16", "--bf16 --lr-warmup-init 1"))
    assert main(["config", "--from-megatron-args", str(path)]) == 0
    out, err = capsys.readouterr()
    assert err == "megallm: not mapped: --lr-warmup-init 1: the warm-up begins at 0.\n"
    assert "#   --lr-warmup-init 1: the warm-up begins at 0.\n" in out and yaml.safe_load(out)["layout"]["tp"] == 4
    assert main(["config", "--from-megatron-args", BASE]) == 0
    assert "num_layers: 4" in capsys.readouterr().out
    assert main(["config", "--from-megatron-args", str(tmp_path / "missing.sh")]) == 2
    assert "cannot be read as a script" in capsys.readouterr().err
    path.write_text("echo hello\n")
    assert main(["config", "--from-megatron-args", str(path)]) == 2
    assert "holds no flags" in capsys.readouterr().err


MOCK = """TOKENIZER_ARG=${3:-"MOCK"} # Path to tokenizer model, or "MOCK"
DATA_ARG=${4:-"MOCK"}     # Data prefix, or "MOCK"
ARGS=(
    "--data-path $DATA_ARG"
    "--tokenizer-type HuggingFaceTokenizer"
    "--tokenizer-model $TOKENIZER_ARG"
)
torchrun pretrain_gpt.py --num-layers 4 --attention-dropout 0 --hidden-dropout 0 --global-batch-size 8 \\
    --train-samples $N --lr-decay-samples $M --load $1 --num-experts `nproc` --save "<path>/run" ${ARGS[@]}
"""


def test_a_placeholder_is_one_problem_and_no_value():
    """Issue R item 21: `$3` and MOCK became data that `config` took."""
    found = translate(MOCK, "x.sh")
    flags = [problem.partition(":")[0] for problem in found.problems]
    assert sorted(flags) == [
        "--data-path MOCK", "--load $1", "--lr-decay-samples $M", "--num-experts `nproc`", "--save <path>/run",
        "--tokenizer-model MOCK", "--train-samples $N",
    ]  # fmt: skip
    assert not {"data.sources", "data.tokenizer", "run.dir", "train.steps"} & found.config.keys()


@pytest.mark.parametrize(
    ("flags", "spec"),
    [
        ("--tokenizer-type Llama2Tokenizer --tokenizer-model x/tokenizer.model", "x/tokenizer.model"),
        ("--tokenizer-type SentencePieceTokenizer --tokenizer-model x.model", "x.model"),
        ("--tokenizer-type GPTSentencePieceTokenizer --tokenizer-model x.spm", "x.spm"),
        ("--tokenizer-type GPT2BPETokenizer --vocab-file t/vocab.json --merge-file t/merges.txt", "t"),
        ("--tokenizer-type TikTokenizer --tokenizer-model x.tiktoken", "x.tiktoken"),
    ],
)
def test_types_of_tokenizers(flags, spec):
    assert translate(QUIET + flags, "x").problems == [] and config_of(flags)["data.tokenizer"] == spec


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--tokenizer-type Llama2Tokenizer --tokenizer-model x.bin", "call it NAME.model"),
        ("--tokenizer-type Llama2Tokenizer", "--tokenizer-model is absent: set data.tokenizer to a sentencepiece"),
        ("--tokenizer-type GPT2BPETokenizer --vocab-file gpt2-vocab.json --merge-file m", "PREFIX_tokenizer"),
        ("--tokenizer-type GPT2BPETokenizer --vocab-file vocab.json", "--merge-file is absent"),
        ("--tokenizer-type TikTokenizer --tokenizer-model v.json", "tools/preprocess_data.py"),
        ("--tokenizer-type BertWordPieceCase --vocab-file v.txt", "megallm reads HuggingFaceTokenizer, Llama2Tok"),
    ],
)
def test_tokenizers_that_do_not_fit_are_named_once(flags, words):
    problems = translate(QUIET + flags, "x").problems
    assert len(problems) == 1 and words in problems[0], problems


def test_a_problem_is_printed_once(capsys, monkeypatch):
    """Where stdout is a terminal the comments of the YAML are enough."""
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    assert main(["config", "--from-megatron-args", QUIET + "--lr $LR"]) == 0
    out, err = capsys.readouterr()
    assert (out + err).count("the script computes $LR") == 1 and err == ""
