"""What is read from an adapter's file is used as it is, also beside a base in 16 bits."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import make_model
from tiny_adapter import make_settings, train
from transformers import AutoModelForCausalLM

from drlora.runs.loading import load_adapter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lora_on_other_layers_is_not_rounded(tmp_path, dtype):
    """PEFT rounds it to the base's dtype where the adapter was made without memory."""
    make_model().to(dtype).save_pretrained(tmp_path / "base")

    def base():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base")

    model = train(get_peft_model(base(), make_settings(target_modules=["q_proj"], target_rank=3)))
    model.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    for loaded in (
        load_adapter(base(), str(tmp_path / "adapter")),
        PeftModel.from_pretrained(base(), tmp_path / "adapter"),
        PeftModel.from_pretrained(base(), tmp_path / "adapter", low_cpu_mem_usage=True),
    ):
        layer = loaded.get_base_model().get_submodule(name)
        for part, factors in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            own = factors["default"].weight
            wanted = stored[f"base_model.model.{name}.{part}.weight"]
            assert own.dtype == torch.float32 and torch.equal(own, wanted)
            assert not torch.equal(wanted, wanted.bfloat16().float())
