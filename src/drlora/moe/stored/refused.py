"""Quantised checkpoints that cannot be kept as they are, refused by name before they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drlora.errors import ConfigError, shown
from drlora.moe.stored.base import FORMS

# quant_method -> what it is called, where it is called otherwise.
REFUSED = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "eetq": "EETQ",
    "fbgemm_fp8": "FBGEMM FP8",
    "fouroversix": "FourOverSix",
    "fp_quant": "FP-Quant",
    "gemma": "Gemma's own",
    "gguf": "GGUF",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "metal": "Metal",
    "modelopt": "NVFP4 or FP8 of ModelOpt",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "quanto": "Quanto",
    "quark": "Quark",
    "sinq": "SINQ",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}
# Those that keep a tensor of their own for each expert, which transformers does not put together.
LOSES_EXPERTS = REFUSED.keys() - {
    "fbgemm_fp8", "gemma", "gguf", "metal", "mxfp8", "quanto", "torchao"
}  # fmt: skip


def method_of(settings: Mapping[str, Any]) -> str:
    """What a checkpoint's `quantization_config` says it is quantised by."""
    found = settings.get("quant_method") or ""
    method = str(getattr(found, "value", found))  # transformers has an enumeration of them
    if method == "bitsandbytes" or settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return f"bitsandbytes_{8 if settings.get('load_in_8bit') else 4}bit"
    return method


def refuse_unknown(name: str, settings: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose form no file of this folder knows.

    Raises:
        ConfigError: with the way out.
    """
    method = method_of(settings)
    if method in FORMS:
        return
    said = REFUSED.get(method)
    kind = f"is quantised with {said} (quant_method {method!r})" if said else (
        f"is quantised in a way that is not known (quant_method {shown(method)})"
    )  # fmt: skip
    raise ConfigError(
        f"the checkpoint {name} {kind}: its experts cannot be kept so under an adapter. Load the "
        f"model's 16-bit checkpoint with quantization_config=drlora.QuantisedExperts('nf4'), or "
        f"one that is quantised with {', '.join(sorted(FORMS))}."
    )
