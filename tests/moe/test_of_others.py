"""Experts that other libraries keep in few bits in memory: read as they are, or refused in words.

Each once as the library's own class, where it is installed, and once as a stand-in of its name.
"""

from __future__ import annotations

import copy
import types

import pytest
import stored_checkpoints as files
import torch
import transformers
from peft import get_peft_model
from test_families import OldLanguageModel, SoftmaxBlock
from tiny import make_batch, make_class, make_model
from tiny_adapter import logits, make_settings, train
from torch import nn
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import use_experts_implementation
from transformers.quantizers.base import SequentialLlama4TextExperts

import drlora
from drlora.adapter.inject import adapted_layers
from drlora.moe.blocks import find_blocks
from drlora.ops.storage import as_matrix, has_own_storage
from drlora.ops.storage.packed import packed_format

WIDE = dict(hidden_size=64, intermediate_size=128, moe_intermediate_size=128)


def adapted(model, **changes):
    torch.manual_seed(3)
    return get_peft_model(model, make_settings(**changes))


def load(name):
    config = drlora.packed_config(name)
    return transformers.AutoModelForCausalLM.from_pretrained(
        name, config=config, dtype=torch.float32
    )


def randomise(model):
    torch.manual_seed(5)
    for layer in adapted_layers(model, "default").values():
        for pool in layer.adapter("default").rank_pools.values():
            owned = (pool.owner >= 0)[:, None]
            pool.lora_B.data = torch.randn(pool.lora_B.shape).to(pool.lora_B) * 0.1 * owned


def gradients(model):
    randomise(model)
    model.train()(**make_batch(0)).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def refused(model, message):
    with pytest.raises(drlora.ConfigError, match=message):
        get_peft_model(model, make_settings())


# bitsandbytes: lists of Linear4bit.


class Params4bit(nn.Parameter):
    """The stand-in of bitsandbytes' class of this name."""

    def __new__(cls, data, state):
        return torch.Tensor._make_subclass(cls, data, False)

    def __init__(self, data, state):
        self.quant_state = state

    def __deepcopy__(self, memo):
        return type(self)(self.data.clone(), self.quant_state)


Params4bit.__module__ = "bitsandbytes.nn.modules"


class Linear4bit(nn.Linear):
    """The stand-in: `weight` is a column of bytes that knows its state."""

    def __init__(self, weight, storage, **changes):
        super().__init__(weight.shape[1], weight.shape[0], bias=False)
        kind = packed_format(storage)
        self.kind, self.parts = kind, kind.encode(weight)
        state = {"quant_type": "nf4", "blocksize": 64, "shape": weight.shape,
                 "dtype": weight.dtype, "nested": storage == "nf4-nested", **changes}  # fmt: skip
        if state["nested"]:
            outer = {"absmax": self.parts["scale_scale"], "blocksize": 256}
            state |= {"absmax": self.parts["scale_codes"].flatten(),
                      "state2": types.SimpleNamespace(**outer),
                      "offset": self.parts["scale_offset"][0]}  # fmt: skip
        else:
            state["absmax"] = self.parts["scale"].flatten()
        codes = self.parts["codes"].reshape(-1, 1)
        self.weight = Params4bit(codes, types.SimpleNamespace(**state))

    def forward(self, x):
        wide = self.kind.decode(self.parts, torch.empty(self.weight.quant_state.shape))
        return nn.functional.linear(x, wide)


def old_model(layer=None):
    """Two blocks of 6 experts in a ModuleList, each Linear of an expert made by `layer`."""
    torch.manual_seed(0)
    model = OldLanguageModel(WideBlock)
    model.embed = nn.Embedding(64, 64)
    for one in model.layers:
        for expert in one.mlp.experts if layer else ():
            for name in expert.names:
                setattr(expert, name, layer(getattr(expert, name).weight.data))
    return model.requires_grad_(False).eval()


