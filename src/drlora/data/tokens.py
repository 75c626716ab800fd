"""Examples to token ids and labels: what TRL's SFTTrainer makes of them, many at a time.

    prepared = prepare(load_examples("data.jsonl"), tokenizer, SFTConfig(max_length=512))

A label is the token itself where there is loss and -100 elsewhere; the model shifts, not we.
TRL goes through the data six times, an example at a time; this goes through it once, with the
same tokens (tests/data/test_tokens.py), and adds what TRL lacks: `weight: 0`, a stop token after
every turn, and the check that what is trained is what the assistant says (drlora.data.targets).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, pack_dataset

from drlora.data import targets
from drlora.data.checks import check_record
from drlora.data.files import Loaded
from drlora.data.formats import PLACES, choose_form, is_conversation, unused_keys
from drlora.data.texts import IGNORED, Tokens, encode_completions, eos_token_id, whole
from drlora.data.turns import ChatTemplate, conversation_of
from drlora.errors import ConfigError, DataError, shown

VERSION = 1
"""Of the tokens; they are cached by it, so whoever changes what is made here raises it."""

_MADE_BY = {name: version(name) for name in ("tokenizers", "transformers", "trl")}

_SHOWN = 300  # characters of a conversation that is refused
_OTHER_OBJECTIVES = {
    "chosen": "has pairs of answers (chosen, rejected)",
    "label": "says of completions whether they are good (label)",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlainSettings:
    """What decides the tokens, by TRL's names and with its defaults.

    But of a conversation only the assistant's turns are learned.
    """

    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    assistant_only_loss: bool = True
    completion_only_loss: bool | None = None
    packing_strategy: str = "bfd"
    shuffle_dataset: bool = False
    seed: int = 42
    dataset_num_proc: int | None = None


@dataclass(frozen=True)
class Prepared:
    """Examples as they are and as tokens.

    Attributes:
        raw: columns by TRL's names, and one of places.
        tokens: input_ids and labels (lists of int, equally long); seq_lengths too when packed.
        dropped: examples left out because no token with loss was left within `max_length`.
        truncated: those kept, but cut.
        said: what `raw` was read as, in one line.
    """

    raw: Dataset
    tokens: Dataset
    dropped: int
    truncated: int
    said: str


def prepare(
    examples: Dataset | Loaded,
    tokenizer: PreTrainedTokenizerBase,
    arguments: PlainSettings | SFTConfig,
    *,
    packing: bool = False,
    template_file: str | None = None,
) -> Prepared:
    """Tokenize a data set as `load_examples` gives it.

    Loss is on the completion and the end-of-sequence token, on the assistant's turns, or on all of
    a text. Dropped and truncated examples are counted and logged as a warning.

    Args:
        examples: as they were read, which names file and line of those that are refused; or a data
            set of them.
        tokenizer: with a chat template, if they are conversations.
        arguments: an SFTConfig.
        packing: whether examples are put together to rows of `max_length`.
        template_file: what the tokenizer's chat template was read from, for messages.

    Raises:
        ConfigError: `max_length` is below 2.
        DataError: a record is malformed, the tokenizer lacks what the examples need, the chat
            template does not train what the assistant says, or every example would be dropped.
    """
    longest = arguments.max_length
    if longest is not None and longest < 2:
        raise ConfigError(f"max_length is {longest}; it must be at least 2")
    loaded = examples if isinstance(examples, Loaded) else Loaded(examples)
    raw = loaded.rows
    encoder = _Encoder(tokenizer, arguments, loaded.name, template_file)
    encoder.refuse_tokenizer(raw)
    notes = unused_keys(raw)
    if notes:
        logger.warning("not used: %s of the messages", ", ".join(notes))
    encoded = raw.map(
        encoder,
        batched=True,
        with_indices=True,
        remove_columns=raw.column_names,
        num_proc=arguments.dataset_num_proc,
        new_fingerprint=encoder.fingerprint(raw),
        desc="Tokenizing",
    )
    columns = encoded.select_columns(["length", "has_target"]).with_format("numpy")[:]
    has_target = columns["has_target"]
    kept = encoded if has_target.all() else encoded.select(has_target.nonzero()[0])
    truncated = int((columns["length"][has_target] > longest).sum()) if longest else 0
    dropped = len(encoded) - len(kept)
    _report(len(encoded), dropped, truncated, longest)
    tokens = kept.select_columns(["input_ids", "labels"])
    if arguments.shuffle_dataset:
        tokens = tokens.shuffle(seed=arguments.seed)
    if packing:
        tokens = _packed(tokens, arguments)
    return Prepared(raw, tokens, dropped, truncated, loaded.said)


def encode_examples(
    examples: Dataset | Loaded, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Prepared:
    """`prepare` with TRL's defaults, and loss on the assistant's turns of a conversation."""
    return prepare(examples, tokenizer, PlainSettings(max_length=max_length))


def refuse_missing_template(raw: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises:
    DataError: the examples are conversations, and the tokenizer has no chat template.
    """
    if is_conversation(raw[0]) and not tokenizer.chat_template:
        raise DataError(
            f"the data has messages, but the tokenizer {tokenizer.name_or_path!r} has no "
            f"chat template; use the tokenizer of an instruction-tuned model, name a template "
            f"(chat_template: FILE), or use prompt and completion columns"
        )


