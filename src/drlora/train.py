"""One run, from a recipe to a trained adapter: `drlora train`.

result = train(load_recipe("recipes/embedded.yaml"))
result.before.loss.loss, result.after.loss.loss, result.ranks
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from rich.console import Console
from safetensors import SafetensorError
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from drlora.assemble import (
    Examples,
    add_adapter,
    check_growth,
    check_start,
    count_steps,
    encode,
    load_architecture,
    load_base_model,
    load_role,
    load_tokenizer,
    model_on_meta,
    training_arguments,
    vocabulary_size,
)
from drlora.callback import DrLoraCallback
from drlora.checkpoint import adapter_state, checkpoint_step
from drlora.config import DrLoraConfig
from drlora.data import Collator
from drlora.environment import peak_memory, versions
from drlora.errors import CheckpointError
from drlora.files import first_line
from drlora.inject import adapted_layers
from drlora.jsonl import append_lines, forget_after, read_lines
from drlora.measure import Measurement, measure, measurement_from
from drlora.methods import METHODS
from drlora.model_card import write_card_if_possible
from drlora.moved import FindBest
from drlora.processes import is_main, on_main
from drlora.progress import MetricsLog, ShowProgress, StopOnInterrupt
from drlora.rank_pool import RankPool
from drlora.recipe import Recipe
from drlora.rundir import RunDir, write_json, write_yaml

Ranks = dict[str, dict[str, list[int]]]


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a run.

    Attributes:
        run: the run directory.
        before: held-out measurement at step 0, None if the recipe does without.
        after: the same at the end, None if the run was interrupted.
        ranks: block -> projection -> rank of each expert.
        budget: spent and stored ranks, and the factors of the stored ones.
        trainable_parameters: numbers in rows that experts own at the end, and in all else that is
            trained (routers, other layers): what methods are compared at.
        stored_parameters: the same with the rows that nobody owns.
        steps: optimizer steps taken in all.
        seconds: time in training (of this process), measurements not included.
        interrupted: whether Ctrl-C ended it early.
    """

    run: RunDir
    before: Measurement | None
    after: Measurement | None
    ranks: Ranks
    budget: dict[str, Any]
    trainable_parameters: int
    stored_parameters: int
    steps: int
    seconds: float
    interrupted: bool


@dataclass(frozen=True)
class _Job:
    """All that a run needs, with nothing left to refuse but the weights."""

    recipe: Recipe
    run: RunDir
    arguments: TrainingArguments
    tokenizer: PreTrainedTokenizerBase
    train: Examples
    held_out: Examples
    total_steps: int
    checkpoint: Path | None


def train(recipe: Recipe, resume: bool = False, console: Console | None = None) -> TrainResult:
    """Fine-tune as the recipe says, into its output_dir.

    Args:
        recipe: what to do.
        resume: continue the unfinished run in output_dir from its newest checkpoint.
        console: where progress is shown; by default standard output.

    Raises:
        DrLoraError: before anything is trained, with what is wrong and the way out.
    """
    run = RunDir(Path(recipe.output_dir))
    arguments = training_arguments(recipe, run)  # from here on several processes know each other
    console = (console or Console()) if is_main() else Console(quiet=True)
    with ExitStack() as stack:
        on_main(lambda: _enter(run, recipe, resume, stack))
        checkpoint = on_main(lambda: run.newest_checkpoint(console.print))
        job = prepare(recipe, run, arguments, checkpoint)
        if recipe.method:
            console.print(f"method {recipe.method}: {METHODS[recipe.method].summary}")
        base = load_base_model(recipe)
        set_seed(job.arguments.seed)
        model = add_adapter(base, recipe, checkpoint).to(job.arguments.device)
        on_main(lambda: write_yaml(run.config, recipe.to_dict()))
        return _run(job, model, console)


def _enter(run: RunDir, recipe: Recipe, resume: bool, stack: ExitStack) -> None:
    """Hold the run directory until `stack` is closed, if it is fit for what is wanted."""

    def refuse() -> None:
        if resume:
            run.refuse_resume_of(recipe)
        else:
            run.refuse_second_run()

    refuse()
    stack.enter_context(run.held())
    refuse()  # another run may have begun, or ended, meanwhile


