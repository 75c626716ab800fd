"""Sound adapters in every layout, and merges, of tiny models; tests spoil copies of them."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_batch, make_model, trainable
from tiny_adapter import trained

from drlora.export.plan import apply_plan, make_plan

IDS = make_batch(7)["input_ids"]
BATCHES = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
FAMILIES = ["olmoe", "qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe"]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def make_all(family: str, folder: Path) -> Path:
    """base, ours, peft, per-expert, merged, stacked, bare and by-peft of one family."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_model(family).save_pretrained(folder / "base")
        trained(family, router="train").save_pretrained(folder / "ours")
        for format in ("peft", "per-expert", "merged"):
            model = trained(family, router="train")
            apply_plan(make_plan(model, format), model, BATCHES, folder / format)
        by_peft(family, folder / "by-peft")
    stacked(folder / "per-expert", folder / "stacked")
    bare(folder / "per-expert", folder / "bare")
    return folder


def by_peft(family: str, folder: Path, steps: int = 20, **changes) -> None:
    """PEFT's own LoRA on target_parameters, trained by a plain loop; and merged by PEFT."""
    torch.manual_seed(1)
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_parameters=parameters, **changes)
    model = get_peft_model(make_model(family), config)
    optimizer = torch.optim.AdamW(trainable(model), lr=5e-3)
    for step in range(steps):
        model(**make_batch(step, rows=4)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    model.merge_and_unload().save_pretrained(folder / "merged")


def stacked(source: Path, folder: Path) -> None:
    """A 3-D tensor each projection, as SGLang reads them."""
    groups: dict[str, dict[int, torch.Tensor]] = {}

    def stack(tensors, config):
        for key in [key for key in tensors if ".experts." in key]:
            before, _, after = key.partition(".experts.")
            expert, _, rest = after.partition(".")
            groups.setdefault(f"{before}.experts.{rest}", {})[int(expert)] = tensors.pop(key)
        for key, parts in groups.items():
            tensors[key] = torch.stack([parts[expert] for expert in sorted(parts)])

    spoil(source, folder, stack)


def bare(source: Path, folder: Path) -> None:
    """Without PEFT's prefix, and with an adapter's name, as other tools write."""

    def rename(tensors, config):
        for key in list(tensors):
            name = key.removeprefix("base_model.model.")
            tensors[name.replace(".weight", ".default.weight")] = tensors.pop(key)

    spoil(source, folder, rename)


def spoil(source: Path, folder: Path, change: Callable[[dict, dict], None]) -> Path:
    """A copy whose tensors and settings `change` has changed in place."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("merged"), dirs_exist_ok=True)
    tensors, config = load_file(source / WEIGHTS), json.loads((source / CONFIG).read_text())
    change(tensors, config)
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def spoil_model(source: Path, folder: Path, change: Callable[[dict], None]) -> Path:
    """A copy of a model whose tensors `change` has changed in place."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
