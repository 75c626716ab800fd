"""The section `training` of a recipe: its defaults, and which fields of TRL it has not."""

from __future__ import annotations

from typing import Any

TRAINING_DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.03,
    "weight_decay": 0.0,
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 200,
    "save_total_limit": 2,
    "seed": 42,
    "report_to": "none",
    "logging_nan_inf_filter": False,  # it logs 0 where the loss is NaN
}
# Fields of TRL's configs that a recipe does not set, and why.
NOT_IN_RECIPES = {
    "model_init_kwargs": "set model, dtype and trust_remote_code at the top of the recipe",
    "trust_remote_code": "set trust_remote_code at the top of the recipe",
    "chat_template_path": "set chat_template at the top of the recipe",
    "max_length": "set data.max_length, which evaluation keeps to as well",
    "dataset_text_field": "set data.columns: {text: NAME}",
    "dataset_kwargs": "drlora prepares the data",
    "shuffle_dataset": "examples are drawn in a random order anyway",
    "eval_packing": "held-out examples are measured one by one",
    "pad_token": "set it in the tokenizer",
    "sync_ref_model": "the reference is the base model, or the adapter that the run starts from",
    "output_dir": "set output_dir at the top of the recipe",
    "label_names": "drlora's data always has the column labels",
    "resume_from_checkpoint": "use --resume",
    "restore_callback_states_from_checkpoint": "use --resume",
    "save_only_model": "a run could not be resumed without the optimizer's state",
    "push_to_hub": "the Trainer would push checkpoints under the name of their folder; push the "
    "finished run, which has the card: hf upload NAME output_dir",
    "do_train": "drlora train trains",
    "do_eval": "see the section evaluation",
    "do_predict": "use drlora eval",
}
COMMON_TRAINING = (
    "max_steps, num_train_epochs, per_device_train_batch_size, gradient_accumulation_steps, "
    "learning_rate, warmup_steps, lr_scheduler_type, weight_decay, logging_steps, save_steps, "
    "seed, {own} and all other fields of trl.{config}"
)
