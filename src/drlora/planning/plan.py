"""Plan a run: a recipe that fits, why, and what it is going to take.

    made = plan("path/to/model", "train.jsonl", gpu="24GB")
    made.memory.total, made.step_seconds, made.path

The recipe is that of `drlora init`, with a length and batches that come from the data, a learning
rate by a stated rule, and as many of `fit`'s changes as it takes to stay in the memory there is.
Memory is counted on paper, and time measured on a few layers of the model, or estimated for a card
that is not here. Both are written into the recipe, so that a run keeps them beside what it took.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from drlora.errors import ConfigError, first_line
from drlora.forecast.memory import MemoryForecast
from drlora.forecast.pace import measure_pace, seconds_on
from drlora.forecast.step import Batch
from drlora.io.commented import with_value
from drlora.io.settings import parse_yaml, split_override
from drlora.io.writing import write_at_once
from drlora.planning.fit import changes
from drlora.planning.rates import TriedRate, range_test, rate_by_width
from drlora.planning.room import MARGIN, Room, find_room
from drlora.runs.arguments import training_arguments
from drlora.runs.forecast import RunOnPaper, batches, optimizer_of, row_lengths, run_on_paper
from drlora.runs.inspect import inspect
from drlora.runs.inspection import GrowthForecast
from drlora.runs.job import Job, prepare
from drlora.runs.loading import load_architecture
from drlora.runs.new_recipe import draft_recipe, new_file
from drlora.runs.recipe import Recipe, load_recipe
from drlora.runs.rundir import RunDir

LONGEST = 2048  # tokens of an example, where nothing is said
PASS_TOKENS = 4096  # of a pass, where as many examples are at hand
PADDING = 0.4  # share of a batch from which on rows are packed
# The same sentence as in the pages and recipes: tests/project/test_docs.py.
METHOD = (
    "Without a word ranks grow by the published rule, which gained 1.5 % in held-out loss "
    "over LoRA and is level with LoRA+; for a short run try method: lora-all-gradient first, "
    "equal ranks on all linear layers at as many parameters as LoRA on experts, all rows of A "
    "along the gradient, which gained 8.1 % over LoRA on experts and 5.9 % over LoRA on all "
    "linear layers (four models of 16 to 64 experts, 200 steps); lora-gradient, on experts "
    "alone, gained 4.8 % in the same runs, in 800 steps 5.0 % on one model and 9.9 % on that "
    "of 64 experts, the published rule 2.6 % and 3.9 %; in 3,200 over examples seen once "
    "lora-all-gradient is still 22 % ahead of LoRA on experts (one model), but not surely of "
    "LoRA on all linear layers; where data repeat, methods come close to each other or "
    "overfit, so keep the best checkpoint"
)


@dataclass(frozen=True)
class Plan:
    """A planned run.

    Attributes:
        path: of the recipe.
        recipe: what it holds.
        room: where it is to run, in words.
        room_bytes: memory there.
        fits: whether the forecast leaves a tenth of it free.
        memory: at the peak, by part.
        step_seconds: of an optimizer step; None where it was not asked for.
        step_from: how that is known, in words.
        steps: of the run.
        why: what was chosen, and why, in sentences.
        changed: what was given up to fit, in the order in which it was.
        rates: of the range test; none where there was none.
    """

    path: Path
    recipe: Recipe
    room: str
    room_bytes: float
    fits: bool
    memory: MemoryForecast
    step_seconds: float | None
    step_from: str
    steps: int
    why: tuple[str, ...]
    changed: tuple[str, ...]
    rates: tuple[TriedRate, ...]

    @property
    def seconds(self) -> float | None:
        """Of all steps; measurements before and after are not in it."""
        return None if self.step_seconds is None else self.step_seconds * self.steps

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "path": str(self.path),
            "room": self.room,
            "room_bytes": self.room_bytes,
            "fits": self.fits,
            "memory_bytes": self.memory.to_dict(),
            "step_seconds": self.step_seconds,
            "step_from": self.step_from,
            "steps": self.steps,
            "seconds": self.seconds,
            "why": list(self.why),
            "changed": list(self.changed),
            "rates": [asdict(rate) for rate in self.rates],
            "recipe": self.recipe.to_dict(),
        }


def plan(
    model: str,
    data: str,
    output: str | Path = "plan.yaml",
    overrides: Sequence[str] = (),
    *,
    gpu: str | None = None,
    memory: str | None = None,
    measures: bool = True,
    tests_rates: bool = False,
    say: Callable[[str], object] = lambda text: None,
) -> Plan:
    """Plan a run and write its recipe.

    Args:
        model: `embedded`, a folder, or a model of the hub.
        data: to learn from, as `data.train` of a recipe.
        output: the recipe's file, which must not be there yet.
        overrides: `key=value` of the recipe; what is given stays as it is.
        gpu: `24GB`, or a card's name, where the run is not to take place on this machine.
        memory: of this machine that may be used; by default what is free.
        measures: whether the time of a step is measured here on a few layers.
        tests_rates: whether short runs choose the learning rate.
        say: is told what is under way.

    Raises:
        ConfigError: if there is no such card, the file is there, or a value is refused.
        DrLoraError: what `train` would refuse.
    """
    path, room = new_file(output), find_room(gpu, memory)
    given = {".".join(key) for key, _ in map(split_override, overrides)}
    draft = _Draft(path, model, data, overrides, room, given)
    say(f"reading {data}")
    draft.fit_to_data()
    draft.set_rate()
    say("counting memory on paper")
    draft.fit_to_room()
    rates: tuple[TriedRate, ...] = ()
    if tests_rates:
        best, rates = range_test(draft.recipe, draft.recipe.training["learning_rate"], say=say)
        draft.change({"training.learning_rate": best})
        draft.why.append(f"learning rate {best:g}: the best of {len(rates)} short runs")
    seconds, known_from = None, "not asked for"
    if room.gpu is not None or measures:
        say("timing a few layers" if room.gpu is None else "estimating time")
        seconds, known_from = draft.step_seconds()
    draft.finish(seconds, known_from)
    return Plan(
        path=path,
        recipe=draft.recipe,
        room=room.name,
        room_bytes=room.memory_bytes,
        fits=draft.paper.memory.total <= room.usable_bytes,
        memory=draft.paper.memory,
        step_seconds=seconds,
        step_from=known_from,
        steps=draft.job.total_steps,
        why=tuple(draft.why),
        changed=tuple(draft.changed),
        rates=rates,
    )


class _Draft:
    """A recipe under way; `text` is what is going to be written."""

    def __init__(
        self,
        path: Path,
        model: str,
        data: str,
        overrides: Sequence[str],
        room: Room,
        given: set[str],
    ) -> None:
        self.path, self.room, self.given = path, room, given
        words = [f"model={model}", f"data.train={data}", *overrides]
        if "data.max_length" not in given:
            words.append(f"data.max_length={_longest_of(model, _runs_code(overrides))}")
        self.text, notes = draft_recipe(path, words)
        self.why = [*notes, METHOD]
        self.changed: list[str] = []
        # A machine without the card would refuse these, so they come in at the end.
        self.on_card: dict[str, Any] = {}
        if not room.on_cpu:
            half = ("bf16", "bfloat16") if room.has_bf16 else ("fp16", "float16")
            self.on_card = {f"training.{half[0]}": True, "dtype": half[1]}
        self._load()

    @property
    def recipe(self) -> Recipe:
        """What the text holds."""
        return load_recipe(parse_yaml(self.text, str(self.path)))

    def change(self, values: dict[str, Any]) -> None:
        """Put values into the text, and read the data anew where they say so."""
        self._put(values)
        if any(key.startswith("data.") or key.endswith("packing") for key in values):
            self._load()

    def _put(self, values: dict[str, Any], keep: bool = False) -> None:
        for key, value in values.items():
            if not (keep and key in self.given):
                self.text = with_value(self.text, key.split("."), value)

    def _load(self) -> None:
        recipe = self.recipe
        run = RunDir(Path(recipe.output_dir))
        self.job: Job = prepare(recipe, run, training_arguments(recipe, run), None)
        self.lengths = row_lengths(self.job)

    def fit_to_data(self) -> None:
        """Lengths, packing, and how many examples are measured at once."""
        longest, mean = self.job.longest, fmean(self.lengths)
        if "data.max_length" not in self.given:
            self.change({"data.max_length": longest})
            cut = self.job.train.truncated
            left = f", {cut} of {len(self.job.train.raw)} are cut" if cut else ""
            self.why.append(f"length {longest}: the longest example has it{left}; mean {mean:.0f}")
        self._fill_a_pass(longest)
        batch = self.job.batch_size
        usual = batches(self.job, self.room.on_cpu)[1]
        padding = 1 - mean * batch / max(1, usual.tokens)
        if padding > PADDING and self.room.on_cpu and "training.packing" not in self.given:
            self.change({"training.packing": True})
            self.why.append(f"packing: {padding:.0%} of a batch would be padding")
        self._put({"evaluation.batch_size": batch}, keep=True)

    def _fill_a_pass(self, longest: int) -> None:
        """The step in as few passes as `PASS_TOKENS` allow."""
        training = self.recipe.training
        at_once = training["per_device_train_batch_size"]
        whole = at_once * training.get("gradient_accumulation_steps", 1)
        keys = ("training.per_device_train_batch_size", "training.gradient_accumulation_steps")
        fitting = [n for n in range(1, whole + 1) if whole % n == 0 and n * longest <= PASS_TOKENS]
        if self.given.intersection(keys) or not fitting or fitting[-1] <= at_once:
            return
        self._put(dict(zip(keys, (fitting[-1], whole // fitting[-1]), strict=True)))
        self.job = replace(self.job, batch_size=fitting[-1])
        self.why.append(f"{fitting[-1]} examples at once of the {whole} of a step")

    def set_rate(self) -> None:
        """By the width of the model, where examples are learned from as they are."""
        recipe = self.recipe
        if "training.learning_rate" in self.given or recipe.objective != "sft":
            return
        text: Any = load_architecture(recipe.model, recipe.trust_remote_code).get_text_config()
        rate = rate_by_width(text.hidden_size)
        self._put({"training.learning_rate": rate})
        self.why.append(
            f"learning rate {rate:g}: ten times that of full fine-tuning at hidden size "
            f"{text.hidden_size} (5e-4 x (2000 / hidden size)^0.781)"
        )

    def fit_to_room(self) -> None:
        """Change the recipe until its memory fits, the cheapest first."""
        recipe = self.recipe
        self.paper = self._on_paper()
        ways = changes(
            recipe.training["per_device_train_batch_size"],
            recipe.training.get("gradient_accumulation_steps", 1),
            self.job.longest,
            recipe.adapter.r_target,
            recipe.quantise.experts,
            self.room.on_cpu,
        )
        for way in ways:
            if self.paper.memory.total <= self.room.usable_bytes:
                return
            if way.values.keys() & self.given:
                continue
            before, text = self.paper, self.text
            try:
                self.change(way.values)
                self.paper = self._on_paper()
            except ConfigError as error:
                self.text, self.paper = text, before
                self.why.append(f"not possible here: {way.says} ({first_line(error)})")
                continue
            if self.paper.memory.total >= before.memory.total:
                self.text, self.paper = text, before
                continue
            self.changed.append(way.says)

    def _on_paper(self) -> RunOnPaper:
        recipe = self.recipe
        recipe.quantise.refuse_missing()
        if "dtype" in self.on_card and "dtype" not in self.given:
            recipe = replace(recipe, dtype=self.on_card["dtype"])
        largest, usual = self._batches(recipe)
        return run_on_paper(recipe, largest, usual, optimizer_of(self.job), self.room.on_cpu)

    def _batches(self, recipe: Recipe) -> tuple[Batch, Batch]:
        """Of the recipe as it is now; the job may have been made with more examples at once."""
        at_once = recipe.training["per_device_train_batch_size"]
        checkpoints = bool(recipe.training.get("gradient_checkpointing"))
        follows = recipe.training.get("gradient_accumulation_steps", 1) > 1
        self.job = replace(self.job, batch_size=at_once)
        made = batches(self.job, self.room.on_cpu)
        largest, usual = (replace(one, checkpoints=checkpoints, follows=follows) for one in made)
        return largest, usual

    def step_seconds(self) -> tuple[float, str]:
        """Of an optimizer step, and how it is known."""
        recipe = self.recipe
        passes = recipe.training.get("gradient_accumulation_steps", 1)
        if self.room.gpu is not None:
            seconds = seconds_on(self.room.gpu, self.paper.passed().work)
            return passes * seconds, "an estimate from the card's data sheet, not measured"
        storage = recipe.quantise.config()
        pace = measure_pace(
            load_architecture(recipe.model, recipe.trust_remote_code),
            recipe.adapter_config(),
            self.paper.usual,
            self.paper.dtype,
            storage.storage if storage else None,
            recipe.trust_remote_code,
            torch.device(self.room.device),
        )
        return passes * pace.seconds, f"measured here on {pace.layers} layers of the model"

    def finish(self, seconds: float | None, known_from: str) -> None:
        """Say the rest, and write."""
        self._put(self.on_card, keep=True)
        recipe = self.recipe
        growth = inspect(
            recipe.model,
            recipe.adapter_config(),
            self.job.plan_steps,
            trust_remote_code=recipe.trust_remote_code,
        ).growth
        if isinstance(growth, GrowthForecast):
            config = recipe.adapter
            self.why.append(
                f"ranks {config.r_init}, {config.r_target} on average, {config.r_max} at most, "
                f"given out in {growth.events} events up to step {growth.reached_at_step}"
            )
        total = self.paper.memory.total
        forecast: dict[str, Any] = {"memory_gb": round(total / 1e9, 2), "on": self.room.name}
        if seconds is not None:
            forecast |= {"step_seconds": float(f"{seconds:.3g}"), "step_from": known_from}
        self._put({"forecast": forecast})
        self.text = self.text.replace("Written by drlora init.", "Written by drlora plan.", 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_at_once(self.path, self.text)


def _runs_code(overrides: Sequence[str]) -> bool:
    """Whether code that comes with the model may run, as the recipe is going to say."""
    said = [value for key, value in map(split_override, overrides) if key == ["trust_remote_code"]]
    return bool(said) and said[-1] is True


def _longest_of(model: str, trust_remote_code: bool) -> int:
    text: Any = load_architecture(model, trust_remote_code).get_text_config()
    return min(LONGEST, getattr(text, "max_position_embeddings", None) or LONGEST)


def shortfall(made: Plan) -> str | None:
    """What is left to do where nothing fits."""
    if made.fits:
        return None
    needed = made.memory.total / (1 - MARGIN) / 1e9
    return (
        f"it does not fit: {needed:.1f} GB are needed. Left are a smaller model, several GPUs "
        f"(docs/many-processes.md), or an overriding data.max_length"
    )
