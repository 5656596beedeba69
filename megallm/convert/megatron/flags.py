"""The flags of Megatron-LM and what each becomes here. Data only; no torch.

`SET` writes a key, `READ` is worked out together with other flags in `from_megatron`, `ALIKE` needs
nothing here, `DROPPED` has no counterpart and is reported when it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SET, READ, ALIKE, DROPPED = "set", "read", "alike", "dropped"


@dataclass(frozen=True)
class Flag:
    """One row. `value` is what a switch writes, `choices` map its texts, `text` keeps the value as
    text.

    `harmless` is a value with which a dropped flag changes nothing ("*": any).
    """

    names: tuple[str, ...]
    kind: str
    key: str = ""
    note: str = ""
    value: Any = None
    choices: Mapping[str, Any] = field(default_factory=dict)
    text: bool = False
    harmless: str = "-"

    def shown(self) -> str:
        """Returns the middle column of the documentation."""
        if self.kind == ALIKE:
            return "nothing to set"
        if self.kind == DROPPED:
            return "-"
        value = "" if self.value is None else f": {str(self.value).lower()}"
        return ", ".join(f"`{key}{value}`" for key in self.key.split())


def _set(names: str, key: str, note: str = "", **more: Any) -> Flag:
    return Flag(tuple(names.split()), SET, key, note, **more)


def _read(names: str, key: str, note: str = "") -> Flag:
    return Flag(tuple(names.split()), READ, key, note)


def _alike(names: str, note: str) -> Flag:
    return Flag(tuple(names.split()), ALIKE, note=note)


def _dropped(names: str, note: str, harmless: str = "-") -> Flag:
    return Flag(tuple(names.split()), DROPPED, note=note, harmless=harmless)


FLAGS: tuple[Flag, ...] = (
    # Model.
    _set("--num-layers --encoder-num-layers", "model.num_layers"),
    _set("--hidden-size", "model.hidden_size"),
    _set("--ffn-hidden-size", "model.ffn_hidden_size", "absent: 4 x hidden, or two thirds of it "
                                                       "with SwiGLU"),
    _set("--num-attention-heads", "model.num_heads"),
    _read("--group-query-attention --num-query-groups", "model.num_kv_heads", "absent: as many as "
                                                                              "heads"),
    _set("--kv-channels", "model.head_size"),
    _set("--max-position-embeddings", "model.max_positions"),
    _set("--position-embedding-type", "model.positions", choices={"learned_absolute": "learned", "rope": "rope"}),
    _set("--use-rotary-position-embeddings", "model.positions", value="rope"),
    _set("--rotary-base", "model.rope_theta"),
    _dropped("--rotary-percent", "rotary embeddings cover the whole head", "1.0"),
    _read("--use-rope-scaling --rope-scaling-factor", "model.rope_scaling model.rope_factor",
          "Llama 3.1's, of 8192 positions; the factor is 8 when absent"),
    _read("--rotary-seq-len-interpolation-factor", "model.rope_scaling model.rope_factor", "linear"),
    _read("--rotary-scaling-factor --mscale --mscale-all-dim", "model.rope_scaling "
                                                               "model.rope_factor",
          "YaRN of 4096 positions, with --multi-latent-attention"),
    _dropped("--rope-type", "`--position-embedding-type` and the scaling say it", "*"),
    _read("--no-position-embedding", "-", "says nothing beside rotary positions"),
    _dropped("--rotary-interleaved --no-rope-freq --mrope-section", "rotary embeddings turn "
                                                                    "halves, in every layer"),
    _set("--normalization", "model.norm", choices={"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}),
    _set("--norm-epsilon --layernorm-epsilon", "model.norm_eps"),
    _dropped("--apply-layernorm-1p", "norm weights are stored as they are used"),
    _set("--swiglu", "model.activation", value="swiglu"),
    _set("--openai-gelu", "model.activation", value="gelu_tanh"),
    _dropped("--squared-relu --quick-geglu --onnx-safe --bert-no-binary-head", "no such layer"),
    _set("--disable-bias-linear", "model.bias", value=False),
    _set("--add-qkv-bias", "model.qkv_bias", value=True),
    _set("--qk-layernorm", "model.qk_norm", "of the same kind as in Qwen 3 (RMSNorm per head)", value=True),
    _set("--untie-embeddings-and-output-weights", "model.tie_embeddings", value=False),
    _set("--init-method-std", "model.init_std"),
    _read("--window-size", "model.sliding_window", "`N,0` sees N tokens before it: here N + 1 "
                                                   "with itself"),
    _set("--vocab-size", "model.vocab_size", "absent: the size of the tokenizer that made the data"),
    _alike("--make-vocab-size-divisible-by --padded-vocab-size", "the vocabulary is never padded, "
                                                                 "at any tp"),
    _read("--attention-dropout --hidden-dropout", "-", "no dropout; reported unless 0 "
                                                       "(Megatron-LM's default is 0.1)"),
    _set("--softmax-type", "model.attention_sinks", choices={"vanilla": False, "learnable": True}),
    _dropped("--window-attn-skip-freq", "all layers see the same window"),
    # Experts, latent attention, further tokens.
    _read("--num-experts", "model.moe.num_experts", "the other flags of experts mean nothing "
                                                    "without it"),
    _set("--moe-router-topk", "model.moe.top_k", "absent: 2"),
    _set("--moe-ffn-hidden-size", "model.moe.ffn_hidden_size"),
    _set("--moe-shared-expert-intermediate-size", "model.moe.shared_ffn_hidden_size"),
    _set("--moe-shared-expert-gate", "model.moe.shared_gate", value=True),
    _read("--moe-layer-freq", "model.moe.first_dense model.moe.every", "a number, or `[0]*D+[1]*N`"),
    _set("--moe-router-score-function", "model.moe.score", choices={"softmax": "softmax", "sigmoid": "sigmoid"}),
    _read("--moe-router-pre-softmax", "model.moe.norm_topk_prob", "false with the flag"),
    _set("--moe-router-topk-scaling-factor", "model.moe.routed_scale"),
    _set("--moe-router-num-groups", "model.moe.num_groups"),
    _set("--moe-router-group-topk", "model.moe.top_groups"),
    _set("--moe-router-enable-expert-bias", "model.moe.selection_bias", value=True),
    _set("--moe-router-bias-update-rate", "model.moe.bias_rate"),
    _read("--moe-router-load-balancing-type --moe-aux-loss-coeff", "model.moe.aux_coef", "of each sequence"),
    _set("--moe-z-loss-coeff", "model.moe.z_coef"),
    _set("--moe-expert-capacity-factor", "model.moe.capacity", "counted in each sequence"),
    _set("--moe-token-drop-policy", "model.moe.drop", choices={"probs": "score", "position": "position"}),
    _alike("--moe-token-dispatcher-type --moe-grouped-gemm --moe-permute-fusion "
           "--moe-router-fusion --moe-router-dtype --moe-per-layer-logging "
           "--moe-flex-dispatcher-backend --moe-enable-deepep",
           "tokens travel by all-to-all; the router is fp32"),
    _dropped("--moe-pad-expert-input-to-capacity --moe-input-jitter-eps "
             "--moe-router-force-load-balancing --moe-shared-expert-overlap "
             "--overlap-moe-expert-parallel-comm --moe-use-upcycling "
             "--moe-upcycling-granularity", "no such choice"),
    _dropped("--expert-tensor-parallel-size", "experts are never split over tp", "1"),
    _read("--multi-latent-attention --kv-lora-rank", "model.mla.kv_lora_dim", "absent: 32"),
    _read("--q-lora-rank", "model.mla.q_lora_dim", "absent: 0, none"),
    _read("--qk-head-dim", "model.mla.nope_head_size", "absent: 128"),
    _read("--qk-pos-emb-head-dim", "model.mla.rope_head_size", "absent: 64"),
    _read("--v-head-dim", "model.mla.value_head_size", "absent: 128"),
    _read("--mtp-num-layers", "model.mtp.depth"),
    _read("--mtp-loss-scaling-factor", "model.mtp.weight", "absent: 0.1"),
    # Layout.
    _set("--tensor-model-parallel-size --model-parallel-size", "layout.tp"),
    _set("--sequence-parallel", "layout.sp", value=True),
    _set("--pipeline-model-parallel-size", "layout.pp"),
    _set("--context-parallel-size", "layout.cp"),
    _set("--expert-model-parallel-size", "layout.ep"),
    _set("--cp-comm-type", "layout.cp_kind",
         choices={"p2p": "ring", "a2a": "ulysses", "allgather": "allgather", "a2a+p2p": "hybrid"}),
    _read("--num-layers-per-virtual-pipeline-stage", "layout.chunks layout.schedule", "layers / pp / this"),
    _set("--num-virtual-stages-per-pipeline-rank", "layout.chunks"),
    _set("--microbatch-group-size-per-virtual-pipeline-stage", "layout.group"),
    _set("--pipeline-model-parallel-layout", "layout.stages", "commas are left out", text=True),
    _alike("--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split",
           "embedding and loss count as work when layers are spread"),
    _dropped("--decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers "
             "--pipeline-model-parallel-split-rank "
             "--standalone-embedding-stage", "write layout.stages"),
    _dropped("--use-tp-pp-dp-mapping --hierarchical-context-parallel-sizes", "ranks are pp x dp x "
                                                                             "cp x tp, tp fastest"),
    # ZeRO and overlap.
    _set("--use-distributed-optimizer", "zero.stage", value=1),
    _set("--data-parallel-sharding-strategy", "zero.stage",
         choices={"no_shard": 0, "optim": 1, "optim_grads": 2, "optim_grads_params": 3}),
    _set("--use-torch-fsdp2 --use-custom-fsdp --use-megatron-fsdp", "zero.stage", value=3),
    _set("--optimizer-cpu-offload", "zero.offload", value=True),
    _set("--grad-reduce-in-bf16", "zero.bf16_grads", value=True),
    _dropped("--num-distributed-optimizer-instances", "set zero.shard_size to the ranks that "
                                                      "divide the state", "1"),
    _alike("--overlap-grad-reduce --overlap-param-gather "
           "--overlap-param-gather-with-optimizer-step --tp-comm-overlap "
           "--no-overlap-p2p-communication --overlap-p2p-communication-warmup-flush "
           "--ddp-bucket-size --ddp-average-in-collective --ddp-num-buckets --align-grad-reduce "
           "--align-param-gather --defer-embedding-wgrad-compute",
           "messages overlap with compute where they can, without a switch"),
    # Batch and length.
    _set("--micro-batch-size --batch-size", "train.micro_batch"),
    _set("--global-batch-size", "train.global_batch"),
    _dropped("--rampup-batch-size --step-batch-size-schedule", "the batch has one size"),
    _alike("--calculate-per-token-loss", "the loss is always the mean over the tokens of the "
                                         "whole batch"),
    _set("--seq-length --encoder-seq-length", "data.seq_len"),
    _set("--train-iters", "train.steps"),
    _read("--train-samples", "train.steps", "samples / global batch"),
    _read("--exit-interval", "train.stop_at"),
    _set("--exit-duration-in-mins", "launch.time_limit"),
    _alike("--exit-signal-handler", "SIGTERM always saves and leaves with exit code 75"),
    # Optimizer and learning rate.
    _set("--optimizer", "optim.rule", choices={"adam": "adamw", "sgd": "sgd"}),
    _read("--sgd-momentum", "optim.momentum", "absent: 0.9"),
    _read("--adam-beta1 --adam-beta2", "optim.betas", "absent: 0.9 and 0.999"),
    _read("--adam-eps", "optim.eps", "absent: 1e-8"),
    _set("--weight-decay", "optim.weight_decay", "never on norms and biases; absent: 0.01"),
    _dropped("--start-weight-decay --end-weight-decay --weight-decay-incr-style", "the weight decay is constant",
             "constant"),
    _set("--clip-grad", "optim.clip", "absent: 1.0"),
    _set("--lr", "optim.lr"),
    _set("--min-lr", "optim.min_lr"),
    _set("--lr-decay-style", "optim.schedule", "absent: linear",
         choices={"constant": "constant", "linear": "linear", "cosine": "cosine", "WSD": "wsd"}),
    _set("--lr-warmup-iters", "optim.warmup_steps"),
    _read("--lr-warmup-fraction --lr-warmup-samples", "optim.warmup_steps"),
    _read("--lr-decay-iters --lr-decay-samples", "train.steps", "reported when it is not the "
                                                                "number of steps"),
    _read("--lr-wsd-decay-iters --lr-wsd-decay-style --lr-wsd-decay-samples", "optim.decay_fraction", "linear only"),
    _dropped("--lr-warmup-init", "the warm-up begins at 0", "0.0"),
    _alike("--override-opt_param-scheduler --use-checkpoint-opt_param-scheduler "
           "--override-opt-param-scheduler "
           "--use-checkpoint-opt-param-scheduler", "the schedule is a function of the "
                                                   "configuration and the step"),
    _dropped("--decoupled-lr --decoupled-min-lr --head-lr-mult", "one learning rate for all "
                                                                 "parameters"),
    # Precision and memory.
    _set("--bf16", "train.precision", "fp32 master weights", value="bf16"),
    _set("--fp16", "train.precision", "fp32 master weights", value="fp16"),
    _set("--fp8-format", "train.precision", "the recipe says which forms there are",
         choices={"e4m3": "fp8", "hybrid": "fp8"}),
    _read("--fp8-recipe", "train.fp8.recipe", "absent: delayed"),
    _read("--fp8-amax-history-len", "train.fp8.history", "absent: 1"),
    _read("--fp8-margin", "train.fp8.margin"),
    _read("--first-last-layers-bf16 --num-layers-at-start-in-bf16", "train.fp8.bf16_first", "absent: 1"),
    _read("--num-layers-at-end-in-bf16", "train.fp8.bf16_last", "absent: 1"),
    _dropped("--fp8-amax-compute-algo", "the largest of the history counts", "max"),
    _alike("--accumulate-allreduce-grads-in-fp32 --attention-softmax-in-fp32 "
           "--no-query-key-layer-scaling --apply-query-key-layer-scaling --main-grads-dtype "
           "--main-params-dtype",
           "sums, softmax and norms are fp32 or wider"),
    _read("--initial-loss-scale", "train.loss_scale.initial", "absent, or more: 2^24"),
    _read("--min-loss-scale", "train.loss_scale.minimum"),
    _read("--loss-scale-window", "train.loss_scale.growth_steps"),
    _dropped("--hysteresis", "the scale is halved at the first overflow", "1"),
    _read("--loss-scale", "-", "the scale is always dynamic"),
    _dropped("--fp32-residual-connection --fp8-param-gather --use-precision-aware-optimizer", "no such choice"),
    _set("--recompute-activations", "train.recompute", value="selective"),
    _set("--recompute-granularity", "train.recompute", choices={"selective": "selective", "full": "full"}),
    _set("--checkpoint-activations", "train.recompute", value="full"),
    _dropped("--recompute-method", "full recompute is per layer", "uniform"),
    _dropped("--recompute-num-layers", "full recompute is per layer", "1"),
    _dropped("--recompute-modules --distribute-saved-activations --cpu-offloading "
             "--cpu-offloading-num-layers",
             "no such choice yet"),
    _alike("--transformer-impl --use-mcore-models --use-legacy-models --use-flash-attn "
           "--attention-backend --no-masked-softmax-fusion --no-bias-gelu-fusion "
           "--no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion "
           "--no-gradient-accumulation-fusion --no-persist-layer-norm "
           "--cross-entropy-loss-fusion --cross-entropy-fusion-impl --enable-cuda-graph "
           "--use-cpu-initialization --empty-unused-memory-level --cuda-graph-impl "
           "--cuda-graph-scope --external-cuda-graph --disable-bf16-reduced-precision-matmul "
           "--manual-gc --manual-gc-interval "
           "--no-async-tensor-model-parallel-allreduce",
           "kernels are chosen by what is installed"),
    # Data.
    _read("--data-path --data-args-path", "data.sources", "weights and prefixes, or prefixes "
                                                          "(null: by size, one epoch "
          "of each); the blend is the same, files are read unchanged"),
    _read("--train-data-path --valid-data-path --per-split-data-args-path", "data.sources "
                                                                            "data.valid_sources",
          "each read whole"),
    _set("--mid-level-dataset-surplus", "data.surplus", "absent: 0.005, for `--data-path 1.0 A` "
                                                        "too"),
    _set("--split", "data.split", "absent: 969,30,1", text=True),
    _set("--seed", "run.seed", "also of the sample order, which is Megatron-LM's (`data.order: "
                               "megatron`)"),
    _dropped("--mock-data", "give data.sources and data.split"),
    _read("--test-data-path", "-", "a run ends without a loss on test data"),
    _dropped("--full-validation --multiple-validation-sets --start-eval-at-iter "
             "--eval-global-batch-size --eval-micro-batch-size --phase-transition-iterations "
             "--skip-train",
             "eval.batches batches of train.global_batch every eval.every steps"),
    _read("--tokenizer-type --tokenizer-model --vocab-file --merge-file", "data.tokenizer",
          "HuggingFaceTokenizer, Llama2Tokenizer, SentencePieceTokenizer, GPT2BPETokenizer "
          "(vocab.json and merges.txt of one folder), TikTokenizer (.tiktoken); NullTokenizer "
          "needs none"),
    _dropped("--tiktoken-pattern --tiktoken-num-special-tokens --tiktoken-special-tokens",
             "NAME.json beside NAME.tiktoken says it"),
    _alike("--data-cache-path --num-workers --no-mmap-bin-files "
           "--no-create-attention-mask-in-dataloader --num-dataset-builder-threads "
           "--vocab-extra-ids --dataloader-fast-cache-load --dataloader-defer-npy-index-mmap "
           "--per-dataset-sequences-path",
           "index arrays are made in seconds; nothing is cached"),
    _dropped("--dataloader-type", "samples are read once, in the shuffled order", "single"),
    _dropped("--reset-position-ids --reset-attention-mask --eod-mask-loss", "documents of a "
                                                                            "sample see each "
                                                                            "other, "
             "as without the flag"),
    # Saving, evaluating, logging.
    _set("--save", "run.dir", "checkpoints lie in its folder `checkpoints`", text=True),
    _read("--load", "-", "a run goes on from its own folder; Megatron-LM's checkpoints are not "
                         "read"),
    _set("--save-interval", "checkpoint.every"),
    _set("--check-weight-hash-across-dp-replicas-interval", "guard.replica_check_every"),
    _set("--deterministic-mode", "train.determinism", value="strict"),
    _alike("--ckpt-format --dist-ckpt-format --use-dist-ckpt --async-save "
           "--ckpt-fully-parallel-save --ckpt-fully-parallel-load --auto-detect-ckpt-format "
           "--ckpt-assume-constant-structure --use-checkpoint-args --dist-ckpt-strictness "
           "--exit-on-missing-checkpoint --no-use-tokenizer-model-from-checkpoint-args "
           "--no-ckpt-fully-parallel-save", "one format, which any layout reads"),
    _dropped("--no-save-optim --no-save-rng --no-load-optim --no-load-rng --finetune "
             "--pretrained-checkpoint "
             "--non-persistent-save-interval --save-retain-interval", "a checkpoint is whole; new "
                                                                      "runs start "
             "from model.hf"),
    _set("--eval-interval", "eval.every", "absent: 1000"),
    _set("--eval-iters", "eval.batches", "absent: 100"),
    _set("--log-interval", "log.every", "absent: 100"),
    _set("--tensorboard-dir", "log.tensorboard", "events lie in the run folder", value=True),
    _alike("--log-throughput --log-params-norm --log-num-zeros-in-grad "
           "--log-timers-to-tensorboard --timing-log-level --timing-log-option "
           "--log-validation-ppl-to-tensorboard --log-memory-to-tensorboard "
           "--log-batch-size-to-tensorboard --log-world-size-to-tensorboard "
           "--tensorboard-queue-size --tensorboard-log-interval --log-progress --log-straggler "
           "--log-learning-rate-to-tensorboard",
           "RUN/metrics.jsonl has a row a step"),
    _dropped("--profile --profile-step-start --profile-step-end --profile-ranks "
             "--use-pytorch-profiler",
             "`megallm profile CONFIG` instead"),
    _dropped("--wandb-project --wandb-exp-name --wandb-save-dir --one-logger-project", "log.tensorboard is there"),
    _alike("--distributed-backend --distributed-timeout-minutes --local-rank --lazy-mpu-init "
           "--nccl-communicator-config-path "
           "--use-sharp --check-for-nan-in-loss-and-grad --no-check-for-nan-in-loss-and-grad", "found out by itself"),
)  # fmt: skip
