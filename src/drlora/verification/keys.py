"""What each name in an adapter's file stands for, in the spelling of any tool.

    ...mlp.experts.base_layer.lora_A.weight     packed   PEFT, 2-D: gate_up (inner)
    ...mlp.experts.lora_A.weight                packed   PEFT, 2-D: down (outer)
    ...mlp.experts.gate_up_proj.lora_A.weight   stacked  3-D (E, r, in), (E, out, r): SGLang, mlx-lm
    ...mlp.experts.7.gate_proj.lora_A.weight    apart    2-D: vLLM, llama.cpp, transformers 4
    ...experts.drlora_adapters.pools.down.owner pool     drlora's own
    ...self_attn.q_proj.lora_A.weight           lora     any other layer
    ...mlp.gate.weight                          whole    trained in full

PEFT's prefix may be missing, as in the files of Megatron-Bridge; an adapter's name may stand
after lora_A, as in a raw state dict; and mlx-lm writes lora_a.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from drlora.export.base_weights import LEAVES

ROUTERS = ("gate", "router")
_PREFIX = re.compile(r"^(base_model\.model\.)+")
_NAMED = re.compile(r"\.lora_([AB])\.(?!weight$)[^.]+(\.weight)?$")
_BARE = re.compile(r"\.lora_([ABab])(\.weight)?$")
_APART = re.compile(r"^(.*\.experts)\.(\d+)\.(\w+)\.lora_([AB])\.weight$")
_STACKED = re.compile(r"^(.*\.(?:experts|switch_mlp))\.(\w+)\.lora_([AB])\.weight$")
_PACKED = re.compile(r"^(.*\.experts)(\.base_layer)?\.lora_([AB])\.weight$")
_POOL = re.compile(r"^(.*)\.drlora_adapters\.(?:pools\.(\w+)\.)?(\w+)$")
_LORA = re.compile(r"^(.*)\.lora_([AB])\.weight$")


@dataclass(frozen=True)
class Key:
    """One name, taken apart.

    Attributes:
        kind: packed, stacked, apart, pool, lora or whole.
        module: full name of the experts module, or of the layer.
        leaf: of stacked and apart the projection's own name, of packed `inner` or `outer`, of pool
            the projection.
        expert: of apart.
        part: A or B; of pool and whole the rest of the name.
    """

    kind: str
    module: str
    leaf: str = ""
    expert: int | None = None
    part: str = ""


def parse(key: str) -> Key:
    """What `key` stands for."""
    name = _PREFIX.sub("", key)
    if match := _POOL.match(name):
        return Key("pool", match[1], match[2] or "", None, match[3])
    name = _NAMED.sub(r".lora_\1.weight", name)
    name = _BARE.sub(lambda found: f".lora_{found[1].upper()}.weight", name)
    if match := _APART.match(name):
        return Key("apart", match[1], match[3], int(match[2]), match[4])
    if match := _PACKED.match(name):
        return Key("packed", match[1], "inner" if match[2] else "outer", None, match[3])
    match = _STACKED.match(name)
    if match and match[2] in LEAVES:
        return Key("stacked", match[1], match[2], None, match[3])
    if match := _LORA.match(name):
        return Key("lora", match[1], match[1].rpartition(".")[2], None, match[2])
    module, _, part = name.rpartition(".")
    return Key("whole", module, module.rpartition(".")[2], None, part)
