"""Issue R, C.20: what is said about a wrong word is right: spellings, other names, groups of verbs, missing files."""

from __future__ import annotations

import argparse
import importlib
import json

import pytest

from megallm.base import suggest
from megallm.base.config import leaves
from megallm.cli import main as cli
from megallm.cli.table import VERBS
from megallm.training import other_names
from megallm.training.config import PretrainConfig

GOOD = "model: {preset: tiny-1m, vocab_size: 300}\ndata: {sources: {PREFIX: 1}, seq_len: 16}\n"


def call(capsys, *argv) -> tuple[int, str, str]:
    try:
        code = cli.main([str(arg) for arg in argv])
    except SystemExit as left:  # argparse's own end of --help
        code = left.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def made(tmp_path, monkeypatch, capsys):
    """A configuration whose data (3 lines, bytes) are there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("one\ntwo\nthree\n")
    words = ("--input", "t.txt", "--tokenizer", "bytes", "--append-eod")
    assert call(capsys, "preprocess", *words, "--output", "many", "--split-text", "lines")[0] == 0
    assert call(capsys, "preprocess", *words, "--output", "one")[0] == 0
    (tmp_path / "c.yaml").write_text(GOOD.replace("PREFIX", "many_text_document"))
    return tmp_path / "c.yaml"


@pytest.mark.parametrize(
    ("setting", "advice"),
    [
        ("optim.rule=AdamW", "Nearest valid: optim.rule=adamw."),  # the issue's: it said adam
        ("optim.rule=adamw_torch_fused", "Nearest valid: optim.rule=adamw."),
        ("optim.rule=SGD", "optim.rule=sgd."),
        ("optim.schedule=WSD", "optim.schedule=wsd."),
        ("optim.schedule=constant_with_warmup", "optim.schedule=constant."),
        ("model.norm=RMSNorm", "model.norm=rmsnorm."),
        ("model.activation=silu", "model.activation=swiglu."),
        ("model.preset=LLaMA2_7B", "Did you mean 'llama2-7b'?"),
        ("train.precision=bfloat16", "Did you mean 'bf16'?"),
        ("train.precision=FP32", "Did you mean 'fp32'?"),
        ("layout.schedule=ZB_H1", "Did you mean 'zb-h1'?"),
        ("layout.schedule=Interleaved1F1B", "Did you mean 'interleaved'?"),
        ("layout.cp_kind=p2p", "Did you mean 'ring'?"),
        ("train.recompute=Selectve", "Did you mean 'selective'?"),
        ("layout.sp=yes", "Did you mean 'true'?"),
        ("optim.LR=1", "Did you mean 'optim.lr'?"),
        ("optimizer.lr=1", "Did you mean 'optim.lr'?"),
        ("learning_rate=1", "Here that is optim.lr."),
        ("optim.learning-rate=1", "Here that is optim.lr."),
        ("seq_length=8", "Here that is data.seq_len."),
        ("per_device_train_batch_size=8", "Here that is train.micro_batch."),
        ("num_train_epochs=3", "Here that is train.steps (steps of the optimizer, not epochs"),
        ("tensor_model_parallel_size=2", "Here that is layout.tp."),
        ("parallelism.tensor_parallel_degree=2", "Here that is layout.tp."),
        ("gradient_accumulation_steps=2", "train.global_batch"),
        ("lora_r=8", "has no LoRA yet"),
        ("save_steps=8", "Here that is checkpoint.every."),
    ],
)
def test_other_spellings_and_other_names_come_before_near_words(capsys, tmp_path, setting, advice):
    path = tmp_path / "c.yaml"
    path.write_text("data: {sources: {p: 1}}\n" if "preset" in setting else GOOD)
    code, _, err = call(capsys, "config", path, "--no-files", setting)
    assert code == 2 and advice in err, err


def test_names_of_other_systems_in_a_file(capsys, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("optimizer: {lr: 1}\ntrain: {max_steps: 3}\nlearning_rate: 3\n")
    code, _, err = call(capsys, "config", path)
    assert code == 2
    for sentence in ("c.yaml:1: unknown key 'optimizer'. That section is optim", "c.yaml:2: unknown key "
                     "'train.max_steps'. Here that is train.steps.", "c.yaml:3: unknown key 'learning_rate'. Here"):
        assert sentence in err  # fmt: skip


def test_other_names_point_at_real_keys_and_hide_none():
    keys = set(leaves(PretrainConfig))
    for name, found in other_names.KEYS.items():
        first = found.partition(" ")[0]
        assert first in keys or found.endswith((".", ")")) and " " in found, (name, found)
    assert set(other_names.BY_KEY) <= keys
    taken = [name for names in other_names.BY_KEY.values() for name in names]
    assert len(taken) > 250 and len({suggest.plain(name) for name in taken}) > 240
    assert set(other_names.VERBS) <= set(VERBS)


# Names from the first page of each system's documentation, which a person brings along.
BROUGHT_ALONG = """
per_device_train_batch_size gradient_accumulation_steps learning_rate num_train_epochs max_steps lr_scheduler_type
warmup_ratio logging_steps save_steps save_total_limit eval_strategy bf16 fsdp deepspeed report_to push_to_hub
gradient_checkpointing group_by_length load_best_model_at_end label_smoothing_factor torch_compile do_train
tensor_model_parallel_size pipeline_model_parallel_size num_attention_heads group_query_attention kv_channels
max_position_embeddings clip_grad global_batch_size train_iters lr_warmup_iters lr_decay_style eval_iters data_path
vocab_file seq_length tokenizer_model moe_router_topk transformer_impl use_distributed_optimizer overlap_grad_reduce
model.flavor optimizer.name lr_scheduler.decay_ratio training.local_batch_size training.max_norm checkpoint.folder
parallelism.data_parallel_shard_degree activation_checkpoint.mode metrics.log_freq checkpoint.async_mode
model_name_or_path finetuning_type cutoff_len template val_size preprocessing_num_workers flash_attn lora_target
base_model datasets val_set_size sequence_len sample_packing adapter lora_alpha wandb_project evals_per_epoch
micro_batch_size chat_template resume_from_checkpoint special_tokens flash_attention load_in_8bit train_on_inputs
n_layer n_head n_embd block_size batch_size max_iters grad_clip out_dir init_from compile wandb_log dropout
"""


@pytest.mark.parametrize("name", BROUGHT_ALONG.split())
def test_names_that_people_bring_along_have_a_pointer(capsys, name):
    code, _, err = call(capsys, "config", "/dev/null", f"{name}=1")
    assert code == 2
    (line,) = [line for line in err.splitlines() if f"unknown key '{name}'" in line]
    assert line.partition("'. ")[2] and not line.partition("'. ")[2].startswith("Keys"), line
    assert "Did you mean" not in line or name.rpartition(".")[2] in line.partition("Did you mean")[2], line


@pytest.mark.parametrize(
    ("word", "advice"),
    [
        ("finetune", "`megallm sft`"), ("lora", "`megallm sft`"),
        ("eval", "prints the held-out loss"), ("train", "`megallm pretrain`"), ("Pretrain", "Did you mean 'pretrain'?"),
        ("inference", "`megallm generate`"), ("serve", "has no server"), ("preprocess_data", "`megallm preprocess`"),
        ("merge_datasets", "`megallm data merge`"), ("rloo", "`megallm grpo`"),
        ("orpo", "`megallm dpo`"), ("resume", "--resume auto"),
        ("list-models", "`megallm presets`"), ("doctr", "Did you mean 'doctor'?"),
        ("tokenise", "`megallm preprocess`"), ("upgrade", "`bash tools/install.sh`"), ("version", "--version"),
    ],
)  # fmt: skip
def test_verbs_of_other_systems(capsys, word, advice):
    code, _, err = call(capsys, word)
    assert code == 2 and advice in err


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        (["--lr", "1e-3"], "key=value: optim.lr=VALUE"), (["--learning-rate=1e-3"], "optim.lr=VALUE"),
        (["--config", "x.yaml"], "stands without an option"), (["--train.steps=5"], "train.steps=VALUE"),
        (["--epochs", "3"], "train.steps=VALUE (steps of the optimizer"), (["--nporc", "2"], "Did you mean '--nproc'?"),
    ],
)  # fmt: skip
def test_options_that_are_settings(capsys, given, advice):
    code, _, err = call(capsys, "pretrain", "c.yaml", *given)
    assert code == 2 and advice in err


@pytest.mark.parametrize("group", sorted({verb.split()[0] for verb in VERBS if " " in verb}))
@pytest.mark.parametrize("form", ["--help", "-h", "help first"])
def test_help_of_a_group(capsys, group, form):
    code, out, err = call(capsys, *(["help", group] if form == "help first" else [group, form]))
    assert (code, err) == (0, "") and out.startswith(f"usage: megallm {group}")
    assert all(verb in out for verb in VERBS if verb.startswith(f"{group} "))


def test_help_of_a_verb_by_the_word_help(capsys):
    assert call(capsys, "help", "ckpt", "ls")[1].startswith("usage: megallm ckpt ls")
    assert call(capsys, "help")[1] == call(capsys, "--help")[1]


@pytest.mark.parametrize("verb", ["config", "pretrain"])
def test_settings_without_a_file_are_no_file(capsys, verb):
    code, _, err = call(capsys, verb, "optim.lr=1e-3", "model.preset=tiny-1m")
    assert code == 2 and "optim.lr=1e-3 is a setting" in err and "CONFIG" in err


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_argument_of_a_verb_has_a_description(verb):
    parser = argparse.ArgumentParser()
    importlib.import_module(VERBS[verb].module).COMMANDS[verb].arguments(parser)
    lacking = [one.dest for one in parser._actions if not one.help and not one.choices]
    assert lacking == []


def described(node: dict, prefix: str = "") -> dict[str, str]:
    """key -> description, of every key of a schema, those of lists of mappings too."""
    found = {}
    for name, entry in node.get("properties", {}).items():
        found |= {f"{prefix}{name}": entry.get("description", "")} if "properties" not in entry else {}
        found |= described(entry, f"{prefix}{name}.") | described(entry.get("items", {}), f"{prefix}{name}[].")
    return found


def test_all_157_keys_have_a_description(capsys):
    found = described(json.loads(call(capsys, "config", "--schema")[1]))
    assert len(found) >= 157
    assert [key for key, text in found.items() if len(text) < 5] == []
    assert "dropout" not in found["run.seed"] and "order of the data" in found["run.seed"]


def test_world_0_blames_world(capsys, made):
    code, _, err = call(capsys, "config", made, "--world", "0")
    assert code == 2 and "--world is 0; it must be at least 1. Nearest valid: --world 1." in err
    assert "--nproc" not in err
    err = call(capsys, "config", made, "layout.tp=2", "--world", "3")[2]
    assert "--nproc" not in err and "--world 2 or --world 4" in err
    assert "--nproc is 0" in call(capsys, "pretrain", made, "--nproc", "0")[2]


@pytest.mark.parametrize("verb", ["config", "pretrain"])
@pytest.mark.parametrize(
    ("settings", "code", "sentence"),
    [
        (["data.sources.nowhere=1"], 65, "nowhere.idx does not exist"),
        (["data.tokenizer=nowhere", "eval.batches=0"], 65, "nowhere"),
        (["data.split=100,0,0"], 2, "eval.batches=0"),
        (["data.split=100,0,0", "eval.every=5"], 2, "leaves nothing for validation"),
        (["data.split=1,0,0", "data.order=megatron"], 2, "leaves nothing for validation"),
        (["data.sources={one_text_document: 1}", "data.split=90,10,0"], 65, "--split-text paragraphs"),
        (["data.sources={one_text_document: 1}", "data.split=90,10,0", "data.order=megatron"], 65, "split 'valid'"),
    ],
)  # fmt: skip
def test_config_finds_what_pretrain_would_end_with(capsys, made, verb, settings, code, sentence):
    found, _, err = call(capsys, verb, made, *settings)
    assert found == code and sentence in err, err
    assert not (made.parent / "runs").exists()


def test_config_passes_what_is_there_and_what_need_not_be(capsys, made):
    assert call(capsys, "config", made, "data.split=1,1,1")[0] == 0
    assert call(capsys, "config", made, "data.split=1,0,0", "eval.batches=0")[0] == 0
    code, out, _ = call(capsys, "config", made, "data.sources.nowhere=1", "data.split=1,1,1", "--no-files")
    assert code == 0 and "nowhere" in out
    (made.parent / "many_text_document.bin").write_bytes(b"")
    code, out, err = call(capsys, "config", made, "data.tokenizer=nothing", "data.split=1,1,1")
    assert code == 65 and "2 problems with the files" in err and "seq_len: 16" in out
