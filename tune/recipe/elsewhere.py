"""What other programs call our keys.

A person who comes from another framework writes its names, and edit distance cannot find ours (`lora_r`). VALUES does
for values what KEYS does for keys.
"""

from __future__ import annotations

from typing import NamedTuple


class Elsewhere(NamedTuple):
    """`key` is our dotted key, or empty where there is none; `note` says what differs, or why none is needed."""

    key: str
    note: str = ""

    @property
    def words(self) -> str:
        """The answer to a person who wrote the other name."""
        if not self.key:
            return self.note
        return f"Here it is {self.key}{f': {self.note}' if self.note else '.'}"


# Our key, what to say besides, and the names others have for it: lower case, underscores.
_ROWS: tuple[tuple[str, str, str], ...] = (
    ("model.base", "", "base_model model_name model_name_or_path model_id pretrained_model_name_or_path"),
    ("model.revision", "", "model_revision"),
    (
        "model.quantization",
        "write nf4, or none to keep the weights as they are.",
        "load_in_4bit quantization_bit quant_bits quant_method quantization_method quantization_config "
        "bnb_4bit_quant_type",
    ),
    (
        "model.quantization",
        "8-bit weights are not offered; write nf4, or none to keep the weights as they are.",
        "load_in_8bit",
    ),
    ("model.dtype", "write bfloat16 or float32.", "bf16"),
    ("model.dtype", "float16 is not offered; write bfloat16 or float32.", "fp16"),
    ("model.dtype", "", "torch_dtype compute_dtype mixed_precision"),
    ("adapter.rank", "", "lora_r lora_rank lora_dim r"),
    ("adapter.alpha", "", "lora_alpha"),
    ("adapter.rslora", "", "use_rslora peft_use_rslora"),
    ("adapter.dropout", "", "lora_dropout"),
    (
        "adapter.targets",
        "write attention, mlp, experts, router or module names.",
        "lora_target lora_target_modules target_modules target_regex",
    ),
    ("adapter.targets", "write [attention, mlp] for every linear layer of a block.", "lora_target_linear"),
    ("adapter.targets", "write experts for a mixture's experts.", "lora_target_parameters target_parameters"),
    ("adapter.exclude", "", "exclude_modules"),
    ("adapter.ranks", "", "rank_pattern"),
    ("adapter.init", "write default or gaussian.", "init_lora_weights init_weights peft_init_lora_weights"),
    ("adapter.method", "", "peft_method peft_type tuner_type train_type finetuning_type use_peft"),
    ("adapter.start_from", "", "lora_model_dir adapter_name_or_path adapters"),
    (
        "router.balance_loss",
        "",
        "router_aux_loss_coef moe_aux_loss_coeff moe_aux_loss_coef aux_loss_coef load_balancing_loss_coef",
    ),
    ("router.balance_loss", "0 turns it off.", "output_router_logits"),
    ("router.balance_loss", "it is the router's only loss.", "router_z_loss_coef"),
    ("router.train", "write frozen or full.", "train_router freeze_router"),
    (
        "data.train",
        "",
        "datasets dataset train_data dataset_name dataset_path data_files data_path train_file train_dataset",
    ),
    (
        "data.eval",
        "write a fraction, or a list of data sets like data.train.",
        "test_datasets eval_dataset eval_datasets val_dataset validation_file val_set_size val_size test_size "
        "split_dataset_ratio do_eval",
    ),
    (
        "data.train.config",
        "it stands with the path in an item of data.train.",
        "dataset_config dataset_config_name subset",
    ),
    ("data.train.revision", "it stands with the path in an item of data.train.", "dataset_revision"),
    ("data.train.split", "it stands with the path in an item of data.train.", "dataset_train_split train_on_split"),
    ("data.train.format", "it stands with the path in an item of data.train.", "dataset_format formatting"),
    (
        "data.train.format",
        "it says how rows are read, and stands with the path in an item of data.train.",
        "type ds_type",
    ),
    (
        "data.train.columns",
        "{ours: theirs} in an item of data.train.",
        "columns_mapping field_messages field field_instruction field_output dataset_text_field",
    ),
    (
        "",
        "Turns have role and content (messages), or from and value (sharegpt): rename the data's keys. Remove it.",
        "message_property_mappings tags message_field_role message_field_content",
    ),
    (
        "",
        "Speakers have their usual names (user, human, assistant, gpt): rename others in the data. Remove it.",
        "roles",
    ),
    (
        "",
        "A turn's own train, training or weight is read: rename another key in the data. Remove it.",
        "message_field_training",
    ),
    (
        "",
        "A turn is trained on whole or not at all, by its train or weight. Remove it.",
        "message_field_training_detail",
    ),
    ("", "`tune check` counts repeats: take them out of the data. Remove it.", "dataset_exact_deduplication"),
    ("", "Take system messages out of the data. Remove it.", "drop_system_message"),
    ("data.train.path", "it stands in an item of data.train.", "file files file_name"),
    ("data.train.limit", "it stands with the path in an item of data.train.", "max_samples shards"),
    ("data.train.weight", "it stands with the path in an item of data.train.", "interleave_probs mix_strategy"),
    ("data.template", "", "chat_template conversation prompt_template prompt_style"),
    ("data.template", "write a path to a .jinja file.", "chat_template_jinja chat_template_path"),
    ("data.system", "", "default_system default_system_message system_prompt"),
    (
        "data.max_length",
        "",
        "sequence_len cutoff_len max_seq_length max_seq_len model_max_length block_size seq_length seq_len max_tokens",
    ),
    ("data.on_long", "write truncate, drop or error.", "truncation_strategy excess_length_strategy"),
    ("data.on_bad", "write error or drop.", "strict"),
    ("data.train_on", "write all to train on prompts, else responses.", "train_on_inputs train_on_prompt"),
    ("data.train_on", "write responses, all or last_response.", "roles_to_train loss_scale"),
    (
        "data.train_on",
        "write responses, which is the default.",
        "train_on_responses_only completion_only_loss assistant_only_loss",
    ),
    ("data.train_on", "write last_response.", "mask_history"),
    ("data.add_tokens", "true adds what the template needs.", "special_tokens add_special_tokens resize_vocab"),
    ("train.epochs", "", "num_epochs num_train_epochs total_epochs max_epochs"),
    ("train.max_steps", "", "num_steps max_iters iters"),
    (
        "train.batch_size",
        "it counts the examples of a step over all devices, and micro-batches follow from train.micro_batch_tokens.",
        "gradient_accumulation_steps per_device_train_batch_size micro_batch_size",
    ),
    ("train.micro_batch_tokens", "evaluation uses the same rows.", "per_device_eval_batch_size eval_batch_size"),
    ("train.micro_batch_tokens", "auto takes what fits.", "auto_find_batch_size"),
    ("train.batch_size", "it counts examples over all devices.", "global_batch_size train_batch_size"),
    ("train.learning_rate", "", "lr"),
    ("train.scheduler", "", "lr_scheduler lr_scheduler_type lr_decay_style"),
    ("train.scheduler", "its shapes take no settings.", "lr_scheduler_kwargs"),
    ("train.warmup", "write a number of steps.", "warmup_steps num_warmup_steps"),
    ("train.warmup", "write a fraction below 1.", "warmup_ratio lr_warmup_fraction"),
    ("train.optimizer", "", "optim optimizer_type"),
    ("train.optimizer", "it takes no further settings.", "optim_args"),
    ("train.max_grad_norm", "", "grad_clip clip_grad gradient_clipping gradient_clip_val"),
    (
        "train.recompute",
        "write auto, none, experts or full.",
        "gradient_checkpointing gradient_checkpointing_kwargs use_gradient_checkpointing "
        "activation_checkpointing activation_offloading recompute_granularity",
    ),
    ("train.recompute", "write none.", "disable_gradient_checkpointing"),
    ("train.save_every", "write a number of steps.", "save_steps save_interval saves_per_epoch save_strategy"),
    (
        "train.eval_every",
        "write a number of steps.",
        "eval_steps eval_interval evals_per_epoch eval_strategy evaluation_strategy",
    ),
    ("train.log_every", "write a number of steps.", "logging_steps log_interval logging_strategy"),
    ("train.keep", "", "save_total_limit"),
    ("train.keep_best", "", "load_best_model_at_end"),
    ("train.keep_best", "the measure is eval loss.", "metric_for_best_model greater_is_better"),
    ("train.patience", "it counts evaluations.", "early_stopping_patience early_stopping_steps early_stop_interval"),
    ("train.max_bad_steps", "", "loss_watchdog_patience loss_watchdog_threshold"),
    ("train.seed", "one seed serves all.", "data_seed random_state"),
    (
        "tracking.to",
        "write a list of wandb, tensorboard, trackio.",
        "report_to use_wandb use_tensorboard with_tracking",
    ),
    ("tracking.project", "", "wandb_project project_name"),
    ("tracking.name", "", "wandb_name wandb_run_id run_name"),
    ("push.repo", "", "hub_model_id export_hub_model_id"),
    ("push.repo", "write OWNER/NAME.", "push_to_hub"),
    ("push.private", "", "hub_private_repo"),
    ("push.repo", "publishing comes when training has ended.", "hub_strategy"),
    ("push.merged", "or merge with `tune merge RUN`.", "merge_lora"),
    ("output", "metrics are kept in the run folder.", "logging_dir"),
    ("output", "", "output_dir out_dir save_dir"),
    ("output", "a merged model goes into its folder merged/.", "export_dir"),
    (
        "",
        "nf4 is always double-quantised and computes in model.dtype. Remove it.",
        "bnb_4bit_use_double_quant bnb_4bit_compute_dtype double_quantization",
    ),
    (
        "",
        "The fast path is chosen for the machine, and said at the start. Remove it.",
        "tf32 attn_implementation attn_impl flash_attention flash_attn sdp_attention xformers_attention "
        "flex_attention eager_attention flash_attn_fuse_mlp "
        "use_liger_kernel enable_liger_kernel lora_mlp_kernel lora_qkv_kernel lora_o_kernel torch_compile",
    ),
    ("", "The kind of model is read from its own configuration. Remove it.", "model_type"),
    ("", "The tokenizer is the base model's. Remove it.", "tokenizer_type tokenizer_name_or_path"),
    ("", "Every adapter is scaled by adapter.alpha and its rank alone. Remove it.", "alpha_pattern"),
    (
        "",
        "This variant of LoRA is not in this version. Remove it.",
        "use_dora peft_use_dora loftq_config pissa_init loraplus_lr_ratio loraplus_lr_embedding lora_bias",
    ),
    (
        "",
        "Whole modules do not train here, only adapters. Remove it.",
        "modules_to_save lora_modules_to_save additional_target",
    ),
    ("", "The base stays frozen, only adapters train. Remove it.", "unfrozen_parameters"),
    ("", "A recipe is always supervised fine-tuning with an adapter. Remove it.", "task_type stage do_train rl"),
    (
        "",
        "The token that ends an answer is the template's, and always trained on. Remove it.",
        "train_on_eos train_on_eot eot_tokens",
    ),
    ("", "A template's control tokens are added with data.add_tokens. Remove it.", "tokens added_tokens_overrides"),
    (
        "",
        "Packing is always on, and examples in a row never see each other. Remove it.",
        "sample_packing eval_sample_packing packing eval_packing neat_packing padding_free "
        "pad_to_sequence_len pad_to_multiple_of group_by_length multipack length_column_name batch_flattening "
        "sample_packing_bin_size sample_packing_group_size sample_packing_sequentially multipack_real_batches",
    ),
    (
        "",
        "Examples are always shuffled, by train.seed. Remove it.",
        "shuffle shuffle_merged_datasets dataset_shuffle train_sampling_strategy curriculum_sampling",
    ),
    ("", "Noise on embeddings is not in this version. Remove it.", "neftune_noise_alpha noisy_embedding_alpha"),
    (
        "",
        "Every trained token weighs the same; data.train.weight repeats or thins out a source. Remove it.",
        "loss_weights example_weights sample_weights sample_weight",
    ),
    ("", "A step is dealt to the devices by its tokens. Remove it.", "split_batches dispatch_batches"),
    (
        "",
        "Preparing the data has no settings. Remove it.",
        "dataset_prepared_path overwrite_cache preprocessing_num_workers dataset_num_proc dataset_processes "
        "dataloader_num_workers streaming",
    ),
    ("", "AdamW's betas and epsilon are fixed at their usual values. Remove it.", "adam_beta1 adam_beta2 adam_epsilon"),
    ("", "Resuming is `tune train RECIPE --resume`. Remove it.", "resume_from_checkpoint auto_resume_from_checkpoints"),
    ("", "A run is never overwritten: choose another output. Remove it.", "overwrite_output_dir"),
    (
        "",
        "There is nothing to set: it is always so here. Remove it.",
        "save_safetensors remove_unused_columns average_tokens_across_devices",
    ),
    ("", "A checkpoint always holds what a resumed run needs. Remove it.", "save_only_model"),
    (
        "",
        "Generation settings are options of `tune generate` and `tune chat`. Remove it.",
        "predict_with_generate temperature max_new_tokens",
    ),
    (
        "",
        "Devices come from the launcher: `accelerate launch --num_processes 8 -m tune train RECIPE`. Remove it.",
        "device_map deepspeed fsdp fsdp_config fsdp_version ddp ddp_timeout ddp_find_unused_parameters "
        "local_rank num_gpus tensor_parallel_size sequence_parallel_degree context_parallel_size",
    ),
    (
        "",
        "A recipe holds no tokens: use HF_TOKEN or `hf auth login`, or the tracker's own login. Remove it.",
        "hub_token hf_token token use_auth_token hf_use_auth_token wandb_api_key api_key",
    ),
)

