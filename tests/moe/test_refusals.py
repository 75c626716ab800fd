"""Models that adapters cannot be put on are refused before anything is changed.

Each of these was accepted once, and died in the first forward pass.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from tiny import make_batch, make_class, make_model
from tiny_adapter import logits, make_settings, trained
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.distributed import DistributedConfig

import drlora
from drlora.adapter.inject import adapted_layers
from drlora.adapter.pool import RankPool


class Int8Tensor(torch.Tensor):
    """Says that it is bfloat16, like torchao's of this name, and can do little of what one can."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.bfloat16)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"Int8Tensor: {func}")


def quantised(weight):
    codes = torch.zeros(weight.shape, dtype=torch.int8)
    return torch.nn.Parameter(Int8Tensor(codes, torch.ones(())), requires_grad=False)


def appearance(model):
    """All of a model that an attempt could change, and how its parts are hooked."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
    return (
        [(name, type(module)) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p.dtype, p.device) for name, p in model.named_parameters()],
        [list(getattr(m, kind).values()) for m in model.modules() for kind in hooks],
        [sorted(key for key in m.__dict__ if "drlora" in key) for m in model.modules()],
        [m.training for m in model.modules()],
        model.config.to_dict() if hasattr(model, "config") else None,
        getattr(model, "peft_config", None),
    )


def refused(model, match, **changes):
    """With the message, and the model and the configuration, which is returned, are as before."""
    config = make_settings(**changes)
    before, settings = appearance(model), copy.deepcopy(config.to_dict())
    with pytest.raises(drlora.ConfigError, match=match):
        get_peft_model(model, config)
    assert appearance(model) == before
    # PEFT itself notes the name of the model in the configuration.
    assert {**config.to_dict(), "base_model_name_or_path": None} == {
        **settings, "base_model_name_or_path": None
    }  # fmt: skip
    config.base_model_name_or_path = None
    return config


LAST = "model.layers.1.mlp.experts"


def test_experts_of_a_tensor_class_that_lies_about_its_dtype():
    model = make_model().to(torch.bfloat16)
    experts = model.get_submodule(LAST)
    experts.down_proj = quantised(experts.down_proj)
    said = rf"{LAST} \(OlmoeExperts\).*down_proj is a test_refusals.Int8Tensor.*bfloat16"
    config = refused(model, said)
    get_peft_model(make_model("mixtral"), config)  # it can be used again, for another model


def test_a_router_of_such_a_class_that_is_to_be_trained():
    model = make_model().to(torch.bfloat16)
    router = model.model.layers[1].mlp.gate
    router.weight = quantised(router.weight)
    refused(model, r"layers.1.mlp.gate.*weight is a .*Int8Tensor", router="train")


def test_experts_that_no_family_knows_and_are_of_such_a_class():
    model = make_model().to(torch.bfloat16)

    class OtherExperts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w1 = quantised(torch.zeros(4, 8, 8))

    model.model.layers[1].mlp.experts = OtherExperts()
    refused(model, r"layers.1.mlp.experts \(OtherExperts\).*it is quantised")


@pytest.fixture
def two_ranks():
    """This process as the first of two; the other is not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    dist.destroy_process_group()


def shard(model, mesh, placement):
    for name in ("gate_up_proj", "down_proj"):
        experts = model.get_submodule(LAST)
        whole = experts.get_parameter(name).data
        setattr(experts, name, torch.nn.Parameter(distribute_tensor(whole, mesh, [placement])))


def test_tensor_parallelism(two_ranks):
    model = make_model()
    model._tp_size = 2
    refused(model, r"OlmoeForCausalLM is tensor-parallel \(tp_size=2\).*without tp_size")
    model._tp_size = 1
    model.config.distributed_config = DistributedConfig(pp_size=2)
    refused(model, r"OlmoeForCausalLM is pipeline-parallel \(pp_size=2\).*without pp_size")


@pytest.mark.parametrize("dim", [1, 2])
def test_experts_that_are_sharded_inside(two_ranks, dim):
    model = make_model()
    shard(model, two_ranks, Shard(dim))
    refused(model, rf"{LAST}.*sharded inside.*Shard\(dim={dim}\).*tensor parallelism")


