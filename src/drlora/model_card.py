"""The model card beside a saved adapter: README.md with front matter for the hub.

    write_card("runs/embedded")

It is made from the folder's files alone (see drlora.report.read): after `save_pretrained` from the
adapter, at the end of `drlora train` from the run's results too. A card that somebody wrote stays:
only PEFT's empty template and cards with MARK are replaced.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from drlora.errors import DrLoraError
from drlora.report.facts import COST, SETUP, SUMMARY, lead, training_data
from drlora.report.markdown import plain, ranks_as_text, tables
from drlora.report.read import RunRecord, read_run
from drlora.writing import write_at_once

MARK = (
    "<!-- Written by drlora from the files beside it. Remove this line, and the card is yours. -->"
)
_TEMPLATE = "[More Information Needed]"
# A name on the hub: `name` or `owner/name`.
_HUB_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


def write_card(folder: str | os.PathLike[str]) -> Path | None:
    """Write README.md into a folder with a saved adapter; None if somebody's own card is there.

    Raises:
        CheckpointError: if the folder holds no adapter.
    """
    path = Path(folder) / "README.md"
    if path.is_file() and not _may_replace(path.read_text("utf-8", errors="replace")):
        return None
    write_at_once(path, card(read_run(Path(folder))))
    return path


def write_card_if_possible(folder: str | os.PathLike[str]) -> None:
    """Saving an adapter must not fail for its card."""
    try:
        write_card(folder)
    except (DrLoraError, OSError):
        return


def card(run: RunRecord) -> str:
    """The card's text."""
    return f"---\n{_front_matter(run).to_yaml()}\n---\n\n{_text(run)}"


def _may_replace(text: str) -> bool:
    return MARK in text or text.count(_TEMPLATE) > 10


def _base(run: RunRecord) -> str | None:
    """The base model's name on the hub; None of one that lies in a folder."""
    found = run.adapter.get("base_model_name_or_path") or run.recipe.get("model")
    is_name = isinstance(found, str) and _HUB_NAME.fullmatch(found) and not Path(found).exists()
    return found if is_name and found != "embedded" else None


def _front_matter(run: RunRecord) -> ModelCardData:
    base, data = _base(run), training_data(run)
    tags = ["drlora", "lora", "mixture-of-experts"]
    on_hub = data if data and "/" in data and _HUB_NAME.fullmatch(data) else None
    return ModelCardData(
        library_name="peft",
        pipeline_tag="text-generation",
        base_model=base,
        tags=[*tags, f"base_model:adapter:{base}"] if base else tags,
        datasets=[on_hub] if on_hub and not Path(on_hub).exists() else None,
        model_name=run.name,
        eval_results=_results(run) or None,
    )


def _results(run: RunRecord) -> list[EvalResult]:
    found = run.measured("after") or {}
    values = {
        "loss": (found.get("loss") or {}).get("loss"),
        "exact_match": (found.get("match") or {}).get("accuracy"),
    }
    data = training_data(run) or "held-out data"
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=data,
            dataset_name=f"{data}, held out",
            metric_type=name,
            metric_value=round(value, 6),
        )
        for name, value in values.items()
        if value is not None
    ]


def _method(run: RunRecord) -> str:
    """`, method static`, where the recipe names one."""
    name = run.recipe.get("method")
    return f", method {plain(str(name))}" if name else ""


def _text(run: RunRecord) -> str:
    from drlora import __version__  # the package itself registers what is here

    base = _base(run) or "BASE_MODEL"
    where = "" if _base(run) else ", with the base model's name or folder for `BASE_MODEL`"
    parts = [
        MARK,
        "",
        f"# {plain(run.name)}",
        "",
        "An adapter on the experts of a Mixture-of-Experts model: LoRA whose ranks can differ "
        "between experts and grow while training (DR-LoRA, "
        f"[arXiv 2601.04823](https://arxiv.org/abs/2601.04823)). Made with `drlora` {__version__}"
        f"{_method(run)}.",
        "",
        plain(lead(run)),
        "",
        *tables([run], (("Results", SUMMARY), ("Settings", SETUP), ("Cost", COST))),
        *ranks_as_text(run),
        "## How to load it",
        "",
        f"`pip install drlora`, then{where}:",
        "",
        "```python",
        "import drlora  # registers the method with PEFT",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base)})",
        'model = PeftModel.from_pretrained(base, "this folder")',
        "```",
        "",
        "## How to export it",
        "",
        "```text",
        "drlora export FOLDER --format peft -o DIR         # plain PEFT LoRA, padded to one rank",
        "drlora export FOLDER --format per-expert -o DIR   # keys of each expert",
        "drlora export FOLDER --format merged -o DIR       # the base model with the update in it",
        "```",
    ]
    return "\n".join(parts) + "\n"
