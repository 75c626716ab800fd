"""Cases of `benchmarks.gpu` on one expert layer: engines, waits, tiles, ScatterMoE."""

from __future__ import annotations

import copy
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import nn

from benchmarks.checks import SLACK, Reference, check_frozen, check_peft, results_of
from benchmarks.experts_layer import SKEW, load_of, rank_met, ranks_of
from benchmarks.gpu_setting import Setting, failure
from benchmarks.harness import Row, alternate, rows_of, where
from benchmarks.layers import Block, Inputs, Shape, make_experts, make_inputs, ours, peft, step_of

UNIFORM = 64
ENGINES = ("grouped", "triton")
# Triton's interpreter cuts bfloat16 off where a chip rounds it.
INTERPRETER_SLACK = 4 * SLACK


class Layer:
    """One layer's shape with its inputs, frozen experts, and the ranks that are compared.

    Args:
        shape: sizes of the layer.
        setting: where it is.
        uniform: the rank of all experts where they have one; unequal ones have a mean of 16.
    """

    def __init__(self, shape: Shape, setting: Setting, uniform: int = UNIFORM) -> None:
        torch.manual_seed(0)
        self.shape, self.setting, self.uniform = shape, setting, uniform
        self.inputs: Inputs = make_inputs(shape, SKEW, setting.device)
        self.experts = make_experts(shape, setting.device)
        load_E = load_of(self.inputs, shape)
        self.ranks = {
            f"r{uniform}": [uniform] * shape.experts,
            "independent": ranks_of("independent", load_E),
            "following": ranks_of("following", load_E),
        }
        self.met = {name: rank_met(load_E, ranks) for name, ranks in self.ranks.items()}

    def adapted(self, kind: str, like: Block | None = None, **settings: str) -> Block:
        """Our layer at the ranks called `kind`, with the weights of `like` if given."""
        block = ours(self.experts, self.shape, self.ranks[kind], **settings)
        if like is not None:
            block.load_state_dict(like.state_dict())
        return block

    def reference(self, kind: str, block: Block) -> Reference:
        """What the naive engine says of `block`."""
        return Reference(block, self.experts, self.shape, self.ranks[kind], self.inputs)

    def peak_extra_bytes(self, step: Callable[[], None]) -> int | None:
        """Device memory that one forward and backward takes beyond what is there before."""
        if not self.setting.on_gpu:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def checked(layer: Layer, case: str) -> Iterator[tuple[str, nn.Module | Row]]:
    """(name, module) of every implementation that is right, or a row that says what is wrong."""

    def attempt(name: str, make: Callable[[], nn.Module]) -> nn.Module | Row:
        try:
            return make()
        except Exception as error:
            return failure(case, name, error)

    def frozen() -> nn.Module:
        check_frozen(layer.experts, layer.shape, layer.inputs)
        return layer.experts

    def theirs() -> nn.Module:
        model = peft(layer.experts, layer.uniform)
        check_peft(model, layer.experts, layer.shape, layer.inputs, layer.uniform)
        return model

    yield "hf_frozen", attempt("hf_frozen", frozen)
    for kind in layer.ranks:
        first = layer.adapted(kind, engine="grouped")
        reference = layer.reference(kind, first)

        def mine(
            engine: str, kind: str = kind, first: Block = first, reference: Reference = reference
        ) -> nn.Module:
            block = layer.adapted(kind, first, engine=engine)
            interpreted = engine == "triton" and not layer.setting.on_gpu
            slack = INTERPRETER_SLACK if interpreted else SLACK
            reference.check(results_of(block, layer.inputs), slack)
            return block

        for engine in ENGINES:
            yield f"{engine} {kind}", attempt(f"{engine} {kind}", lambda e=engine: mine(e))
    yield f"peft r{layer.uniform}", attempt(f"peft r{layer.uniform}", theirs)


def compare(shape: Shape, setting: Setting, uniform: int = UNIFORM) -> Iterator[Row]:
    """Engines at equal and unequal ranks beside the frozen layer and PEFT."""
    case, layer = f"gpu layer {shape.name} r{uniform}", Layer(shape, setting, uniform)
    steps: dict[str, Callable[[], None]] = {}
    for name, module in checked(layer, case):
        if isinstance(module, nn.Module):
            steps[name] = step_of(module, layer.inputs)
        else:
            yield module
    yield from timed(case, layer, steps)


