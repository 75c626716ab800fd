"""One of several gloo processes on FSDP2 or spread experts: `fsdp_processes.py FOLDER CASE...`

Used by tests/trainer/test_fsdp.py, which compares what the cases found. torchrun's variables say
which process this is. A case is one run with transformers' Trainer; `own-loop`: see own_loops.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate_double import fsdp_on_a_cpu
from datasets import Dataset
from own_loops import compare
from peft import PeftModel, get_peft_model
from tiny import checkpointing_arguments, make_batch, make_class, make_model
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig

import drlora

STEPS, CUT = 10, 5  # ranks change after steps 4, 5, 6, 7, 8
CLASSES = {"olmoe": "OlmoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
           "gpt_oss": "GptOssForCausalLM"}  # fmt: skip
SETTINGS: dict[str, Any] = dict(
    r_init=2, r_target=6, r_max=16, p_grow=0.2, grow_every=1, warmup_steps=3, settle_steps=3,
    lora_alpha=8.0, router="frozen", young_rows="own",
    options={"move_share": 0.2, "young_a": "probe"},
)  # fmt: skip
ROWS = [{k: v[0] for k, v in make_batch(1000 + n, rows=1).items()} for n in range(128)]


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        engine: `ddp`, `ep`, `loaded` (FSDP2 when the model is loaded), `hybrid` (the same in two
            groups that hold all of it, HSDP), `full` or `sharded` (FSDP2 through accelerate, by the
            kind of its state).
        family: of the model.
        settings: of the adapter, beside SETTINGS.
        arguments: of the Trainer.
        dtype: of the model.
        start: a case whose last checkpoint this one goes on from.
    """

    engine: str
    family: str = "olmoe"
    settings: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    start: str = ""


# LoRA on all linear layers in one budget, whose rows start along the gradient.
_BESIDE: dict[str, Any] = {
    "target_modules": "all-linear",
    "options": {"common_budget": True, "start_a": "gradient-all", "start_a_scale": 3.0},
}
_BF16 = dict(settings={"router": "train"}, arguments={"bf16": True}, dtype=torch.bfloat16)
CASES = {
    "ddp-olmoe": Case("ddp"),
    "ep-olmoe": Case("ep", arguments={"save_strategy": "steps", "save_only_model": True}),
    "ddp-qwen3_moe": Case("ddp", "qwen3_moe"),
    "ep-qwen3_moe": Case("ep", "qwen3_moe"),
    "ddp-gpt_oss": Case("ddp", "gpt_oss"),
    "ep-gpt_oss": Case("ep", "gpt_oss"),
    "ep-beside": Case("ep", settings=_BESIDE),
    "ddp-beside": Case("ddp", settings=_BESIDE),
    "sharded-beside": Case("sharded", settings=_BESIDE),
    "ddp-router": Case("ddp", settings={"router": "train"}),
    "hybrid-router": Case("hybrid", settings={"router": "train"}),
    "loaded-router": Case("loaded", settings={"router": "train"}),
    "ep-router": Case("ep", settings={"router": "train"}),
    "ep-whole": Case(
        "ep",
        settings={"options": {"move_share": 0.2, "young_a": "probe", "share_rows": False}},
        arguments=checkpointing_arguments(),
    ),
    "full": Case("full", settings={"router": "train"}, arguments={"save_strategy": "steps"}),
    "full-resumed": Case("full", settings={"router": "train"}, start="full"),
    "sharded": Case("sharded", arguments={"save_strategy": "steps"}),
    "sharded-resumed": Case("sharded", start="sharded"),
    "killed": Case("sharded", arguments={"save_strategy": "steps"}),
    "killed-resumed": Case("sharded", start="killed"),
    "bf16": Case("full", **_BF16 | {"arguments": {"bf16": True, "save_strategy": "steps"}}),
    "bf16-resumed": Case("full", **_BF16, start="bf16"),
}


