"""A conversation with a run, an export or a model: `drlora chat`.

    talk = chat("runs/first", max_new_tokens=128)
    print(talk.say("Hello").text)

Each side that is asked (the adapter, and with `compare` the base) goes on from its own answers. A
model without a chat template has no conversation: each text is continued on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drlora.errors import ConfigError
from drlora.runs.prompts import Prompt
from drlora.runs.speaker import Said, Speaker, load_speaker

OnText = Callable[[str, str], None]


@dataclass
class Chat:
    """A conversation under way.

    Attributes:
        speaker: who answers.
        sides: of it that are asked, the first one first.
        system: what the conversation begins with, if anything.
        turns: side -> the turns so far.
    """

    speaker: Speaker
    sides: tuple[str, ...]
    system: str | None = None
    turns: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        self.turns = {side: list(first) for side in self.sides}

    def say(self, text: str, on_text: OnText | None = None) -> Said:
        """The answer of the first side to one more turn of the user's.

        Args:
            text: the turn.
            on_text: is told the side and the next piece of its answer, as it comes.

        Raises:
            ConfigError: if transformers refuses the settings.
            DataError: if the conversation cannot be put to the model, or has grown too long.
        """
        return self.say_to_all(text, on_text)[self.sides[0]]

    def say_to_all(self, text: str, on_text: OnText | None = None) -> dict[str, Said]:
        """Side -> its answer; as `say`. What is stopped on the way leaves the turns alone."""
        said = {}
        for side in self.sides:
            said[side] = self._ask(side, text, on_text)
        if self.speaker.is_templated:
            for side, answer in said.items():
                self.turns[side] += [_turn("user", text), _turn("assistant", answer.text)]
        return said

    def _ask(self, side: str, text: str, on_text: OnText | None) -> Said:
        is_templated = self.speaker.is_templated
        prompt = Prompt((*self.turns[side], _turn("user", text)) if is_templated else text)
        pieces = None if on_text is None else lambda piece: on_text(side, piece)
        return self.speaker.answer([prompt], side, pieces)[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"model": self.speaker.source.model, "turns": self.turns}


def _turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def chat(
    folder: str | Path,
    *,
    compare: bool = False,
    system: str | None = None,
    seed: int = 0,
    chat_template: bool | None = None,
    model: str | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> Chat:
    """Begin a conversation with the model in `folder`.

    Args:
        folder: a run directory, a folder with an adapter (DR-LoRA or PEFT's LoRA) or a model, such
            as an export, or the name of a model or an adapter of the hub.
        compare: whether the base model, with the adapter off, answers too.
        system: a system message to begin with; it needs a chat template.
        seed: of answers that are drawn.
        chat_template: whether texts are turns of a conversation. By default they are where there is
            a template, unless the run was trained on plain texts.
        model: the base model, where the adapter does not say or it has moved.
        trust_remote_code: whether code that comes with the model may run.
        settings: of generation, by transformers' names, as `drlora.generate` takes them.

    Raises:
        CheckpointError: if the run is unfinished, damaged, or was made for another model.
        ConfigError: if a setting is refused, or a whole model is to be compared with its base.
    """
    speaker = load_speaker(
        folder,
        settings,
        seed=seed,
        chat_template=chat_template,
        model=model,
        trust_remote_code=trust_remote_code,
    )
    if compare:
        speaker.refuse_comparison()
    if (speaker.config.num_beams or 1) > 1:
        raise ConfigError(
            f"num_beams={speaker.config.num_beams}: beams have no answer to show before the end; "
            f"leave it out, or use drlora generate."
        )
    if system and not speaker.is_templated:
        raise ConfigError(
            f"a system message needs a chat template, and texts are continued here"
            f"{': ' + speaker.notes[0] if speaker.notes else ''}."
        )
    return Chat(speaker, speaker.sides if compare else speaker.sides[:1], system)
