"""The format `merged`: the whole model with the adapter in its weights, for transformers alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drlora.adapter.embeddings import has_tied_embeddings
from drlora.adapter.inject import refuse_fixed_weights
from drlora.errors import ConfigError
from drlora.export.base_files import own_config, write_config, write_tokenizer
from drlora.export.check import Batch
from drlora.export.float32 import NARROW
from drlora.export.format import Contents, Format
from drlora.export.make import Made, measured
from drlora.export.merging import Kept, merge
from drlora.export.reference import compare_trained
from drlora.export.shards import bytes_of
from drlora.export.updates import Updates
from drlora.io.run_files import EXPORT_RECORD, README
from drlora.ops.merge import NEAREST, Rounding

WORTH_SAYING = 0.1  # of the adapter's effect


class _Merged(Format):
    name = "merged"
    summary = "The model with a DR-LoRA adapter merged into its weights, for transformers alone."
    loading = 'model = AutoModelForCausalLM.from_pretrained("this folder")'
    files = ("config.json", "generation_config.json", "model*.safetensors",
             "the tokenizer's files", EXPORT_RECORD, README)  # fmt: skip

    def plan(self, model: PeftModel, adapter: str, rank: str, routers: str = "auto") -> Contents:
        if rank != "padded":
            raise ConfigError(
                f"rank={rank!r} is for formats of LoRA, such as peft; merged weights have no rank; "
                f"leave it out."
            )
        if routers != "auto":
            raise ConfigError(
                f"routers={routers!r} is for formats of LoRA, such as per-expert; merged weights "
                f"have their routers in them; leave it out."
            )
        refuse_fixed_weights(model)
        return Contents(None, _bytes(cast(PreTrainedModel, model.get_base_model())))

    def make(
        self,
        updates: Updates | None,
        model: PeftModel,
        batches: Sequence[Batch],
        rounding: Rounding,
    ) -> Made:
        if cast(PreTrainedModel, model.get_base_model()).dtype not in NARROW:
            rounding = NEAREST
        known = measured(model, batches, rounding, merged=True)
        base, weights, kept = merge(model, known.adapter, known.reference, rounding)
        compare_trained(weights, base.get_submodule, known.reference)
        found = known.compared(base, weights)
        _, note = own_config(base)
        own = [note] if note else []
        if known.dtype not in NARROW:
            return Made(base, found, notes=own)
        said = rounding_record(rounding, kept, known.cost)
        notes = [in_words(said, found.dtype)] if kept.entries else []
        return Made(base, found, said, notes + own)

    def write(
        self,
        made: Made,
        updates: Updates | None,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase | None,
        max_shard_size: str | None,
    ) -> None:
        # As a number: transformers knows fewer units.
        size = {"max_shard_size": bytes_of(max_shard_size)} if max_shard_size else {}
        made.result.save_pretrained(folder, **size)
        write_config(made.result, folder)
        if tokenizer is not None:
            write_tokenizer(tokenizer, made.result.config._name_or_path, folder)


def _bytes(base: PreTrainedModel) -> int:
    """Size of the merged model's weights; tied ones once, unless one of them was trained alone."""
    added = (".lora_", ".drlora_adapters.", ".modules_to_save.", ".trainable_tokens_")
    own = [p for name, p in base.named_parameters() if not any(part in name for part in added)]
    size = sum(p.numel() * p.element_size() for p in own)
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    adapted = any(hasattr(end, "original_module") for end in (head, embedding))
    if has_tied_embeddings(base) and (adapted or hasattr(head, "base_layer")):
        weight = next(iter(embedding.parameters()))
        size += weight.numel() * weight.element_size()
    return size


def rounding_record(rounding: Rounding, kept: Kept, cost: float | None) -> dict[str, Any]:
    """What rounding did, for the record; `cost`: to the logits, where it is known."""
    return {
        "mode": rounding.mode,
        "seed": rounding.seed if rounding.mode == "stochastic" else None,
        "unmoved": kept.unmoved_share,
        "kept": kept.share,
        "nearest_would_keep": kept.nearest_share,
        "nearest_would_lose_entries": kept.swallowed_share,
        "of_effect": cost,
    }


def in_words(said: dict[str, Any], dtype: str) -> str:
    """The same for people."""
    way_out = "; merge into a float32 base, or export as peft, to lose none of it"
    text = (
        f"rounding to {dtype} ({said['mode']}): {said['unmoved']:.1%} of the updated entries are "
        f"as they were, {said['kept']:.1%} of the update is in the weights"
    )
    if said["mode"] != "nearest":
        text += (
            f"; nearest rounding would swallow {said['nearest_would_lose_entries']:.1%} of the "
            f"entries and keep {said['nearest_would_keep']:.1%} of the update"
        )
    if said["of_effect"] is None:
        return text
    return (
        f"{text}; logits move by {said['of_effect']:.1%} of what the adapter does to them"
        f"{way_out if said['of_effect'] > WORTH_SAYING else ''}"
    )


FORMAT = _Merged()