def prepare(
    recipe: Recipe, run: RunDir, arguments: TrainingArguments, checkpoint: Path | None
) -> _Job:
    """Everything that can be checked without the weights, in the order of its cost."""
    if checkpoint is None:
        check_start(recipe)
    architecture = load_architecture(recipe.model, recipe.trust_remote_code)
    skeleton = model_on_meta(architecture, recipe.trust_remote_code)
    if arguments.max_steps > 0:
        check_growth(skeleton, recipe.adapter_config(), arguments.max_steps)
    tokenizer = load_tokenizer(recipe, vocabulary_size(skeleton))
    train, held_out = (
        encode(load_role(recipe, role), tokenizer, recipe, architecture)
        for role in ("train", "eval")
    )
    total_steps = count_steps(arguments, len(train.encoded.dataset))
    check_growth(skeleton, recipe.adapter_config(), total_steps)
    return _Job(recipe, run, arguments, tokenizer, train, held_out, total_steps, checkpoint)


def _run(job: _Job, model: PeftModel, console: Console) -> TrainResult:
    checkpoint = job.checkpoint
    on_main(lambda: forget_after(job.run.metrics, checkpoint_step(checkpoint) if checkpoint else 0))
    before = _measure_before(job, model)
    if before:
        console.print(f"before: {before}")
    if checkpoint:
        console.print(f"continuing from {checkpoint}")
    started = time.monotonic()
    steps, interrupted = _fit(job, model, console)
    seconds = time.monotonic() - started
    after = None
    if not interrupted:
        _save(job, model)
        after = _measure_and_log(job, model, "after", steps)
    stored = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result = TrainResult(
        run=job.run,
        before=before,
        after=after,
        ranks=(ranks := current_ranks(model)),
        budget=_budget(model, ranks),
        trainable_parameters=stored - _free_parameters(model),
        stored_parameters=stored,
        steps=steps,
        seconds=seconds,
        interrupted=interrupted,
    )
    if not interrupted:
        on_main(lambda: write_json(job.run.result, _to_json(result, job, model)))
        on_main(lambda: write_card_if_possible(job.run.path))  # now with the results
    return result


def _save(job: _Job, model: PeftModel) -> None:
    """The trained adapter and the tokenizer; from all processes, by the main one."""
    state = adapter_state(model)

    def write(folder: Path) -> None:
        model.save_pretrained(str(folder), state_dict=state)
        job.tokenizer.save_pretrained(str(folder))

    on_main(lambda: job.run.write_adapter(write))


def _measure_before(job: _Job, model: PeftModel) -> Measurement | None:
    """The measurement at step 0; a resumed run has it in its metrics."""
    if not job.recipe.evaluation.before:
        return None
    entries = (e for e in read_lines(job.run.metrics) if e.get("kind") == "before")
    found = on_main(lambda: next(entries, None))
    return measurement_from(found) if found else _measure_and_log(job, model, "before", 0)


def _measure_and_log(job: _Job, model: PeftModel, kind: str, step: int) -> Measurement:
    found = measure(model, job.tokenizer, job.held_out, job.recipe.evaluation)
    entry = {"step": step, "kind": kind, **found.to_dict()}
    on_main(lambda: append_lines(job.run.metrics, [entry]))
    return found


def _fit(job: _Job, model: PeftModel, console: Console) -> tuple[int, bool]:
    """Train to the end, or until Ctrl-C; returns the steps taken and whether it was that."""
    checkpoint = job.checkpoint
    if checkpoint and checkpoint_step(checkpoint) >= job.total_steps:
        # The run ended between its last step and its result; the Trainer would take one step more.
        model.load_adapter(str(checkpoint), model.active_adapter, is_trainable=True)
        return job.total_steps, False
    stop = StopOnInterrupt(console)
    trainer = _make_trainer(job, model, console, stop)
    with stop:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    steps = trainer.state.global_step
    return steps, stop.interrupted and steps < job.total_steps


