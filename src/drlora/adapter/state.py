"""The adapters' part of a model's state, in full also where it is sharded or split."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from drlora.adapter.embeddings import embedding_names, rows_before
from drlora.distributed.held import whole_weights

# In the keys of what PEFT and this package add to a model.
_ADDED = (".lora_", ".drlora_adapters.", ".modules_to_save.", ".token_adapter.trainable_tokens_")


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What `model.save_pretrained(folder, state_dict=...)` needs of a model that may be sharded.

    Every process must call it: sharded tensors (FSDP2) and split ones (ZeRO) are gathered.

    Returns:
        The adapters' part of `model.state_dict()`, each tensor in full, without the base model's;
        but with its embeddings where they were resized, since PEFT saves these too. Weights that
        ZeRO trains are the float32 ones, also where the model computes in 16 bits.
    """
    resized = embedding_names(model) if rows_before(model) is not None else []
    added = (*_ADDED, *(f"{name}." for name in resized))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        return {
            key: whole_weights(parameters.get(key, value)).detach()
            for key, value in model.state_dict().items()
            if any(part in key for part in added)
        }