def _packed(tokens: Dataset, arguments: PlainSettings | SFTConfig) -> Dataset:
    if arguments.max_length is None:
        raise ConfigError("packing needs a max_length")
    return pack_dataset(tokens, arguments.max_length, arguments.packing_strategy)


def _report(total: int, dropped: int, truncated: int, max_length: int | None) -> None:
    if dropped == total:
        raise DataError(
            f"all {total} examples have no token to learn within max_length={max_length}; raise "
            f"max_length (or, for messages, see that there are assistant turns)"
        )
    if dropped:
        logger.warning(
            "%d of %d examples left out: no token to learn within max_length=%s",
            dropped,
            total,
            max_length,
        )
    if truncated:
        logger.warning("%d of %d examples cut at max_length=%s", truncated, total, max_length)


@dataclass(frozen=True)
class _Encoder:
    """A batch of records to columns of tokens; many texts at once cost a fifth of one at a time."""

    tokenizer: PreTrainedTokenizerBase
    settings: PlainSettings | SFTConfig
    name: str
    template_file: str | None = None

    def __call__(self, records: Mapping[str, list], indices: Sequence[int]) -> dict[str, list]:
        places = list(_places(records, indices, self.name))
        with _no_search_for_cycles():
            encoded = self._encoded(records, places)
        kept = [(self._cut(ids), self._cut(labels)) for ids, labels in encoded]
        return {
            "input_ids": [ids for ids, _ in kept],
            "labels": [labels for _, labels in kept],
            "length": [len(ids) for ids, _ in encoded],
            "has_target": [any(label != IGNORED for label in labels) for _, labels in kept],
        }

    def _encoded(self, records: Mapping[str, list], places: Sequence[str]) -> list[Tokens]:
        columns = [records[name] for name in records]
        rows = [dict(zip(records, row, strict=True)) for row in zip(*columns, strict=True)]
        form = choose_form(list(records), None, "the data set")
        for row, where in zip(rows, places, strict=True):
            check_record(row, form, where)
        if is_conversation(rows[0]):
            return self._conversations(rows, places)
        if "prompt" not in records:
            return [(ids, ids) for ids in whole(records["text"], self.tokenizer)]
        found = encode_completions(records["prompt"], records["completion"], self.tokenizer)
        is_all = self.settings.completion_only_loss is False
        return [(ids, ids) for ids, _ in found] if is_all else found

    def fingerprint(self, raw: Dataset) -> str:
        """What the tokens of `raw` are kept under: its data, the tokenizer, settings and code."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        parts = (
            VERSION,
            _MADE_BY,
            raw._fingerprint,
            self.name,
            backend.to_str() if backend else self.tokenizer,
            self.tokenizer.special_tokens_map,
            self.tokenizer.chat_template,
            [getattr(self.settings, name) for name in PlainSettings.__dataclass_fields__],
        )
        return Hasher.hash(parts)

    def refuse_tokenizer(self, raw: Dataset) -> None:
        """Raises:
        DataError: it lacks what the examples need.
        """
        eos_token_id(self.tokenizer)
        for column, what in _OTHER_OBJECTIVES.items():
            if column in raw.column_names:
                raise DataError(
                    f"the data {what}; learn from it with another objective (objective: dpo, kto), "
                    f"or say what is to be learned as columns: {{prompt: .., completion: ..}}"
                )
        refuse_missing_template(raw, self.tokenizer)

    def _cut(self, ids: list[int]) -> list[int]:
        longest = self.settings.max_length
        if longest is None:
            return ids
        return ids[-longest:] if self.settings.truncation_mode == "keep_end" else ids[:longest]

    def _conversations(
        self, rows: Sequence[Mapping[str, Any]], places: Sequence[str]
    ) -> list[Tokens]:
        template = ChatTemplate(self.tokenizer, self.settings.assistant_only_loss)
        found = [conversation_of(row, where) for row, where in zip(rows, places, strict=True)]
        try:
            return targets.learn(found, template)
        except DataError as error:
            # One of them: the shortest that is refused by itself.
            pairs = zip(found, places, strict=True)
            for one, where in sorted(pairs, key=lambda pair: len(str(pair[0].turns))):
                try:
                    targets.learn([one], template)
                except DataError as own:
                    raise DataError(
                        f"{where}: {self.template_name} cannot be used on it: {own}. "
                        f"It is: {shown(one.turns, _SHOWN)}"
                    ) from own
            raise DataError(f"{self.template_name} cannot be used: {error}") from error

    @property
    def template_name(self) -> str:
        """In words, where the chat template is from."""
        if self.template_file:
            return f"chat_template: {self.template_file}"
        name = self.tokenizer.name_or_path
        return f"the chat template of {name!r}" if name else "the chat template"


@contextmanager
def _no_search_for_cycles() -> Iterator[None]:
    """Without Python's cyclic garbage collector: of a thousand conversations it takes a fifth."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _places(records: Mapping[str, list], indices: Sequence[int], name: str) -> Iterator[str]:
    """`data.jsonl, line 61` for each record, as far as the data set says where it comes from."""
    place = next((place for place in PLACES if place in records), None)
    files = records.get("file") or [name] * len(indices)
    for row, index in enumerate(indices):
        yield f"{files[row]}, {place} {records[place][row]}" if place else f"example {index + 1}"
