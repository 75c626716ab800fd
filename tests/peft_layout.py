"""Where PEFT's LoRA on target_parameters keeps its factors."""

from __future__ import annotations

PARAMETERS = {"gate_up": "gate_up_proj", "down": "down_proj"}


def peft_factors(model, rank):
    """(block, projection) -> PEFT's (lora_A (E*r, in), lora_B (out, r*E)) parameters."""
    from peft.tuners.lora.layer import ParamWrapper

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            block = name.split("base_model.model.")[1].split(".experts")[0]
            projection = next(p for p, key in PARAMETERS.items() if key == module.parameter_name)
            found[block, projection] = (
                module.lora_A["default"].weight,
                module.lora_B["default"].weight,
            )
    return found


def to_pool_layout(a, b, experts):
    """PEFT keeps A at row e*r + k and B at column k*E + e; a pool keeps both at row e*r + k."""
    outputs = b.shape[0]
    return a, b.reshape(outputs, -1, experts).permute(2, 1, 0).reshape(-1, outputs)
