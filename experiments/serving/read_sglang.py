"""SGLang's loader on a CPU: python read_sglang.py JOB.json, in its environment; see compare.py.

SGLang has no build for a CPU, so no logits: its own classes read the adapter's folder (LoRAConfig,
LoRAAdapter) and fill the buffers that its kernels would read (LoRAMemoryPool). B A of each expert
in them is compared with the merged model's weight minus the base's. Its kernels' package and
torchvision are stood in for by nothing; the model is a skeleton with SGLang's names.
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
import transformers.image_processing_utils  # noqa: F401  # before torchvision seems to be there
import transformers.image_utils  # noqa: F401
import transformers.processing_utils  # noqa: F401
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig
from transformers.utils import import_utils

ABSENT = ("sgl_kernel", "torchvision")
LEAVES = {"mixtral": ("w1", "w3", "w2")}


class Nothing(types.ModuleType):
    """A module in which everything is there and does nothing."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, MagicMock(name=name))
        return getattr(self, name)


class Finder:
    """Finds the absent packages."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """A spec of `Nothing`."""
        if name.partition(".")[0] in ABSENT:
            return importlib.machinery.ModuleSpec(name, self)
        return None

    def create_module(self, spec: Any) -> Nothing:
        """An empty module."""
        return Nothing(spec.name)

    def exec_module(self, module: Any) -> None:
        """Nothing to be run."""


def bare(kind: type) -> Any:
    """A module of SGLang's that was not initialised."""
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    return made


def skeleton(config: Any, block: str, is_interleaved: bool) -> tuple[nn.Module, list[dict]]:
    """A model with SGLang's names, and its layers' experts with LoRA."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.lora.layers import FusedMoEWithLoRA

    model: Any = nn.Module()
    model.config, model.dummy = config, nn.Parameter(torch.zeros(1))
    model.model = nn.Module()
    model.model.layers = nn.ModuleList()
    wrapped = []
    for number in range(config.num_hidden_layers):
        experts = bare(FusedMoE)
        experts.moe_runner_config = types.SimpleNamespace(
            is_gated=True, gemm1_alpha=1.7 if is_interleaved else None
        )
        experts.is_shared_fused_moe, experts.moe_tp_rank = False, 0
        layer, moe = nn.Module(), nn.Module()
        moe.experts = experts
        setattr(layer, block, moe)
        model.model.layers.append(layer)
        around = bare(FusedMoEWithLoRA)
        around.base_layer, around.tp_size = experts, 1
        around._uses_interleaved_gate_up = is_interleaved
        around.intermediate_size_per_partition = getattr(
            config, "moe_intermediate_size", config.intermediate_size
        )
        wrapped.append({f"model.layers.{number}.{block}.experts": around})
    return model, wrapped


def updates_of(job: dict[str, Any], block: str, number: int, expert: int) -> list[torch.Tensor]:
    """gate_up and down (O, I) of one expert: merged minus base."""
    base = load_file(Path(job["model"]) / "model.safetensors")
    merged = load_file(Path(job["merged"]) / "model.safetensors")
    place = f"model.layers.{number}.{block}.experts."
    if f"{place}gate_up_proj" in base:  # (E, I, O)
        names = [f"{place}{leaf}" for leaf in ("gate_up_proj", "down_proj")]
        return [(merged[name][expert] - base[name][expert]).T for name in names]
    leaves = LEAVES.get(job["family"], ("gate_proj", "up_proj", "down_proj"))
    parts = [
        merged[key] - base[key] for key in (f"{place}{expert}.{leaf}.weight" for leaf in leaves)
    ]
    return [torch.cat(parts[:2]), parts[2]]


def main() -> None:
    """Read the job, fill the buffers, write how far they are off."""
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    import_utils.is_torchvision_available()
    sys.meta_path.insert(0, Finder())
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.lora import lora, mem_pool, utils
    from sglang.srt.lora.lora_config import LoRAConfig

    one = types.SimpleNamespace(
        tp_size=1, tp_rank=0, attn_tp_size=1, moe_ep_size=1, moe_ep_rank=0, moe_tp_size=1,
        moe_tp_rank=0,
    )  # fmt: skip
    mem_pool.get_parallel = lambda: one
    config = AutoConfig.from_pretrained(job["model"])
    block = "block_sparse_moe" if job["family"] == "mixtral" else "mlp"
    model, wrapped = skeleton(config, block, is_interleaved=job["family"] == "gpt_oss")
    settings = LoRAConfig(path=job["adapter"], base_vocab_size=config.vocab_size)
    targets = utils.get_normalized_target_modules(settings.target_modules)
    if not {"gate_up_proj", "down_proj"} <= targets:
        sys.exit(f"error: SGLang would not wrap experts for target_modules {sorted(targets)}")
    # Attention is ordinary; its layers are not in the skeleton.
    targets = {"gate_up_proj", "down_proj"}
    adapter = lora.LoRAAdapter("a", settings, config, LoadConfig(), None, base_model=model)
    tensors = load_file(Path(job["adapter"]) / "adapter_model.safetensors")
    experts = {key: value for key, value in tensors.items() if "self_attn" not in key}
    adapter.initialize_weights_from_tensors(experts)
    pool = mem_pool.LoRAMemoryPool(
        config, 2, torch.float32, settings.r, targets, model, "lru", 0, strict_loading=True
    )
    pool.base_model = model
    pool.load_lora_weight_to_buffer("a", 0, adapter, wrapped, None, None)
    block_of_files = block if job["family"] == "mixtral" else "mlp"
    worst, largest = 0.0, 0.0
    for number in range(config.num_hidden_layers):
        a_up, b_up = (x["gate_up_proj_moe"][number][0] for x in (pool.A_buffer, pool.B_buffer))
        a_down, b_down = (x["down_proj_moe"][number][0] for x in (pool.A_buffer, pool.B_buffer))
        for expert in range(len(a_up)):
            a, b, rank = a_up[expert], b_up[expert], settings.r
            if job["family"] == "gpt_oss":  # in turns
                both = torch.empty(len(b), a.shape[1])
                both[0::2], both[1::2] = b[0::2] @ a[:rank], b[1::2] @ a[rank:]
            else:
                gate, up = b.chunk(2)
                both = torch.cat([gate @ a[:rank], up @ a[rank:]])
            found = (both, b_down[expert] @ a_down[expert])
            wanted = updates_of(job, block_of_files, number, expert)
            for own, right in zip(found, wanted, strict=True):
                worst = max(worst, float((own - right).abs().max()))
                largest = max(largest, float(right.abs().max()))
    said = {"largest_difference": worst, "effect": largest}
    Path(job["out"]).write_text(json.dumps(said), "utf-8")


if __name__ == "__main__":
    main()
