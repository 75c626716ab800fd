"""The format `peft`: plain LoRA on `target_parameters`, for PEFT without drlora."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drlora.export import peft_lora
from drlora.export.format import LoraFormat, name_base_from_root, write_tokens
from drlora.export.make import Made
from drlora.export.updates import Updates


class _Peft(LoraFormat):
    name = "peft"
    summary = (
        "A DR-LoRA adapter as a plain PEFT LoRA on `target_parameters`. The experts' ranks are "
        "padded with zeros to {rank}, and scalings are folded into B. It needs PEFT and "
        "transformers, not drlora."
    )
    loading = """base = AutoModelForCausalLM.from_pretrained({base!r})
    model = PeftModel.from_pretrained(base, "this folder")"""

    def size_bytes(self, base: PreTrainedModel, updates: Updates) -> int:
        peft_lora.refuse_if_not_readable(base, updates)
        return peft_lora.size_bytes(updates)

    def attach(self, base: PreTrainedModel, updates: Updates) -> PeftModel:
        return peft_lora.attach(base, updates)

    def write(
        self,
        made: Made,
        updates: Updates | None,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase | None,
        max_shard_size: str | None,
    ) -> None:
        assert updates is not None
        write_tokens(updates, tokenizer, folder)
        name_base_from_root(made.result.peft_config["default"])
        made.result.save_pretrained(folder, save_embedding_layers=bool(updates.embeddings))


FORMAT = _Peft()
