"""What settings are called elsewhere, and where they are here: for the message about an unknown
key. Pure.

The names are those of Megatron-LM's flags, transformers' TrainingArguments and model
configurations, torchtitan, LLaMA-Factory, Axolotl, nanoGPT and DeepSpeed. A value begins with our
key, or is a sentence.
"""

from __future__ import annotations

from megallm.base.suggest import plain

_ACCUMULATION = (
    "train.global_batch (samples of a step over all ranks; accumulation follows from it and "
    "micro_batch)"
)
_EPOCHS = (
    "train.steps (steps of the optimizer, not epochs: tokens / (global_batch x seq_len) of them "
    "are one epoch)"
)
_LORA = "megallm has no LoRA yet; it trains all weights."
_CHAT = "megallm has no fine-tuning on conversations yet; it trains on text (docs/data.md)."
_GENERATE = "That belongs to `megallm generate`, not to training (see `megallm generate --help`)."
_TOKENS = "train.steps (steps of the optimizer: tokens / (train.global_batch x data.seq_len))"
_TRACKERS = "log.trackers (of tensorboard, wandb, mlflow, trackio; RUN/metrics.jsonl has every row)"
_PROJECT = "log.project (the trackers themselves are log.trackers)"
_GPU = "Nothing to set: ranks take the GPUs they find; --nproc says how many ranks."

