"""Small checkpoints that are quantised already, written as other libraries write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from drlora.ops.storage import fp8, nf4
from drlora.ops.storage.packed import Parts, packed_format

# Names of weights that such checkpoints leave in 16 bits.
PLAIN = ("embed", "norm", "lm_head", ".gate.weight", "router", "e_score")


def rewrite(folder: Path, quantise: Any, settings: dict[str, Any], plain=PLAIN) -> dict[str, Any]:
    """Have the checkpoint in `folder` keep each matrix as `quantise(name, weight)` gives it.

    Returns:
        What was written, by names.
    """
    (file,) = folder.glob("*.safetensors")
    written: dict[str, Tensor] = {}
    for name, weight in load_file(file).items():
        is_left = weight.dim() < 2 or any(part in name for part in plain)
        written |= {name: weight} if is_left else quantise(name, weight)
    replace(folder, written, settings)
    return written


def bnb_settings(nested: bool = False, **changes: Any) -> dict[str, Any]:
    """What bitsandbytes writes into config.json."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head", "gate", "router"],
        **changes,
    }


def bnb(
    name: str, weight: Tensor, nested: bool = False, changes: dict[str, Any] | None = None
) -> dict[str, Tensor]:
    """A matrix, or one of all experts, as `Linear4bit` and `replace_parameter_4bit` save it."""
    kind = packed_format("nf4-nested" if nested else "nf4")
    parts = kind.encode(weight.reshape(-1, 64))
    return bnb_of(name, parts, tuple(weight.shape), weight.dtype, changes or {})


def bnb_of(
    name: str, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype, changes: dict[str, Any]
) -> dict[str, Tensor]:
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": shape,
    }
    found = {
        name: parts["codes"].reshape(-1, 1),
        f"{name}.quant_map": torch.tensor(nf4.CODES),
    }
    if "scale" in parts:
        found[f"{name}.absmax"] = parts["scale"].flatten()
    else:
        state |= {
            "nested_blocksize": 256,
            "nested_dtype": "float32",
            "nested_offset": parts["scale_offset"].item(),
        }
        found[f"{name}.absmax"] = parts["scale_codes"].flatten()
        found[f"{name}.nested_absmax"] = parts["scale_scale"]
        found[f"{name}.nested_quant_map"] = nf4.eight_bits(torch.device("cpu"))
    text = json.dumps({**state, **changes})
    found[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(
        list(text.encode()), dtype=torch.uint8
    )
    return found


def llm_int8(name: str, weight: Tensor) -> dict[str, Tensor]:
    """A matrix as `Linear8bitLt` saves it."""
    largest = weight.float().abs().amax(dim=1)
    codes = (weight.float() * (127 / largest)[:, None]).round().to(torch.int8)
    stem = name.removesuffix("weight")
    return {
        name: codes,
        f"{stem}SCB": largest,
        f"{stem}weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def int8_rows(name: str, weight: Tensor) -> dict[str, Tensor]:
    """A matrix as compressed-tensors saves `int-quantized` ones with one scale a row."""
    scale = (weight.float().abs().amax(dim=1, keepdim=True) / 127).to(torch.bfloat16)
    codes = (weight.float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
    return {name: codes, f"{name}_scale": scale}


def compressed_settings(form: str = "int-quantized", **weights: Any) -> dict[str, Any]:
    """What compressed-tensors writes into config.json."""
    own = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", **weights}
    group = {"targets": ["Linear"], "weights": own}
    group |= {"input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": ["lm_head", "re:.*gate$"],
        "config_groups": {"group_0": group},
    }


def compressed(form: str, settings: dict[str, Any]) -> Any:
    """A function that writes a matrix by compressed-tensors itself, with bfloat16 scales."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = settings["config_groups"]["group_0"]["weights"]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    compressor = BaseCompressor.get_value_from_registry(form)

    def quantise(name: str, weight: Tensor) -> dict[str, Tensor]:
        size = weights.get("group_size") or weight.shape[1]
        largest = weight.float().view(len(weight), -1, size).abs().amax(dim=2)
        scale = largest / (448 if weights["type"] == "float" else 7.5)
        found = compressor.compress(
            {"weight": weight, "weight_scale": scale.to(torch.bfloat16)}, scheme
        )
        return {f"{name.removesuffix('weight')}{key}": value for key, value in found.items()}

    return quantise


def fp8_blocks(name: str, weight: Tensor, scale: str = "float32") -> dict[str, Tensor]:
    """A matrix in e4m3 with a scale for each tile, which multiplies."""
    parts = fp8.Fp8().encode(weight)
    if scale == "float32":
        return {name: parts["codes"], f"{name}_scale_inv": parts["scale"]}
    powers = parts["scale"].log2().ceil()
    spread = powers.exp2().repeat_interleave(128, 0).repeat_interleave(128, 1)
    codes = (weight.float() / spread[: len(weight), : weight.shape[1]]).to(torch.float8_e4m3fn)
    exponents = (powers + 127).to(torch.uint8)
    kept = exponents if scale == "bytes" else exponents.view(torch.float8_e8m0fnu)
    return {name: codes, f"{name}_scale_inv": kept}


FP8_SETTINGS = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
}


def mxfp4(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Experts (E, I, O) of a GPT-OSS model as its checkpoints have them; the rest as it is."""
    if ".experts." not in name or name.endswith("bias"):
        return {name: weight}
    kind = packed_format("mxfp4")
    parts = [kind.encode(w_IO.T) for w_IO in weight]
    return {
        f"{name}_{part}": torch.stack([found[part] for found in parts])
        for part in ("blocks", "scales")
    }


MXFP4_SETTINGS = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
    ],
}  # fmt: skip


def replace(folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Have the checkpoint in `folder` consist of these tensors."""
    (file,) = folder.glob("*.safetensors")
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
