"""Answers of a run, an export or a model to prompts: `drlora generate`.

    found = generate("runs/first", ["bank, noun:", "river, noun:"], max_new_tokens=32)
    print(found.answers[0].text)

transformers generates; nothing here is a server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from drlora.errors import ConfigError, DataError, counted
from drlora.io.places import from_root
from drlora.runs.prompts import Prompt, Turns, as_prompt
from drlora.runs.speaker import BASE, Said, Speaker, load_speaker

EXAMPLES_AT_ONCE = 8


@dataclass(frozen=True)
class Answer:
    """What was asked, and what came.

    Attributes:
        prompt: a text, or the turns of a conversation.
        text: the answer.
        tokens: in the answer.
        is_ended: whether the model ended it; else it was cut at the longest that was allowed.
        base: the answer of the base model, with the adapter off, where it was asked too.
        expected: what the prompt's record has as its answer, if it has one.
    """

    prompt: str | Turns
    text: str
    tokens: int
    is_ended: bool
    base: str | None = None
    expected: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; None is left out."""
        prompt = self.prompt if isinstance(self.prompt, str) else [dict(t) for t in self.prompt]
        found = {**asdict(self), "prompt": prompt}
        return {key: value for key, value in found.items() if value is not None}


@dataclass(frozen=True)
class Generation:
    """Answers to some prompts, and by what they were given.

    Attributes:
        model: the base model of an adapter, or the whole model.
        adapter: PEFT's name of the adapter's type on it, or None.
        dtype: of the model's weights.
        device: where it ran.
        settings: of generation, those that are set.
        answers: in the order of the prompts.
        notes: how texts were put, and what else whoever reads the answers should know.
    """

    model: str
    adapter: str | None
    dtype: str
    device: str
    settings: dict[str, Any]
    answers: tuple[Answer, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = {key: getattr(self, key) for key in self.__dataclass_fields__}
        answers = [answer.to_dict() for answer in self.answers]
        return {**plain, "answers": answers, "notes": list(self.notes)}


def generate(
    folder: str | Path,
    prompts: Sequence[str | Prompt | Sequence[Mapping[str, Any]] | Mapping[str, Any]],
    *,
    compare: bool = False,
    seed: int = 0,
    batch_size: int = EXAMPLES_AT_ONCE,
    chat_template: bool | None = None,
    model: str | None = None,
    trust_remote_code: bool = False,
    on_answer: Callable[[Answer], None] | None = None,
    **settings: Any,
) -> Generation:
    """What the model in `folder` answers to each prompt.

    Args:
        folder: a run directory, a folder with an adapter (DR-LoRA or PEFT's LoRA) or a model, such
            as an export, or the name of a model or an adapter of the hub.
        prompts: texts, conversations (lists of turns with role and content), or records of either
            (`drlora.runs.prompts`).
        compare: whether the base model, with the adapter off, is asked too.
        seed: of answers that are drawn.
        batch_size: prompts at once.
        chat_template: whether a text is put as a user's turn of the chat template. By default it is
            where there is a template, unless the run was trained on plain texts.
        model: the base model, where the adapter does not say or it has moved.
        trust_remote_code: whether code that comes with the model may run.
        on_answer: is told each answer as it comes.
        settings: of generation, by transformers' names: max_new_tokens (256 by default),
            temperature, top_p, top_k, do_sample, num_beams, repetition_penalty, stop_strings and
            others (`drlora.runs.sampling`). Where none is given that draws, the model's own
            generation_config says how.

    Raises:
        CheckpointError: if the run is unfinished, damaged, or was made for another model.
        ConfigError: if a setting is refused, or a whole model is to be compared with its base.
        DataError: if a prompt is malformed or does not fit the model.
    """
    if isinstance(prompts, (str, Mapping)):
        raise ConfigError("prompts must be a list; put the one prompt into one.")
    asked = [as_prompt(prompt, f"prompt {n}") for n, prompt in enumerate(prompts, start=1)]
    if not asked:
        raise DataError("there is no prompt.")
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} must be at least 1.")
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
    for number, prompt in enumerate(asked, start=1):
        _refuse(speaker, prompt, number)
    answers = []
    for start in range(0, len(asked), batch_size):
        for answer in _answers(speaker, asked[start : start + batch_size], compare):
            answers.append(answer)
            if on_answer is not None:
                on_answer(answer)
    cut = sum(not answer.is_ended for answer in answers)
    notes = list(speaker.notes)
    if cut:
        notes.append(
            f"{counted(cut, 'answer')} of {len(answers)} reached {speaker.config.max_new_tokens} "
            f"tokens without an end; max_new_tokens allows more"
        )
    return Generation(
        model=from_root(speaker.source.model),
        adapter=speaker.source.adapter,
        dtype=str(speaker.model.dtype).removeprefix("torch."),
        device=str(speaker.model.device),
        settings=speaker.settings(),
        answers=tuple(answers),
        notes=tuple(notes),
    )


def _refuse(speaker: Speaker, prompt: Prompt, number: int) -> None:
    """Find what cannot be asked before anything is generated."""
    try:
        speaker.ids(prompt)
    except DataError as error:
        raise DataError(f"prompt {number}: {error}") from error


def _answers(speaker: Speaker, prompts: Sequence[Prompt], compare: bool) -> Iterator[Answer]:
    said = speaker.answer(prompts)
    base: list[Said | None] = [*speaker.answer(prompts, BASE)] if compare else [None] * len(said)
    for prompt, one, other in zip(prompts, said, base, strict=True):
        yield Answer(
            prompt.content,
            one.text,
            one.tokens,
            one.is_ended,
            other.text if other is not None else None,
            prompt.expected,
        )
