"""Start a new run from a DR-LoRA adapter that was trained before.

    model = drlora.continue_adapter(base_model, "runs/first", ranks="grow")

The new run has its own plan of growth, optimizer and statistics; what the adapter computes comes
along. Of its ranks there are three things to make:

    keep     every expert has the rank that it has; nothing grows
    grow     from these ranks on, up to a budget that is larger (r_target) or was not spent
    again    every expert goes back to r_init with the strongest part of what it learned (the
             singular value decomposition of its update), and the budget is given out anew
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from drlora.adapter.embeddings import fit_embeddings
from drlora.adapter.inject import adapted_layers
from drlora.adapter.pool import RankPool
from drlora.adapter.row_book import FREE
from drlora.config.adapter import DrLoraConfig, with_options_apart
from drlora.config.registry import ALLOCATIONS, WITH_OPTIONS, known_options
from drlora.errors import CheckpointError, ConfigError, DrLoraError, first_line
from drlora.io.files import home, read_adapter_config, read_shapes
from drlora.io.run_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CHECKPOINTS, CONFIG

RANKS = ("keep", "grow", "again")
# What belongs to a run and its length, not to the adapter.
_OF_A_RUN = (
    "grow_every",
    "settle_steps",
    "p_grow",
    "warmup_steps",
    "start",
    "record",
)
_OPTIONS_OF_A_RUN = ("start_a", "start_a_scale", "start_batches", "hot_fraction")
_POOLS, _OWNER = ".drlora_adapters.pools.", ".owner"
_FREQUENCY = ".drlora_adapters.frequency"


def is_drlora(folder: str | Path) -> bool:
    """Whether a folder holds a DR-LoRA adapter, as a run directory does."""
    path = Path(home(str(folder)))
    if not (path / ADAPTER_CONFIG).is_file():
        return False
    return read_adapter_config(path, ADAPTER_WEIGHTS).get("peft_type") == "DRLORA"


def kept_settings(
    folder: str | Path, ranks: str | None, known: Collection[str], given: Mapping[str, Any]
) -> dict[str, Any]:
    """`given` settings on top of those that a continued adapter brings along.

    Args:
        folder: what is continued; of anything but a DR-LoRA adapter nothing is brought.
        ranks: one of RANKS; None is `keep`.
        known: the names of settings.
        given: what the user set.

    Raises:
        CheckpointError: if the adapter is damaged.
        ConfigError: if `given` and `ranks` contradict each other.
    """
    if not is_drlora(folder):
        return dict(given)
    path = Path(home(str(folder)))
    config = with_options_apart(read_adapter_config(path, ADAPTER_WEIGHTS))
    saved = {k: config[k] for k in known if k in config and k not in _OF_A_RUN}
    if shared := (config.get("record") or {}).get("shared_outer"):
        saved["record"] = {"shared_outer": shared}  # ranks were raised already
    brought = config.get("options")
    options = {
        k: v
        for k, v in (brought if isinstance(brought, dict) else {}).items()
        if k not in _OPTIONS_OF_A_RUN
    }
    if "r_target" in given and "lora_alpha" not in given:  # the scaling stays as it is
        wanted = int(given["r_target"]) / saved["r_target"]
        saved["lora_alpha"] *= math.sqrt(wanted) if saved.get("use_rslora") else wanted
    found = {**saved, **given}
    is_kept = (ranks or "keep") == "keep"
    if is_kept:  # with r_init = r_target growth changes nothing, other policies may
        found["allocation"] = "grow"
    still = known_options({setting: found[setting] for setting in WITH_OPTIONS if setting in found})
    options = {k: v for k, v in options.items() if k in still}
    found["options"] = {**options, **(given.get("options") or {})}
    if is_kept:
        _refuse_growth(found, given)
        still = {k: v for k, v in found["options"].items() if k != "move_share"}
        return {**found, "r_init": found["r_target"], "options": still}
    if ranks == "grow" and "r_init" not in given:
        found["r_init"] = min(_lowest_mean_rank(path), found["r_target"])
    planned = DrLoraConfig(**found)
    if not ALLOCATIONS[planned.allocation].changes_ranks(planned):
        raise ConfigError(
            f"start_from_ranks={ranks!r}: the adapter in {folder} has spent its budget of "
            f"{found['r_target']} ranks an expert; raise adapter.r_target (and adapter.r_max), or "
            f"set start_from_ranks: {'keep or again' if ranks == 'grow' else 'keep'}."
        )
    return found


def _refuse_growth(found: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    if "r_init" in given and given["r_init"] != found["r_target"]:
        raise ConfigError(
            f"r_init={given['r_init']} and r_target={found['r_target']} ask for growth, but "
            f"start_from_ranks is 'keep'; set start_from_ranks: grow or again, or leave r_init out."
        )


def continue_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    config: DrLoraConfig | None = None,
    ranks: str = "keep",
) -> PeftModel:
    """`model` with a new adapter that computes what the DR-LoRA adapter in `folder` computes.

    Args:
        model: the base model that the adapter was trained on; it is wrapped.
        folder: a run directory, a checkpoint, or a folder that `save_pretrained` wrote.
        config: settings of the new adapter; by default those of the old one, and the published plan
            of growth. With `keep` r_init must be r_target.
        ranks: `keep`, `grow` or `again` (see above; only the last one changes what is computed,
            where an expert had more than r_init ranks, and says by how much).

    Raises:
        CheckpointError: if the adapter is missing, damaged, or was made for another model.
        ConfigError: if it cannot be continued with these settings.
    """
    path = Path(home(str(folder)))
    refuse_unfit(path)
    if config is None:
        of_peft = {f.name for f in fields(PeftConfig)} - {"task_type"}
        known = [f.name for f in fields(DrLoraConfig) if f.name not in of_peft]
        config = DrLoraConfig(**kept_settings(path, ranks, known, {}))
    if ranks not in RANKS or (ranks == "keep" and config.grows):
        raise ConfigError(
            f"ranks={ranks!r} with r_init={config.r_init} and r_target={config.r_target}: choose "
            f"one of {list(RANKS)}; for 'keep' both ranks must be the same."
        )
    tensors, before = _read(path)
    _refuse_contradictions(config, before, path)
    fit_embeddings(model, path)
    adapted = cast(PeftModel, get_peft_model(model, config))
    change = before.scaling / config.scaling
    kept, lost = _refit(adapted, tensors, config, ranks, change)
    if config.target_modules and before.target_modules:
        _rescale_linears(kept, _linear_scaling(before) / _linear_scaling(config))
    try:
        set_peft_model_state_dict(adapted, kept)
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"the adapter in {folder} cannot be continued: {first_line(error)}. Give the settings "
            f"that it was trained with, and its base model."
        ) from error
    if lost > 0:
        warnings.warn(
            f"start_from_ranks 'again': back at r_init={config.r_init}, the experts keep "
            f"{1 - lost:.1%} of their squared update; the rest is to be learned again.",
            stacklevel=2,
        )
    return adapted


def _refuse_contradictions(config: DrLoraConfig, before: DrLoraConfig, folder: Path) -> None:
    """Refuse settings that place ranks or rows anew, or give ordinary LoRA another rank."""
    if config.starts_from_data:
        raise ConfigError(
            f"start={config.start!r} and options.start_a={config.option('start_a')!r} place what a "
            f"new adapter begins with, but the adapter in {folder} is continued with what it has; "
            f"leave them out."
        )
    ranks = config.target_rank, before.target_rank
    both = config.target_modules and before.target_modules
    if both and not config.option("common_budget") and ranks[0] != ranks[1]:
        raise ConfigError(
            f"target_rank={ranks[0]}, but the LoRA on target_modules in {folder} has rank "
            f"{ranks[1]}, which stays as it is; set target_rank={ranks[1]}."
        )


def _linear_scaling(config: DrLoraConfig) -> float:
    """The factor on B A x of ordinary LoRA."""
    assert config.target_alpha is not None and config.target_rank is not None
    rank = config.target_rank
    return config.target_alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _rescale_linears(tensors: dict[str, Tensor], change: float) -> None:
    """Have ordinary LoRA compute what it did under another scaling; pools are rescaled already."""
    for key in [key for key in tensors if key.endswith(".lora_B.weight")]:
        tensors[key] = (tensors[key].float() * change).to(tensors[key].dtype)


def refuse_unfit(folder: Path) -> None:
    """Refuse a folder without a DR-LoRA adapter.

    Raises:
        CheckpointError: saying what is missing.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file() and (folder / CONFIG).is_file():
        raise CheckpointError(
            f"the run in {folder} is not finished, so it has no adapter to start from; finish it "
            f"with --resume, or name one of {folder / CHECKPOINTS}."
        )
    if not is_drlora(folder):
        raise CheckpointError(f"{folder} holds no DR-LoRA adapter.")