KEYS: dict[str, Elsewhere] = {name: Elsewhere(key, note) for key, note, names in _ROWS for name in names.split()}

_COSINE = "Restarts and other shapes are not offered: cosine, linear or constant."

VALUES: dict[str, dict[str, str]] = {
    "adapter.method": {
        "qlora": "QLoRA is lora with model.quantization nf4.",
        "dora": "DoRA is not in this version.",
        "full": "The base stays frozen here; lora on all targets comes nearest.",
    },
    "model.quantization": {
        **dict.fromkeys(("4bit", "4", "int4", "fp4", "bnb", "bitsandbytes", "true"), "Write nf4."),
        "false": "Write none.",
        **dict.fromkeys(("8bit", "8", "int8"), "8-bit weights are not offered."),
        **dict.fromkeys(("gptq", "awq"), "Start from the unquantised model: it is quantised while it loads."),
    },
    "model.dtype": {
        "bf16": "Write bfloat16.",
        "fp32": "Write float32.",
        "float": "Write float32.",
        **dict.fromkeys(("fp16", "float16", "half"), "float16 overflows in training and is not offered."),
        "auto": "Write bfloat16.",
    },
    "train.optimizer": {
        **dict.fromkeys(("adam", "adamw_torch", "adamw_torch_fused", "adamw_hf"), "Write adamw."),
        "adamw_bnb_8bit": "Write adamw_8bit.",
        "paged_adamw": "Write paged_adamw_8bit.",
        "paged_adamw_32bit": "Write paged_adamw_8bit.",
    },
    "train.scheduler": {
        "cosine_with_restarts": _COSINE,
        "polynomial": _COSINE,
        "constant_with_warmup": "Write constant: train.warmup comes first in every shape.",
    },
    "train.recompute": {
        "true": "Write full.",
        "false": "Write none.",
        "unsloth": "Write full.",
        "selective": "Write auto.",
    },
    "data.train_on": {
        "inputs": "Write all.",
        "assistant": "Write responses.",
        "true": "Write all.",
        "false": "Write responses.",
    },
    "router.train": {"true": "Write full.", "false": "Write frozen."},
    "data.train.format": {
        **dict.fromkeys(
            ("json", "jsonl", "csv", "parquet", "arrow"),
            "File types are recognised by themselves; the format says how rows are read.",
        ),
        "chat": "Write messages.",
        "openai": "Write messages.",
        "chat_template": "Write messages.",
        "chatml": "Write messages, and chatml at data.template.",
        "completion": "Write text.",
    },
}


def look_up(name: str) -> Elsewhere | None:
    """Return what another framework's key is called here, or None where the name is unknown."""
    return KEYS.get(name.rpartition(".")[2].lower().replace("-", "_"))


def look_up_value(key: str, value: str) -> str:
    """Return a hint for a value that another framework takes at our dotted `key`, or an empty string."""
    return VALUES.get(key.replace("data.eval", "data.train"), {}).get(value.lower(), "")
