"""One run, from a recipe to a trained adapter: `drlora train`.

result = train(load_recipe("recipes/embedded.yaml"))
result.before.loss.loss, result.after.loss.loss, result.ranks
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from rich.console import Console
from transformers import PrinterCallback, set_seed

from drlora.adapter.inject import adapted_layers
from drlora.adapter.pool import RankPool
from drlora.adapter.state import adapter_state
from drlora.config.adapter import DrLoraConfig
from drlora.config.methods import METHODS
from drlora.data import Collator
from drlora.distributed import is_main, on_main
from drlora.evaluation.measure import Measurement, measure, measurement_from
from drlora.io.checkpoint import checkpoint_step
from drlora.io.jsonl import append_lines, forget_kind, read_lines
from drlora.io.run_files import CHECKPOINT
from drlora.ranks.dynamics import RankDynamics
from drlora.ranks.starts import needs_ranks
from drlora.report.card import write_card_if_possible
from drlora.runs.environment import peak_memory, versions
from drlora.runs.held_out import measured_on
from drlora.runs.job import Job, prepare
from drlora.runs.loading import add_adapter, load_base_model, training_arguments
from drlora.runs.moved import FindBest
from drlora.runs.outcome import Ranks, TrainResult, reasons_of_divergence
from drlora.runs.progress import MetricsLog, ShowProgress, StopOnInterrupt, at_work, say
from drlora.runs.recipe import Recipe
from drlora.runs.rundir import RunDir, write_json, write_yaml
from drlora.trainer.callback import DrLoraCallback
from drlora.trainer.trainer import Clock, NewSchedule, StopWhenLost
from drlora.trainer.trainer import RunTrainer as _Trainer


def train(
    recipe: Recipe,
    resume: bool = False,
    console: Console | None = None,
    overwrite: bool = False,
) -> TrainResult:
    """Fine-tune as the recipe says, into its output_dir.

    Args:
        recipe: what to do.
        resume: continue the unfinished run in output_dir from its newest checkpoint; a finished one
            that is given more steps, too.
        console: where progress is shown; by default standard output.
        overwrite: replace the run that is in output_dir.

    Raises:
        DrLoraError: before anything is trained, with what is wrong and the way out.
    """
    run = RunDir(Path(recipe.output_dir))
    arguments = training_arguments(recipe, run)  # from here on several processes know each other
    console = (console or Console()) if is_main() else Console(quiet=True)
    with ExitStack() as stack:
        on_main(lambda: _enter(run, recipe, resume, overwrite, stack))
        tell = console.print
        checkpoint = on_main(lambda: run.newest_checkpoint(tell) if resume else None)
        job = prepare(recipe, run, arguments, checkpoint, resume)
        for note in job.notes():
            say(console, note)
        if recipe.method:
            say(console, f"method {recipe.method}: {METHODS[recipe.method].summary}")
        with at_work(console, f"loading {recipe.model}"):
            base = load_base_model(recipe)
        set_seed(job.arguments.seed)
        model = add_adapter(base, recipe, checkpoint).to(job.arguments.device)
        return _run(job, model, console)


def _enter(run: RunDir, recipe: Recipe, resume: bool, overwrite: bool, stack: ExitStack) -> None:
    """Hold the run directory until `stack` is closed, if it is fit for what is wanted."""

    def refuse() -> None:
        if resume:
            run.refuse_resume_of(recipe)
        else:
            run.refuse_second_run(overwrite)

    refuse()
    stack.enter_context(run.held())
    refuse()  # another run may have begun, or ended, meanwhile


def _run(job: Job, model: PeftModel, console: Console) -> TrainResult:
    """From a job with nothing left to refuse to its result."""
    stop = StopOnInterrupt(console)
    training = _Training(job, model, console, stop)
    if not job.checkpoint and not needs_ranks(model):
        RankDynamics(model, job.plan_steps).release()  # what it refuses, it is to refuse now
    on_main(lambda: _begin(job))
    before = _measure_before(job, model, console)
    if before:
        say(console, f"before: {before}")
    if job.checkpoint:
        say(console, f"continuing from {job.checkpoint}")
    set_seed(job.arguments.seed)
    training.fit()
    interrupted = stop.interrupted and training.steps < training.due
    after = None
    if not interrupted:
        _save(job, model)
        after = _measure_and_log(job, model, "after", training.steps, console)
    result = _result(job, model, training, before, after)
    if not interrupted:
        on_main(lambda: write_json(job.run.result, _to_json(result, job, model, training)))
        on_main(lambda: write_card_if_possible(job.run.path))  # now with the results
    return result


def _result(
    job: Job,
    model: PeftModel,
    training: _Training,
    before: Measurement | None,
    after: Measurement | None,
) -> TrainResult:
    stored = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return TrainResult(
        run=job.run,
        before=before,
        after=after,
        ranks=(ranks := current_ranks(model)),
        budget=_budget(model, ranks),
        trainable_parameters=stored - _free_parameters(model),
        stored_parameters=stored,
        steps=training.steps,
        seconds=training.seconds,
        interrupted=after is None,
        diverged=_reasons(job, training, before, after) if after else (),
        signal=training.stop.signal,
    )


def _begin(job: Job) -> None:
    """From here on the folder is that of this run."""
    if job.is_resumed:
        job.run.set_result_aside()
    else:
        job.run.clear()
    job.run.start_logs_at(checkpoint_step(job.checkpoint) if job.checkpoint else 0)
    write_json(job.run.record, job.record)
    write_yaml(job.run.config, job.recipe.resolved().to_dict())


def _reasons(
    job: Job, training: _Training, before: Measurement | None, after: Measurement
) -> tuple[str, ...]:
    found = on_main(lambda: reasons_of_divergence(before, after, read_lines(job.run.metrics)))
    if found and training.steps < training.due:
        return (*found, f"training was stopped at step {training.steps} of {training.due}")
    return found


def _save(job: Job, model: PeftModel) -> None:
    """The trained adapter and the tokenizer; from all processes, by the main one."""
    state = adapter_state(model)

    def write(folder: Path) -> None:
        model.save_pretrained(str(folder), state_dict=state)
        job.tokenizer.save_pretrained(str(folder))

    on_main(lambda: job.run.write_adapter(write))


def _measure_before(job: Job, model: PeftModel, console: Console) -> Measurement | None:
    """The measurement at step 0; a resumed run has it in its metrics."""
    if not job.recipe.evaluation.before:
        return None
    entries = (e for e in read_lines(job.run.metrics) if e.get("kind") == "before")
    found = on_main(lambda: next(entries, None))
    if found:
        return measurement_from(found)
    return _measure_and_log(job, model, "before", 0, console)


def _measure_and_log(
    job: Job, model: PeftModel, kind: str, step: int, console: Console
) -> Measurement:
    section = job.recipe.evaluation
    what = f"measuring {kind} training: {measured_on(job.held_out, section)}"
    with at_work(console, what):
        found = measure(model, job.tokenizer, job.held_out, section)
    entry = {"step": step, "kind": kind, **found.to_dict()}
    on_main(lambda: _log_measurement(job.run, entry))
    return found


def _log_measurement(run: RunDir, entry: dict[str, Any]) -> None:
    forget_kind(run.metrics, entry["kind"], entry["step"])  # of a process that was ended just then
    append_lines(run.metrics, [entry])


class _Training:
    """The Trainer of a run, and how far it came.

    Attributes:
        steps: taken in all.
        due: the length of the run, by the batch size that was found to fit.
        seconds: in training, over all parts of the run.
        restarts: batch sizes that did not fit: `batch_size`, and the `steps` and
            `seconds` before it showed.
    """

    def __init__(self, job: Job, model: PeftModel, console: Console, stop: StopOnInterrupt) -> None:
        self.job, self.model, self.console, self.stop = job, model, console, stop
        self.due = job.total_steps
        self.steps = checkpoint_step(job.checkpoint) if job.checkpoint else 0
        self.clock = Clock()
        self.restarts: list[dict[str, Any]] = list(job.record.get("restarts", []))
        self.trainer = None if self.steps >= self.due else self._make_trainer()

    @property
    def seconds(self) -> float:
        """In training, over all parts of the run."""
        return self.clock.seconds if self.trainer else self.job.seconds

    def fit(self) -> None:
        """Train to the end, or until Ctrl-C or SIGTERM."""
        checkpoint = self.job.checkpoint
        if self.trainer is None:
            # The run ended between its last step and its result; the Trainer would take one more.
            name = self.model.active_adapter
            self.model.load_adapter(str(checkpoint), name, is_trainable=True)
            return
        with self.stop:
            self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self.steps, self.due = self.trainer.state.global_step, self.trainer.state.max_steps

    def _make_trainer(self) -> _Trainer:
        job = self.job
        progress = ShowProgress(self.console)
        self.growth = DrLoraCallback(log_dir=job.run.path, on_growth=progress.show_growth)
        self.growth.tells_of_length = False  # the notes of the job do
        job.arguments.disable_tqdm = True
        callbacks = [self.growth, MetricsLog(job.run.metrics), _Share(self, progress), progress]
        callbacks += [StopWhenLost(), self.stop, self.clock, FindBest()]
        if job.is_extended:
            callbacks.append(NewSchedule())
        trainer = _Trainer(
            model=self.model,
            args=job.arguments,
            train_dataset=job.train.encoded.dataset,
            eval_dataset=job.held_out.encoded.dataset,
            data_collator=Collator(job.tokenizer),
            processing_class=job.tokenizer,
            callbacks=callbacks,
        )
        trainer.on_restart = self._restart
        trainer.remove_callback(PrinterCallback)
        self.growth.log_first(trainer)
        return trainer

    def _restart(self, batch_size: int, step: int) -> None:
        """A batch did not fit: what was done with it is undone, and told once."""
        taken, begun = self.clock.seconds, self.steps
        self.restarts.append({"batch_size": batch_size, "steps": step, "seconds": round(taken, 2)})
        say(
            self.console,
            f"out of memory at step {step} with {batch_size} examples at once; starting again at "
            f"step {begun} with fewer, as if it had begun so",
        )
        self.growth.begin_again()
        on_main(lambda: self._forget_since(begun))

    def _forget_since(self, step: int) -> None:
        self.job.run.start_logs_at(step)
        for path in self.job.run.checkpoints.glob(CHECKPOINT.format("*")):
            if checkpoint_step(path) > step:
                shutil.rmtree(path)

    def note_length(self, steps: int, batch_size: int) -> None:
        """Keep the length of the run and its batch, once training knows them."""
        assert self.growth.dynamics is not None
        self.job.record.update(
            steps=steps,
            batch_size=batch_size,
            restarts=self.restarts,
        )
        on_main(lambda: write_json(self.job.run.record, self.job.record))


class _Share(transformers.TrainerCallback):
    """Hands on what exists from the start of training on: the ranks, the length of the run."""

    def __init__(self, training: _Training, progress: ShowProgress) -> None:
        self.training, self.progress = training, progress

    def on_train_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        """Once for each batch size that is tried."""
        self.progress.dynamics = self.training.growth.dynamics
        self.training.note_length(state.max_steps, state.train_batch_size)


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


def _to_json(
    result: TrainResult, job: Job, model: PeftModel, training: _Training
) -> dict[str, Any]:
    assert result.after is not None
    return {
        "verdict": "diverged" if result.diverged else "ok",
        "diverged": list(result.diverged),
        "before": result.before.to_dict() if result.before else None,
        "after": result.after.to_dict(),
        "budget": result.budget,
        "ranks": result.ranks,
        "schedule": _config(model).recorded("schedule"),
        "method": job.recipe.method,
        "trainable_parameters": result.trainable_parameters,
        "stored_parameters": result.stored_parameters,
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "steps": result.steps,
        "seconds": round(result.seconds, 2),
        "restarts": training.restarts,
        "examples": job.counts(),
        "held_out": job.record["held_out"],
        "seed": job.arguments.seed,
        "device": str(job.arguments.device),
        **peak_memory(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "config": job.recipe.to_dict(),
    }