@pytest.mark.parametrize("placement", [Shard(0), Replicate()])
def test_experts_that_are_sharded_from_one_another_are_not_refused(two_ranks, placement):
    model = make_model()
    shard(model, two_ranks, placement)
    assert len(drlora.moe.blocks.find_blocks(model)) == 2


def test_weights_under_zero_init_are_described_by_their_own_shape():
    """DeepSpeed leaves parameters of the shape (0,) that know it."""
    wanted = drlora.moe.blocks.find_blocks(make_model())
    model = make_model()
    for parameter in model.parameters():
        parameter.ds_shape, parameter.ds_id = parameter.shape, 0
        parameter.data = torch.empty(0)
    before = dict(model.named_parameters())
    assert drlora.moe.blocks.find_blocks(model) == wanted
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    adapted = get_peft_model(model, drlora.DrLoraConfig(router="frozen"))
    pools = [module for module in adapted.modules() if isinstance(module, RankPool)]
    assert {tuple(pool.lora_A.shape) for pool in pools} == {(96, 24), (96, 32)}
    with pytest.raises(drlora.ConfigError, match="cannot be merged into them there. Save it"):
        adapted.merge_and_unload()
    with pytest.raises(drlora.ConfigError, match=r"no engine brings them .*after deepspeed"):
        drlora.ranks_from_routing(adapted, [])


def offloaded(folder, name="base"):
    """The second layer on disk, as transformers loads it."""
    model = make_model()
    model.save_pretrained(folder / name)
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    return type(model).from_pretrained(
        folder / name,
        device_map={**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"},
        offload_folder=folder / "offload",
    )


SAID = r"are not in memory \(device meta.*without offloading to cpu or disk"


def test_a_base_that_accelerate_offloaded(tmp_path):
    refused(offloaded(tmp_path), rf"{LAST}.*{SAID}")
    adapter = tmp_path / "adapter"
    trained().save_pretrained(adapter)
    for settings in ({}, {"device_map": "auto", "offload_folder": tmp_path / "other"}):
        with pytest.raises(drlora.ConfigError, match=SAID):
            PeftModel.from_pretrained(offloaded(tmp_path), adapter, **settings)


def test_a_base_that_is_offloaded_by_hand():
    model = make_model()
    cpu_offload(model)
    refused(model, SAID)


def test_experts_alone_on_meta():
    model = make_model()
    model.get_submodule(LAST).to_empty(device="meta")
    refused(model, SAID)


def test_a_skeleton_is_not_refused():
    with torch.device("meta"):
        model = make_model()
    adapted = get_peft_model(model, make_settings(), low_cpu_mem_usage=True)
    adapted.add_adapter("second", make_settings())
    assert len(adapted_layers(adapted, "second")) == 2


def spread(model, **changes):
    """A model that looks as transformers leaves it with its experts spread over processes."""
    model._mesh_manager = object()
    model.config.distributed_config = DistributedConfig(fsdp_size=2, ep_size=2, **changes)
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            module._is_expert_parallel = True
    return model


def test_spread_experts_that_could_not_be_computed():
    """Of another family, packed, or by a kernel without a backward pass."""
    refused(spread(make_class("DbrxForCausalLM")), "DbrxExperts.*interface.*without ep_size")
    packed = make_model()
    drlora.quantise_experts(packed, "int8")
    refused(spread(packed), "expert-parallel and packed.*bfloat16")
    megamoe = spread(make_model(), ep_implementation="deepgemm_megamoe")
    refused(megamoe, "no backward pass.*ep_implementation='auto'")


def test_fsdp_that_leaves_buffers_on_one_process(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "True")
    refused(make_model(), "fsdp_cpu_ram_efficient_loading=true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    get_peft_model(make_model(), make_settings())


def test_a_second_adapter_that_is_refused_leaves_the_first_at_work():
    """Also what it has noted of routers."""
    model = trained(options={"routing_signal": "probability"}, router="train")
    wanted, before = logits(model), appearance(model.get_base_model())
    with pytest.raises(drlora.ConfigError, match="match nothing"):
        model.add_adapter("second", make_settings(experts=["nonsense"]))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), wanted)
    hooks = [len(found) for found in appearance(model.get_base_model())[2]]
    assert hooks == [len(found) for found in before[2]]
    model.train()(**make_batch()).loss.backward()
    for layer in adapted_layers(model, "default").values():
        assert layer.adapter("default").meter.num_tokens == 24
