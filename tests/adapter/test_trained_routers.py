"""A trained router computes in float32, and the 16-bit model around it does not notice."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from all_classes import ALL_CLASSES, DOCS, SETTINGS, make_base
from peft import get_peft_model
from tiny import make_batch, make_model
from tiny_config import VOCAB

import drlora
from drlora.adapter.inject import adapted_layers

IDS = torch.randint(3, VOCAB, (1, 5), generator=torch.Generator().manual_seed(7))
CLASSES = json.loads((DOCS / "families.json").read_text())["classes"]
# JetMoE's router is inside of what the adapter takes the place of, so it cannot be trained.
WITH_ROUTER = [n for n in ALL_CLASSES if CLASSES[n]["router"] and n != "JetMoeForCausalLM"]


def as_loaded(model, dtype):
    """All in `dtype`, but what from_pretrained keeps in float32, and complex buffers."""
    kept = model._keep_in_fp32_modules_strict or ()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not any(part in name for part in kept):
            tensor.data = tensor.data.to(dtype)
    return model


def trained_routers(model):
    """Where the routers of the adapted blocks and their trained copies are."""
    names = {layer.block.router_name for layer in adapted_layers(model, "default").values()}
    return [model.base_model.model.get_submodule(name) for name in names]


def answers(model):
    """Logits outside and inside autocast, and a generated text where the class can generate."""
    with torch.no_grad():
        plain = model(input_ids=IDS, use_cache=False).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = model(input_ids=IDS, use_cache=False).logits
        text = None
        if hasattr(model, "prepare_inputs_for_generation"):
            text = model.generate(
                input_ids=IDS, max_new_tokens=2, min_new_tokens=2, use_cache=False
            )
    return plain, cast, text


@pytest.mark.parametrize("class_name", WITH_ROUTER)
def test_a_model_in_bfloat16_with_trained_routers(class_name):
    """Forward and generate, outside and inside autocast, before and after a step in autocast."""
    with torch.no_grad():
        base = as_loaded(make_base(class_name), torch.bfloat16)
    wanted = answers(base)
    model = get_peft_model(base, drlora.DrLoraConfig(**SETTINGS, router="train")).eval()
    for copies in trained_routers(model):
        assert {p.dtype for p in copies.modules_to_save["default"].parameters()} == {torch.float32}
    got = answers(model)
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=IDS, use_cache=False).logits.float().square().mean().backward()
    for one, again, other in zip(got, answers(model.eval()), wanted, strict=True):
        assert (one is None) == (again is None) == (other is None)
        if other is not None:
            assert one.dtype == again.dtype == other.dtype and one.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "mixtral"])
def test_a_trained_router_returns_the_dtypes_of_the_original(family, dtype):
    """Also with its logits recorded, which must not count the original's."""
    model = make_model(family).to(dtype)
    kept, said = [], []

    def note(into):
        def hook(module, args, output):
            outputs = output if isinstance(output, tuple) else (output,)
            into.append([o.dtype for o in outputs if isinstance(o, torch.Tensor)])

        return hook

    config = drlora.DrLoraConfig(**SETTINGS, router="train")
    plain = copy.deepcopy(model)
    model = get_peft_model(model, config).eval()
    for layer in adapted_layers(model, "default").values():
        plain.get_submodule(layer.block.router_name).register_forward_hook(note(said))
    for copies in trained_routers(model):
        copies.register_forward_hook(note(kept))
    plain(**make_batch())
    twin = copy.deepcopy(model)
    for one in (model, twin):
        recorded = one(**make_batch(), output_router_logits=True)
        assert sorted(map(str, kept)) == sorted(map(str, said))
        kept.clear()
        if getattr(recorded, "router_logits", None) is not None:
            assert len(recorded.router_logits) == len(said)
