"""Forms of other tools, rewritten to those of TRL: ShareGPT, Alpaca, LLaMA-Factory, questions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, Features, Json, List, Value

from drlora.data.checks import parsed
from drlora.data.formats import PLACES, Form

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
    where = ", ".join(f"{name} {record[name]}" for name in PLACES if name in record)
    turns = [_from_value(turn, where) for turn in record["conversations"]]
    tools = record.get("tools")
    text = tools if isinstance(tools, str) or not tools else json.dumps(tools)
    return {"messages": [*system, *turns], **({"tools": text or None} if "tools" in record else {})}


def _from_value(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    more = {k: v for k, v in turn.items() if k not in ("from", "value") and v is not None}
    role = _SHAREGPT.get(turn["from"], turn["from"])
    if turn["from"] != "function_call":
        return {"role": role, "content": turn["value"], **more}
    call = {"type": "function", "function": parsed(turn["value"], f"{where}: function_call")}
    return {"role": role, "content": "", "tool_calls": [call], **more}
