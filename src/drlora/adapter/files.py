"""What an adapter's file must hold, may hold and must not hold: checked before anything is loaded.

PEFT itself is lenient: what is missing stays new, and what else is there is put into the base model
or ignored, in silence or with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from drlora.adapter.embeddings import embedding_names, has_tied_embeddings, rows_before
from drlora.config.adapter import DrLoraConfig
from drlora.errors import CheckpointError

CONTAINER = ".drlora_adapters."
ROOT = "base_model.model."
Renamed = Callable[[str, str], str]


def refuse_other_tensors(
    model: nn.Module, adapter_name: str, loaded: dict[str, Tensor], without_name: Renamed
) -> None:
    """Compare an adapter's tensors with what the model has room for.

    Args:
        model: with the adapter in place, its rows still new.
        adapter_name: its name in the model.
        loaded: key -> tensor, with the adapter's name in the key.
        without_name: (key, adapter's name) -> the key in a file.

    Raises:
        CheckpointError: naming the first key that is missing, does not fit, or has no place.
    """
    here = {key.removeprefix(ROOT): value for key, value in model.state_dict().items()}
    there = {key.removeprefix(ROOT): value for key, value in loaded.items()}
    own = _own_keys(model, adapter_name, list(here))
    beside = _keys_beside(model, adapter_name, list(here), without_name)
    for key in [*own, *there]:
        place = key if key in own else beside.get(key)
        found = there[key].shape if key in there else None
        if place is None or found != here[place].shape:
            room = here[place or key].shape if (place or key) in here else None
            raise _misfit(key, found, None if room == found else room, place in {*beside.values()})


def put_embeddings_in_place(
    model: nn.Module, adapter_name: str, loaded: dict[str, Tensor], without_name: Renamed
) -> dict[str, Tensor]:
    """Load the base model's embeddings, which PEFT saves with an adapter where they were resized.

    In place, so that tied ones stay tied and none takes on the file's dtype. A resized model whose
    new rows are in no file is warned of.

    Args:
        As for `refuse_other_tensors`.

    Returns:
        The tensors that are left to be loaded.
    """
    here = {key.removeprefix(ROOT): value for key, value in model.state_dict().items()}
    own = _own_keys(model, adapter_name, list(here))
    beside = _keys_beside(model, adapter_name, list(here), without_name)
    _warn_of_new_rows(model, [key.removeprefix(ROOT) for key in loaded])
    left = dict(loaded)
    for full, value in loaded.items():
        key = full.removeprefix(ROOT)
        if key in beside and key not in own:
            is_second_copy = beside[key] != key  # of a module that was trained in full
            if is_second_copy or _put_in_place(here[key], value):
                del left[full]
    return left


def _own_keys(model: nn.Module, adapter_name: str, keys: list[str]) -> dict[str, None]:
    """The adapter's own tensors, in order: pools, ordinary LoRA, and what PEFT trains beside it."""
    ends = (f".lora_A.{adapter_name}.weight", f".lora_B.{adapter_name}.weight")
    own = [key for key in keys if f"{CONTAINER}{adapter_name}." in key or key.endswith(ends)]
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            places = module.adapter_state_dict_load_map(adapter_name).values()
            named = [f"{name}.{place}".removeprefix(ROOT) for place in places]
            own += [key for key in named if key in keys]  # PEFT names tokens of other adapters too
    return dict.fromkeys(own)


def _keys_beside(
    model: nn.Module, adapter_name: str, keys: list[str], without_name: Renamed
) -> dict[str, str]:
    """Key in the file -> key in the model, of all that PEFT writes with the embeddings."""
    names = tuple(f"{name.removeprefix(ROOT)}." for name in embedding_names(model))
    under = [key for key in keys if key.startswith(names)]
    return {without_name(key, adapter_name): key for key in under}


def _misfit(key: str, found: Any, room: Any, is_embedding: bool) -> CheckpointError:
    saved = "missing" if found is None else tuple(found)
    wanted = "no place for it" if room is None else tuple(room)
    both = f"{key} is {saved} in the file, the model has {wanted}"
    if is_embedding and found is not None and room is not None and found[1:] == room[1:]:
        return CheckpointError(
            f"the adapter was saved with embeddings of {found[0]} rows, the model has {room[0]}: "
            f"call model.resize_token_embeddings({found[0]}) before the adapter is loaded ({both})."
        )
    return CheckpointError(
        f"the adapter does not fit this model: {both}. It was made for another model or with other "
        f"settings, or is incomplete."
    )


def _put_in_place(target: Tensor, value: Tensor) -> bool:
    """Copy a base model's tensor; PEFT is left to it where it has no memory, or is sharded."""
    if target.is_meta or isinstance(target, DTensor):
        return False
    target.detach().copy_(value)
    return True


def _warn_of_new_rows(model: nn.Module, keys: list[str]) -> None:
    """Of a resized model; `keys` are those of the adapter's file."""
    saved = [key for key in keys if ".lora_" not in key]
    names = [name.removeprefix(ROOT) for name in embedding_names(model)]
    left_out = [n for n in names if not any(key.startswith(f"{n}.") for key in saved)]
    if not left_out or (len(left_out) < len(names) and has_tied_embeddings(model)):
        return
    before = rows_before(model)
    if before is not None:
        warnings.warn(
            f"the embeddings of this model had {before} rows in its own checkpoint and were "
            f"resized, but the adapter's file has none of {left_out}: rows of added tokens are not "
            f"those that it was trained with. Save it with save_embedding_layers=True.",
            stacklevel=2,
        )


def refuse_damaged_ranks(config: DrLoraConfig, loaded: dict[str, Tensor]) -> None:
    """Owners must be what growth can lead to; who they are is checked by the pool itself.

    Raises:
        CheckpointError: if a rank map cannot be.
    """
    ranks: dict[str, dict[str, list[int]]] = {}
    for key, owner_R in loaded.items():
        pools, _, projection = key.removesuffix(".owner").rpartition(".")
        if not key.endswith(".owner") or not pools.endswith(".pools"):
            continue
        if owner_R.is_floating_point() or owner_R.is_complex():
            raise CheckpointError(
                f"the adapter's rank map is damaged: {key} is of {owner_R.dtype}, not of integers."
            )
        # A pool has at least a row an expert; and bincount takes memory up to the largest number.
        if owner_R.numel() and owner_R.max() >= len(owner_R):
            raise CheckpointError(
                f"the adapter's rank map is damaged: {key} names expert {int(owner_R.max())}, "
                f"which cannot be with {len(owner_R)} rows."
            )
        counts = owner_R[owner_R >= 0].long().bincount()
        if len(counts) and counts.max() > config.r_max:
            raise CheckpointError(
                f"the adapter's rank map is damaged: in {key} expert {int(counts.argmax())} has "
                f"rank {int(counts.max())}, r_max is {config.r_max}."
            )
        ranks.setdefault(pools, {})[projection] = counts.tolist()
    for pools, found in ranks.items():
        together = config.option("rank_per") == "expert"
        if together and len({tuple(row) for row in found.values()}) > 1:
            raise CheckpointError(
                f"the adapter's rank map is damaged: with rank_per='expert' {sorted(found)} of "
                f"{pools} must give each expert the same rank."
            )
