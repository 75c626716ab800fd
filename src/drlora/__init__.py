"""DR-LoRA: LoRA on Mixture-of-Experts models whose experts' ranks grow where the task needs them.

    import drlora
    from peft import get_peft_model

    model = get_peft_model(base_model, drlora.DrLoraConfig(r_init=8, r_target=16, r_max=32))
    trainer = Trainer(model=model, ..., callbacks=[drlora.DrLoraCallback()])

Every verb of the command line is a function here too: `plan`, `write_recipe`, `load_recipe`,
`look_at_data` and `train`, `evaluate`, `generate`, `chat`, `inspect`, `export_adapter`,
`write_report`, `run_comparison`.

Importing drlora registers the method with PEFT (see `registration`). The names below are imported
from where they are defined when they are first used. The method: arXiv 2601.04823.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from drlora.errors import CheckpointError, ConfigError, DataError, DrLoraError, SyncError
from drlora.registration import register_with_peft as _register_with_peft
from drlora.version import __version__

if TYPE_CHECKING:
    from drlora.adapter.state import adapter_state
    from drlora.compare.comparison import run_comparison
    from drlora.config.adapter import DrLoraConfig
    from drlora.doctor.examine import examine
    from drlora.export.import_lora import load_peft_lora
    from drlora.io.checkpoint import newest_checkpoint, write_checkpoint
    from drlora.moe.loading import QuantisedExperts
    from drlora.moe.quantise import quantise_experts
    from drlora.moe.stored.config import packed_config
    from drlora.planning.plan import plan
    from drlora.ranks.continue_adapter import continue_adapter
    from drlora.ranks.dynamics import RankDynamics
    from drlora.ranks.event import Grant
    from drlora.ranks.rank_map import rank_map, start_ranks
    from drlora.ranks.starts import place_ranks, ranks_from_routing
    from drlora.report.write import write_report
    from drlora.runs.chat import chat
    from drlora.runs.evaluate import evaluate
    from drlora.runs.export import export_adapter
    from drlora.runs.generate import generate
    from drlora.runs.inspect import inspect
    from drlora.runs.look import look_at_data
    from drlora.runs.new_recipe import write_recipe
    from drlora.runs.outcome import RunDiverged, RunInterrupted
    from drlora.runs.recipe import load_recipe
    from drlora.runs.train import train
    from drlora.trainer.callback import DrLoraCallback
    from drlora.verification.verify import Verification, verify

# Module -> the public names that it defines.
_NAMES = {
    "adapter.state": ("adapter_state",),
    "compare.comparison": ("run_comparison",),
    "config.adapter": ("DrLoraConfig",),
    "doctor.examine": ("examine",),
    "export.import_lora": ("load_peft_lora",),
    "io.checkpoint": ("newest_checkpoint", "write_checkpoint"),
    "moe.loading": ("QuantisedExperts",),
    "moe.quantise": ("quantise_experts",),
    "moe.stored.config": ("packed_config",),
    "planning.plan": ("plan",),
    "ranks.continue_adapter": ("continue_adapter",),
    "ranks.dynamics": ("RankDynamics",),
    "ranks.event": ("Grant",),
    "ranks.rank_map": ("rank_map", "start_ranks"),
    "ranks.starts": ("place_ranks", "ranks_from_routing"),
    "report.write": ("write_report",),
    "runs.chat": ("chat",),
    "runs.evaluate": ("evaluate",),
    "runs.export": ("export_adapter",),
    "runs.generate": ("generate",),
    "runs.inspect": ("inspect",),
    "runs.look": ("look_at_data",),
    "runs.new_recipe": ("write_recipe",),
    "runs.outcome": ("RunDiverged", "RunInterrupted"),
    "runs.recipe": ("load_recipe",),
    "runs.train": ("train",),
    "trainer.callback": ("DrLoraCallback",),
    "verification.verify": ("Verification", "verify"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DrLoraCallback",
    "DrLoraConfig",
    "DrLoraError",
    "Grant",
    "QuantisedExperts",
    "RankDynamics",
    "RunDiverged",
    "RunInterrupted",
    "SyncError",
    "Verification",
    "__version__",
    "adapter_state",
    "chat",
    "continue_adapter",
    "evaluate",
    "examine",
    "export_adapter",
    "generate",
    "inspect",
    "load_peft_lora",
    "load_recipe",
    "look_at_data",
    "newest_checkpoint",
    "packed_config",
    "place_ranks",
    "plan",
    "quantise_experts",
    "rank_map",
    "ranks_from_routing",
    "run_comparison",
    "start_ranks",
    "train",
    "verify",
    "write_checkpoint",
    "write_recipe",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """A public name, or a module of the package, imported on first use."""
    if name in _HOMES:
        found = getattr(import_module(f"drlora.{_HOMES[name]}"), name)
    elif not name.startswith("_") and find_spec(f"drlora.{name}"):
        found = import_module(f"drlora.{name}")
    else:
        raise AttributeError(f"module 'drlora' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


_register_with_peft()
