"""Write the table of docs/chat-templates.md: what is trained with each chat template.

    python tools/make_chat_templates.py          # with --check, only say whether it is there

Each template that TRL ships, that of the embedded model, and three whose form is public and whose
text no package has, encode six kinds of conversation whose texts are words found nowhere else.
What is trained is decoded again: every word of the assistant and a token that ends each of its
turns must be in it, and no word of anybody else.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset, Features, Json, List
from made_pages import write_or_check
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from drlora.data import encode_examples
from drlora.embedded import model_folder
from drlora.errors import DataError

PAGE = Path(__file__).resolve().parents[1] / "docs" / "chat-templates.md"
START, END = "<!-- table: tools/make_chat_templates.py -->\n", "<!-- end of table -->\n"
FOLDER = Path(trl.__file__).parent / "chat_templates"
_CALL = {"type": "function", "function": {"name": "lookup", "arguments": {"city": "CCC"}}}
_TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "DDD",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CASES: dict[str, dict[str, Any]] = {
    "single": {"messages": [("user", "QQQ"), ("assistant", "AAA")]},
    "system": {"messages": [("system", "SSS"), ("user", "QQQ"), ("assistant", "AAA")]},
    "multi-turn": {
        "messages": [("user", "QQQ"), ("assistant", "AAA"), ("user", "RRR"), ("assistant", "BBB")]
    },
    "tools": {
        "messages": [
            ("user", "QQQ"),
            ("assistant", "", {"tool_calls": [_CALL]}),
            ("tool", "TTT", {"name": "lookup"}),
            ("assistant", "BBB"),
        ],
        "tools": [_TOOL],
    },
    "thinking": {"messages": [("user", "QQQ"), ("assistant", "<think>\nHHH\n</think>\n\nAAA")]},
    "reasoning_content": {
        "messages": [("user", "QQQ"), ("assistant", "AAA", {"reasoning_content": "HHH"})]
    },
}
# Forms of chats as their model cards show them, in words of our own.
FORMS = {
    "Mixtral's form": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}"
        "{{ raise_exception('user and assistant take turns, beginning with user') }}{% endif %}"
        "{% if m.role == 'user' %}{{ ' [INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    "Llama 4's form": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|header_start|>' + m.role + '<|header_end|>\n\n' + m.content + '<|eot|>' }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|header_start|>assistant<|header_end|>\n\n' }}{% endif %}"
    ),
    "Phi-3.5-MoE's form": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
}
_OURS = ("AAA", "BBB", "HHH", "CCC")  # words of the assistant
_OTHERS = ("QQQ", "RRR", "SSS", "TTT", "DDD")
_SPECIAL = re.compile(
    r"<[|｜][^<>{}'\" ]{1,60}[|｜]>|<(?:start|end)_of_\w+>|</?s>"
    r"|\[/?INST\]|<(?:bos|eos)>|<\|[A-Z_]+\|>|<[a-z_]+\|>|<\|[a-z_]+>"
)


def templates() -> dict[str, str]:
    """Name -> text."""
    found = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
    own = AutoTokenizer.from_pretrained(model_folder()).get_chat_template()
    return {"embedded (OLMoE's)": own, **FORMS, **found}


def tokenizer_with(template: str) -> PreTrainedTokenizerBase:
    """The embedded tokenizer with a template, and the special tokens that stand in it."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    special = sorted(set(_SPECIAL.findall(template)))
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template
    return tokenizer


def outcome(template: str, case: dict[str, Any]) -> str:
    """`trained`, or the sentence with which the conversation is refused.

    Raises:
        AssertionError: something else is trained than what the assistant says.
    """
    tokenizer = tokenizer_with(template)
    messages = [
        {"role": role, "content": text, **(more[0] if more else {})}
        for role, text, *more in case["messages"]
    ]
    row = {"messages": messages} | ({"tools": case["tools"]} if "tools" in case else {})
    features = Features({name: List(Json()) for name in row})
    try:
        rows = Dataset.from_list([row], features=features)
        (found,) = encode_examples(rows, tokenizer, 4000).tokens
    except DataError as error:
        return str(error).partition(" cannot be used on it: ")[2].partition(". It is: ")[0]
    trained = tokenizer.decode([label for label in found["labels"] if label != -100])
    said = str(messages)
    for word in _OURS:
        assert (word in trained) == (word in said), (word, trained)
    for word in _OTHERS:
        assert word not in trained, (word, trained)
    ends = list(_ends(found["labels"], tokenizer))
    assert len(ends) >= 1 and all(ends), (ends, trained)
    return "trained"


def _ends(labels: list[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[bool]:
    """Whether each stretch of trained tokens ends with a special token, white space apart."""
    special = set(tokenizer.all_special_ids)
    for here, after in zip(labels, [*labels[1:], -100], strict=True):
        if here != -100 and (here in special or tokenizer.decode([here]).strip()):
            last = here in special
        if here != -100 and after == -100:
            yield last


def table() -> str:
    """One row a template, and the sentences with which conversations are refused."""
    sentences: dict[str, str] = {}
    lines = []
    for name, template in templates().items():
        found = [outcome(template, case) for case in CASES.values()]
        cells = [
            "yes" if one == "trained" else sentences.setdefault(one, f"({len(sentences) + 1})")
            for one in found
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    trained = sum(line.count("| yes") for line in lines)
    return "\n".join(
        [
            f"TRL {trl.__version__}: of {len(lines)} x {len(CASES)} pairs of template and "
            f"conversation {trained} are trained, {len(lines) * len(CASES) - trained} refused.",
            "",
            f"| template | {' | '.join(CASES)} |",
            f"|---|{'---|' * len(CASES)}",
            *lines,
            "",
            *(f"- {mark} {sentence}" for sentence, mark in sentences.items()),
            "",
        ]
    )


def with_table(page: str) -> str:
    """The page with the table between the two marks."""
    before, rest = page.split(START)
    return before + START + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, with_table, __doc__))
