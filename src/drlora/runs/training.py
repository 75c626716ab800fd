"""The training of a run: the Trainer with all that watches it, and how far it came."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PrinterCallback, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from drlora.distributed import are_several, on_main
from drlora.distributed.zero import is_split
from drlora.io.checkpoint import checkpoint_step
from drlora.io.run_files import CHECKPOINT
from drlora.ranks.rank_map import adapters_of, budget_of
from drlora.runs.interrupt import StopOnInterrupt
from drlora.runs.job import Job
from drlora.runs.metrics_log import MetricsLog
from drlora.runs.moved import FindBest
from drlora.runs.progress import TellProgress
from drlora.runs.rundir import write_json
from drlora.trainer.callback import DrLoraCallback
from drlora.trainer.objectives import OwnSettings, make_trainer, objective_of, refuse_leaks
from drlora.trainer.patience import Patience
from drlora.trainer.preferences import REFERENCE, PreferenceTrainer
from drlora.trainer.sft import SftTrainer
from drlora.trainer.trainer import Clock, NewSchedule, RunTrainer, StopWhenLost


def _state_of(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


class Training:
    """The Trainer of a run, and how far it came.

    Attributes:
        steps: taken in all.
        due: the length of the run, by the batch size that was found to fit.
        seconds: in training, over all parts of the run.
        restarts: batch sizes that did not fit: `batch_size`, and the `steps` and
            `seconds` before it showed.
        when_it_computes: is called once the model can be computed with, before the first step.
    """

    def __init__(self, job: Job, model: PeftModel, stop: StopOnInterrupt) -> None:
        self.job, self.model, self.stop, self.progress = job, model, stop, stop.progress
        self.due = job.total_steps
        self.steps = checkpoint_step(job.checkpoint) if job.checkpoint else 0
        self.clock = Clock()
        self.restarts: list[dict[str, Any]] = list(job.record.get("restarts", []))
        self.is_over = self.steps >= self.due
        self.when_it_computes: Callable[[], object] = lambda: None
        if job.checkpoint and (job.checkpoint / REFERENCE).is_dir():
            # The adapter that the run began with, of which TRL makes the reference now.
            self._load(job.checkpoint / REFERENCE)
        self.trainer = self._make_trainer()
        if job.checkpoint and not self.is_over and not job.is_extended:
            self.is_over = self._has_lost_patience(job.checkpoint)

    @property
    def waits_for_engine(self) -> bool:
        """Whether training first makes of the model what computes.

        Under ZeRO-3 it is in parts till then, under FSDP whole and not on the device. Where the
        trainer itself measures, accelerate would take the model for prepared and leave DDP out.
        """
        is_in_parts = any(is_split(parameter) for parameter in self.model.parameters())
        measures = are_several() and isinstance(self.trainer, PreferenceTrainer)
        return is_in_parts or self.trainer.is_fsdp_enabled or measures

    @property
    def seconds(self) -> float:
        """In training, over all parts of the run."""
        return self.job.seconds if self.is_over else self.clock.seconds

    @property
    def stopped_early(self) -> bool:
        """Whether evaluations ended it before its last step."""
        return self.patience is not None and self.patience.has_ended

    def begin_to_compute(self) -> None:
        """Do what had to wait until the model can be computed with."""
        if self.waits_for_engine:
            refuse_leaks(self.trainer)
        self.when_it_computes()

    def fit(self) -> None:
        """Train to the end, or until Ctrl-C or SIGTERM."""
        checkpoint = self.job.checkpoint
        if self.is_over:
            # The run ended between its last step and its result; the Trainer would take one more.
            assert checkpoint is not None
            self._load(self._best_of(checkpoint) or checkpoint)
            if self.waits_for_engine:
                self._make_engine()
            self.when_it_computes()
            return
        with self.stop:
            self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self.steps, self.due = self.trainer.state.global_step, self.trainer.state.max_steps

    def _load(self, folder: Path) -> None:
        self.model.load_adapter(str(folder), self.model.active_adapter, is_trainable=True)

    def _best_of(self, checkpoint: Path) -> Path | None:
        """The best checkpoint until that one, where it is to be the run's adapter."""
        arguments, state = self.job.arguments, self.trainer.state
        if not arguments.load_best_model_at_end:
            return None
        state.best_model_checkpoint = _state_of(checkpoint).best_model_checkpoint
        FindBest().on_train_begin(arguments, state, self.trainer.control)
        return Path(state.best_model_checkpoint) if state.best_model_checkpoint else None

    def _has_lost_patience(self, checkpoint: Path) -> bool:
        if self.patience is not None:
            self.patience.go_on_from(_state_of(checkpoint))
        return self.stopped_early

    def beginning(self) -> Iterator[str]:
        """What it does otherwise than a script would."""
        if isinstance(self.trainer, SftTrainer) and self.trainer.way == "targets":
            yield (
                "the loss is computed at the targets alone, in chunks, for the vocabulary is large "
                "(training.token_metrics=true: as TRL does)"
            )

    def ending(self) -> Iterator[str]:
        """How the run came to its end, where that was not its last step with its last weights."""
        if self.stopped_early:
            yield (
                f"no better for {self.job.recipe.training['early_stopping_patience']} evaluations: "
                f"ended at step {self.steps} of {self.due}"
            )
        best = self.trainer.state.best_model_checkpoint
        if self.job.arguments.load_best_model_at_end and best:
            yield f"the adapter is that of step {checkpoint_step(Path(best))}, the best evaluation"
        spent, ranks = budget_of(self.model).spent, self._ranks_of_budget()
        if spent < ranks and self.ends_before_its_time:
            yield (
                f"{spent:,} of the {ranks:,} ranks of the budget are in use: the "
                f"rest was to be given out later"
            )

    def _ranks_of_budget(self) -> int:
        """Fewer than there are rows, where layers share one budget and may take from each other."""
        planned = sum(
            adapter.config.r_target * adapter.block.num_experts * len(adapter.rank_pools)
            for adapter in adapters_of(self.model).values()
        )
        return min(planned, budget_of(self.model).stored)

    @property
    def ends_before_its_time(self) -> bool:
        """Whether the adapter may be of a step before the last."""
        return self.stopped_early or self.job.arguments.load_best_model_at_end

    def measure_objective(self) -> dict[str, float] | None:
        """What the objective says of the held-out data, where that is not the loss of answers."""
        trainer = self.trainer
        return trainer.measure() if isinstance(trainer, PreferenceTrainer) else None

    def _make_trainer(self) -> RunTrainer:
        job, own = self.job, OwnSettings.of(self.job.recipe.training)
        progress = TellProgress(self.progress)
        self.growth = DrLoraCallback(log_dir=job.run.path, on_growth=progress.show_growth)
        self.growth.tells_of_length = False  # the notes of the job do
        self.growth.ended_early = lambda: self.stopped_early
        job.arguments.disable_tqdm = True
        callbacks = [self.growth, MetricsLog(job.run.metrics), _Share(self, progress), progress]
        callbacks += [StopWhenLost(), self.stop, self.clock, FindBest()]
        if job.is_extended:
            callbacks.append(NewSchedule())
        self.patience = Patience.of(own)
        if self.patience is not None:
            callbacks.append(self.patience)
        trainer = make_trainer(
            objective_of(job.recipe.objective),
            own,
            continues=job.recipe.start_from is not None,
            rewards=job.recipe.rewards,
            model=self.model,
            args=job.arguments,
            train_dataset=job.train.tokens,
            eval_dataset=job.held_out.tokens,
            processing_class=job.tokenizer,
            callbacks=callbacks,
        )
        trainer.on_restart = self._restart
        self.growth.loss = trainer.places_by
        trainer.remove_callback(PrinterCallback)
        self.growth.log_first(trainer)
        return trainer

    def _make_engine(self) -> None:
        """Have the model made what computes, where there is nothing to train."""
        if self.trainer.is_fsdp_enabled:  # accelerate wants an optimizer beside the model
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.trainer.accelerator.prepare(self.model, torch.optim.SGD(trained, lr=0.0))
            return
        few = self.job.held_out.tokens.select(range(min(8, len(self.job.held_out.tokens))))
        batches = self.trainer.get_eval_dataloader(few)
        self.trainer.evaluation_loop(batches, "engine", prediction_loss_only=True)

    def _restart(self, batch_size: int, step: int) -> None:
        """A batch did not fit: what was done with it is undone, and told once."""
        taken, begun = self.clock.seconds, self.steps
        self.restarts.append({"batch_size": batch_size, "steps": step, "seconds": round(taken, 2)})
        self.progress.say(
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


class _Share(TrainerCallback):
    """Hands on what exists from the start of training on: the ranks, the length of the run."""

    def __init__(self, training: Training, progress: TellProgress) -> None:
        self.training, self.progress = training, progress

    def on_train_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        """Once for each batch size that is tried."""
        self.progress.dynamics = self.training.growth.dynamics
        with torch.random.fork_rng([args.device] if args.device.type == "cuda" else []):
            self.training.begin_to_compute()
        self.training.note_length(state.max_steps, state.train_batch_size)