def _read(folder: Path) -> tuple[dict[str, Tensor], DrLoraConfig]:
    try:
        config = DrLoraConfig.from_pretrained(str(folder))
        return load_file(folder / ADAPTER_WEIGHTS), config
    except DrLoraError:
        raise
    except Exception as error:  # whatever PEFT makes of a file that it does not understand
        raise CheckpointError(
            f"the adapter in {folder} cannot be read: {first_line(error)}."
        ) from error


def _lowest_mean_rank(folder: Path) -> int:
    """The mean rank of an expert in the pool where it is lowest, rounded down; at least 1."""
    path = folder / ADAPTER_WEIGHTS
    names = [name for name in read_shapes(path) if name.endswith(_OWNER)]
    tensors = load_file(path)
    experts = {name: len(tensors[name.partition(_POOLS)[0] + _FREQUENCY]) for name in names}
    return max(1, min(int((tensors[n] != FREE).sum()) // experts[n] for n in names))


def _refit(
    adapted: PeftModel,
    tensors: dict[str, Tensor],
    config: DrLoraConfig,
    ranks: str,
    change: float,
) -> tuple[dict[str, Tensor], float]:
    """The adapter's tensors as the new pools take them, and the share of the update that is lost.

    Statistics and births are those of a new run.
    """
    found = dict(tensors)
    whole = gone = 0.0
    for layer in adapted_layers(adapted, "default").values():
        experts = f"base_model.model.{layer.block.experts_name}"
        if (frequency := experts + _FREQUENCY) in found:
            found[frequency] = torch.zeros_like(found[frequency])
        for projection, pool in layer.adapter("default").rank_pools.items():
            prefix = f"{experts}{_POOLS}{projection}"
            if f"{prefix}{_OWNER}" not in found:
                raise CheckpointError(
                    f"the adapter that is continued has no {projection} on "
                    f"{layer.block.experts_name}; set projections and experts as it was trained."
                )
            old = {key: found[f"{prefix}.{key}"] for key in ("lora_A", "lora_B", "owner")}
            old["lora_B"] = old["lora_B"] * change
            fit = _again if ranks == "again" else _moved
            new, energy, lost = fit(pool, old, config, prefix)
            whole, gone = whole + energy, gone + lost
            found = {k: v for k, v in found.items() if not k.startswith(f"{prefix}.")}
            own = {key: getattr(pool, key).detach().cpu() for key in pool.state_keys}
            zero = {key: torch.zeros_like(own[key]) for key in own if key not in ("owner", "seed")}
            found |= {f"{prefix}.{key}": value for key, value in {**own, **zero, **new}.items()}
    return found, gone / whole if whole and gone > 1e-9 * whole else 0.0


def _moved(
    pool: RankPool, old: dict[str, Tensor], config: DrLoraConfig, where: str
) -> tuple[dict[str, Tensor], float, float]:
    """The owned rows as they are; free rows are as in a new adapter."""
    owned = torch.nonzero(old["owner"] != FREE)[:, 0]
    rows = len(pool.owner)
    ranks_E = torch.bincount(old["owner"][owned].long(), minlength=pool.book.num_experts)
    if len(owned) > rows or int(ranks_E.max()) > config.r_max:
        raise ConfigError(
            f"{where}: the adapter owns {len(owned)} rows and up to {int(ranks_E.max())} an "
            f"expert, r_target={config.r_target} makes room for {rows}, r_max={config.r_max}; "
            f"raise them, or set start_from_ranks: again."
        )
    # Where they are, if there is room; the places of rows decide nothing.
    places = owned if len(old["owner"]) <= rows else torch.arange(len(owned))
    owner_R = torch.full((rows,), FREE, dtype=pool.owner.dtype)
    owner_R[places] = old["owner"][owned].to(owner_R.dtype)
    a_RI, b_RO = _fresh(pool)
    a_RI[places], b_RO[places] = old["lora_A"][owned].to(a_RI), old["lora_B"][owned].to(b_RO)
    return {"owner": owner_R, "lora_A": a_RI, "lora_B": b_RO}, 0.0, 0.0


def _again(
    pool: RankPool, old: dict[str, Tensor], config: DrLoraConfig, where: str
) -> tuple[dict[str, Tensor], float, float]:
    """The strongest directions of each expert's update in the rows that a new adapter gives it.

    Also the squares of all singular values, and of those that are left out, both summed.
    """
    a_RI, b_RO = _fresh(pool)
    energy = lost = 0.0
    for expert in range(pool.book.num_experts):
        rows = torch.nonzero(old["owner"] == expert)[:, 0]
        places = torch.from_numpy(np.flatnonzero(pool.book.owner_R == expert))
        a_rI, b_rO, sigma = _directions(old["lora_A"][rows], old["lora_B"][rows])
        kept = min(len(places), len(sigma))
        a_RI[places[:kept]], b_RO[places[:kept]] = a_rI[:kept].to(a_RI), b_rO[:kept].to(b_RO)
        energy += float(sigma.square().sum())
        lost += float(sigma[kept:].square().sum())
    return {"lora_A": a_RI, "lora_B": b_RO}, energy, lost


def _directions(a_rI: Tensor, b_rO: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of A and of B whose products are the singular directions of the same update.

    Rows keep the length that rows of A had on the whole, since Adam steps as far in A of any
    length; B has the rest. In float64; the update itself is never formed.
    """
    q_b, r_b = torch.linalg.qr(b_rO.double().T)
    q_a, r_a = torch.linalg.qr(a_rI.double().T)
    u, sigma, v_t = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    length = a_rI.double().norm(dim=1).mean() if len(a_rI) else torch.tensor(1.0)
    return length * (v_t @ q_a.T), (q_b @ u * sigma / length).T, sigma


def _fresh(pool: RankPool) -> tuple[Tensor, Tensor]:
    """A and B of a new adapter."""
    return pool.lora_A.detach().cpu().clone(), pool.lora_B.detach().cpu().clone()
