"""DR-LoRA: LoRA on Mixture-of-Experts models whose experts' ranks grow where the task needs them.

    import drlora
    from peft import get_peft_model

    model = get_peft_model(base_model, drlora.DrLoraConfig(r_init=8, r_target=16, r_max=32))
    trainer = Trainer(model=model, ..., callbacks=[drlora.DrLoraCallback()])

Importing drlora registers the method with PEFT. The method: arXiv 2601.04823.
"""

from __future__ import annotations

from drlora.adapter import model as _peft_method
from drlora.adapter.state import adapter_state
from drlora.config.adapter import DrLoraConfig
from drlora.config.peft_type import AFTER_SAVE as _AFTER_SAVE
from drlora.errors import CheckpointError, ConfigError, DataError, DrLoraError, SyncError
from drlora.export.import_lora import load_peft_lora
from drlora.io.checkpoint import newest_checkpoint, write_checkpoint
from drlora.ranks.continue_adapter import continue_adapter
from drlora.ranks.dynamics import RankDynamics
from drlora.ranks.event import Grant
from drlora.ranks.starts import place_ranks, rank_map, ranks_from_routing, start_ranks
from drlora.report.card import keep_cards as _keep_cards
from drlora.report.card import write_card_if_possible as _write_card
from drlora.trainer.callback import DrLoraCallback
from drlora.version import __version__

_peft_method.register()
_keep_cards()
if _write_card not in _AFTER_SAVE:
    _AFTER_SAVE.append(_write_card)

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DrLoraCallback",
    "DrLoraConfig",
    "DrLoraError",
    "Grant",
    "RankDynamics",
    "SyncError",
    "__version__",
    "adapter_state",
    "continue_adapter",
    "load_peft_lora",
    "newest_checkpoint",
    "place_ranks",
    "rank_map",
    "ranks_from_routing",
    "start_ranks",
    "write_checkpoint",
]
