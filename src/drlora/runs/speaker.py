"""A model that answers: a run, an export or a whole model, with its tokenizer and its settings.

    speaker = load_speaker("runs/first", {"max_new_tokens": 64})
    speaker.answer([Prompt("bank, noun:")])           # with the adapter
    speaker.answer([Prompt("bank, noun:")], BASE)     # the same weights with the adapter off

A conversation goes through the tokenizer's chat template. A text is a user's turn where there is a
template, unless the run was trained on plain texts: then it is continued as it was in training.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from drlora.data import pad_token_id
from drlora.data.turns import ChatTemplate, Conversation
from drlora.distributed import best_device
from drlora.errors import ConfigError, DataError, DrLoraError, counted, shown
from drlora.evaluation.evaluate import evaluating
from drlora.evaluation.prompts import encode_prompts
from drlora.runs.hub import find_named
from drlora.runs.loading import load_adapter, load_base_model, load_tokenizer, vocabulary_size
from drlora.runs.prompts import Prompt
from drlora.runs.roles import load_source
from drlora.runs.sampling import SETTINGS, check_settings, generation_config, refusal
from drlora.runs.sources import Source

ADAPTER, BASE, MODEL = "adapter", "base", "model"  # who answers

SLOW_LORA = (
    "PEFT forms the update of every expert anew for each token, which makes it several times "
    "slower than the run itself or its export as merged"
)


@dataclass(frozen=True)
class Said:
    """An answer, how many tokens it has, and whether the model ended it."""

    text: str
    tokens: int
    is_ended: bool


@dataclass(frozen=True)
class Speaker:
    """See above.

    Attributes:
        source: what the user named.
        model: with the adapter, if there is one, on its device.
        config: how answers are drawn.
        is_templated: whether a text is put as a user's turn of a conversation.
        seed: of answers that are drawn; the same prompts get the same answers.
        notes: what whoever reads the answers should know.
    """

    source: Source
    model: Any
    tokenizer: PreTrainedTokenizerBase
    config: GenerationConfig
    is_templated: bool
    seed: int = 0
    notes: tuple[str, ...] = ()

    @property
    def sides(self) -> tuple[str, ...]:
        """Who can be asked: what is in the folder first."""
        return (ADAPTER, BASE) if self.source.adapter is not None else (MODEL,)

    def settings(self) -> dict[str, Any]:
        """How answers are drawn, as plain values: what is set, ids of tokens left out."""
        found = {name: getattr(self.config, name) for name in SETTINGS}
        return {name: value for name, value in found.items() if value is not None}

    def refuse_comparison(self) -> None:
        """Refuse to compare a whole model with its base.

        Raises:
            ConfigError: if there is no adapter that could be turned off.
        """
        if BASE not in self.sides:
            raise ConfigError(
                f"{self.source.folder} is a whole model, without an adapter that could be turned "
                f"off; to compare, name the run or an export as peft."
            )

    def ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, up to where the answer begins.

        Raises:
            DataError: if the template is missing or takes no such conversation, or the prompt
                leaves no room for an answer.
        """
        content = prompt.content
        if isinstance(content, str) and not self.is_templated:
            found = encode_prompts([content], self.tokenizer)[0]
        else:
            found = self._rendered(prompt.conversation)
        if not found:
            raise DataError("an empty prompt has no token to continue from.")
        if len(found) >= self._longest:
            raise DataError(
                f"the prompt {shown(content)} has {counted(len(found), 'token')}, and "
                f"{self.source.model} takes {self._longest:,} with the answer; shorten it."
            )
        return found

    @property
    def _longest(self) -> float:
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or math.inf

    def _rendered(self, asked: Conversation) -> list[int]:
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{shown(asked.turns)} is a conversation, and the tokenizer of {self.source.model} "
                f"has no chat template; write the prompt as a text."
            )
        try:
            (ids,) = ChatTemplate(self.tokenizer, is_marked=False).asked([asked])
        except DataError as error:
            raise DataError(
                f"the chat template of {self.source.model} cannot be used on "
                f"{shown(asked.turns)}: {error}."
            ) from error
        return ids

    def answer(
        self,
        prompts: Sequence[Prompt],
        side: str | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> list[Said]:
        """What the model says to each of some prompts, all at once.

        Args:
            prompts: B of them.
            side: one of `sides`; by default the first.
            on_text: is told the pieces of the answer as they come; for one prompt.

        Raises:
            ConfigError: if transformers refuses the settings.
            DataError: if a prompt cannot be put to the model.
        """
        ids = [self.ids(prompt) for prompt in prompts]
        pad, longest = pad_token_id(self.tokenizer), max(map(len, ids))
        rows_BL = torch.tensor([[pad] * (longest - len(row)) + row for row in ids])
        mask_BL = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
        device, config = self.model.device, copy.deepcopy(self.config)
        config.max_new_tokens = min(config.max_new_tokens, self._longest - longest)
        with self._as(side), evaluating(self.model), _seeded(self.seed, device):
            try:
                output_BL = self.model.generate(
                    input_ids=rows_BL.to(device),
                    attention_mask=mask_BL.to(device),
                    generation_config=config,
                    tokenizer=self.tokenizer,
                    streamer=_Pieces(self.tokenizer, on_text) if on_text else None,
                )
            except (ValueError, TypeError) as error:
                raise refusal(error) from error
        return [self._said(row[longest:].tolist()) for row in output_BL]

    def _as(self, side: str | None) -> AbstractContextManager[Any]:
        if side == BASE:
            self.refuse_comparison()
            return self.model.disable_adapter()
        return nullcontext()

    def _said(self, ids: list[int]) -> Said:
        """The answer in token ids that may go on, as padding, after the token that ends it."""
        assert isinstance(self.config.eos_token_id, list)
        end = next((at for at, token in enumerate(ids) if token in self.config.eos_token_id), None)
        kept = ids[:end]
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        assert isinstance(text, str)
        stops = self.config.stop_strings or ()
        stops = (stops,) if isinstance(stops, str) else tuple(stops)
        is_ended = end is not None or any(text.endswith(stop) for stop in stops)
        return Said(text, len(kept), is_ended)


class _Pieces(TextStreamer):
    """Hands the pieces on, where transformers' own prints them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """One piece, empty while a word is not whole yet."""
        if text:
            self._on_text(text)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draws from `seed` while it lasts, and leaves the generators as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def load_speaker(
    folder: str | Path,
    settings: Mapping[str, Any],
    *,
    seed: int = 0,
    chat_template: bool | None = None,
    model: str | None = None,
    trust_remote_code: bool = False,
) -> Speaker:
    """The model in a folder, ready to answer.

    Args:
        folder: a run directory, a folder with an adapter (DR-LoRA or PEFT's LoRA) or a model,
            `embedded`, or the name of a model or an adapter of the hub.
        settings: of generation, by transformers' names.
        seed: of answers that are drawn.
        chat_template: whether a text is put as a user's turn; by default as described above.
        model: the base model, where the adapter does not say or it has moved.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        CheckpointError: if the run is unfinished, damaged, or was made for another model.
        ConfigError: if a setting is refused, or `chat_template` is asked for and there is none.
    """
    checked = check_settings(settings)
    source = find_named(str(folder), model, trust_remote_code)
    subject: Any = load_base_model(source)
    tokenizer = load_tokenizer(source, vocabulary_size(subject))
    config = generation_config(subject, tokenizer, checked)
    if source.adapter is not None:
        subject = load_adapter(subject, str(source.folder))
        assert isinstance(subject, PeftModel)
    is_templated, notes = _how_texts_are_put(source, tokenizer, chat_template)
    if source.adapter == "LORA":
        notes.append(SLOW_LORA)
    subject = subject.to(best_device()).eval()
    return Speaker(source, subject, tokenizer, config, is_templated, seed, tuple(notes))


def _how_texts_are_put(
    source: Source, tokenizer: PreTrainedTokenizerBase, wanted: bool | None
) -> tuple[bool, list[str]]:
    """Whether a text becomes a user's turn, and what is to be said of it."""
    if not tokenizer.chat_template:
        if wanted:
            raise ConfigError(
                f"the tokenizer of {source.model} has no chat template; leave chat_template out."
            )
        return False, [f"{source.model} has no chat template: texts are continued"]
    if wanted is not None:
        return wanted, []
    if _learned_from_texts(source):
        return False, ["the run was trained on plain texts, without the chat template: texts are "
                       "continued"]  # fmt: skip
    return True, []


def _learned_from_texts(source: Source) -> bool:
    """Whether the data of the run, where it can still be read, are texts and not conversations."""
    if source.data is None:
        return False
    try:
        first = load_source(source.data, *source.data.source("eval"), 1).rows[0]
    except DrLoraError:  # moved or gone, which is no fault here
        return False
    return isinstance(first.get("prompt", first.get("text")), str)