# Our key: its names elsewhere.
_NAMES = """
run.dir: output_dir out_dir save_dir save save_path checkpoint_dir ckpt_dir logdir log_dir
    dump_folder job.dump_folder default_root_dir checkpoint.folder work_dir run_dir run_name
    results_dir tensorboard_dir logging_dir hydra.run.dir
run.seed: seed manual_seed random_seed training_seed torch_seed model_seed debug.seed
data.seed: data_seed shuffle_seed dataset_seed sampler_seed
model.preset: model_name model_type model_size flavor model.flavor base_config
model.hf: model_name_or_path base_model pretrained_model_name_or_path hf_path hf_assets_path
    init_from load_hf_model initial_load_path pretrained_checkpoint from_pretrained model_path
model.num_layers: n_layer n_layers num_hidden_layers layers depth decoder_layers
    encoder_num_layers
model.hidden_size: n_embd d_model dim embed_dim emb_dim embedding_dim model_dim hidden_dim
    n_embed width
model.ffn_hidden_size: intermediate_size ffn_dim d_ff ffn_size mlp_dim ff_dim n_inner
    intermediate_dim
model.num_heads: n_head n_heads num_attention_heads attention_heads heads
model.num_kv_heads: group_query_attention n_kv_heads num_key_value_heads num_query_groups
    kv_heads n_kv_head multi_query_attention
model.head_size: head_dim kv_channels d_head d_kv attention_head_dim
model.vocab_size: n_vocab vocabulary_size padded_vocab_size num_embeddings
model.max_positions: max_position_embeddings n_positions n_ctx max_seq_len_model
    rotary_max_seq_len
model.tie_embeddings: tie_word_embeddings untie_embeddings_and_output_weights weight_tying
    enable_weight_tying share_embeddings_and_output_weights
model.norm: normalization norm_type layernorm_type
model.norm_eps: rms_norm_eps layer_norm_eps layer_norm_epsilon layernorm_epsilon norm_epsilon
model.activation: hidden_act activation_function swiglu act_fn
model.positions: position_embedding_type pos_emb rotary use_rope
model.rope_theta: rotary_base rope_base rotary_emb_base
model.rope_scaling: rope_scaling_type rope_type use_rope_scaling
model.rope_factor: rope_scaling_factor rotary_scaling_factor
model.bias: use_bias add_bias_linear disable_bias_linear mlp_bias
model.qkv_bias: add_qkv_bias attention_bias attn_bias
model.qk_norm: qk_layernorm use_qk_norm
model.sliding_window: window_size attention_window local_attention_window
model.layer_pattern: layer_types sliding_window_pattern window_attn_skip_freq no_rope_layers
model.rope_fraction: partial_rotary_factor rotary_percent rotary_pct
model.attention_cap: attn_logit_softcapping attn_logit_softcap
model.logit_cap: final_logit_softcapping logits_soft_cap
model.attention_scale: attention_multiplier softmax_scale
model.embedding_scale: embedding_multiplier embed_scale
model.residual_scale: residual_multiplier
model.parallel_residual: use_parallel_residual parallel_attn
model.init_std: initializer_range init_method_std init_range
model.moe.num_experts: num_local_experts n_routed_experts num_moe_experts moe_num_experts
    n_experts experts
model.moe.top_k: num_experts_per_tok moe_router_topk router_topk experts_per_token
    n_experts_per_token
model.moe.ffn_hidden_size: moe_intermediate_size moe_ffn_hidden_size
model.moe.aux_coef: router_aux_loss_coef moe_aux_loss_coeff aux_loss_coef load_balance_coeff
model.moe.z_coef: moe_z_loss_coeff router_z_loss_coef
model.moe.capacity: moe_expert_capacity_factor capacity_factor
model.mtp.depth: mtp_num_layers num_nextn_predict_layers
layout.tp: tensor_model_parallel_size tensor_parallel_size tp_size tensor_parallel_degree
    tensor_parallel model_parallel_size
layout.pp: pipeline_model_parallel_size pipeline_parallel_size pp_size pipeline_parallel_degree
    num_stages
layout.cp: context_parallel_size cp_size context_parallel_degree sequence_parallel_size sp_size
layout.ep: expert_model_parallel_size expert_parallel_size ep_size expert_parallel_degree
layout.dp: data_parallel_size dp_size data_parallel_replicate_degree data_parallel_degree
    num_replicas
layout.sp: sequence_parallel enable_sequence_parallel
layout.chunks: virtual_pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage
    num_virtual_stages_per_pipeline_rank vpp model_chunks
layout.schedule: pipeline_parallel_schedule pipeline_schedule
layout.stages: pipeline_model_parallel_layout decoder_first_pipeline_num_layers split_points
zero.stage: zero_stage zero_optimization.stage fsdp use_distributed_optimizer sharding_strategy
    fsdp_config data_parallel_shard_degree deepspeed_stage zero_optimization
    data_parallel_sharding_strategy use_fsdp
zero.offload: cpu_offload optimizer_cpu_offload offload_optimizer enable_cpu_offload
data.sources: data_path train_data_path dataset dataset_path train_file datasets train_data
    dataset_name data_dir train_files dataset_prepared_path pretraining_dataset dataset_dir
    data_prefix data_files train_dataset
data.split: validation_split val_split test_size val_size eval_split val_set_size valid_split
data.seq_len: seq_length sequence_length max_seq_len max_seq_length block_size context_length
    max_length cutoff_len sequence_len context_size ctx_len seqlen train_seq_len
data.tokenizer: tokenizer_path tokenizer_name tokenizer_model tokenizer_name_or_path vocab_file
    tokenizer_type merge_file tokenizer_config
data.packing: group_by_length pad_to_sequence_len eval_sample_packing sample_packing
    pack_sequences packing_strategy neat_packing
data.document_masks: reset_attention_mask reset_position_ids eod_mask_loss document_attention
    intra_doc_masking
data.fim.rate: fim_rate fim_data
data.masking.rate: mlm_probability mask_prob mask_ratio
train.steps: max_steps train_iters iters num_steps total_steps max_iters train_steps
    training.steps num_train_steps max_train_steps total_training_steps num_training_steps
    iterations max_iterations num_iters lr_decay_iters max_update
train.stop_at: exit_interval stop_after exit_step
launch.time_limit: exit_duration_in_mins max_time run_timeout timeout_minutes
train.global_batch: global_batch_size batch_size train_batch_size total_batch_size batch gbs
    effective_batch_size samples_per_step
train.micro_batch: micro_batch_size per_device_train_batch_size train_micro_batch_size_per_gpu
    local_batch_size device_batch_size mbs per_gpu_train_batch_size per_device_batch_size
    microbatch pipeline_parallel_microbatch_size per_device_eval_batch_size
train.precision: dtype torch_dtype bf16 fp16 mixed_precision amp precision_plugin params_dtype
    mixed_precision_param mixed_precision_dtype compute_dtype half_precision use_amp
train.fp8.recipe: fp8_format fp8_recipe enable_fp8
train.recompute: gradient_checkpointing activation_checkpointing recompute_granularity
    recompute_activations activation_checkpoint activation_checkpoint.mode
    use_gradient_checkpointing grad_checkpointing ac_mode recompute_method
    checkpoint_activations
train.recompute_layers: recompute_num_layers
train.loss_scale.initial: initial_loss_scale init_scale loss_scale_init
train.loss_scale.minimum: min_loss_scale
train.determinism: deterministic deterministic_mode full_determinism
guard.non_finite: check_for_nan_in_loss_and_grad check_for_nan_in_loss error_on_nan
guard.spike: check_for_spiky_loss check_for_large_grads
guard.spike_sigma: sigma_factor
guard.spike_window: rolling_interval_length
guard.replica_check_every: check_weight_hash_across_dp_replicas_interval
optim.rule: adafactor optimizer_name optimizer_type optim_name optimizer.type optimizer.name
    algorithm
optim.lr: learning_rate max_lr base_lr peak_lr max_learning_rate initial_lr peak_learning_rate
optim.min_lr: min_lr_factor min_learning_rate final_lr lr_min end_lr min_lr_ratio
    cosine_min_lr_ratio min_lr_rate
optim.warmup_steps: num_warmup_steps lr_warmup_iters warmup warmup_iters lr_warmup_steps
    warmup_ratio lr_warmup_fraction lr_warmup_samples warmup_updates
optim.schedule: lr_scheduler_type lr_scheduler lr_decay_style scheduler lr_schedule decay_type
    lr_decay scheduler_type decay_lr lr_scheduler_kwargs
optim.decay_fraction: lr_wsd_decay_iters decay_ratio cooldown_fraction wsd_decay
optim.betas: adam_beta1 adam_beta2 beta1 beta2 adam_betas
optim.eps: adam_epsilon adam_eps epsilon
optim.weight_decay: wd decay l2
optim.momentum: sgd_momentum muon_momentum
optim.clip: max_grad_norm clip_grad grad_clip gradient_clip_val gradient_clipping max_norm
    grad_norm_clip clip_grad_norm clip_norm
optim.groups: unfrozen_parameters param_groups parameter_groups no_weight_decay_cond freeze
    frozen_layers trainable_modules
checkpoint.every: saves_per_epoch enable_checkpoint always_save_checkpoint save_interval
    save_steps checkpoint_interval save_every checkpointing_steps save_strategy
    checkpoint.interval save_freq every_n_train_steps ckpt_interval
checkpoint.keep: save_total_limit keep_latest_k max_checkpoints keep_last_n save_top_k
eval.every: evals_per_epoch do_eval eval_delay eval_interval eval_steps val_check_interval
    eval_freq evaluation_strategy eval_strategy validation_interval val_interval eval_every
    val_freq
eval.batches: eval_iters eval_batches limit_val_batches max_eval_samples val_steps
    num_eval_batches
log.every: logging_first_step logging_strategy logging_steps log_interval log_freq log_every
    log_every_n_steps print_freq print_every
log.plot: plot_loss draw_loss
"""
_NOTES = {
    "data.sources": "(prefix of .bin/.idx: weight; `megallm preprocess` makes them, or train on a "
    "folder of text: `megallm pretrain --text DIR`)",
}
_BY_SENTENCE: dict[str, str] = {
    _ACCUMULATION:
    "gradient_accumulation_steps grad_accum accumulate_grad_batches gradient_accumulation "
    "grad_acc accumulation_steps grad_accum_steps gradient_accumulation_iters update_freq",
    _EPOCHS:
    "num_train_epochs epochs num_epochs max_epochs n_epochs train_epochs",
    _TOKENS:
    "train_tokens max_tokens total_tokens num_tokens train_samples token_budget",
    _LORA:
    "lora_r lora_rank lora_alpha lora_dropout lora_target lora_target_modules lora peft adapter "
    "use_lora qlora finetuning_type load_in_4bit load_in_8bit lora_modules",
    _CHAT:
    "template chat_template messages train_on_inputs train_on_prompt mask_history dpo_beta",
    _GENERATE:
    "temperature top_p max_new_tokens repetition_penalty num_beams do_sample prompt prompts",
    _TRACKERS:
    "report_to wandb wandb_run_name use_wandb logger enable_wandb trackers "
    "enable_tensorboard wandb_log tensorboard mlflow trackio swanlab",
    _PROJECT: "wandb_project project_name experiment_name trackio_project",
    _GPU:
    "device devices gpus num_gpus n_gpus gpu cuda_visible_devices nproc_per_node accelerator "
    "num_nodes nnodes local_rank ddp_backend distributed_backend backend",
    "Resuming is an option, not a setting: --resume auto (the default), must or never; the run "
    "folder is run.dir.":
    "resume resume_from_checkpoint load load_checkpoint resume_from ckpt_path "
    "auto_resume_from_checkpoints",
    "Nothing to set: torch's attention kernels are used.":
    "attn_implementation flash_attention use_flash_attn flash_attn attention_backend "
    "sdp_attention flash_attention_2",
    "Nothing to set: models have no dropout.":
    "dropout hidden_dropout attention_dropout resid_pdrop attn_pdrop embd_pdrop "
    "hidden_dropout_prob residual_dropout",
    "Nothing to set: one thread reads ahead.":
    "num_workers dataloader_num_workers preprocessing_num_workers data_loader_workers "
    "prefetch_factor",
    "Nothing to set: megallm does not compile models.":
    "torch_compile compile use_compile",
    "Nothing to set: reductions and gathers are overlapped with the backward pass where that is "
    "possible.":
    "overlap_grad_reduce overlap_param_gather ddp_find_unused_parameters "
    "fsdp_reshard_after_forward enable_async_tensor_parallel tp_comm_overlap",
    "Nothing to set: checkpoints are safetensors, written whole or not at all, with the "
    "optimizer's state; `megallm convert --to hf` writes weights alone.":
    "save_safetensors save_only_model async_mode export_dtype last_save_model_only no_load_optim "
    "no_load_rng no_save_optim async_save ckpt_format push_to_hub hub_model_id dist_ckpt_format",
    "Nothing to set: a vocabulary needs no padding here.":
    "make_vocab_size_divisible_by pad_vocab_size_to",
    "Nothing to set: experts are routed by all-to-all with grouped matrix products.":
    "moe_grouped_gemm moe_token_dispatcher_type",
    "megallm has no such regularisation or search: leave it out.":
    "label_smoothing_factor label_smoothing neftune_noise_alpha early_stopping_patience "
    "load_best_model_at_end metric_for_best_model auto_find_batch_size rampup_batch_size patience",
    "Code from a model folder is never run (there is nothing to trust).":
    "trust_remote_code",
    "A DeepSpeed configuration has its own names here: zero.stage, zero.offload, train.precision,"
    " optim.clip.":
    "deepspeed deepspeed_config",
    "The command says it: `megallm pretrain` trains, `megallm generate` predicts.":
    "do_train do_predict finetune eval_only predict_with_generate",
    "Leave it out: nothing here depends on it.":
    "overwrite_output_dir overwrite_cache disable_tqdm remove_unused_columns label_names "
    "prediction_loss_only strict log_level logging_nan_inf_filter dataloader_drop_last "
    "dataloader_pin_memory tf32 debug job.description description eval_accumulation_steps "
    "dataloader_type transformer_impl use_mcore_models eval_table_size xformers_attention "
    "special_tokens distributed_timeout_minutes init_timeout_seconds streaming max_samples "
    "optim_args enable_profiling selective_ac_option enable_fsdp_float8_all_gather",
    "That section is optim: optim.rule, optim.lr and so on.":
    "optimizer optimizers",
    "That section is train: train.steps, train.global_batch and so on.":
    "training trainer training_args",
    "That section is layout: layout.tp, layout.pp, layout.cp, layout.ep, layout.dp.":
    "parallelism parallel distributed mesh parallel_dims",
    "That section is checkpoint: checkpoint.every, checkpoint.keep.":
    "checkpointing ckpt saving",
    "That section is eval: eval.every, eval.batches.":
    "evaluation validation val valid",
    "That section is log: log.every, log.trackers.":
    "logging metrics",
    "That section is data: data.sources, data.seq_len, data.tokenizer.":
    "dataloader data_config",
    "That section is model: model.preset, or model.num_layers and so on.":
    "model_config model_args architecture arch",
}  # fmt: skip


