"""The README that lies beside an export: what was done, and how to load it."""

from __future__ import annotations

import os
from typing import Any

_WHAT = {
    "peft": (
        "A DR-LoRA adapter as a plain PEFT LoRA on `target_parameters`. The experts' ranks are "
        "padded with zeros to {rank}, and scalings are folded into B. It needs PEFT and "
        "transformers, not drlora."
    ),
    "per-expert": (
        "A DR-LoRA adapter as LoRA of rank {rank} on the gate, up and down projection of every "
        "expert, in 2-D tensors, for engines that keep experts apart."
    ),
    "merged": "The model with a DR-LoRA adapter merged into its weights, for transformers alone.",
}
_HOW = {
    "peft": """base = AutoModelForCausalLM.from_pretrained({base!r})
    model = PeftModel.from_pretrained(base, "this folder")""",
    "merged": 'model = AutoModelForCausalLM.from_pretrained("this folder")',
}


def readme(record: dict[str, Any], difference: str) -> str:
    """Markdown from what `drlora_export.json` says."""
    named = record.get("base_model")
    # A path of this machine means nothing to others, and says what is on it.
    base = named if named and not os.path.exists(named) else "BASE_MODEL"
    ranks = record["adapter_ranks"]
    lines = [f"# drlora export: {record['format']}", "", _WHAT[record["format"]].format(**record)]
    if record["format"] in _HOW:
        lines += ["", "    " + _HOW[record["format"]].format(base=base)]
    lines += [
        "",
        f"- base model: {base}",
        f"- the adapter's ranks: {ranks['smallest']} to {ranks['largest']} (mean "
        f"{ranks['mean']:.4g})",
        f"- checked before writing: {difference}",
        *(f"- {note}" for note in record["notes"]),
        "",
        "`drlora_export.json` holds the same for programs, and where adapter and base model were.",
    ]
    return "\n".join(lines) + "\n"
