"""The memory tables of docs/many-processes.md: `python tools/make_memory.py [--check]`.

Parameters are counted on the models themselves, made from their published configurations without
memory for weights, as `drlora inspect` does.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from made_pages import write_or_check
from transformers import GptOssConfig, OlmoeConfig, PreTrainedConfig, Qwen3MoeConfig

from drlora import DrLoraConfig
from drlora.runs.inspect import inspect
from drlora.runs.loading import load_architecture, model_on_meta

PAGE = Path(__file__).parents[1] / "docs" / "many-processes.md"
BEGIN, END = "<!-- make_memory.py: begin -->\n", "<!-- make_memory.py: end -->\n"
RANK, GB = 16, 1e9
WEIGHT_BYTES = 2  # bfloat16
PACKED_BYTES = 0.5 + 4 / 64  # NF4: half a byte, and a float32 scale for 64
TRAINED_BYTES = 4 * (1 + 1 + 2)  # float32: the number, its gradient, Adam's two moments
GPUS = (8, 64)
EXPERT_PROCESSES = 8  # ep_size: the GPUs of one machine


def models() -> dict[str, PreTrainedConfig]:
    """The sizes that the models' config.json files have."""
    qwen3 = dict(head_dim=128, num_experts=128, num_experts_per_tok=8, num_key_value_heads=4,
                 norm_topk_prob=True, vocab_size=151936)  # fmt: skip
    return {
        "OLMoE-1B-7B": OlmoeConfig(
            hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_experts=64,
            num_experts_per_tok=8, num_attention_heads=16, vocab_size=50304,
        ),
        "Qwen3-30B-A3B": Qwen3MoeConfig(
            hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=48,
            num_attention_heads=32, **qwen3,
        ),
        "GPT-OSS-120B": GptOssConfig(),
        "Qwen3-235B-A22B": Qwen3MoeConfig(
            hidden_size=4096, moe_intermediate_size=1536, num_hidden_layers=94,
            num_attention_heads=64, **qwen3,
        ),
    }  # fmt: skip


def sizes(config: PreTrainedConfig) -> dict[str, float]:
    """Bytes of the weights, of all that is trained, and of what a layer gathers."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps({**config.to_dict(), "architectures": None}))
        settings = DrLoraConfig(r_init=RANK // 2, r_target=RANK, r_max=2 * RANK)
        found = inspect(str(path), settings)
        skeleton = model_on_meta(load_architecture(str(path)))
    layers = skeleton.get_submodule("model.layers")
    count = len(list(layers.children()))
    layer, experts_of_layer = max(
        (
            sum(p.numel() for p in one.parameters()),
            sum(p.numel() for name, p in one.named_parameters() if ".experts." in name),
        )
        for one in layers.children()
    )
    trained = found.adapter.r_target.parameters
    experts = experts_of_layer * count  # every layer of these models has as many
    return {
        "parameters": found.parameters.total,
        "trained": trained,
        "weights": found.parameters.total * WEIGHT_BYTES,
        "state": trained * TRAINED_BYTES,
        "packed": (found.parameters.total - experts) * WEIGHT_BYTES + experts * PACKED_BYTES,
        # Gathered while it computes: base weights, and the adapter's share in float32.
        "gathered": layer * WEIGHT_BYTES + trained / count * 4,
        "gathered dense": (layer - experts_of_layer) * WEIGHT_BYTES + trained / count * 4,
        "gathered experts": experts_of_layer * WEIGHT_BYTES,
    }


def shared(s: dict[str, float], gpus: int) -> float:
    """Bytes on each GPU under FSDP2."""
    # Two layers are there at once: the one that computes, and the next one on its way.
    return (s["weights"] + s["state"]) / gpus + 2 * s["gathered"]


def spread(s: dict[str, float], gpus: int) -> float:
    """Bytes on each GPU under FSDP2 with experts spread over `EXPERT_PROCESSES`."""
    # Where each expert has one process, its weights are there already and are not gathered.
    copies = gpus // EXPERT_PROCESSES
    experts = s["gathered experts"] / EXPERT_PROCESSES if copies > 1 else 0.0
    return (s["weights"] + s["state"]) / gpus + 2 * (s["gathered dense"] + experts)


def table(*names: str) -> str:
    """Two tables in Markdown, of some models or all: what there is, and what each GPU holds."""
    chosen = {name: config for name, config in models().items() if not names or name in names}
    found = {name: sizes(config) for name, config in chosen.items()}
    lines = [
        "| model | parameters | weights, bf16 | trained at rank 16 | its state, fp32 "
        "| one layer, gathered |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {s['parameters'] / 1e9:.1f} B | {s['weights'] / GB:.1f} GB "
            f"| {s['trained'] / 1e6:,.0f} M | {s['state'] / GB:.1f} GB "
            f"| {s['gathered'] / GB:.2f} GB |"
            for name, s in found.items()
        ),
        "",
        "| each GPU | DDP | DDP, experts in NF4 | "
        + " | ".join(f"FSDP2 on {n} | FSDP2 and EP on {n}" for n in GPUS)
        + " |",
        "|---|---|---|" + "---|---|" * len(GPUS),
    ]
    for name, s in found.items():
        columns = [s["weights"] + s["state"], s["packed"] + s["state"]]
        for gpus in GPUS:
            columns += [shared(s, gpus), spread(s, gpus)]
        lines.append(f"| {name} | " + " | ".join(f"{c / GB:.1f} GB" for c in columns) + " |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """The page with its table made anew."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, with_table, __doc__))