class WideBlock(SoftmaxBlock):
    """64 features in and out, and 128 inside of an expert."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(64, 6, bias=False)
        for expert in self.experts:
            for name, shape in zip(expert.names, [(64, 128), (64, 128), (128, 64)], strict=True):
                setattr(expert, name, nn.Linear(*shape, bias=False))

    def forward(self, hidden):
        x = hidden.reshape(-1, 64)
        scores = self.gate(x)
        weight, index = torch.topk(scores.softmax(dim=1), self.top_k)
        weight = weight / weight.sum(dim=-1, keepdim=True)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(index == number)
            out.index_add_(0, token, expert(x[token]) * weight[token, place, None])
        return out.view(hidden.shape), scores


def real_linear4bit(weight, storage="nf4"):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, quant_type="nf4",
        compute_dtype=torch.float32, compress_statistics=storage == "nf4-nested",
    )  # fmt: skip
    layer.weight = bnb.nn.Params4bit(
        weight,
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=layer.weight.compress_statistics,
    )
    return layer.to("cpu")


def numbers_of(layer):
    return as_matrix([layer.weight]).read(0)


@pytest.mark.parametrize("make", [Linear4bit, real_linear4bit])
@pytest.mark.parametrize("storage", ["nf4", "nf4-nested"])
def test_lists_of_linear4bit_are_read_as_they_are(storage, make):
    packed = old_model(lambda weight: make(weight, storage))
    wide = old_model()
    for one, other in zip(packed.layers, wide.layers, strict=True):
        for expert, plain in zip(one.mlp.experts, other.mlp.experts, strict=True):
            for name in expert.names:
                getattr(plain, name).weight.data = numbers_of(getattr(expert, name))
    models = [adapted(model, task_type="FEATURE_EXTRACTION") for model in (packed, wide)]
    first = next(iter(adapted_layers(models[0], "default").values()))
    held = {id(p) for p in packed.parameters()}
    weights = [expert.get_submodule(n).weight for expert in first.get_base_layer().experts
               for n in expert.names]  # fmt: skip
    assert {id(w) for w in weights} <= held and first.base_weights.gate_up.name == storage
    found = [gradients(model) for model in models]
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        assert torch.equal(gradient, found[1][key]), key
    with pytest.raises(drlora.ConfigError, match="stored in 4 bits"):
        models[0].merge_and_unload()


@pytest.mark.parametrize("storage", ["nf4", "nf4-nested"])
def test_llama_4_whose_experts_transformers_made_a_list_of(storage):
    """As it does for checkpoints quantised by bitsandbytes or compressed-tensors."""
    sizes = dict(hidden_size=64, intermediate_size=64)
    packed, wide = (make_class("Llama4ForCausalLM", **sizes) for _ in range(2))
    for block in find_blocks(wide):
        old = wide.get_submodule(block.experts_name)
        made = SequentialLlama4TextExperts(packed.config.get_text_config())
        for number, expert in enumerate(made):
            gate, up = old.gate_up_proj.data[number].T.chunk(2)
            for key, weight in (("gate_proj", gate), ("up_proj", up),
                                ("down_proj", old.down_proj.data[number].T)):  # fmt: skip
                setattr(expert, key, Linear4bit(weight.contiguous(), storage))
            old.gate_up_proj.data[number] = torch.cat(
                [numbers_of(expert.gate_proj), numbers_of(expert.up_proj)]
            ).T
            old.down_proj.data[number] = numbers_of(expert.down_proj).T
        packed.set_submodule(block.experts_name, made)
    models = [adapted(model) for model in (packed, wide)]
    assert adapted_layers(models[0], "default").popitem()[1].base_weights.down.name == storage
    torch.testing.assert_close(logits(models[0]), logits(models[1]), rtol=1e-4, atol=1e-5)
    found = [gradients(model) for model in models]
    for key, gradient in found[0].items():
        assert (gradient - found[1][key]).norm() < 1e-4 * found[1][key].norm().clamp(min=1e-9), key
    with models[0].disable_adapter():
        assert logits(models[0]).isfinite().all()


def test_matrices_of_bitsandbytes_that_cannot_be_read():
    weight = torch.randn(8, 64)
    assert has_own_storage(Linear4bit(weight, "nf4").weight)
    for changes in ({"quant_type": "fp4"}, {"blocksize": 128}, {"shape": (16, 32)}):
        layer = Linear4bit(weight, "nf4", **changes)
        assert not has_own_storage(layer.weight)
    model = old_model(lambda w: Linear4bit(w, "nf4", quant_type="fp4"))
    with pytest.raises(drlora.ConfigError, match="Params4bit|cannot be read"):
        get_peft_model(model, make_settings(task_type="FEATURE_EXTRACTION"))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_a_parameter_of_all_experts_under_bitsandbytes(family, nested, tmp_path):
    """Read an expert at a time, and not as a whole in each forward; and from its checkpoint."""
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")

    def base():
        sizes = dict(hidden_size=128, intermediate_size=128)
        if family == "gpt_oss":
            return make_class("GptOssForCausalLM", **sizes)
        return make_model(family, **sizes)

    packed, wide = base(), base()
    for block in find_blocks(packed):
        experts, other = (m.get_submodule(block.experts_name) for m in (packed, wide))
        for key in ("gate_up_proj", "down_proj"):
            parametrize.replace_parameter_4bit(experts, key, nested, "nf4")
            getattr(other, key).data = getattr(experts, key).detach()
    files_of = {key: value.clone() for key, value in packed.state_dict().items()}
    with pytest.raises(drlora.ConfigError, match="cannot be packed"):
        drlora.quantise_experts(packed, "int8")
    models = [adapted(model) for model in (packed, wide)]
    storage = adapted_layers(models[0], "default").popitem()[1].base_weights.down.name
    assert storage == ("nf4-nested" if nested else "nf4")
    found = [gradients(model) for model in models]
    for key, gradient in found[0].items():
        error = (gradient - found[1][key]).norm()
        assert error < 1e-5 * found[1][key].norm().clamp(min=1e-9), key
    base().save_pretrained(tmp_path)
    files.replace(tmp_path, files_of, files.bnb_settings(nested))
    with pytest.raises(drlora.ConfigError, match="_proj.weight: it is in 16 bits in the check"):
        load(str(tmp_path))
    left = ["lm_head", "gate", "router", "q_proj", "k_proj", "v_proj", "o_proj"]
    settings = files.bnb_settings(nested, llm_int8_skip_modules=left)
    files.replace(tmp_path, files_of, settings)
    loaded = load(str(tmp_path))
    with models[1].disable_adapter():
        torch.testing.assert_close(logits(loaded), logits(models[1]), rtol=1e-3, atol=1e-4)


# torchao.


class Int8Tensor(torch.Tensor):
    """The stand-in of torchao's class of this name, which can do nothing else."""

    @staticmethod
    def __new__(cls, qdata, scale, dtype, **others):
        return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=dtype)

    def __init__(self, qdata, scale, dtype, **others):
        self.qdata, self.scale = qdata, scale
        self.__dict__.update(others)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].qdata, args[0].scale, args[0].dtype, **{
                k: v for k, v in args[0].__dict__.items() if k not in ("qdata", "scale")
            })  # fmt: skip
        raise NotImplementedError(f"Int8Tensor: {func}")


