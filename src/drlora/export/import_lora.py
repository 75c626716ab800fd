"""Start from a LoRA on experts that was trained with PEFT, and grow from there.

    model = drlora.load_peft_lora(base_model, "folder of the LoRA")

Every expert owns as many rows as the LoRA has rank, with its weights; the other rows of the budget
are free. What the model computes is unchanged.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor
from transformers import PreTrainedModel

from drlora.adapter.inject import adapted_layers
from drlora.adapter.layer import DrLoraExperts
from drlora.adapter.pool import RankPool
from drlora.config.adapter import DrLoraConfig
from drlora.errors import CheckpointError, ConfigError, first_line, shown
from drlora.export.factors import Factors
from drlora.export.peft_lora import read
from drlora.export.updates import PARAMETERS, Updates, base_of, seen_transposed
from drlora.io.files import read_adapter_config
from drlora.io.run_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS


def load_peft_lora(
    model: PreTrainedModel, folder: str | Path, config: DrLoraConfig | None = None
) -> PeftModel:
    """`model` with a new DR-LoRA adapter that continues the PEFT LoRA in `folder`.

    LoRA on other layers than experts becomes ordinary LoRA of the same adapter, and modules that
    were trained in full come along. Per-expert keys are read through PEFT's converter.

    Args:
        model: the base model that the LoRA was trained on; it is wrapped.
        folder: holds adapter_config.json and adapter_model.safetensors.
        config: settings of the new adapter; `r_init` must be at least the LoRA's rank (rows beyond
            it start like new ones). By default r_init is that rank r, r_target 2 r and r_max 4 r.

    Raises:
        CheckpointError: if the LoRA is missing, damaged, or was made for another model.
        ConfigError: if it cannot be continued with these settings, or has trained what an adapter
            of experts has no place for.
    """
    if config is not None and config.starts_from_data:
        raise ConfigError(
            f"start={config.start!r}, start_a={config.option('start_a')!r}: a LoRA that is "
            f"continued has ranks and rows of its own; leave these settings out."
        )
    updates = _read_lora(model, Path(folder))
    rank = max(rank for factors in updates.experts.values() for rank in factors.ranks)
    config = _default_config(rank) if config is None else copy.copy(config)
    if config.r_init < rank:
        raise ConfigError(
            f"r_init={config.r_init} is less than the rank of the LoRA in {folder}; set "
            f"r_init={rank} and r_target to at least that."
        )
    if config.task_type is None:
        config.task_type = PeftConfig.from_pretrained(str(folder)).task_type
    _take_over_settings(config, updates)
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    for layer in adapted_layers(adapted, "default").values():
        _fill_layer(layer, updates, config)
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            _fill_linear(module, updates.linears[name])
        elif isinstance(module, ModulesToSaveWrapper) and name in updates.modules:
            module.modules_to_save["default"].load_state_dict(updates.modules[name])
    return adapted


def _default_config(rank: int) -> DrLoraConfig:
    one_a_time = 1 / (3 * rank)  # of small ranks the default's 10 % would be less than one
    return DrLoraConfig(r_init=rank, r_target=2 * rank, r_max=4 * rank, p_grow=max(0.1, one_a_time))


def _read_lora(model: PreTrainedModel, folder: Path) -> Updates:
    """The contents of the LoRA in `folder`; `model` is as before."""
    refuse_other_files(folder)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            # PEFT converts rank_pattern itself, applies it, and then says that it matched nothing.
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys")
            loaded = PeftModel.from_pretrained(model, folder)
    except Exception as error:  # whatever PEFT makes of a file that it does not understand
        raise CheckpointError(
            f"the LoRA in {folder} cannot be loaded into {type(model).__name__}: "
            f"{first_line(error)}. Was it made for another model?"
        ) from error
    updates = read(loaded)
    base_of(loaded, "default")
    if not updates.experts:
        raise ConfigError(
            f"the LoRA in {folder} is on no expert (its layers are {sorted(updates.linears)[:3]}); "
            f"there is nothing to grow."
        )
    return updates


def refuse_other_files(folder: Path) -> None:
    """Raises:
    CheckpointError: if `folder` does not hold the two files of a LoRA.
    ConfigError: if the LoRA has more than can be carried over.
    """
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} holds no PEFT LoRA: it has no {name} (weights in other formats than "
                f"safetensors are not read)."
            )
    config = read_adapter_config(folder, ADAPTER_WEIGHTS)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"the adapter in {folder} is of type {kind!r}; LORA can be continued."
        )
    for name, effect in _not_carried(config):
        raise ConfigError(
            f"the LoRA in {folder} has {name}={shown(config[name])}, which {effect} and cannot be "
            f"carried over. Merge it into its base model (PEFT's merge_and_unload), and start a "
            f"new adapter on that."
        )


def _not_carried(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Settings of a LoRA that change more than its own weights do, and what they change."""
    if config.get("bias") not in (None, "none"):
        yield "bias", "trains biases of the base model"
    if config.get("trainable_token_indices"):
        yield "trainable_token_indices", "trains single tokens of an embedding"
    if config.get("layer_replication"):
        yield "layer_replication", "makes a model of other layers"


