"""Forms of other tools, rewritten to those of TRL: ShareGPT, Alpaca, LLaMA-Factory, questions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, Features, Json, List, Value

from drlora.data.checks import parsed
from drlora.data.formats import PLACES, Form, where_of
from drlora.errors import DataError, shown

_SHAREGPT = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant", "function_call": "assistant",
    "observation": "tool", "function": "tool",
}  # fmt: skip
_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{}\n\n{}### Response:\n"
)


def standard(found: Dataset, form: Form) -> Dataset:
    """The columns of `form` under TRL's names, those of other forms rewritten, and the place."""
    places = [name for name in found.column_names if name in PLACES]
    found = found.select_columns([*form.columns.values(), *places])
    found = found.rename_columns({column: name for name, column in form.columns.items()})
    if "tools" in form.columns and _is_table(found.features["tools"]):
        found = _tools_as_written(found)
    if "label" in form.columns and found.features["label"] != Value("bool"):
        found = found.cast_column("label", Value("bool"))
    kept = {name: found.features[name] for name in places}
    texts = {"prompt": Value("string"), "completion": Value("string")}
    features: dict[str, Any] = {"messages": List(Json())}
    if form.name == "sharegpt":
        rewrite, tools = _from_sharegpt, {"tools": Value("string")}
        features |= tools if "tools" in form.columns else {}
    elif form.has_history:
        rewrite = _from_history
    elif form.name == "alpaca":
        rewrite, features = _from_alpaca, texts
    elif form.name == "question":
        rewrite, features = _from_question, texts
    else:
        return found
    features |= kept
    done = found.map(rewrite, features=Features(features), remove_columns=list(form.columns))
    return done.select_columns([*features])


def _is_table(feature: Any) -> bool:
    """Whether Arrow gives each item the fields of all, filled up with nothing."""
    return isinstance(feature, List) and isinstance(feature.feature, dict)


def _tools_as_written(found: Dataset) -> Dataset:
    features = Features({**found.features, "tools": List(Json())})
    return found.map(lambda row: {"tools": _filled(row["tools"])}, features=features)


def _filled(value: Any) -> Any:
    """Without the keys of mappings that have no value."""
    if isinstance(value, Mapping):
        return {key: _filled(one) for key, one in value.items() if one is not None}
    return [_filled(one) for one in value] if isinstance(value, list) else value


def _from_question(record: Mapping[str, Any]) -> dict[str, Any]:
    context = f"{record['context']}\n\n" if record.get("context") else ""
    return {"prompt": f"{context}{record['question']}\n", "completion": record["answer"]}


def _from_history(record: Mapping[str, Any]) -> dict[str, Any]:
    """Turns, as LLaMA-Factory makes them of Alpaca's columns."""
    asked = "\n".join(text for text in (record["instruction"], record.get("input")) if text)
    said = [*(record.get("history") or ()), (asked, record["output"])]
    turns = [("system", record["system"])] if record.get("system") else []
    for user, assistant in said:
        turns += [("user", user), ("assistant", assistant)]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def _from_alpaca(record: Mapping[str, Any]) -> dict[str, Any]:
    given = record.get("input") or ""
    context = ", paired with an input that provides further context" if given else ""
    part = f"### Input:\n{given}\n\n" if given else ""
    prompt = _ALPACA.format(context, record["instruction"], part)
    return {"prompt": prompt, "completion": record["output"]}


def _from_sharegpt(record: Mapping[str, Any]) -> dict[str, Any]:
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    where = where_of(record)
    turns = [_from_value(turn, where) for turn in record["conversations"]]
    tools = record.get("tools")
    text = tools if isinstance(tools, str) or not tools else json.dumps(tools)
    return {"messages": [*system, *turns], **({"tools": text or None} if "tools" in record else {})}


def _from_value(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    more = {k: v for k, v in turn.items() if k not in ("from", "value") and v is not None}
    role = _SHAREGPT.get(turn["from"], turn["from"])
    if turn["from"] != "function_call":
        return {"role": role, "content": turn["value"], **more}
    found = parsed(turn["value"], f"{where}: function_call")
    calls = [
        one.get("function", one) if isinstance(one, Mapping) else one
        for one in (found if isinstance(found, list) else [found])
    ]
    if not calls or not all(map(_is_call, calls)):
        raise DataError(
            f"{where}: function_call {shown(turn['value'])} must be a call with name and "
            f"arguments, or a list of such calls"
        )
    said = [{"type": "function", "function": dict(call)} for call in calls]
    return {"role": role, "content": "", "tool_calls": said, **more}


def _is_call(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("name"), str)
