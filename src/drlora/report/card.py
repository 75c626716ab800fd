"""The model card beside a saved adapter: README.md with front matter for the hub.

    write_card("runs/embedded")

It is made from the folder's files alone (see drlora.report.read): after `save_pretrained` from the
adapter, at the end of `drlora train` from the run's results too. A card that somebody wrote stays:
only PEFT's empty template and cards with MARK are replaced.
"""

from __future__ import annotations

import functools
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel

from drlora.config.adapter import DrLoraConfig
from drlora.config.peft_type import AFTER_SAVE
from drlora.errors import DrLoraError
from drlora.io.run_files import ADAPTER_CONFIG, README
from drlora.io.writing import write_at_once
from drlora.report.facts import COST, SETUP, SUMMARY, is_path, lead, training_data
from drlora.report.markdown import plain, ranks_as_text, tables
from drlora.report.read import RunRecord, read_run

MARK = (
    "<!-- Written by drlora from the files beside it. Remove this line, and the card is yours. -->"
)
_TEMPLATE = "[More Information Needed]"
# A name on the hub: `name` or `owner/name`.
_HUB_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
# What a card keeps of the one that it replaces: transformers' Trainer is told these.
_KEPT = ("license", "license_name", "license_link", "language")
# Tags that PEFT adds; ours say the same, or it is that a base lies in a folder.
_TAGS_OF_PEFT = re.compile("transformers|base_model:.*")
# Task -> its name on the hub, and the class that a base is loaded with.
_TASKS = {
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("question-answering", "AutoModelForQuestionAnswering"),
    "FEATURE_EXTRACTION": ("feature-extraction", "AutoModel"),
}
# How the names of classes of a task end, for adapters without one.
_CLASSES = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def write_card(folder: str | os.PathLike[str], name: str | None = None) -> Path | None:
    """Write README.md into a folder with a saved adapter; None if somebody's own card is there.

    Args:
        folder: holds the adapter, and perhaps the other files of a run.
        name: its title; by default the folder's name.

    Raises:
        CheckpointError: if the folder holds no adapter.
    """
    path = Path(folder) / README
    before = path.read_text("utf-8", errors="replace") if path.is_file() else ""
    if before and not _may_replace(before):
        return None
    run = read_run(Path(folder))
    text = card(run if name is None else replace(run, name=name), _data_of(before))
    write_at_once(path, text)
    return path


def write_card_if_possible(folder: str | os.PathLike[str], name: str | None = None) -> None:
    """Saving an adapter must not fail for its card."""
    try:
        write_card(folder, name)
    except (DrLoraError, OSError):
        return


def card(run: RunRecord, before: ModelCardData | None = None) -> str:
    """The card's text, with the license and the like of the card that was there before."""
    return f"---\n{_front_matter(run, before or ModelCardData()).to_yaml()}\n---\n\n{_text(run)}"


def keep_cards() -> None:
    """Have PEFT write and keep the cards of DR-LoRA adapters; called when drlora is registered.

    PEFT writes into the card at each saving, and so does transformers' Trainer through PEFT: its
    own draft in the place of the card, and the folder where the base model lies. `push_to_hub`
    uploads a draft too. Tried with PEFT 0.21.2 and transformers 5.23;
    tests/report/test_model_card.py notices when it stops working.
    """
    if hasattr(PeftModel.create_or_update_model_card, "__wrapped__"):
        return
    AFTER_SAVE.append(write_card_if_possible)
    update, upload = PeftModel.create_or_update_model_card, PeftModel._upload_modified_files

    @functools.wraps(update)
    def create_or_update_model_card(self: Any, output_dir: str) -> None:
        path = Path(output_dir) / README
        before = _data_of(path.read_text("utf-8", errors="replace") if path.is_file() else "")
        update(self, output_dir)
        if _has_ours(self):
            _mend(path, before)
            if (path.parent / ADAPTER_CONFIG).is_file():
                write_card_if_possible(path.parent)

    @functools.wraps(upload)
    def _upload_modified_files(
        self: Any, working_dir: str, repo_id: str, *args: Any, **kwargs: Any
    ) -> Any:
        if _has_ours(self):
            write_card_if_possible(working_dir, repo_id.rpartition("/")[2])
        return upload(self, working_dir, repo_id, *args, **kwargs)

    for function in (create_or_update_model_card, _upload_modified_files):
        setattr(PeftModel, function.__name__, function)