def _take_over_settings(config: DrLoraConfig, updates: Updates) -> None:
    """What the LoRA decides: which experts, and the layers and modules beside them."""
    if config.experts is None:
        config.experts = sorted({name.rpartition(".")[0] for name in updates.experts})
    if updates.modules:
        config.modules_to_save = sorted({*(config.modules_to_save or ()), *updates.modules})
    if not updates.linears:
        if config.target_modules:
            raise ConfigError(
                f"target_modules={config.target_modules}: the LoRA has no other layers than "
                f"experts to continue; leave it out."
            )
        return
    if config.target_modules:
        raise ConfigError(
            f"target_modules={config.target_modules} is decided by the LoRA; leave it out."
        )
    rank = max(rank for factors in updates.linears.values() for rank in factors.ranks)
    config.target_modules, config.target_rank = sorted(updates.linears), rank
    # The scaling is part of B already.
    config.target_alpha = math.sqrt(rank) if config.use_rslora else float(rank)


@torch.no_grad()
def _fill_layer(layer: DrLoraExperts, updates: Updates, config: DrLoraConfig) -> None:
    adapter, block = layer.adapter("default"), layer.block
    left = {}
    for matrix, keys in PARAMETERS.items():
        names = [f"{block.experts_name}.{key}" for key in keys]
        found = next((updates.experts[n] for n in names if n in updates.experts), None)
        if found is not None:
            if seen_transposed(layer, matrix):
                found = found.transposed()
            left[matrix] = torch.stack([b.abs().amax(dim=1) for b in found.b]).amax(dim=0)
            for projection, pool in adapter.rank_pools.items():
                place, start, step = block.place_of(projection)
                if place == matrix:
                    columns = slice(start, start + step * pool.lora_B.shape[1], step)
                    _fill_pool(pool, found, columns, config.scaling)
                    left[matrix][columns] = 0
    unheld = [matrix for matrix, remaining_O in left.items() if remaining_O.any()]
    if unheld:
        raise ConfigError(
            f"projections={config.projections} leave out a part of {unheld[0]} of {block.name} "
            f"that the LoRA has trained; use projections=['gate_up', 'down']."
        )


def _fill_pool(pool: RankPool, factors: Factors, columns: slice, scaling: float) -> None:
    for expert, (a_rI, b_Or) in enumerate(zip(factors.a, factors.b, strict=True)):
        rows = torch.nonzero(pool.owner == expert)[: len(a_rI), 0]
        _copy_rows(pool.lora_A, rows, a_rI)
        _copy_rows(pool.lora_B, rows, b_Or[columns].T / scaling)


def _copy_rows(target_RF: Tensor, rows: Tensor, value_nF: Tensor) -> None:
    target_RF.data[rows] = value_nF.to(target_RF)


@torch.no_grad()
def _fill_linear(module: LoraLayer, factors: Factors) -> None:
    rank = module.r["default"]
    a_1rI, b_1Or = factors.padded(rank)
    module.lora_A["default"].get_parameter("weight").copy_(a_1rI[0])
    module.lora_B["default"].get_parameter("weight").copy_(b_1Or[0])
