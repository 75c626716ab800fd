"""docs/chat-templates.md says what each chat template trains, and nothing is trained wrong."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import trl

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def made():
    """tools/make_chat_templates.py, which refuses by itself what is trained wrong."""
    spec = importlib.util.spec_from_file_location("made", TOOLS / "make_chat_templates.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(TOOLS))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(TOOLS))
    return module


@pytest.mark.slow
def test_the_table_is_what_is_trained(made):
    page = made.PAGE.read_text("utf-8")
    table = made.table()
    if f"TRL {trl.__version__}:" in page:  # of another version the templates may be others
        assert made.START + table + made.END in page


TURN = "<|{{ m.role }}|>{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
NO_TURN = "<|{{ m.role }}|>{{ m.content }}{{ eos_token }}"
NO_END = TURN.replace("{{ eos_token }}", "") + "."
LOOP = (
    "{{% for m in messages %}}{{% if m.role == 'user' %}}{}{{% else %}}{}{{% endif %}}"
    "{{% endfor %}}"
)


@pytest.mark.parametrize(("user", "assistant"), [(TURN, TURN), (TURN, NO_TURN), (NO_TURN, NO_END)])
def test_what_is_trained_wrong_does_not_pass(made, monkeypatch, user, assistant):
    """The check of the table by itself, without the one that it is made to try."""
    case = made.CASES["multi-turn"]
    assert made.outcome(LOOP.format(NO_TURN, TURN), case) == "trained"
    assert made.outcome(LOOP.format(user, assistant), case) != "trained"
    monkeypatch.setattr("drlora.data.targets.verify", lambda *args: None)
    with pytest.raises(AssertionError):
        made.outcome(LOOP.format(user, assistant), case)
