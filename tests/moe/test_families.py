"""Common families in depth, experts in a ModuleList, and what is refused.

`test_architectures.py` goes through every model class.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from tiny import FAMILIES, make_batch, make_model, plain_loop, trainable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as activation_checkpoint
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts
from transformers.modeling_outputs import CausalLMOutput

import drlora
from drlora.adapter.inject import adapted_layers
from drlora.moe.blocks import find_blocks
from drlora.report.read import read_run

PROJECTIONS = [["gate_up", "down"], ["up", "down"], ["gate", "up", "down"]]


def adapted(family, **changes):
    settings = dict(r_init=2, r_target=4, r_max=8, p_grow=0.5, grow_every=2, warmup_steps=1,
                    settle_steps=1, lora_alpha=8.0)  # fmt: skip
    return get_peft_model(make_model(family), drlora.DrLoraConfig(**{**settings, **changes}))


def randomise(model):
    """LoRA's B starts at zero; give the owned rows values, as training would."""
    generator = torch.Generator().manual_seed(3)
    for layer in adapted_layers(model, "default").values():
        for pool in layer.drlora_adapters["default"].pools.values():
            owned = pool.owner >= 0
            noise = torch.randn(pool.lora_B.shape, generator=generator) * 0.2
            pool.lora_B.data = torch.where(owned[:, None], noise, 0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_found_without_naming_modules(family):
    model = make_model(family)
    blocks = find_blocks(model)
    dense = getattr(model.config, "first_k_dense_replace", 0)
    assert len(blocks) == model.config.num_hidden_layers - dense
    for block in blocks:
        experts = model.get_submodule(block.experts_name)
        assert experts.gate_up_proj.shape == (block.num_experts, 48, 32)
        router = model.get_submodule(block.router_name)
        assert block.num_experts in [p.shape[0] for p in router.parameters()]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_adapter_changes_nothing(family):
    batch, plain = make_batch(), make_model(family)
    model = adapted(family).eval()
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("projections", PROJECTIONS, ids="+".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_output_and_gradients_equal_merged_eager_experts(family, projections):
    """The reference is the class's own eager forward over W + s B A, differentiated by torch."""
    model = adapted(family, projections=projections).eval()
    randomise(model)
    model.config._experts_implementation = "eager"
    batch = make_batch()
    out = model(**batch)
    out.loss.backward()
    layers = adapted_layers(model, "default")
    factors = {
        (name, projection, key): getattr(pool, key)
        for name, layer in layers.items()
        for projection, pool in layer.drlora_adapters["default"].pools.items()
        for key in ("lora_A", "lora_B")
    }
    got = {key: factor.grad.clone() for key, factor in factors.items()}

    reference = make_model(family)
    reference.config._experts_implementation = "eager"
    tensors = {}
    for name, layer in layers.items():
        experts = reference.get_submodule(layer.block.experts_name)
        merged = {
            "gate_up": experts.gate_up_proj.detach().clone(),
            "down": experts.down_proj.detach().clone(),
        }
        for projection, pool in layer.drlora_adapters["default"].pools.items():
            a, b = (
                getattr(pool, k).detach().clone().requires_grad_() for k in ("lora_A", "lora_B")
            )
            tensors[name, projection, "lora_A"], tensors[name, projection, "lora_B"] = a, b
            update = merged_update(pool, a, b, layer.block.num_experts)
            target = "down" if projection == "down" else "gate_up"
            start = layer.block.expert_width if projection == "up" else 0
            full = torch.zeros_like(merged[target])
            full[:, start : start + update.shape[1]] = update
            merged[target] = merged[target] + full
        for key, weight in (("gate_up_proj", "gate_up"), ("down_proj", "down")):
            delattr(experts, key)
            setattr(experts, key, merged[weight])
    wanted = reference(**batch)
    torch.testing.assert_close(out.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(wanted.loss, list(tensors.values()))
    for (key, _), grad in zip(tensors.items(), grads, strict=True):
        error = (got[key] - grad).norm() / grad.norm()
        assert error < 1e-4, f"{key}: {error:.2e}"


def merged_update(pool, a, b, num_experts):
    scaling = 8.0 / 4
    return torch.stack([
        scaling * b[pool.owner == e].T @ a[pool.owner == e] for e in range(num_experts)
    ])  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_growth_spends_the_budget(family):
    model = adapted(family)
    dynamics = drlora.RankDynamics(model, total_steps=12)
    plain_loop(model, dynamics, torch.optim.AdamW(trainable(model), lr=1e-3), range(12))
    spent, stored = dynamics.budget()
    blocks = find_blocks(model.base_model.model)
    assert spent == stored == sum(4 * 2 * block.num_experts for block in blocks)
    ranks = [r for block in dynamics.ranks().values() for r in block["down"]]
    assert len(set(ranks)) > 1 and max(ranks) <= 8 and min(ranks) >= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_router_can_be_trained(family):
    model = adapted(family, router="train")
    dynamics = drlora.RankDynamics(model, total_steps=12)
    routers = dict(model.named_parameters())
    routers = {n: p for n, p in routers.items() if p.requires_grad and "drlora" not in n}
    before = {name: p.detach().clone() for name, p in routers.items()}
    assert len(routers) >= len(dynamics.adapters)
    plain_loop(model, dynamics, torch.optim.AdamW(trainable(model), lr=1e-2), range(3))
    assert all(not torch.equal(p, before[name]) for name, p in routers.items())
    adapted_logits = model.eval()(**make_batch()).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**make_batch()).logits, adapted_logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_routing_is_what_the_router_chose(family):
    model = adapted(family, router="frozen").train()
    chosen = {}
    layers = adapted_layers(model, "default")

    def note(name):
        def hook(module, args):
            chosen[name] = (args[1].detach(), args[2].detach().float())

        return hook

    for name, layer in layers.items():
        layer.register_forward_pre_hook(note(name))
    model(**make_batch()).loss.backward()
    for name, layer in layers.items():
        index, weight = chosen[name]
        wanted = torch.zeros(layer.block.num_experts)
        for tokens, weights in zip(index.tolist(), weight.tolist(), strict=True):
            for expert, value in zip(tokens, weights, strict=True):
                wanted[expert] += value
        meter = layer.drlora_adapters["default"].meter
        torch.testing.assert_close(meter.sum_E, wanted, rtol=1e-5, atol=1e-5)
        assert meter.num_tokens.item() == 24


class Mlp(torch.nn.Module):
    """An expert as it was before fusing."""

    def __init__(self, names):
        super().__init__()
        self.names, self.act_fn = names, torch.nn.SiLU()
        for name, shape in zip(names, [(32, 24), (32, 24), (24, 32)], strict=True):
            setattr(self, name, torch.nn.Linear(*shape, bias=False))

    def forward(self, x):
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(self.act_fn(gate(x)) * up(x))


class SoftmaxBlock(torch.nn.Module):
    """Mixtral's block as it was in transformers 4."""

    def __init__(self):
        super().__init__()
        self.top_k, self.temperature = 2, 1.0
        self.gate = torch.nn.Linear(32, 6, bias=False)
        self.experts = torch.nn.ModuleList([Mlp(("w1", "w3", "w2")) for _ in range(6)])

    def forward(self, hidden):
        x = hidden.view(-1, 32)
        logits = self.gate(x)
        weight, index = torch.topk((logits / self.temperature).softmax(dim=1), self.top_k)
        weight = weight / weight.sum(dim=-1, keepdim=True)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(index == number)
            out.index_add_(0, token, expert(x[token]) * weight[token, place, None])
        return out.view(hidden.shape), logits


class Gate(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(6, 32) * 0.2)

    def forward(self, hidden):
        scores = (hidden.view(-1, 32) @ self.weight.T).sigmoid()
        weight, index = torch.topk(scores, 2)
        return index, weight * 2.5, None


class DeepseekBlock(torch.nn.Module):
    """DeepSeek's, as its remote code has it."""

    def __init__(self):
        super().__init__()
        names = ("gate_proj", "up_proj", "down_proj")
        self.gate, self.shared_experts = Gate(), Mlp(names)
        self.experts = torch.nn.ModuleList([Mlp(names) for _ in range(6)])

    def forward(self, hidden):
        index, weight, _ = self.gate(hidden)
        x = hidden.view(-1, 32).repeat_interleave(2, dim=0)
        y = torch.empty_like(x)
        for number, expert in enumerate(self.experts):
            y[index.view(-1) == number] = expert(x[index.view(-1) == number])
        y = (y.view(*weight.shape, -1) * weight[..., None]).sum(dim=1)
        return y.view(hidden.shape) + self.shared_experts(hidden)


class OldModel(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.mlp = block

    def forward(self, x):
        out = self.mlp(x)
        return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("engine", ["naive", "loop", "grouped"])
@pytest.mark.parametrize("kind", [SoftmaxBlock, DeepseekBlock])
@pytest.mark.filterwarnings("ignore:engine=")  # of grouped, which takes no lists
def test_experts_in_a_module_list(kind, engine):
    """Against the block's own forward over experts whose weights are W + s B A."""
    base = OldModel(kind()).requires_grad_(False)
    twin, x = copy.deepcopy(base), torch.randn(2, 6, 32)
    config = drlora.DrLoraConfig(r_init=2, r_target=4, r_max=8, p_grow=0.5, lora_alpha=8.0,
                                 projections=["gate", "up", "down"], engine=engine,
                                 task_type="FEATURE_EXTRACTION")  # fmt: skip
    model = drlora.adapter.model.DrLoraModel(base, config, "default")
    randomise(model)
    layer = next(iter(adapted_layers(model, "default").values()))
    pools = layer.adapter("default").rank_pools
    names = twin.mlp.experts[0].names
    factors, copies, merged = [], [], {}
    for projection, name in zip(("gate", "up", "down"), names, strict=True):
        pool = pools[projection]
        own = [f.detach().clone().requires_grad_() for f in (pool.lora_A, pool.lora_B)]
        factors, copies = [*factors, pool.lora_A, pool.lora_B], copies + own
        for expert, update in enumerate(merged_update(pool, *own, 6)):
            key = f"mlp.experts.{expert}.{name}.weight"
            merged[key] = twin.get_parameter(key) + update
    out, wanted = model(x), torch.func.functional_call(twin, merged, x)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(wanted.square().sum(), copies)
    for got, grad in zip(torch.autograd.grad(out.square().sum(), factors), grads, strict=True):
        assert (got - grad).norm() < 1e-4 * grad.norm()
    layer.merge()
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    layer.unmerge()
    assert all(torch.equal(p, q) for p, q in
               zip(layer.base_layer.parameters(), twin.parameters(), strict=True))  # fmt: skip


class OldLanguageModel(torch.nn.Module):
    """Two layers, with a loss, as remote code has them."""

    def __init__(self, kind):
        super().__init__()
        self.embed = torch.nn.Embedding(64, 32)
        self.layers = torch.nn.ModuleList([OldModel(kind()) for _ in range(2)])

    def forward(self, input_ids, labels=None, checkpoint=None, **_):
        x = self.embed(input_ids).requires_grad_()
        for layer in self.layers:
            if checkpoint is None:
                x = x + layer(x)
            else:
                x = x + activation_checkpoint(layer, x, use_reentrant=checkpoint == "reentrant")
        logits = x @ self.embed.weight.T
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1),
                                                           labels[:, 1:].flatten())  # fmt: skip
        return CausalLMOutput(loss=loss, logits=logits)


def old_language_model(kind):
    torch.manual_seed(0)
    return OldLanguageModel(kind).requires_grad_(False).eval()


@pytest.mark.parametrize("checkpoint", [None, "reentrant", "non-reentrant"])
@pytest.mark.parametrize("kind", [SoftmaxBlock, DeepseekBlock])
def test_training_of_a_module_list(kind, checkpoint, tmp_path):
    """Routing is counted once a token, ranks grow without changing the function, and come back."""
    config = drlora.DrLoraConfig(r_init=2, r_target=4, r_max=8, p_grow=0.5, grow_every=2,
                                 warmup_steps=1, settle_steps=1, lora_alpha=8.0,
                                 task_type="FEATURE_EXTRACTION")  # fmt: skip
    model = get_peft_model(old_language_model(kind), config)
    dynamics = drlora.RankDynamics(model, total_steps=12)

    def batch_of(step):
        return {**make_batch(step), "checkpoint": checkpoint}

    model.train()
    model(**batch_of(0)).loss.backward()
    for number, layer in enumerate(adapted_layers(model, "default").values()):
        meter = layer.adapter("default").meter
        assert meter.num_tokens == 24
        if number == 0:  # whose input is the same for the block alone
            torch.testing.assert_close(meter.sum_E, routed_by_hand(kind, make_batch(0)))
        meter.reset()
    model.zero_grad()
    plain_loop(model, dynamics, torch.optim.AdamW(trainable(model), lr=1e-2), range(12), batch_of)
    spent, stored = dynamics.budget()
    assert spent == stored
    ranks = [r for block in dynamics.ranks().values() for r in block["down"]]
    assert len(set(ranks)) > 1 and max(ranks) <= 8 and min(ranks) >= 2
    model.eval().save_pretrained(tmp_path)
    wanted = model(**make_batch(5)).logits
    loaded = PeftModel.from_pretrained(old_language_model(kind), tmp_path)
    assert torch.equal(loaded(**make_batch(5)).logits, wanted)
    assert drlora.rank_map(loaded) == drlora.rank_map(model)
    read = dict(zip(read_run(tmp_path).maps[0].blocks, read_run(tmp_path).maps[0].final(),
                    strict=True))  # fmt: skip
    assert read == {name: ranks["down"] for name, ranks in dynamics.ranks().items()}
    assert "blocks of 6 experts" in (tmp_path / "README.md").read_text()


def routed_by_hand(kind, batch):
    """(E,) routing weights of the first layer, from its gate."""
    base = old_language_model(kind)
    x, gate = base.embed(batch["input_ids"]).flatten(0, 1), base.layers[0].mlp.gate
    if kind is DeepseekBlock:
        index, weight, _ = gate(x)
    else:
        weight, index = gate(x).softmax(dim=1).topk(2)
        weight = weight / weight.sum(dim=1, keepdim=True)
    return torch.zeros(len(x), 6).scatter(1, index, weight).sum(dim=0)


@pytest.mark.parametrize("kind", [SoftmaxBlock, DeepseekBlock])
def test_growth_of_a_module_list_keeps_the_function(kind):
    config = drlora.DrLoraConfig(r_init=2, r_target=4, r_max=8, p_grow=0.5,
                                 task_type="FEATURE_EXTRACTION")  # fmt: skip
    model = get_peft_model(old_language_model(kind), config)
    randomise(model)
    before = model(**make_batch()).logits
    for layer in adapted_layers(model, "default").values():
        for pool in layer.adapter("default").rank_pools.values():
            pool.grant([0, 3, 1, 2, 0, 4], step=1)
    torch.testing.assert_close(model(**make_batch()).logits, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("saved", ["fused", "list"])
def test_an_adapter_stays_with_the_layout_of_its_experts(saved, tmp_path):
    """Mixtral's experts as they are now and as they were, in blocks of the same name and size."""

    def mixtral(layout):
        base = make_model("mixtral", num_local_experts=6)
        for layer in base.model.layers if layout == "list" else []:
            layer.mlp = SoftmaxBlock()
        return base

    config = drlora.DrLoraConfig(r_init=2, r_target=4, r_max=8, p_grow=0.5)
    get_peft_model(mixtral(saved), config).save_pretrained(tmp_path)
    other = {"fused": "list", "list": "fused"}[saved]
    with pytest.raises(drlora.ConfigError, match=r"match nothing .*\(fused, or in a ModuleList\)"):
        PeftModel.from_pretrained(mixtral(other), tmp_path)
    PeftModel.from_pretrained(mixtral(saved), tmp_path)


def test_a_module_list_that_is_routed_otherwise_is_refused():
    model = OldModel(SoftmaxBlock())
    model.mlp.temperature = 1.3
    with pytest.raises(drlora.ConfigError, match=r"mlp \(SoftmaxBlock\).*its routing is not known"):
        find_blocks(model)


def test_a_model_is_not_adapted_by_half():
    model = make_model("olmoe")
    model.model.layers[1].mlp.experts = VitLike()
    with pytest.raises(drlora.ConfigError, match=r"layers.1.mlp \(Olmoe.*its experts have no"):
        get_peft_model(model, drlora.DrLoraConfig())
    assert not any("lora" in name for name, _ in model.named_modules())


class VitLike(torch.nn.ModuleList):
    def __init__(self):
        super().__init__([torch.nn.Linear(32, 32)])


def refused(model, match):
    """Adapting is refused with the message, and the model is as it was before."""
    before = [(name, type(module)) for name, module in model.named_modules()]
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(drlora.ConfigError, match=match):
        get_peft_model(model, drlora.DrLoraConfig())
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert [parameter.requires_grad for parameter in model.parameters()] == frozen
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]


def test_experts_that_something_else_has_spread_are_refused():
    """The last block, so that those before it could have been adapted already."""
    model = make_model("olmoe")
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    refused(model, r"layers.1.mlp.experts.*expert-parallel.*distributed_config.*FSDP")


def test_packed_experts_of_gpt_oss_are_refused_as_quantised():
    """The module that transformers puts into GPT-OSS for weights in mxfp4."""
    config = transformers.GptOssConfig(hidden_size=64, intermediate_size=64, num_local_experts=4)
    model = make_model("olmoe")
    model.model.layers[1].mlp.experts = Mxfp4GptOssExperts(config)
    refused(
        model, r"layers.1.mlp.experts.*quantised.*bfloat16, float16 or float32.*dequantize=True"
    )


def test_shared_experts_are_named():
    (first, *_) = find_blocks(make_model("qwen2_moe"))
    assert first.shared_names == ("model.layers.0.mlp.shared_expert",)
    assert find_blocks(make_model("olmoe"))[0].shared_names == ()


def test_refusals_name_the_module_and_the_reason():
    model = make_model("olmoe")
    model.model.layers[1].mlp.experts.is_transposed = True  # which it is not
    with pytest.raises(drlora.ConfigError, match=r"model.layers.1.mlp.experts.*\(32, 48\)"):
        get_peft_model(model, drlora.DrLoraConfig())
    quantised = make_model("olmoe")
    experts = quantised.model.layers[0].mlp.experts
    experts.down_proj = torch.nn.Parameter(
        experts.down_proj.data.to(torch.float8_e4m3fn), requires_grad=False
    )
    with pytest.raises(drlora.ConfigError, match="layers.0.*float8.*bfloat16"):
        get_peft_model(quantised, drlora.DrLoraConfig())
    with pytest.raises(drlora.ConfigError, match="no Mixture-of-Experts block"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), drlora.DrLoraConfig())
    with pytest.raises(drlora.ConfigError, match="nonsense.*match nothing"):
        get_peft_model(make_model("olmoe"), drlora.DrLoraConfig(experts=["nonsense"]))