Int8Tensor.__module__ = "torchao.quantization"


def stand_in_int8(weight, **others):
    kind = packed_format("int8")
    parts = [kind.encode(w_OI) for w_OI in weight]
    codes, scale = (torch.stack([found[key] for found in parts]) for key in ("codes", "scale"))
    others = {"zero_point": torch.zeros_like(scale[..., None]), **others}
    return nn.Parameter(Int8Tensor(codes, scale[..., None], weight.dtype, **others), False)


def real_int8(weight, **others):
    pytest.importorskip("torchao")
    from torchao.quantization import PerRow
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor

    return nn.Parameter(Int8Tensor.from_hp(weight.detach(), PerRow()), requires_grad=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("make", [stand_in_int8, real_int8])
@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_int8_of_torchao_is_read_by_row(family, make):
    packed, wide = (make_model(family, **WIDE) for _ in range(2))
    for module, other in zip(packed.modules(), wide.modules(), strict=True):
        for key in ("gate_up_proj", "down_proj") if hasattr(module, "has_gate") else ():
            weight = make(getattr(module, key))
            setattr(module, key, weight)
            matrix = as_matrix(weight)
            numbers = torch.stack([matrix.read(e) for e in range(matrix.shape[0])])
            getattr(other, key).data = numbers
            if make is real_int8:
                torch.testing.assert_close(numbers, weight.dequantize(), rtol=1e-6, atol=1e-7)
    models = [adapted(model) for model in (packed, wide)]
    found = [gradients(model) for model in models]
    for key, gradient in found[0].items():
        assert (gradient - found[1][key]).norm() < 1e-5 * found[1][key].norm(), key
    with pytest.raises(drlora.ConfigError, match="stored in 8 bits"):
        models[0].merge_and_unload()


def test_other_tensors_of_torchao_are_refused_in_words():
    model = make_model("olmoe", **WIDE)
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = stand_in_int8(experts.down_proj, zero_point=torch.ones(6, 64, 1))
    refused(model, r"layers.1.mlp.experts.*down_proj is a torchao.quantization.Int8Tensor")
    with pytest.raises(drlora.ConfigError, match="no plain tensors: down_proj is a torchao"):
        drlora.quantise_experts(model, "nf4")


# transformers: FP8Experts.


def in_fp8(model, family_width, scale_fmt="float"):
    """Its experts as transformers keeps them on a GPU, with numbers that FP8 has."""
    kind = packed_format("fp8")
    for block in find_blocks(model):
        old = model.get_submodule(block.experts_name)
        made = use_experts_implementation(
            experts_class=FP8Experts, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS
        )(config=model.config, block_size=(128, 128), scale_fmt=scale_fmt)
        for key in ("gate_up_proj", "down_proj"):
            parts = [kind.encode(w_OI) for w_OI in getattr(old, key).detach()]
            getattr(made, key).data = torch.stack([found["codes"] for found in parts])
            scale = getattr(made, f"{key}_scale_inv")
            scale.data = torch.stack([found["scale"] for found in parts]).to(scale.dtype)
        model.set_submodule(block.experts_name, made)
    return model


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_fp8_experts_of_transformers_are_read_as_they_are(scale_fmt):
    wide = make_model("qwen3_moe", **WIDE)
    packed = in_fp8(make_model("qwen3_moe", **WIDE), 128, scale_fmt)
    packed.config.dtype = torch.float32
    for block in find_blocks(packed):
        module, other = (m.get_submodule(block.experts_name) for m in (packed, wide))
        for key in ("gate_up_proj", "down_proj"):
            scale = getattr(module, f"{key}_scale_inv").float()
            spread = scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
            codes = getattr(module, key).float()
            getattr(other, key).data = codes * spread[:, : codes.shape[1], : codes.shape[2]]
    models = [adapted(model) for model in (packed, wide)]
    torch.testing.assert_close(logits(models[0]), logits(models[1]), rtol=1e-4, atol=1e-5)
    found = [gradients(model) for model in models]
    for key, gradient in found[0].items():
        assert torch.equal(gradient, found[1][key]), key
    assert adapted_layers(models[0], "default").popitem()[1].base_weights.gate_up.name == "fp8"
    before = logits(models[0])
    train(models[0])
    assert not torch.equal(logits(models[0]), before)


def test_fp8_experts_of_another_tile_are_refused_in_words():
    model = in_fp8(make_model("qwen3_moe", **WIDE), 128)
    experts = model.model.layers[0].mlp.experts
    experts.down_proj_scale_inv = nn.Parameter(torch.ones(6, 1, 4))
    refused(model, r"its down_proj is in .*e4m3fn with scales \(1, 4\), .*packed_config")
    model = in_fp8(make_model("qwen3_moe", **WIDE), 128)
    with pytest.raises(drlora.ConfigError, match="FP8Experts cannot be packed.*quantised already"):
        drlora.quantise_experts(model, "int8")


# Models whose other layers are quantised.


def with_a_quantiser(model, name="BitsAndBytesConfig", pre_quantized=False, method="bitsandbytes"):
    """As from_pretrained leaves a model: what is not an expert is taken for quantised."""
    config = type(name, (), {"to_dict": lambda self: {"quant_method": method}})()
    model.hf_quantizer = types.SimpleNamespace(
        quantization_config=config, pre_quantized=pre_quantized
    )
    model.config.quantization_config = config
    return model


def test_experts_that_a_quantiser_left_in_16_bits_are_told_of_once(recwarn):
    model = with_a_quantiser(make_model("olmoe", **WIDE).to(torch.bfloat16))
    model = adapted(model)
    model.add_adapter("second", make_settings())
    (warning,) = [w for w in recwarn if issubclass(w.category, UserWarning)]
    said = str(warning.message)
    assert said.startswith("BitsAndBytesConfig leaves experts as they are: 87 %")
    assert "still bfloat16, 0.00 GB. drlora.quantise_experts(model, 'nf4') makes" in said
    train(model)


def test_a_model_that_is_not_quantised_is_told_nothing(recwarn):
    get_peft_model(make_model("olmoe", **WIDE), make_settings())
    get_peft_model(drlora.quantise_experts(make_model("olmoe", **WIDE), "int8"), make_settings())
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


@pytest.mark.parametrize("load_in", ["load_in_4bit", "load_in_8bit"])
def test_bitsandbytes_on_a_model_with_experts_in_one_tensor(load_in, tmp_path):
    pytest.importorskip("bitsandbytes")
    make_model("olmoe", **WIDE).to(torch.bfloat16).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.bfloat16,
        quantization_config=transformers.BitsAndBytesConfig(**{load_in: True}),
    )
    with pytest.warns(UserWarning, match=r"BitsAndBytesConfig leaves experts as they are: 87 %"):
        get_peft_model(copy.deepcopy(model), make_settings())
    model = adapted(drlora.quantise_experts(model, "nf4"))
    assert logits(train(model)).isfinite().all()


