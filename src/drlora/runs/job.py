"""A run before its weights: all that can be checked, and said, without them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from trl import GRPOConfig

from drlora.data import encode_examples
from drlora.data.tokens import Prepared
from drlora.distributed import on_main, world_size
from drlora.errors import CheckpointError, ConfigError, counted
from drlora.io.checkpoint import checkpoint_step
from drlora.io.files import home, read_json
from drlora.io.run_files import TRAINER_STATE
from drlora.ranks.rank_map import fitting_ranks
from drlora.ranks.schedule import Schedule
from drlora.runs.arguments import count_steps, notes_of, settle
from drlora.runs.data_section import default_split
from drlora.runs.examples import encode, examples_to_measure, longest_of
from drlora.runs.held_out import refuse_unanswerable, word_for_word
from drlora.runs.loading import (
    check_growth,
    check_start,
    checkpoint_settings,
    fit_tokenizer,
    last_event,
    load_architecture,
    load_tokenizer,
    longest_example,
    model_on_meta,
    vocabulary_size,
)
from drlora.runs.openings import opening_note
from drlora.runs.recipe import Recipe
from drlora.runs.roles import load_source, load_training_data
from drlora.runs.run_record import data_record, held_out_record, read_record, refuse_other_data
from drlora.runs.rundir import RunDir
from drlora.trainer.callback import DrLoraCallback
from drlora.trainer.objectives import OwnSettings, objective_of, rehearse_trainer
from drlora.trainer.rewards import rewards_of
from drlora.trainer.trainer import rehearse, seconds_of, takes_any_model


@dataclass(frozen=True)
class Job:
    """All that a run needs, with nothing left to refuse but the weights.

    Attributes:
        train, held_out: what the objective's trainer is given.
        measured: held-out examples for loss and exact match: the same, or, of preferences, the
            answers that are wanted.
        others: the data that `evaluation.forgetting` names.
        longest: most tokens of a training example.
        total_steps: length of the run; where auto_find_batch_size finds another batch, it may
            become longer.
        plan_steps: length that growth is planned for; not the same where a run was given more.
        checkpoint: what a resumed run goes on from; None if it has none yet.
        record: what run.json is to hold.
        seconds: in training, up to the checkpoint.
        remarks: what was found on the way that whoever reads the results should know.
    """

    recipe: Recipe
    run: RunDir
    arguments: TrainingArguments
    tokenizer: PreTrainedTokenizerBase
    train: Prepared
    held_out: Prepared
    measured: Prepared
    others: Prepared | None
    longest: int
    total_steps: int
    plan_steps: int
    checkpoint: Path | None
    record: dict[str, Any]
    is_resumed: bool
    is_extended: bool
    batch_size: int
    seconds: float
    remarks: tuple[str, ...]

    def counts(self) -> dict[str, dict[str, int]]:
        """Role -> examples that are used, dropped and truncated."""
        return {
            role: {"used": len(e.raw) - e.dropped, "dropped": e.dropped, "truncated": e.truncated}
            for role, e in (("train", self.train), ("eval", self.held_out))
        }

    def notes(self) -> Iterator[str]:
        """What the run is, and what of its settings has no effect, in sentences."""
        for name, counts in zip(("train", "held out"), self.counts().values(), strict=True):
            left_out = f", {counts['dropped']:,} left out" if counts["dropped"] else ""
            cut = f", {counts['truncated']:,} cut" if counts["truncated"] else ""
            rows = len(self.train.tokens)
            is_packed = name == "train" and rows != counts["used"]
            packed = f", packed to {counted(rows, 'row')}" if is_packed else ""
            yield f"{name:8} {counted(counts['used'], 'example')}{left_out}{cut}{packed}"
        if self.train.said:
            yield f"{'data':8} {self.train.said}"
        yield f"{'length':8} {self._length()}"
        yield f"{'device':8} {self.arguments.device}"
        yield from notes_of(self.arguments, self.recipe)
        for role, examples in (("train", self.train), ("eval", self.held_out)):
            limit = self.recipe.data.limits.get(role)
            if limit is not None and limit > len(examples.raw):
                yield (
                    f"data.limits.{role}={limit}, but only {len(examples.raw):,} examples are "
                    f"there: all are taken"
                )
        yield from self.remarks
        if self.plan_steps != self.total_steps:
            yield (
                f"the run was planned for {self.plan_steps:,} steps and is given "
                f"{self.total_steps:,}: ranks grow as planned for {self.plan_steps:,} and stay as "
                f"they are after that, the learning rate follows the new length"
            )

    def _length(self) -> str:
        arguments = self.arguments
        factors = [f"batch {self.batch_size}"]
        if arguments.gradient_accumulation_steps > 1:
            factors.append(f"{arguments.gradient_accumulation_steps} accumulated")
        if world_size() > 1:
            factors.append(f"{world_size()} processes")
        effective = self.batch_size * arguments.gradient_accumulation_steps * world_size()
        made_of = f" ({' x '.join(factors)})" if len(factors) > 1 else ""
        one = "row" if "seq_lengths" in self.train.tokens.column_names else "example"
        epochs = self.total_steps * effective / len(self.train.tokens)
        if isinstance(self.arguments, GRPOConfig):  # each prompt is answered several times
            one, epochs = "answer", epochs / (self.arguments.num_generations or 1)
        return (
            f"{counted(self.total_steps, 'step')} of {counted(effective, one)}{made_of}, "
            f"{epochs:.3g} epoch{'s' * (epochs != 1)}"
        )


@dataclass(frozen=True)
class _Past:
    """What a run that is resumed has behind it; of one that begins, nothing.

    Attributes:
        record: run.json.
        state: trainer_state.json of the checkpoint.
    """

    is_resumed: bool
    checkpoint: Path | None
    record: dict[str, Any]
    state: dict[str, Any]

    @classmethod
    def of(cls, run: RunDir, checkpoint: Path | None, resume: bool) -> _Past:
        """Read it.

        Raises:
            CheckpointError: if it is damaged, or a finished run has no checkpoint to go on from.
        """
        if resume and checkpoint is None and run.result.is_file():
            raise CheckpointError(
                f"the run in {run.path} has no whole checkpoint that it could go on from; start a "
                f"new one from its adapter, with start_from: {run.path} and another output_dir."
            )
        record = on_main(lambda: read_record(run.record)) if resume else {}
        state = read_json(checkpoint / TRAINER_STATE) if checkpoint else {}
        return cls(resume, checkpoint, record, state)

    @property
    def schedule(self) -> Schedule | None:
        """What growth was planned to be; None of a run that begins, or was begun by drlora 0.1."""
        growth = (self.state.get("stateful_callbacks") or {}).get(DrLoraCallback.__name__)
        found = growth.get("attributes", {}).get("schedule") if isinstance(growth, dict) else None
        return Schedule(**found) if found else None

    def batch_size(self, arguments: TrainingArguments) -> int:
        """Examples of a process at once: what was found to fit, where that was looked for."""
        found = self.state.get("train_batch_size") if arguments.auto_find_batch_size else None
        return int(found or arguments.train_batch_size)

    def length(self, arguments: TrainingArguments, examples: int) -> int:
        """Steps of the run: those it was begun with, unless it is given another length now."""
        if arguments.max_steps > 0:
            return arguments.max_steps
        if self.record.get("num_train_epochs") == arguments.num_train_epochs:
            return int(self.record["steps"])
        if self.state and not self.record:  # begun by an older drlora
            return int(self.state["max_steps"])
        return count_steps(arguments, examples, self.batch_size(arguments))


def prepare(
    recipe: Recipe,
    run: RunDir,
    arguments: TrainingArguments,
    checkpoint: Path | None,
    resume: bool = False,
) -> Job:
    """Everything that can be checked without the weights, in the order of its cost.

    Raises:
        DrLoraError: with what is wrong and the way out.
    """
    past = _Past.of(run, checkpoint, resume)
    if checkpoint is None:
        check_start(recipe)
    architecture = load_architecture(recipe.model, recipe.trust_remote_code)
    skeleton = model_on_meta(architecture, recipe.trust_remote_code)
    _refuse_settings(recipe, arguments, skeleton, past)
    tokenizer = load_tokenizer(recipe, vocabulary_size(skeleton))
    fit_tokenizer(tokenizer, recipe, getattr(arguments, "eos_token", None))
    most = longest_example(recipe.data, recipe.model, architecture)
    settle(arguments, architecture, most)
    train, held_out = (
        encode(loaded, role, tokenizer, recipe, arguments)
        for role, loaded in zip(("train", "eval"), load_training_data(recipe.data), strict=True)
    )
    measured = examples_to_measure(held_out, recipe.objective, most, tokenizer)
    refuse_unanswerable(measured.raw, recipe.evaluation, tokenizer)
    others = _others(recipe, tokenizer, most)
    record = data_record({"train": train, "eval": held_out}, tokenizer, most)
    if resume:
        refuse_other_data(past.record, record, str(run.path))
    total = past.length(arguments, len(train.tokens))
    planned = _plan(recipe, run, skeleton, past, total)
    record |= {
        "held_out": held_out_record(measured, recipe.evaluation),
        "steps": total,
        # None where the recipe gives a number of steps.
        "num_train_epochs": None if arguments.max_steps > 0 else arguments.num_train_epochs,
        "batch_size": past.batch_size(arguments),
        "restarts": past.record.get("restarts", []) if checkpoint else [],
    }
    if resume:
        arguments.max_steps = total  # the Trainer would count them anew
    if takes_any_model(arguments):
        adapted = get_peft_model(
            model_on_meta(architecture, recipe.trust_remote_code),
            recipe.adapter_config(),
            low_cpu_mem_usage=True,
        )
        assert isinstance(adapted, PeftModel)
        rehearse_trainer(
            objective_of(recipe.objective),
            OwnSettings.of(recipe.training),
            model=adapted,
            args=arguments,
            rewards=recipe.rewards,
            train_dataset=train.tokens,
            eval_dataset=held_out.tokens,
            processing_class=copy.deepcopy(tokenizer),
        )
    return Job(
        recipe=recipe,
        run=run,
        arguments=arguments,
        tokenizer=tokenizer,
        train=train,
        held_out=held_out,
        measured=measured,
        others=others,
        longest=longest_of(train, arguments),
        total_steps=total,
        plan_steps=planned,
        checkpoint=checkpoint,
        record=record,
        is_resumed=resume,
        is_extended=bool(past.state) and past.state["max_steps"] != total,
        batch_size=past.batch_size(arguments),
        seconds=seconds_of(past.state.get("stateful_callbacks")),
        remarks=tuple(_remarks(train, held_out, past, record, tokenizer)),
    )


def _refuse_settings(
    recipe: Recipe, arguments: TrainingArguments, skeleton: PreTrainedModel, past: _Past
) -> None:
    """What can be told before data is read."""
    recipe.quantise.refuse_missing()
    checkpoint_settings(recipe)
    recipe.quantise.refuse_unfit(skeleton)
    if arguments.gradient_checkpointing and not skeleton.supports_gradient_checkpointing:
        raise ConfigError(
            f"training.gradient_checkpointing=true: {type(skeleton).__name__} does not support it; "
            f"leave it out."
        )
    rewards_of(recipe.rewards)
    rehearse(arguments, arguments.max_steps)
    if arguments.max_steps > 0 and not past.is_resumed:
        check_growth(skeleton, recipe.adapter_config(), arguments.max_steps)


def _others(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, most: int) -> Prepared | None:
    """What is measured beside, as a model of the same length sees it."""
    source = recipe.evaluation.forgetting
    if source is None:
        return None
    source = home(source)
    loaded = load_source(None, source, default_split(source, "eval"), None)
    return encode_examples(loaded, tokenizer, most)


def _plan(recipe: Recipe, run: RunDir, skeleton: PreTrainedModel, past: _Past, total: int) -> int:
    """The length that growth is planned for in a run of `total` steps; uses `skeleton` up.

    Raises:
        ConfigError: if the run is too short for it.
    """
    checkpoint, schedule, config = past.checkpoint, past.schedule, recipe.adapter_config()
    if checkpoint is not None and checkpoint_step(checkpoint) > total:
        raise ConfigError(
            f"the run in {run.path} is at step {checkpoint_step(checkpoint)} already; {total} "
            f"steps are fewer. Give it as many or more."
        )
    if schedule is None:
        check_growth(skeleton, config, total)
    elif (last := last_event(skeleton, config, schedule)) > total:
        raise ConfigError(
            f"the run in {run.path} was planned for {schedule.total_steps} steps, with its last "
            f"growth event after step {last}; {total} steps would not spend the budget. Give it "
            f"{schedule.total_steps} or more."
        )
    if checkpoint is None and recipe.start_ranks:
        adapted = get_peft_model(skeleton, config, low_cpu_mem_usage=True)
        assert isinstance(adapted, PeftModel)
        fitting_ranks(adapted, recipe.start_ranks)
    return schedule.total_steps if schedule else total


def _remarks(
    train: Prepared,
    held_out: Prepared,
    past: _Past,
    record: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[str]:
    """What the data of the run have in common, and what is otherwise than when it began."""
    opening = opening_note(train.raw, tokenizer)
    if opening:
        yield opening
    shared = word_for_word(train.raw, held_out.raw)
    if shared:
        yield (
            f"{shared:,} of the {counted(len(held_out.raw), 'held-out example')} can be found in "
            f"the training data word for word, so the held-out loss says less than it seems"
        )
    if past.is_resumed and "data" not in past.record:
        yield "the run has no record of its data, so it is not known whether they are the same"
    elif past.is_resumed and past.record.get("processes") != record["processes"]:
        yield (
            f"the run was begun in {past.record.get('processes')} processes and goes on in "
            f"{record['processes']}: a step has another number of examples now"
        )