class History(TrainerCallback):
    """The ranks after every change of them, and the budget after every step."""

    def __init__(self, callback: drlora.DrLoraCallback, is_killed: bool) -> None:
        self.callback, self.ranks, self.budgets = callback, [], []
        self.drifts: list[float] = []
        self.is_killed = is_killed

    def on_substep_end(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        """In the middle of a step one process may end without a word."""
        if self.is_killed and state.global_step == CUT + 2 and dist.get_rank() == 1:
            os._exit(9)

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """How far trained routers have moved, as the callback before this one says."""
        if "router_drift" in logs:
            self.drifts.append(logs["router_drift"])

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note them."""
        dynamics = self.callback.dynamics
        ranks = json.loads(json.dumps(dynamics.ranks()))
        if self.ranks[-1:] != [ranks]:
            self.ranks.append(ranks)
        self.budgets.append(dynamics.budget())


def base_model(folder: Path, case: Case, world: int) -> transformers.PreTrainedModel:
    """The case's model; the first process has saved it."""
    place = folder / f"model-{case.family}"
    if dist.get_rank() == 0 and not place.exists():
        is_other = case.family == "gpt_oss"
        make = make_class(CLASSES[case.family]) if is_other else make_model(case.family)
        make.save_pretrained(place)
    dist.barrier()
    spread: dict[str, Any] = {}
    sizes = {
        "ep": {"fsdp_size": world, "ep_size": 2},
        "loaded": {"fsdp_size": world},
        "hybrid": {"fsdp_size": world // 2, "dp_replicate_size": 2},
    }
    if case.engine in sizes:
        spread["distributed_config"] = DistributedConfig(**sizes[case.engine])
    load = getattr(transformers, CLASSES[case.family]).from_pretrained
    return load(place, dtype=case.dtype, **spread)


def adapted(folder: Path, case: Case, world: int) -> PeftModel:
    """It, with a new adapter."""
    base = base_model(folder, case, world)
    torch.manual_seed(1)
    return get_peft_model(base, drlora.DrLoraConfig(**SETTINGS | case.settings)).train()


def train(folder: Path, name: str, world: int) -> dict[str, Any]:
    """A run with transformers' Trainer: what it found."""
    case = CASES[name]
    fsdp: dict[str, Any] = {}
    if case.engine in ("full", "sharded"):
        fsdp = {"fsdp": True, "fsdp_config": fsdp_config(case.engine.upper())}
    place = folder / (case.start or name)
    callback = drlora.DrLoraCallback()
    history = History(callback, name == "killed")
    # Not Adam's 1e-8: it would turn a gradient that is mere rounding into a full step.
    defaults: dict[str, Any] = dict(
        adam_epsilon=1e-6,
        per_device_train_batch_size=4 // world, gradient_accumulation_steps=2, max_steps=STEPS,
        use_cpu=True, seed=3, report_to=[], logging_steps=1, save_steps=CUT, save_strategy="no",
        learning_rate=3e-3, weight_decay=0.1, max_grad_norm=0.04, optim="adamw_torch",
        disable_tqdm=True, dataloader_pin_memory=False, ddp_find_unused_parameters=False,
    )  # fmt: skip
    with fsdp_on_a_cpu():
        trainer = Trainer(
            adapted(folder, case, world),
            TrainingArguments(str(place), **defaults | case.arguments | fsdp),
            train_dataset=Dataset.from_list(ROWS),
            callbacks=[callback, history],
        )
        assert trainer.is_fsdp_enabled == bool(fsdp)
        start = str(place / f"checkpoint-{CUT}") if case.start else None
        trainer.train(resume_from_checkpoint=start)
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    found = result(trainer.model, callback.dynamics)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    return found | {
        "ranks": history.ranks,
        "budgets": history.budgets,
        "losses": [float(entry["loss"]) for entry in logs],
        "norms": [float(entry["grad_norm"]) for entry in logs],
        "drifts": history.drifts,
    }


def evaluate_first(folder: Path) -> dict[str, Any]:
    """What is said where the Trainer evaluates before it trains, under DDP."""
    arguments = TrainingArguments(str(folder / "evaluated"), max_steps=STEPS, use_cpu=True,
                                  report_to=[], save_strategy="no", disable_tqdm=True)  # fmt: skip
    rows = Dataset.from_list(ROWS)
    model = adapted(folder, Case("ddp"), dist.get_world_size())
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows.select(range(4)),
                      callbacks=[drlora.DrLoraCallback()])  # fmt: skip
    trainer.evaluate()
    try:
        trainer.train()
    except drlora.ConfigError as error:
        return {"said": str(error)}
    return {"said": ""}


def run_recipe(folder: Path, name: str) -> dict[str, Any]:
    """`drlora train`, the embedded model in four bits: under DDP, or FSDP2 (`recipe-fsdp`).

    `recipe-dpo` learns from preferences, under DDP.
    """
    if dist.get_rank() == 0:
        rows: list[dict[str, str]] = [
            {"prompt": f"say {n}:", "completion": f" {n % 7}"} for n in range(96)
        ]
        if name == "recipe-dpo":
            rows = [{"prompt": f"say {n}:", "chosen": " yes", "rejected": " no"} for n in range(96)]
        for file, part in (("train", rows[:80]), ("dev", rows[80:])):
            lines = "\n".join(map(json.dumps, part))
            (folder / f"{name}-{file}.jsonl").write_text(lines, encoding="utf-8")
    dist.barrier()
    settings = [
        f"output_dir={folder / name}",
        f"data.train={folder / name}-train.jsonl", f"data.eval={folder / name}-dev.jsonl",
        "training.max_steps=8", "training.per_device_train_batch_size=2", "training.use_cpu=true",
        "training.save_steps=4", "training.eval_strategy=no", "adapter.warmup_steps=2",
        "adapter.grow_every=1", "evaluation.exact_match=false", "quantise.experts=nf4",
    ]  # fmt: skip
    if name == "recipe-dpo":
        settings += ["objective=dpo", "adapter.settle_steps=2", "training.learning_rate=1e-4"]
    else:
        settings.append("method=drlora-informed")
    if name == "recipe-fsdp":
        settings += [
            "training.fsdp=true",
            f"training.fsdp_config={json.dumps(fsdp_config('FULL'))}",
        ]
    with fsdp_on_a_cpu():
        run = drlora.train(drlora.load_recipe("embedded", settings))
        again = None
        if name == "recipe-fsdp":  # stopped after its last step, before its result
            dist.barrier()
            if dist.get_rank() == 0:
                (folder / name / "result.json").unlink()
            dist.barrier()
            again = drlora.train(drlora.load_recipe("embedded", settings), resume=True)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    losses = [m.loss.loss for m in (run.before, run.after, again and again.after) if m]
    objectives = [m.objective["loss"] for m in (run.before, run.after) if m and m.objective]
    return {"ranks": run.ranks, "losses": losses, "trained": run.trainable_parameters,
            "objectives": objectives}  # fmt: skip


def fsdp_config(state: str) -> dict[str, Any]:
    """FSDP2 by layer, with this kind of state in checkpoints."""
    return {
        "version": 2, "reshard_after_forward": True, "cpu_ram_efficient_loading": False,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["OlmoeDecoderLayer"],
        "state_dict_type": f"{state}_STATE_DICT",
    }  # fmt: skip


def result(model: PeftModel, dynamics: drlora.RankDynamics) -> dict[str, Any]:
    """The adapter in full, and the state of growth."""
    return {
        "adapter": {k: v.clone() for k, v in drlora.adapter_state(model).items()},
        "state": dynamics.state_dict(),
    }


def main() -> None:
    """All cases that are asked for, one file each."""
    warnings.simplefilter("ignore")
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for name in names:
        if name == "evaluated-first":
            found = evaluate_first(folder)
        elif name.startswith("recipe"):
            found = run_recipe(folder, name)
        else:
            found = compare(folder) if name == "own-loop" else train(folder, name, world)
        torch.save(found, folder / f"{name}.{rank}")
        print(name, flush=True)


if __name__ == "__main__":
    main()