def timed(case: str, layer: Layer, steps: dict[str, Callable[[], None]]) -> list[Row]:
    """Rows of implementations that passed their check, with memory and the ranks that rows met."""
    peaks = {name: layer.peak_extra_bytes(step) for name, step in steps.items()}
    timings = alternate(
        steps, layer.setting.rounds, layer.setting.warmup, calls=layer.setting.calls
    )
    rows = rows_of(case, timings, "hf_frozen", f"peft r{layer.uniform}")
    for row in rows:
        row["peak_extra_bytes"] = peaks[row["implementation"]]
        kind = row["implementation"].partition(" ")[2]
        if kind in layer.met:
            row["mean_rank_met"] = layer.met[kind]
    return rows


def synchronisation(shape: Shape, setting: Setting) -> Iterator[Row]:
    """Whether a forward and backward pass makes the host wait for the device."""
    case, layer = f"gpu synchronisation {shape.name}", Layer(shape, setting)
    modules: dict[str, Callable[[], nn.Module]] = {
        "hf_frozen": lambda: layer.experts,
        **{e: lambda e=e: layer.adapted("following", engine=e) for e in ENGINES},
        f"peft r{UNIFORM}": lambda: peft(layer.experts, UNIFORM),
    }
    for name, make in modules.items():
        try:
            step = step_of(make(), layer.inputs)
            step()  # compiles, and puts the ranks on the device, which does wait
            found = first_wait(step, setting)
        except Exception as error:
            yield failure(case, name, error)
        else:
            yield {"case": case, "implementation": name, "waits": found, **where()}


def first_wait(step: Callable[[], None], setting: Setting) -> str | None:
    """What torch says of the first operator that waits; None if none does, or without a GPU."""
    if not setting.on_gpu:
        step()
        return "not measured: no GPU"
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        trace = traceback.extract_tb(error.__traceback__)[-1]
        return f"{str(error).splitlines()[0]} ({os.path.basename(trace.filename)}:{trace.lineno})"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def by_trial(shape: Shape, setting: Setting) -> Iterator[Row]:
    """What `engine="auto"` chooses, at equal and unequal ranks, and what it says of it."""
    from drlora.ops import trial

    case, layer = f"gpu trial {shape.name}", Layer(shape, setting)
    known = dict(trial.CANDIDATES)
    trial.CANDIDATES.setdefault(setting.device, ENGINES)
    try:
        for kind in layer.ranks:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                before = trial.found()
                step_of(layer.adapted(kind, engine="auto"), layer.inputs)()
            chosen = {k: v for k, v in trial.found().items() if k not in before}
            yield {"case": case, "implementation": f"auto {kind}", "chosen": chosen,
                   "told": [str(w.message) for w in told], **where()}  # fmt: skip
    finally:
        trial.CANDIDATES.clear()
        trial.CANDIDATES.update(known)


def tile_sweep(shape: Shape, setting: Setting) -> Iterator[Row]:
    """Other tile sizes for the Triton kernels, each checked, beside the ones in use."""
    from drlora.ops.triton import tiles

    case, layer = f"gpu tiles {shape.name}", Layer(shape, setting)
    block = layer.adapted("following", engine="triton")
    reference, plain = layer.reference("following", block), dict(tiles.TILES)
    rows_each = tiles._rows_per_tile(
        shape.tokens * shape.top_k, shape.experts, layer.inputs.x.element_size()
    )
    key = (layer.inputs.x.element_size(), rows_each, tiles._is_hopper_class(layer.inputs.x.device))
    used = tiles.TILES[key]
    others = [
        used._replace(**change)
        for change in (
            {"columns": 128}, {"columns": 128, "warps": 4}, {"stages": 4}, {"stages": 2},
            {"depth": 32, "stages": 4}, {"columns": 128, "depth": 128, "stages": 2},
        )
    ]  # fmt: skip
    step = step_of(block, layer.inputs)
    for other in others if setting.on_gpu else others[:1]:

        def with_other(other=other) -> None:
            tiles.TILES[key] = other
            try:
                step()
            finally:
                tiles.TILES[key] = used

        name = ", ".join(f"{k} {v}" for k, v in other._asdict().items())
        try:
            tiles.TILES[key] = other
            slack = SLACK if setting.on_gpu else INTERPRETER_SLACK
            reference.check(results_of(block, layer.inputs), slack)
            tiles.TILES[key] = used
            steps = {"in use": step, name: with_other}
            timings = alternate(steps, setting.rounds, setting.warmup, calls=setting.calls)
            yield from rows_of(case, timings, "in use", "", tiles=name, tiles_in_use=str(used))[1:]
        except Exception as error:
            yield failure(case, name, error)
        finally:
            tiles.TILES.update(plain)