def _by_key() -> dict[str, list[str]]:
    """`_NAMES` by key."""
    found: dict[str, list[str]] = {}
    for word in _NAMES.split():
        if word.endswith(":"):
            key = word[:-1]
            found[key] = []
        else:
            found[key].append(word)
    return found


def _table() -> dict[str, str]:
    found = {}
    for key, names in BY_KEY.items():
        meant = f"{key} {_NOTES[key]}" if key in _NOTES else key
        found |= {plain(name): meant for name in names}
    for sentence, names in _BY_SENTENCE.items():
        found |= {plain(name): sentence for name in names.split()}
    return found


BY_KEY = _by_key()
KEYS = _table()
VERBS = {
    "pretrain": "train training run fit start train_gpt pretrain_gpt launch trainer learn",
    "sft": "finetune fine_tune lora peft tune instruct qlora instruction_tune sft_train",
    "grpo": "rl reinforce rloo dapo gspo reinforcement_learning rlvr dr_grpo cispo sapo",
    "ppo": "rlhf actor_critic",
    "dpo": "orpo simpo cpo ipo preference align dpo_train",
    "reward": "rm reward_model train_rm",
    "kto": "unpaired",
    "generate": "inference infer predict sample complete completion_text text_generation "
    "run_inference gen",
    "chat": "talk webchat webui conversation",
    "preprocess": "preprocess_data tokenize tokenise prepare prepare_data process encode "
    "pretokenize",
    "tokenizer train": "train_tokenizer train_bpe",
    "data merge": "merge_datasets merge",
    "data verify": "validate_data check_data",
    "convert": "export convert_checkpoint import to_hf from_hf save_pretrained convert_hf",
    "config": "check validate print_config show_config schema",
    "presets": "models list_models model_list recipes",
    "ckpt ls": "checkpoint checkpoints list",
    "ckpt dump": "dump extract",
    "curate": "clean filter dedup deduplicate",
    "schedule": "pipeline simulate plan",
    "doctor": "env info system_info check_env environment collect_env",
    "completion": "completions install_completion",
    "synth": "synthesize synthetic",
}
NO_VERBS = {
    "There is no verb for benchmarks: `megallm pretrain` prints the held-out loss (eval.every, "
    "eval.batches), and "
    "`megallm generate --json` writes answers to score.":
    "eval evaluate evaluation test benchmark lm_eval perplexity validate_model bench",
    "megallm has no server; `megallm convert --to hf` writes a folder that vLLM and others serve.":
    "serve server api deploy vllm host",
    "A run goes on when the same `megallm pretrain` command is given again (--resume auto).":
    "resume continue restart",
    "`bash tools/install.sh`, in the repository, installs megallm and brings it up to date with "
    "the files there.":
    "install update upgrade self_update",
    "That is an option: `megallm --version`.": "version",
}  # fmt: skip


def verb_pointer(word: str) -> str | None:
    """Returns a sentence about a verb of another system; None for a word that none of them has."""
    wanted = plain(word.lstrip("-"))
    for verb, names in VERBS.items():
        if wanted in map(plain, names.split()):
            return f"Here that is `megallm {verb}`."
    for sentence, names in NO_VERBS.items():
        if wanted in map(plain, names.split()):
            return sentence
    return None
