"""One run, from a recipe to a trained adapter: `drlora train`.

result = train(load_recipe("embedded"))
result.before.loss.loss, result.after.loss.loss, result.ranks
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import set_seed

from drlora.adapter.state import adapter_state
from drlora.config.adapter import DrLoraConfig
from drlora.config.methods import METHODS
from drlora.distributed import is_main, on_main
from drlora.distributed.zero import shape_of
from drlora.evaluation.measure import Measurement, measure, measurement_from
from drlora.io.checkpoint import checkpoint_step
from drlora.io.jsonl import append_lines, forget_kind, read_lines
from drlora.io.plugins import plugins_for_the_record
from drlora.ops.trial import found
from drlora.ranks.dynamics import RankDynamics
from drlora.ranks.rank_map import budget_of, free_parameters, rank_map
from drlora.ranks.starts import needs_ranks
from drlora.report.card import write_card_if_possible
from drlora.runs.arguments import has_fsdp, training_arguments
from drlora.runs.environment import peak_memory, versions
from drlora.runs.forecast import forecast_for_the_record
from drlora.runs.held_out import measured_on
from drlora.runs.interrupt import StopOnInterrupt
from drlora.runs.job import Job, prepare
from drlora.runs.loading import add_adapter, load_base_model
from drlora.runs.outcome import (
    RunDiverged,
    RunInterrupted,
    TrainResult,
    reasons_of_divergence,
)
from drlora.runs.progress import Progress, progress_from
from drlora.runs.recipe import Recipe
from drlora.runs.rundir import RunDir, write_json, write_yaml
from drlora.runs.training import Training


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | Callable[[str], object] | None = None,
) -> TrainResult:
    """Fine-tune as the recipe says, into its output_dir.

    Args:
        recipe: what to do.
        resume: continue the unfinished run in output_dir from its newest checkpoint; a finished one
            that is given more steps, too.
        overwrite: replace the run that is in output_dir.
        progress: what is told how the run goes (`drlora.runs.progress`): a function such as `print`
            is told a few lines; by default nothing is said.

    Returns:
        What came of the finished run. Whoever needs no more than its files finds all of it there.

    Raises:
        DrLoraError: before anything is trained, with what is wrong and the way out.
        RunDiverged: at the end, if its result is one that nobody wants; it is in the exception.
        RunInterrupted: after Ctrl-C or SIGTERM, when a checkpoint is saved that `resume` goes on
            from; a KeyboardInterrupt.
    """
    run = RunDir(Path(recipe.output_dir))
    arguments = training_arguments(recipe, run)  # from here on several processes know each other
    told = progress_from(progress) if is_main() else Progress()
    with ExitStack() as stack:
        on_main(lambda: _enter(run, recipe, resume, overwrite, stack))
        checkpoint = on_main(lambda: run.newest_checkpoint(told.say) if resume else None)
        job = prepare(recipe, run, arguments, checkpoint, resume)
        for note in job.notes():
            told.say(note)
        forecast = on_main(lambda: forecast_for_the_record(job))
        if recipe.method:
            told.say(f"method {recipe.method}: {METHODS[recipe.method].summary}")
        with told.at_work(f"loading {recipe.model}"):
            base = load_base_model(recipe)
        set_seed(job.arguments.seed)
        model = add_adapter(base, recipe, checkpoint)
        if not has_fsdp(job.arguments):  # which moves it in parts, as it may not fit in one piece
            model = model.to(job.arguments.device)
        result = _run(job, model, told, forecast)
    if result.interrupted:
        raise RunInterrupted(result)
    if result.diverged:
        raise RunDiverged(result, job.arguments.learning_rate)
    return result


def _enter(run: RunDir, recipe: Recipe, resume: bool, overwrite: bool, stack: ExitStack) -> None:
    """Hold the run directory until `stack` is closed, if it is fit for what is wanted."""
    run.refuse(recipe, resume, overwrite)
    stack.enter_context(run.held())
    run.refuse(recipe, resume, overwrite)  # another may have begun, or ended, meanwhile


def _run(job: Job, model: PeftModel, progress: Progress, forecast: dict[str, Any]) -> TrainResult:
    """From a job with nothing left to refuse to its result."""
    stop = StopOnInterrupt(progress)
    training = Training(job, model, stop)
    if not job.checkpoint and not needs_ranks(model):
        # What it refuses, it is to refuse now.
        RankDynamics(model, job.plan_steps, step=0).release()
    on_main(lambda: _begin(job, forecast))
    before = Before(job, training, progress)
    if training.waits_for_engine:
        training.when_it_computes = before.measure
    else:
        before.measure()
    if job.checkpoint:
        progress.say(f"continuing from {job.checkpoint}")
    for note in training.beginning():
        progress.say(note)
    set_seed(job.arguments.seed)
    training.fit()
    is_short = training.steps < training.due
    interrupted = stop.interrupted and is_short and not training.stopped_early
    after = None
    if not interrupted:
        for note in training.ending():
            progress.say(note)
        _save(job, model)
        after = _measure_and_log(job, training, "after", training.steps, progress)
    result = _result(job, model, training, before.found, after)
    if not interrupted:
        on_main(lambda: write_json(job.run.result, _to_json(result, job, model, training)))
        on_main(lambda: write_card_if_possible(job.run.path))  # now with the results
    return result


def _result(
    job: Job,
    model: PeftModel,
    training: Training,
    before: Measurement | None,
    after: Measurement | None,
) -> TrainResult:
    stored = sum(shape_of(p).numel() for p in model.parameters() if p.requires_grad)
    return TrainResult(
        run=job.run,
        before=before,
        after=after,
        ranks=rank_map(model),
        budget=budget_of(model),
        trainable_parameters=stored - free_parameters(model),
        stored_parameters=stored,
        steps=training.steps,
        seconds=training.seconds,
        interrupted=after is None,
        diverged=_reasons(job, training, before, after) if after else (),
        signal=training.stop.signal,
    )


def _begin(job: Job, forecast: dict[str, Any]) -> None:
    """From here on the folder is that of this run."""
    if job.is_resumed:
        job.run.set_result_aside()
    else:
        job.run.clear()
    job.run.start_logs_at(checkpoint_step(job.checkpoint) if job.checkpoint else 0)
    write_json(job.run.record, job.record)
    write_json(job.run.forecast, forecast)
    write_yaml(job.run.config, job.recipe.resolved().to_dict())


def _reasons(
    job: Job, training: Training, before: Measurement | None, after: Measurement
) -> tuple[str, ...]:
    found = on_main(lambda: reasons_of_divergence(before, after, read_lines(job.run.metrics)))
    if found and training.steps < training.due:
        return (*found, f"training was stopped at step {training.steps} of {training.due}")
    return found


def _save(job: Job, model: PeftModel) -> None:
    """The trained adapter and the tokenizer; from all processes, by the main one."""
    state = adapter_state(model)

    def write(folder: Path) -> None:
        # A reference adapter that TRL made stays in the checkpoints.
        active = [model.active_adapter]
        model.save_pretrained(str(folder), state_dict=state, selected_adapters=active)
        job.tokenizer.save_pretrained(str(folder))

    on_main(lambda: job.run.write_adapter(write))


class Before:
    """The measurement at step 0: `found`, None without one. A resumed run has it in its metrics."""

    def __init__(self, job: Job, training: Training, progress: Progress) -> None:
        self._job, self._training, self._progress = job, training, progress
        self.found: Measurement | None = None

    def measure(self) -> None:
        """Measure, or read what was measured; once, however often training begins."""
        job = self._job
        if not job.recipe.evaluation.before or self.found is not None:
            return
        entries = (e for e in read_lines(job.run.metrics) if e.get("kind") == "before")
        known = on_main(lambda: next(entries, None))
        if known:
            self.found = measurement_from(known)
        else:
            self.found = _measure_and_log(job, self._training, "before", 0, self._progress)
        self._progress.say(f"before: {self.found}")


def _measure_and_log(
    job: Job, training: Training, kind: str, step: int, progress: Progress
) -> Measurement:
    section = job.recipe.evaluation
    what = f"measuring {kind} training: {measured_on(job.measured, section)}"
    with progress.at_work(what):
        found = measure(training.model, job.tokenizer, job.measured, section, job.others)
        found = replace(found, objective=training.measure_objective())
    entry = {"step": step, "kind": kind, **found.to_dict()}
    on_main(lambda: _log_measurement(job.run, entry))
    return found


def _log_measurement(run: RunDir, entry: dict[str, Any]) -> None:
    forget_kind(run.metrics, entry["kind"], entry["step"])  # of a process that was ended just then
    append_lines(run.metrics, [entry])


def _config(model: PeftModel) -> DrLoraConfig:
    config = model.peft_config[model.active_adapter]
    assert isinstance(config, DrLoraConfig)
    return config


def _to_json(result: TrainResult, job: Job, model: PeftModel, training: Training) -> dict[str, Any]:
    assert result.after is not None
    return {
        "verdict": "diverged" if result.diverged else "ok",
        "diverged": list(result.diverged),
        "before": result.before.to_dict() if result.before else None,
        "after": result.after.to_dict(),
        "budget": asdict(result.budget),
        "ranks": result.ranks,
        "schedule": _config(model).recorded("schedule"),
        "objective": job.recipe.objective,
        "method": job.recipe.method,
        "trainable_parameters": result.trainable_parameters,
        "stored_parameters": result.stored_parameters,
        "total_parameters": sum(shape_of(p).numel() for p in model.parameters()),
        "steps": result.steps,
        "seconds": round(result.seconds, 2),
        "restarts": training.restarts,
        "notes": list(training.ending()),
        "examples": job.counts(),
        "held_out": job.record["held_out"],
        "seed": job.arguments.seed,
        "device": str(job.arguments.device),
        **peak_memory(),
        "threads": torch.get_num_threads(),
        **({"engines": engines} if (engines := found()) else {}),
        "versions": versions(),
        "plugins": plugins_for_the_record(),
        "config": job.recipe.to_dict(),
    }