def _make_trainer(job: _Job, model: PeftModel, console: Console, stop: StopOnInterrupt) -> Trainer:
    progress = ShowProgress(console)
    growth = DrLoraCallback(log_dir=job.run.path, on_growth=progress.show_growth)
    job.arguments.disable_tqdm = True
    trainer = _Trainer(
        model=model,
        args=job.arguments,
        train_dataset=job.train.encoded.dataset,
        eval_dataset=job.held_out.encoded.dataset,
        data_collator=Collator(job.tokenizer),
        processing_class=job.tokenizer,
        callbacks=[
            growth,
            MetricsLog(job.run.metrics),
            _Share(growth, progress),
            progress,
            stop,
            FindBest(),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    growth.log_first(trainer)
    return trainer


class _Trainer(Trainer):
    """The Trainer, with LoRA+'s parameter groups where the adapter asks for them.

    What goes wrong in writing a checkpoint, it tells in one sentence.
    """

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:  # the last one is torch.save's
            raise CheckpointError(
                f"the checkpoint of step {self.state.global_step} could not be written to "
                f"{self.args.output_dir}: {first_line(error)} (is the disk full, or the folder "
                f"read-only?)"
            ) from error

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """PEFT's helper makes the groups; otherwise all is as in transformers."""
        assert isinstance(self.model, PeftModel)
        config = _config(self.model)
        if self.optimizer is None and config.b_lr_ratio != 1:
            base = cast(PreTrainedModel, self.model)
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, base)
            self.optimizer = create_loraplus_optimizer(
                self.model,
                kind,
                loraplus_lr_ratio=config.b_lr_ratio,
                loraplus_weight_decay=self.args.weight_decay,
                **settings,
            )
        return super().create_optimizer(model)


class _Share(transformers.TrainerCallback):
    """Lets the progress bar see the ranks, which exist from the start of training on."""

    def __init__(self, growth: DrLoraCallback, progress: ShowProgress) -> None:
        self.growth, self.progress = growth, progress

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Hand the RankDynamics over."""
        self.progress.dynamics = self.growth.dynamics


def current_ranks(model: PeftModel) -> Ranks:
    """Block -> projection -> rank of each expert, of the model's adapter."""
    name = model.active_adapter
    layers = adapted_layers(model, name)
    return {block: layer.adapter(name).ranks() for block, layer in layers.items()}


def _pools(model: PeftModel) -> list[RankPool]:
    layers = adapted_layers(model, model.active_adapter).values()
    return [p for la in layers for p in la.adapter(model.active_adapter).rank_pools.values()]


def _free_parameters(model: PeftModel) -> int:
    """Numbers in rows that no expert owns."""
    return sum(
        pool.book.free * (pool.lora_A.shape[1] + pool.lora_B.shape[1]) for pool in _pools(model)
    )


def _config(model: PeftModel) -> DrLoraConfig:
    config = model.peft_config[model.active_adapter]
    assert isinstance(config, DrLoraConfig)
    return config


def _budget(model: PeftModel, ranks: Ranks) -> dict[str, Any]:
    rows = [row for projections in ranks.values() for row in projections.values()]
    return {
        "spent": sum(map(sum, rows)),
        "stored": sum(len(pool.book.owner_R) for pool in _pools(model)),
        "r_target": _config(model).r_target,
        "experts": len(rows[0]),
        "layers": len(ranks),
        "projections": len(next(iter(ranks.values()))),
    }


def _to_json(result: TrainResult, job: _Job, model: PeftModel) -> dict[str, Any]:
    assert result.after is not None
    return {
        "before": result.before.to_dict() if result.before else None,
        "after": result.after.to_dict(),
        "budget": result.budget,
        "ranks": result.ranks,
        "schedule": _config(model).schedule,
        "method": job.recipe.method,
        "trainable_parameters": result.trainable_parameters,
        "stored_parameters": result.stored_parameters,
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "steps": result.steps,
        "seconds": round(result.seconds, 2),
        "examples": {
            role: {"used": len(e.dataset), "dropped": e.dropped, "truncated": e.truncated}
            for role, e in (("train", job.train.encoded), ("eval", job.held_out.encoded))
        },
        "seed": job.arguments.seed,
        "device": str(job.arguments.device),
        **peak_memory(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "config": job.recipe.to_dict(),
    }
