"""One of two gloo processes that train under DeepSpeed: `engine_processes.py FOLDER RANK RUN...`

Used by tests/trainer/test_deepspeed.py. One pair of processes runs many configurations, for most of
the time goes into imports. Each trains a tiny OLMoE in transformers' Trainer, as users do, or is a
recipe that `drlora train` runs.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from peft import get_peft_model
from tiny import make_batch, make_class, make_model, trainable
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import drlora
from drlora.runs.recipe import load_recipe

STEPS, CUT = 18, 9  # ranks change after steps 3, 6, 9, 12 and 15
SETTINGS: dict[str, Any] = dict(
    r_init=2, r_target=6, r_max=16, p_grow=0.2, grow_every=3, warmup_steps=3, settle_steps=3,
    lora_alpha=8.0, young_rows="own", options={"move_share": 0.2},
)  # fmt: skip
CLIP = 0.04
_STAGE_3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
_ROUTER: dict[str, Any] = {"router": "train", "warmup_steps": 6}
_ROWS: dict[str, Any] = {
    "young_rows": "inherit",
    "options": {"young_a": "gradient", "move_share": 0.2},
}
_PROBED: dict[str, Any] = {
    "young_rows": "inherit",
    "options": {"young_a": "probe", "move_share": 0.2},
}
# Ranks and rows are placed from the first batches, by the callback.
_PLACED: dict[str, Any] = {
    "start": "gradient",
    "options": {"start_a": "gradient", "start_a_scale": 3.0, "move_share": 0.2},
}
_BESIDE: dict[str, Any] = {
    "target_modules": ["q_proj", "o_proj"],
    "options": {"start_a": "gradient-all", "start_a_scale": 3.0, "move_share": 0.2},
}
# Ranks are placed by counts, which no gradient is needed for.
_ROUTED: dict[str, Any] = {"start": "routing", "options": {"move_share": 0.2}}
# Name of a run -> what is said to DeepSpeed (None: DDP), and what differs in settings.
RUNS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "ddp": (None, {}),
    "z1": ({"stage": 1}, {}),
    "z2": ({"stage": 2}, {}),
    "z3": (_STAGE_3, {}),
    # Parameters stay together, and the Trainer writes no adapter of its own.
    "z3-persistent": (
        {
            "stage": 3,
            "stage3_param_persistence_threshold": 10**6,
            "stage3_gather_16bit_weights_on_model_save": False,
        },
        {},
    ),
    "z3-init": (_STAGE_3, {}),
    "z2-offload": ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, {}),
    "z2-bf16": ({"stage": 2}, {}),
    "z3-bf16": (_STAGE_3, {}),
    "ddp-router": (None, _ROUTER),
    "z2-router": ({"stage": 2}, _ROUTER),
    "z3-router-init": (_STAGE_3, _ROUTER),
    "ddp-rows": (None, _ROWS),
    "z2-rows": ({"stage": 2}, _ROWS),
    "z3-rows": (_STAGE_3, _ROWS),
    "ddp-probed": (None, _PROBED),
    "z2-probed": ({"stage": 2}, _PROBED),
    "z3-probed": (_STAGE_3, _PROBED),
    "ddp-placed": (None, _PLACED),
    "z1-placed": ({"stage": 1}, _PLACED),
    "z2-placed": ({"stage": 2}, _PLACED),
    "z3-placed": (_STAGE_3, _PLACED),
    "z2-placed-checkpointed": ({"stage": 2}, _PLACED),
    "z3-placed-checkpointed-init": (_STAGE_3, _PLACED),
    "z2-placed-bf16": ({"stage": 2}, _PLACED),
    "z3-placed-bf16": (_STAGE_3, _PLACED),
    "ddp-beside": (None, _BESIDE),
    "z2-beside": ({"stage": 2}, _BESIDE),
    "z3-beside": (_STAGE_3, _BESIDE),
    "ddp-routed": (None, _ROUTED),
    "z2-routed": ({"stage": 2}, _ROUTED),
    "z3-routed": (_STAGE_3, _ROUTED),
    # A block of Mixtral is a leaf module: gradients are taken where the whole block is through.
    "ddp-mixtral": (None, _PLACED),
    "z3-mixtral": (_STAGE_3, _PLACED),
    "ddp-mixtral-router": (None, _ROUTER),
    "z3-mixtral-router-checkpointed-init": (_STAGE_3, _ROUTER),
    # Experts with biases, and halves of a matrix that lie interleaved.
    "ddp-gpt_oss": (None, _PLACED),
    "z3-gpt_oss": (_STAGE_3, _PLACED),
}
RESUMED = ("z2", "z3", "z3-init", "z2-offload", "z2-bf16", "z3-bf16", "z2-router", "z3-placed")
LOOPS: dict[str, Any] = {
    "loop": None, "loop-z2": {"stage": 2}, "loop-z3": _STAGE_3,
    "loop-placed": None, "loop-placed-z2": {"stage": 2}, "loop-placed-z3": _STAGE_3,
}  # fmt: skip
"""Loops of one's own, the first by every process alone on the examples of both."""


