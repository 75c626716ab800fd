"""A family of experts that only this file knows: one class and `register_family`.

Its experts are OLMoE's under other names and stored the other way round, so that OLMoE's own
adapter says what must come out.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import make_model
from tiny_adapter import logits, make_settings, train
from torch.nn import functional as F

import drlora
from drlora.export.plan import make_plan
from drlora.moe.blocks import find_blocks
from drlora.moe.families import FAMILIES, Family, family_of, register_family
from drlora.ops.weights import ExpertWeights, as_matrix


class MirroredExperts(torch.nn.Module):
    """`enter (E, H, 2I)`, gate before up, and `leave (E, I, H)`."""

    def __init__(self, experts):
        super().__init__()
        self.enter = torch.nn.Parameter(experts.gate_up_proj.data.transpose(1, 2).contiguous())
        self.leave = torch.nn.Parameter(experts.down_proj.data.transpose(1, 2).contiguous())

    def gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def forward(self, hidden, index, weights):
        every = torch.einsum("th,ehg->teg", hidden, self.enter)
        out = torch.einsum("tei,eih->teh", self.gate(every), self.leave)
        chosen = out.gather(1, index[..., None].expand(-1, -1, out.shape[-1]))
        return (chosen * weights[..., None]).sum(1)


class Mirrored(Family):
    """What drlora has to be told."""

    def recognises(self, module):
        return type(module).__name__ == "MirroredExperts"

    def weights(self, module):
        enter, leave = (as_matrix(w, transposed=True) for w in (module.enter, module.leave))
        return ExpertWeights(enter, leave, module.gate, is_silu=False)


@pytest.fixture
def family():
    family = register_family(Mirrored())
    yield family
    FAMILIES.remove(family)


def mirrored():
    model = make_model()
    for layer in model.model.layers:
        layer.mlp.experts = MirroredExperts(layer.mlp.experts)
    return model.eval()


def trained(base, projections):
    torch.manual_seed(3)
    model = get_peft_model(base, make_settings(projections=projections))
    assert isinstance(model, PeftModel)
    return train(model)


def test_without_it_the_model_is_refused():
    with pytest.raises(drlora.ConfigError, match="no Mixture-of-Experts block|not understood"):
        find_blocks(mirrored())


def test_a_family_from_outside_is_found(family):
    assert find_blocks(mirrored()) == find_blocks(make_model())
    assert family_of(mirrored().model.layers[0].mlp.experts) is family


@pytest.mark.parametrize("projections", [["up", "down"], ["gate_up", "down"]], ids=str)
def test_it_trains_as_the_family_that_it_mirrors(family, projections):
    """With growth."""
    model, twin = (trained(base, projections) for base in (mirrored(), make_model()))
    ranks = drlora.rank_map(model)
    assert ranks == drlora.rank_map(twin)
    assert len({rank for block in ranks.values() for rank in block["down"]}) > 1
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-3, atol=1e-4)
    plain = logits(mirrored())
    assert (logits(model) - plain).norm() > 0.01 * plain.norm()


def test_it_is_saved_loaded_merged_and_taken_off(family, tmp_path):
    model = trained(mirrored(), ["gate_up", "down"])
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mirrored(), tmp_path)
    assert torch.equal(logits(loaded), wanted)
    before = {name: p.clone() for name, p in loaded.named_parameters()}
    loaded.merge_adapter()
    torch.testing.assert_close(logits(loaded), wanted, rtol=1e-4, atol=1e-5)
    loaded.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in loaded.named_parameters())
    assert make_plan(loaded, "merged").format == "merged"
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(mirrored()))
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)


def test_the_last_one_registered_is_asked_first(family):
    other = register_family(Mirrored())
    try:
        assert family_of(mirrored().model.layers[0].mlp.experts) is other
    finally:
        FAMILIES.remove(other)
    assert family_of(mirrored().model.layers[0].mlp.experts) is family


def test_no_file_of_the_package_knows_this_family():
    source = Path(drlora.__file__).parent
    assert not [p for p in source.rglob("*.py") if "Mirrored" in p.read_text("utf-8")]


def test_every_file_of_the_folder_is_a_family():
    folder = Path(drlora.__file__).parent / "moe" / "families"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "base"}
    assert files == {type(family).__module__.rpartition(".")[2] for family in FAMILIES}
