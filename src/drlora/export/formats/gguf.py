"""The format `gguf`: an adapter as llama.cpp reads it, by llama.cpp's own converter.

The tensors are those of `per-expert`, which are checked; what the converter makes of them is one
file in float32, `adapter.gguf`. Refused where the converter is not here (see `llama_cpp`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drlora.errors import ConfigError
from drlora.export.base_files import CONFIG_NAME, base_file
from drlora.export.formats.per_expert import LoraForOneReader
from drlora.export.llama_cpp import OF_ADAPTERS, convert_adapter, script_of
from drlora.export.make import Made
from drlora.export.updates import Updates
from drlora.io.run_files import EXPORT_RECORD, GGUF_ADAPTER, README


class _Gguf(LoraForOneReader):
    name = "gguf"
    reader = "llama.cpp"
    way_on = "use the format merged, and convert that"
    summary = "A DR-LoRA adapter of rank {rank} on every expert, for llama.cpp."
    files = (GGUF_ADAPTER, EXPORT_RECORD, README)

    def size_bytes(self, base: PreTrainedModel, updates: Updates) -> int:
        script_of(OF_ADAPTERS)
        _config_of(base)
        return super().size_bytes(base, updates)

    def write(
        self,
        made: Made,
        updates: Updates | None,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase | None,
        max_shard_size: str | None,
    ) -> None:
        config = _config_of(made.result.get_base_model())
        with tempfile.TemporaryDirectory() as temporary:
            apart = Path(temporary) / "per-expert"
            apart.mkdir()
            super().write(made, updates, apart, tokenizer, max_shard_size)
            convert_adapter(apart, config.parent, folder / GGUF_ADAPTER)


def _config_of(base: PreTrainedModel) -> Path:
    path = base_file(base.config._name_or_path, CONFIG_NAME)
    if path is None:
        raise ConfigError(
            f"{base.config._name_or_path or 'the base model'!r} has no config.json on this "
            f"machine, which llama.cpp's converter reads; name a folder with --model."
        )
    return path


FORMAT = _Gguf()