# Recipes that `drlora train` runs on the embedded model; None: DDP. Those come first, since
# accelerate keeps DeepSpeed's settings.
_INFORMED = ["method=drlora-informed"]
_PACKED = ["training.packing=true"]
_DPO = [
    "objective=dpo", "data.train=$pairs.jsonl", "data.eval=$held-out.jsonl",
    "adapter.settle_steps=3",
]  # fmt: skip
# Slower: on so few words the loss falls to zero, and rounding grows with each step.
_PLACED_DPO = [*_INFORMED, *_DPO, "training.learning_rate=0.0005"]
RECIPES: dict[str, tuple[dict[str, Any] | None, list[str]]] = {
    "train-ddp": (None, _INFORMED),
    "train-packed-ddp": (None, [*_INFORMED, *_PACKED]),
    "train-dpo-ddp": (None, _DPO),
    "train-placed-dpo-ddp": (None, _PLACED_DPO),
    "train-z2": ({"stage": 2}, _INFORMED),
    "train-z3": (_STAGE_3, _INFORMED),
    "train-packed-z3": (_STAGE_3, [*_INFORMED, *_PACKED]),
    "train-dpo-z3": (_STAGE_3, _DPO),
    "train-placed-dpo-z3": (_STAGE_3, _PLACED_DPO),
}
RECIPE = [
    "training.max_steps=12", "training.per_device_train_batch_size=4", "training.use_cpu=true",
    "training.save_steps=6", "training.eval_strategy=no", "training.logging_steps=1",
    "evaluation.loss_examples=8", "evaluation.exact_match_examples=4",
    "adapter.warmup_steps=2", "adapter.grow_every=2",
]  # fmt: skip