def _has_ours(model: Any) -> bool:
    return any(isinstance(config, DrLoraConfig) for config in model.peft_config.values())


def _mend(path: Path, before: ModelCardData) -> None:
    """Give a card back the tags that PEFT took from it, and no base model that lies in a folder."""
    found = ModelCard.load(path)
    tags = [*(before.tags or []), *(found.data.tags or [])]
    if (base := found.data.base_model) is not None and not _on_hub(base):
        found.data.base_model = before.base_model if _on_hub(before.base_model) else None
        tags = [tag for tag in tags if not tag.endswith(f":{base}")]
    found.data.tags = list(dict.fromkeys(tags)) or None
    write_at_once(path, str(found))


def _data_of(text: str) -> ModelCardData:
    """The front matter of a card; empty where there is none, or it cannot be read."""
    if not text.lstrip().startswith("---"):
        return ModelCardData()
    try:
        return cast(ModelCardData, ModelCard(text, ignore_metadata_errors=True).data)
    except Exception:  # whatever YAML and the hub's checks make of somebody's text
        return ModelCardData()


def _may_replace(text: str) -> bool:
    # Not above: this file may be imported by transformers' Trainer, which is only half there then.
    from transformers.modelcard import AUTOGENERATED_TRAINER_COMMENT

    drafts = (MARK, AUTOGENERATED_TRAINER_COMMENT.strip())
    return any(draft in text for draft in drafts) or text.count(_TEMPLATE) > 10


def _on_hub(name: object) -> bool:
    return isinstance(name, str) and bool(_HUB_NAME.fullmatch(name)) and not is_path(name)


def _base(run: RunRecord) -> str | None:
    """The base model's name on the hub; None of one that lies in a folder."""
    found = run.adapter.get("base_model_name_or_path") or run.recipe.get("model")
    return found if _on_hub(found) and found != "embedded" else None


def _task(run: RunRecord) -> tuple[str | None, str]:
    """The task's name on the hub, and the class that the base is loaded with."""
    name = run.adapter.get("task_type")
    base_class = (run.adapter.get("auto_mapping") or {}).get("base_model_class") or ""
    if name is None:
        name = next((t for end, t in _CLASSES.items() if base_class.endswith(end)), None)
    if name in _TASKS:
        return _TASKS[name]
    return (None, base_class) if base_class.isidentifier() else _TASKS["CAUSAL_LM"]


def _front_matter(run: RunRecord, before: ModelCardData) -> ModelCardData:
    base, data = _base(run), training_data(run)
    others = [tag for tag in before.tags or [] if not _TAGS_OF_PEFT.fullmatch(tag)]
    tags = list(dict.fromkeys(["drlora", "lora", "mixture-of-experts", *others]))
    on_hub = [data] if data and "/" in data and _on_hub(data) else None
    kept = {name: value for name in _KEPT if (value := before.get(name)) is not None}
    return ModelCardData(
        library_name="peft",
        pipeline_tag=_task(run)[0],
        base_model=base,
        tags=[*tags, f"base_model:adapter:{base}"] if base else tags,
        datasets=on_hub or before.datasets,
        model_name=run.name,
        eval_results=_results(run) or None,
        **kept,
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
    from drlora.version import __version__  # the package itself registers what is here

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
        f"from transformers import {_task(run)[1]}",
        "",
        f"base = {_task(run)[1]}.from_pretrained({json.dumps(base)})",
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
