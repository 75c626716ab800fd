"""Learning by trying: TRL's GRPOTrainer, whose answers functions reward.

The model answers each prompt several times (transformers' own generation, unless TRL is asked for
another), and learns from how the rewards of these answers differ. The right answer of the data is
handed to the rewards, and held-out loss is measured on it, but it is not learned from.
"""

from __future__ import annotations

from typing import Any, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, set_seed
from trl import GRPOConfig, GRPOTrainer

from drlora.errors import ConfigError, DataError, counted
from drlora.trainer.preferences import PreferenceTrainer
from drlora.trainer.rewards import text_of


class GrpoTrainer(PreferenceTrainer, GRPOTrainer):
    """TRL's GRPOTrainer as `drlora train` uses it."""

    @property
    def places_by(self) -> None:
        """Nothing: there is no loss before answers were tried."""

    def measure(self) -> dict[str, float]:
        """The mean reward of answers to the held-out prompts, and TRL's other figures.

        Answers are drawn, so from the same seed each time; TRL's loss says nothing here.
        """
        set_seed(self.args.seed)
        figures = super().measure()
        return {name: value for name, value in figures.items() if name != "loss"}


def questions(
    raw: Dataset, tokenizer: PreTrainedTokenizerBase, arguments: GRPOConfig, max_length: int
) -> Dataset:
    """Prompts, and what the rewards are given beside the answers.

    Args:
        raw: columns prompt and completion, texts or messages, maybe answers.
        tokenizer: of the model.
        arguments: the trainer's config.
        max_length: most tokens of a prompt with an answer.

    Returns:
        Columns prompt, answer (a text), answers (texts, the completion if `raw` has none) and
        prompt_ids; without the prompts that leave no room for an answer.

    Raises:
        DataError: if no prompt is left, fewer are left than a step takes, or `raw` has a column
            that TRL would not put to the model.
    """
    unread = [name for name in ("tools", "chat_template_kwargs") if name in raw.column_names]
    if unread:
        raise DataError(
            f"the column {unread[0]} would not be put to the model by TRL's GRPOTrainer; leave it "
            f"out, or train from a script of your own (tools= of GRPOTrainer)."
        )

    def question(row: dict[str, Any]) -> dict[str, Any]:
        prompt, answer = row["prompt"], text_of(row["completion"])
        encoded: Any = (
            tokenizer(prompt)
            if isinstance(prompt, str)
            else tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=True, return_dict=True
            )
        )
        ids = encoded["input_ids"]
        answers = row.get("answers") or [answer]
        return {"prompt": prompt, "answer": answer, "answers": answers, "prompt_ids": list(ids)}

    longest = arguments.max_completion_length or 0
    rows = raw.map(question, remove_columns=raw.column_names)
    kept = rows.filter(lambda row: len(row["prompt_ids"]) + longest <= max_length)
    if len(kept) == 0:
        raise DataError(
            f"all {len(rows)} prompts are too long: with training.max_completion_length="
            f"{longest} they have more than data.max_length={max_length} tokens; lower the one, or "
            f"raise the other."
        )
    return kept


def refuse_few(prompts: int, arguments: GRPOConfig) -> None:
    """Refuse fewer prompts than are answered at once: TRL would find no batch.

    Raises:
        DataError: saying how many there must be.
    """
    wanted = cast(int, arguments.generation_batch_size) // cast(int, arguments.num_generations)
    if prompts < wanted:
        raise DataError(
            f"{counted(prompts, 'prompt')} of training data, but {wanted} are answered at once; "
            f"lower training.per_device_train_batch_size."
        )


def refuse_settings(arguments: GRPOConfig) -> None:
    """Refuse what has no meaning where answers are drawn and rewarded.

    Raises:
        ConfigError: naming the setting.
    """
    if arguments.max_steps < 1:
        raise ConfigError(
            "objective='grpo' needs training.max_steps: the prompts of a step are answered "
            "several times, so epochs do not say how long a run is."
        )
    if arguments.load_best_model_at_end or arguments.metric_for_best_model is not None:
        raise ConfigError(
            "objective='grpo' knows no best checkpoint and no early end: TRL hands no reward to "
            "what looks for them; leave load_best_model_at_end, metric_for_best_model and "
            "early_stopping_patience out."
        )