def scattermoe(shape: Shape, setting: Setting) -> Iterator[Row]:
    """Axolotl's ScatterMoE-LoRA, as PEFT adapters reach it, beside our kernels at one rank."""
    case, layer = f"gpu scattermoe {shape.name}", Layer(shape, setting)
    steps = {"hf_frozen": step_of(layer.experts, layer.inputs)}
    block = layer.adapted(f"r{UNIFORM}", engine="triton")
    try:
        slack = SLACK if setting.on_gpu else INTERPRETER_SLACK
        layer.reference(f"r{UNIFORM}", block).check(results_of(block, layer.inputs), slack)
        steps[f"triton r{UNIFORM}"] = step_of(block, layer.inputs)
        rival = peft(scattermoe_experts(layer.experts, setting.scattermoe), UNIFORM)
        check_peft(rival, layer.experts, layer.shape, layer.inputs, UNIFORM, slack)
        steps[f"scattermoe r{UNIFORM}"] = step_of(rival, layer.inputs)
    except Exception as error:
        yield failure(case, f"scattermoe r{UNIFORM}", error)
    if len(steps) == 3:
        yield from timed(case, layer, steps)


def scattermoe_experts(experts: nn.Module, folder: str | None) -> nn.Module:
    """The same frozen experts, computed by the package `scattermoe_lora` in `folder`.

    It is what axolotl (Apache-2.0) keeps in `axolotl/integrations/kernels/libs`; taken alone it
    needs torch and triton only. PEFT's wrapper is patched as axolotl patches it, which concerns no
    other experts.
    """
    if folder is None:
        raise ValueError("not there: name the folder of scattermoe_lora with --scattermoe")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    from scattermoe_lora.experts import scattermoe_experts_forward
    from scattermoe_lora.experts_lora_fastpath import patch_paramwrapper_fastpath
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("scattermoe", scattermoe_experts_forward)
    patch_paramwrapper_fastpath()
    twin = copy.deepcopy(experts, {id(p): p for p in experts.parameters()})
    twin.config._experts_implementation = "scattermoe"
    return twin


def toy(shape: Shape) -> Shape:
    """The same kind of layer, small enough for an interpreter."""
    return replace(shape, hidden=32, width=16, experts=4, top_k=2, tokens=12)


OLMOE_LAYER = Shape(2048, 1024, 64, 8, 8192, torch.bfloat16)
QWEN3_LAYER = Shape(2048, 768, 128, 8, 8192, torch.bfloat16)
# PEFT's own case, of which it published 2.56 ms and 1.30 GB on an H100 (its pull request 3577).
PUBLISHED = replace(QWEN3_LAYER, tokens=4096)


def sized(shape: Shape, is_toy: bool) -> Shape:
    """The shape, or a toy of it."""
    return toy(shape) if is_toy else shape


# Name -> (whether at toy sizes, where) -> rows.
CASES: dict[str, Callable[[bool, Setting], Iterator[Row]]] = {
    "layer-published": lambda tiny, s: compare(sized(PUBLISHED, tiny), s, 16),
    "layer-olmoe": lambda tiny, s: compare(sized(OLMOE_LAYER, tiny), s),
    "layer-qwen3": lambda tiny, s: compare(sized(QWEN3_LAYER, tiny), s),
    "trial": lambda tiny, s: by_trial(sized(PUBLISHED, tiny), s),
    "synchronisation": lambda tiny, s: synchronisation(sized(OLMOE_LAYER, tiny), s),
    "scattermoe": lambda tiny, s: scattermoe(sized(PUBLISHED, tiny), s),
    "tiles": lambda tiny, s: tile_sweep(sized(OLMOE_LAYER, tiny), s),
}
