"""What a run is going to take, said before its weights are loaded and kept beside it.

Memory is counted on paper (`drlora.forecast`); how long a step takes is what `drlora plan` measured
or estimated, where the recipe has it from there. A forecast never stops a run: where a model does
not run on paper, it says so.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from drlora.embedded import resolve_model
from drlora.errors import first_line
from drlora.evaluation.head import CHUNK_BYTES, LEAST_VOCABULARY
from drlora.evaluation.measure import EvaluationSection
from drlora.forecast.memory import MemoryForecast, mapped_bytes, memory_forecast
from drlora.forecast.step import Batch, PassOnPaper, adapted_on_paper, pass_on_paper
from drlora.io.places import from_root
from drlora.moe.blocks import active_experts, find_blocks
from drlora.ops.loop.engine import work_saved, working_dtype
from drlora.runs.job import Job
from drlora.runs.loading import load_architecture, model_on_meta
from drlora.runs.recipe import Recipe

LENGTHS_READ = 2000
# Of configs whose logits are not the head's product alone.
OTHER_HEADS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


@dataclass(frozen=True)
class RunOnPaper:
    """A run as far as paper tells.

    Attributes:
        memory: at its peak.
        largest: the batch with which that is.
        usual: a batch as it is in the mean.
        dtype: of the weights.
        model: the adapted model without numbers.
        works_in: dtype that the engine computes in.
    """

    memory: MemoryForecast
    largest: Batch
    usual: Batch
    dtype: torch.dtype
    model: PeftModel
    works_in: torch.dtype

    def passed(self) -> PassOnPaper:
        """What a pass with `usual` takes; a memory forecast has no need of it."""
        return pass_on_paper(self.model, self.usual, self.works_in)


def run_on_paper(
    recipe: Recipe, largest: Batch, usual: Batch, optim: str, on_cpu: bool
) -> RunOnPaper:
    """Count what a step takes.

    Args:
        recipe: of the run.
        largest: batch that there can be.
        usual: batch in the mean.
        optim: the optimizer, by transformers' name.
        on_cpu: whether it is to run on a CPU.

    Raises:
        RuntimeError: what a model says that cannot run without numbers.
    """
    architecture = load_architecture(recipe.model, recipe.trust_remote_code)
    skeleton = model_on_meta(architecture, recipe.trust_remote_code)
    stored = architecture.dtype if isinstance(architecture.dtype, torch.dtype) else torch.float32
    dtype = stored if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    kept = recipe.quantise.of_checkpoint(architecture)
    weight_bytes = kept.weight_bytes(skeleton, dtype, find_blocks(skeleton))
    mapped = 0.0
    if on_cpu and dtype == stored:
        folder = from_root(resolve_model(recipe.model))
        shapes = dict(skeleton.named_parameters())
        mapped = mapped_bytes(folder, shapes, recipe.quantise.experts is not None)
    if on_cpu and _loses_at_targets(recipe, architecture, dtype):
        largest, usual = (
            replace(one, fuses_head=True, head_chunk_bytes=CHUNK_BYTES["cpu"])
            for one in (largest, usual)
        )
    model = adapted_on_paper(skeleton, recipe.adapter_config(), dtype)
    works_in = _working_dtype(skeleton, dtype, largest.tokens) if on_cpu else dtype
    peak = _peak(model, largest, recipe.evaluation, works_in)
    memory = memory_forecast(model, weight_bytes, peak, optim, mapped, on_cpu, works_in)
    return RunOnPaper(memory, largest, usual, dtype, model, works_in)


def _working_dtype(skeleton: PreTrainedModel, dtype: torch.dtype, tokens: int) -> torch.dtype:
    """What the engine of a CPU computes the largest batch in, if its experts are used alike."""
    block = next(iter(find_blocks(skeleton)))
    used = active_experts(skeleton, block)
    rows = tokens * used / block.num_experts if used else math.inf
    saved = work_saved(rows, block.hidden_size, block.expert_width)
    return working_dtype(torch.empty(0, dtype=dtype), saved)


def _loses_at_targets(recipe: Recipe, architecture: Any, dtype: torch.dtype) -> bool:
    """Whether a CPU forms the loss in chunks, as far as the config tells (`has_plain_head`)."""
    text = architecture.get_text_config()
    training = recipe.training
    return (
        text.vocab_size >= LEAST_VOCABULARY
        and dtype in (torch.float32, torch.bfloat16)
        and not any(getattr(text, name, None) for name in OTHER_HEADS)
        and not training.get("token_metrics")
        and not training.get("router_aux_loss_coef")
    )


def _peak(
    model: PeftModel, largest: Batch, evaluation: EvaluationSection, dtype: torch.dtype
) -> float:
    """Of a step, or of a batch that is measured where that takes more."""
    step = pass_on_paper(model, largest, dtype).peak_bytes
    in_chunks = largest.head_chunk_bytes > 0  # on a CPU, where measuring forms its loss alike
    measured = Batch(
        evaluation.batch_size,
        largest.length,
        fuses_head=in_chunks,
        head_chunk_bytes=largest.head_chunk_bytes,
    )
    # A step of as many tokens keeps for its backward pass what measuring gives back. Autocast is of
    # the step alone.
    is_alike = measured.fuses_head == largest.fuses_head and largest.autocast is None
    if is_alike and measured.tokens <= largest.tokens:
        return step
    return max(step, pass_on_paper(model, measured, dtype, trains=False).peak_bytes)


def batches(job: Job, on_cpu: bool) -> tuple[Batch, Batch]:
    """The largest batch that there can be, and the usual one."""
    settings = cast(Any, job.arguments)
    lengths = row_lengths(job)
    per_batch = job.batch_size
    one = Batch(
        examples=1,
        length=job.longest,
        checkpoints=bool(settings.gradient_checkpointing),
        follows=settings.gradient_accumulation_steps > 1,
        fuses_head=not on_cpu,
        engine="loop" if on_cpu else "grouped",
        autocast=torch.bfloat16 if settings.bf16 else torch.float16 if settings.fp16 else None,
    )
    if "seq_lengths" in job.train.tokens.column_names or getattr(settings, "padding_free", False):
        most, mean = max(lengths), sum(lengths) / len(lengths)
        return replace(one, length=most * per_batch), replace(one, length=round(mean * per_batch))
    # Of each draw the longest decides; draws are neighbours in an order by chance.
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()
    drawn = [lengths[row] for row in order]
    longest = [max(drawn[at : at + per_batch]) for at in range(0, len(drawn), per_batch)]
    usual = round(sum(longest) / len(longest))
    largest = replace(one, examples=per_batch)
    return largest, replace(largest, length=usual)


def optimizer_of(job: Job) -> str:
    """Its name, as transformers has it."""
    return str(getattr(job.arguments.optim, "value", job.arguments.optim))


def row_lengths(job: Job) -> list[int]:
    """Tokens of the first rows of the training data; of pairs and prompts each as the longest."""
    tokens = job.train.tokens
    count = min(len(tokens), LENGTHS_READ)
    if "input_ids" not in tokens.column_names:
        return [job.longest] * count
    return [len(ids) for ids in tokens.select(range(count))["input_ids"]]


def forecast_for_the_record(job: Job) -> dict[str, Any]:
    """What is kept beside a run: bytes by part, the batch, and what was planned."""
    recipe = job.recipe
    found: dict[str, Any] = {"planned": recipe.forecast}
    if recipe.objective != "sft":
        return found | {"said": f"objective={recipe.objective} is not forecast"}
    try:
        on_cpu = job.arguments.device.type == "cpu"
        paper = run_on_paper(recipe, *batches(job, on_cpu), optimizer_of(job), on_cpu)
    except Exception as error:  # whatever a model makes of tensors without numbers
        return found | {"said": f"the model does not run on paper: {first_line(error)}"}
    return found | {"memory_bytes": paper.memory.to_dict(), "batch": _plain(paper.largest)}


def _plain(batch: Batch) -> dict[str, Any]:
    values = asdict(batch)
    return values | {"autocast": str(batch.autocast) if batch.autocast else None}