class Examples(Dataset):
    """64 rows of random tokens."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {key: value[0] for key, value in make_batch(1000 + number, rows=1).items()}


class History(TrainerCallback):
    """What is known after each change of rank, and how far routers have moved."""

    def __init__(self, callback: drlora.DrLoraCallback) -> None:
        self.callback = callback
        self.found: dict[str, torch.Tensor] = {}
        self.routers: list[float] = []
        self.budgets: list[tuple[int, int]] = []
        self._ranks: object = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._first = [drlora.adapter_state(model)[key].clone() for key in self._names(model)]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        dynamics = self.callback.dynamics
        if names := self._names(model):
            now = drlora.adapter_state(model)
            moved = [(now[n] - f).abs().max() for n, f in zip(names, self._first, strict=True)]
            self.routers.append(float(max(moved)))
        if dynamics.ranks() != self._ranks:
            self._ranks = dynamics.ranks()
            self.budgets.append(dynamics.budget())
            for key, value in dynamics.state_dict().items():
                self.found[f"{state.global_step} {key}"] = value

    @staticmethod
    def _names(model) -> list[str]:
        return [name for name, _ in model.named_parameters() if ".modules_to_save." in name]


class Counted:
    """All-reduces of torch.distributed, by size, while it is entered."""

    def __enter__(self) -> list[int]:
        self.sizes: list[int] = []
        self._real = dist.all_reduce

        def counting(tensor, *args, **kwargs):
            self.sizes.append(tensor.numel())
            return self._real(tensor, *args, **kwargs)

        dist.all_reduce = counting
        return self.sizes

    def __exit__(self, *error: object) -> None:
        dist.all_reduce = self._real


def deepspeed_config(zero: dict[str, Any]) -> dict[str, Any]:
    """As a user has it in a file."""
    return {
        "zero_optimization": {"stage3_gather_16bit_weights_on_model_save": True, **zero},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": "auto"},
    }


def base_model(name: str) -> Any:
    """The model that a run of `RUNS` or `LOOPS` trains: of the family that its name has in it."""
    if "gpt_oss" in name:
        return make_class("GptOssForCausalLM", num_hidden_layers=1)
    return make_model("mixtral" if "mixtral" in name else "olmoe", num_hidden_layers=1)


def make_trainer(folder: Path, name: str, **changes: Any) -> tuple[Trainer, History]:
    """A trainer of one of `RUNS`."""
    zero, settings = RUNS[name]
    config = None
    if zero:
        config = deepspeed_config(zero)
    arguments = TrainingArguments(
        str(folder / name), per_device_train_batch_size=2, gradient_accumulation_steps=2,
        max_steps=STEPS, use_cpu=True, seed=3, deepspeed=config, report_to=[], logging_steps=1,
        save_steps=CUT, optim="adamw_torch", learning_rate=3e-3, disable_tqdm=True,
        weight_decay=0.1, max_grad_norm=CLIP, dataloader_pin_memory=False,
        bf16=name.endswith("bf16"), ddp_find_unused_parameters=False,
        gradient_checkpointing="checkpointed" in name, **changes,
    )  # fmt: skip
    if name.endswith("init"):
        saved = folder / ("mixtral" if "mixtral" in name else "olmoe")
        base = AutoModelForCausalLM.from_pretrained(saved)  # zero.Init, by the arguments
        assert next(base.parameters()).numel() == 0
    else:
        base = base_model(name)
    torch.manual_seed(1)
    model = get_peft_model(
        base, drlora.DrLoraConfig(**{**SETTINGS, "router": "frozen", **settings})
    )
    callback = drlora.DrLoraCallback()
    history = History(callback)
    trainer = Trainer(model, arguments, train_dataset=Examples(), callbacks=[callback, history])
    return trainer, history


def train(folder: Path, name: str, resumed: bool = False) -> None:
    """Train one of `RUNS`, from the start or from its checkpoint; keep what came of it."""
    trainer, history = make_trainer(folder, name)
    checkpoint = str(folder / name / f"checkpoint-{CUT}") if resumed else None
    with Counted() as sizes:
        trainer.train(resume_from_checkpoint=checkpoint)
    dynamics = history.callback.dynamics
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry]
    kept = {
        "history": history.found,
        "final": {key: v.clone() for key, v in drlora.adapter_state(trainer.model).items()},
        "losses": torch.tensor([float(loss) for loss in losses]),
        "norms": torch.tensor([float(norm) for norm in norms]),
        "budgets": history.budgets,
        "routers": history.routers,
        "sums": sizes.count(2 * dynamics.budget()[1]),
    }
    torch.save(kept, folder / f"{name}{'-resumed' * resumed}.{dist.get_rank()}")


def loop(folder: Path, name: str) -> None:
    """A loop of one's own, two batches a step and process; all four in one without ZeRO."""
    zero, rank = LOOPS[name], dist.get_rank()
    torch.manual_seed(1)
    settings = {**SETTINGS, **(_PLACED if "placed" in name else {})}
    model = get_peft_model(
        make_model(num_hidden_layers=1), drlora.DrLoraConfig(**settings, router="frozen")
    ).train()
    optimizer: Any = torch.optim.AdamW(trainable(model), lr=3e-3, weight_decay=0.1)
    engine: Any = None
    if zero:
        config = {
            "zero_optimization": zero,
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": CLIP,
            "zero_allow_untested_optimizer": True,
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        optimizer = engine.optimizer
    if "placed" in name:
        if engine:
            refuse_without_optimizer(model)
        drlora.place_ranks(model, [make_batch(number) for number in range(4)], optimizer=optimizer)
    dynamics = drlora.RankDynamics(model, STEPS)
    dynamics.watch(optimizer)
    found, budgets = {}, []
    for step in range(STEPS):
        numbers = range(4 * step, 4 * step + 4)
        for number in numbers[2 * rank : 2 * rank + 2] if engine else numbers:
            loss = (engine or model)(**make_batch(number)).loss
            if engine:
                engine.backward(loss)
                engine.step()
            else:
                (loss / len(numbers)).backward()
        if not engine:
            torch.nn.utils.clip_grad_norm_(trainable(model), CLIP)
        dynamics.before_optimizer_step()
        if not engine:
            optimizer.step()
        if dynamics.after_optimizer_step(optimizer):
            budgets.append(dynamics.budget())
            for key, value in dynamics.state_dict().items():
                found[f"{step + 1} {key}"] = value
        if not engine:
            optimizer.zero_grad()
    final = {key: value.clone() for key, value in drlora.adapter_state(model).items()}
    kept = {"history": found, "final": final, "budgets": budgets}
    torch.save(kept, folder / f"{name}.{rank}")


def run_recipe(folder: Path, name: str) -> None:
    """`drlora train`, to the end; with ZeRO also from a checkpoint, and without a step left."""
    zero, more = RECIPES[name]
    more = [setting.replace("=$", f"={folder}/") for setting in more]
    settings = [*RECIPE, *more, f"output_dir={folder / name}"]
    if zero is not None:
        settings.append(f"training.deepspeed={folder / name}.json")
    if dist.get_rank() == 0:
        (folder / f"{name}.json").write_text(json.dumps(deepspeed_config(zero or {})))
        pairs = [
            json.dumps({"prompt": f"{n}:", "chosen": " yes", "rejected": " no"}) for n in range(96)
        ]
        (folder / "pairs.jsonl").write_text("\n".join(pairs[:80]))
        (folder / "held-out.jsonl").write_text("\n".join(pairs[80:]))
    dist.barrier()
    recipe = load_recipe("embedded", settings)
    run = folder / name
    kinds = ("straight", "over", "resumed") if name in ("train-z2", "train-z3") else ("straight",)
    for kind in kinds:
        if dist.get_rank() == 0 and kind != "straight":
            (run / "result.json").unlink()
            (run / "adapter_model.safetensors").unlink(missing_ok=True)
            if kind == "resumed":
                shutil.rmtree(run / "checkpoints" / "checkpoint-12")
        dist.barrier()
        result = drlora.train(recipe, resume=kind != "straight")
        kept = {
            "before": result.before.loss.loss,
            "after": result.after.loss.loss,
            "ranks": result.ranks,
            "trained": result.trainable_parameters,
            "objective": (result.after.objective or {}).get("loss"),
        }
        torch.save(kept, folder / f"{name}-{kind}.{dist.get_rank()}")


def refuse_without_optimizer(model: Any) -> None:
    """`place_ranks` says what it needs, before it reads a batch."""
    try:
        drlora.place_ranks(model, [])
    except drlora.ConfigError as error:
        assert "give it optimizer=engine.optimizer" in str(error)
    else:
        raise AssertionError("placed without the optimizer")


def main() -> None:
    """The runs that are named."""
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    named = sys.argv[3:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    # Without this zero.Init would count one process where there is no accelerator.
    deepspeed.init_distributed("gloo", init_method=meet, rank=rank, world_size=2)
    if rank == 0:
        for kind in ("olmoe", "mixtral"):
            base_model(kind).save_pretrained(folder / kind)
    dist.barrier()
    for name in named:
        print("run", name, flush=True)
        if name in LOOPS or name in RECIPES:
            (loop if name in LOOPS else run_recipe)(folder, name)
            continue
        train(folder, name)
        if name in RESUMED:
            train(folder, name, resumed=True)


if __name__ == "__main__":
    main()