def test_a_checkpoint_whose_experts_were_not_read_is_refused():
    model = make_model("olmoe", **WIDE)
    with_a_quantiser(model, "GPTQConfig", pre_quantized=True, method="gptq")
    refused(
        model, r"quantised with GPTQ \(quant_method 'gptq'\), .*random numbers.*QuantisedExperts"
    )
    model.config.quantization_config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    del model.hf_quantizer
    refused(model, r"ModelOpt \(quant_method 'modelopt'\)")


def test_a_router_in_few_bits_is_refused():
    model = make_model("olmoe", **WIDE)
    router = model.model.layers[1].mlp.gate
    codes = Linear4bit(router.weight.detach(), "nf4").weight
    router.weight = codes
    said = r"router model.layers.1.mlp.gate is quantised \(weight is a Params4bit .*'gate'\]"
    refused(model, said)
    router.weight = nn.Parameter(torch.zeros(6, 64, dtype=torch.int8), requires_grad=False)
    refused(model, "is quantised .weight is a Parameter of torch.int8")
    old = old_model()
    old.layers[0].mlp.gate = Linear4bit(old.layers[0].mlp.gate.weight, "nf4")
    with pytest.raises(drlora.ConfigError, match=r"router layers.0.mlp.gate is quantised"):
        get_peft_model(old, make_settings(task_type="FEATURE_EXTRACTION"))
