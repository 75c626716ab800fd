"""The tasks under experiments/tasks: sizes, splits without leaks, metrics, how they are made."""

import importlib
import json
import re
from collections import Counter
from functools import cache
from itertools import combinations
from pathlib import Path
from types import ModuleType

import pytest

from drlora.data import load_examples
from drlora.evaluation.evaluate import Sample, word_error_rate

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "tasks"
TASKS = ("headlines", "returns", "sums")
SPLITS = ("train", "dev", "test")
PAIRS = tuple(combinations(SPLITS, 2))
LIMIT_BYTES = 3_000_000

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="this source distribution came without experiments/"
)


@cache
def read_split(task: str, split: str) -> list[dict]:
    lines = (FOLDER / "data" / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    """The script that makes a task, by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(request.param)


def test_files_fit():
    assert sum(path.stat().st_size for path in (FOLDER / "data").rglob("*")) <= LIMIT_BYTES


@pytest.mark.parametrize("task", TASKS)
def test_sizes_columns_and_no_prompt_twice(task):
    readme = (FOLDER / "data" / task / "README.md").read_text(encoding="utf-8")
    for split, least in (("train", 7_000), ("dev", 600), ("test", 1_200)):
        examples = read_split(task, split)
        assert len(examples) >= least
        assert f"| {split} | {len(examples)} |" in readme
        for example in examples:
            assert {"prompt", "completion"} <= set(example) <= {"prompt", "completion", "choices"}
            assert re.fullmatch(r" \S.*", example["completion"])
            assert len(example["prompt"]) <= 140
    prompts = [example["prompt"] for split in SPLITS for example in read_split(task, split)]
    assert len(set(prompts)) == len(prompts)
    files = FOLDER / "data" / task
    assert load_examples(str(files / "dev.jsonl"))[0] == read_split(task, "dev")[0]


def share_of_the_commonest(task: str) -> float:
    commonest = Counter(e["completion"] for e in read_split(task, "train")).most_common(1)[0][0]
    test = read_split(task, "test")
    return sum(example["completion"] == commonest for example in test) / len(test)


@pytest.mark.parametrize("task", TASKS)
def test_readme_states_what_the_commonest_answer_gives(task):
    readme = (FOLDER / "data" / task / "README.md").read_text(encoding="utf-8")
    assert f"{share_of_the_commonest(task):.1%}".replace("%", " %") in readme


def letters(example: dict) -> str:
    return re.sub("[^a-z]", "", example["prompt"].lower())


def signature(example: dict) -> str:
    return example["prompt"].splitlines()[1]


def operands(example: dict) -> frozenset[str]:
    one, _, other, _ = example["prompt"].split(" ")
    return frozenset((one, other))


@pytest.mark.parametrize(
    ("task", "key"), [("headlines", letters), ("returns", signature), ("sums", operands)]
)
@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_splits_share_nothing(task, key, one, other):
    first, second = (set(map(key, read_split(task, split))) for split in (one, other))
    assert first.isdisjoint(second)


def test_headlines_are_a_choice_of_two():
    for split in ("dev", "test"):
        for example in read_split("headlines", split):
            assert example["choices"] == [" serious", " satire"]
            assert example["completion"] in example["choices"]
    assert {e["completion"] for e in read_split("headlines", "train")} == {" serious", " satire"}


def test_sums_are_right():
    for split in SPLITS:
        for example in read_split("sums", split):
            one, sign, other, _ = example["prompt"].split(" ")
            total = int(one) + int(other) if sign == "+" else int(one) - int(other)
            assert example["completion"] == f" {total}"


def test_types_of_test_can_be_learnt_and_parsed():
    known = {example["completion"] for example in read_split("returns", "train")}
    test = [example["completion"] for example in read_split("returns", "test")]
    assert sum(answer in known for answer in test) > 0.99 * len(test)
    for answer in known:
        compile(answer.strip(), "type", "eval")


def test_phone_error_rate_of_answers_made_by_hand():
    samples = [
        Sample("word: judge\nsounds:", "JH AH JH", ("JH AH JH",), True),
        Sample("word: pontiff\nsounds:", "P AA N T F", ("P AA N T AH F", "P AA N T IH F"), False),
        Sample("word: a\nsounds:", "", ("AH",), False),
    ]
    assert word_error_rate(samples) == pytest.approx((0 + 1 + 1) / (3 + 6 + 1))


@pytest.mark.parametrize("script", ["common"], indirect=True)
def test_split_by_key_keeps_what_shares_a_key_out_of_train(script, monkeypatch):
    monkeypatch.setattr(script, "TEST_LINES", 20)
    monkeypatch.setattr(script, "DEV_LINES", 10)
    examples = [
        (script.make_example(str(number), [str(number)]), {f"a{number % 50}", f"b{number // 4}"})
        for number in range(200)
    ]
    splits = script.split_by_key(examples, train_lines=1_000)
    keys = {example["prompt"]: of for example, of in examples}
    assert (len(splits["test"]), len(splits["dev"])) == (20, 10)
    assert len(splits["train"]) > 20
    for one, other in PAIRS:
        first, second = (
            set().union(*(keys[example["prompt"]] for example in splits[split]))
            for split in (one, other)
        )
        assert first.isdisjoint(second)


@pytest.mark.parametrize("script", ["german"], indirect=True)
def test_german_pairs_are_headwords_without_notes(script, monkeypatch):
    text = (
        "# Version :: devel\n"
        "Breite {f}; Weite {f} [geogr.] | Breiten {pl} :: breadth; clear width (of it) | breadths\n"
        "Sandwich {n} :: sandwich\n"
        "abtafeln {vt} :: to plait\n"
        "das A und O :: the nuts and bolts\n"
    )
    monkeypatch.setattr(script, "dictionary", lambda: text)
    assert list(script.read_pairs()) == [
        (["Breite", "Weite"], ["breadth", "clear width"]),
        (["Sandwich"], ["sandwich"]),
        (["abtafeln"], ["plait"]),
    ]
    found = [example for examples in script.german_splits().values() for example in examples]
    assert {example["prompt"] for example in found} <= {
        f"German: {word}\nEnglish:" for word in ("Breite", "Weite", "abtafeln")
    }


@pytest.mark.parametrize("script", ["returns"], indirect=True)
def test_functions_are_read_from_a_stub(script):
    source = (
        "def f(x: int, *, y: str = ...) -> bool: ...\n"
        "class A:\n"
        "    def __init__(self) -> None: ...\n"
        "    if sys.version_info >= (3, 12):\n"
        "        async def g(self) -> list[str]: ...\n"
        "    def untyped(self): ...\n"
    )
    found = list(script.functions_of("_thing/sub.pyi", source))
    assert [(function.family, function.prompt, function.type) for function in found] == [
        ("thing", "module _thing.sub\ndef f(x: int, *, y: str=...) ->", "bool"),
        ("thing", "class A\ndef g(self) ->", "list[str]"),
    ]


@pytest.mark.parametrize("script", ["common"], indirect=True)
def test_an_archive_that_cannot_be_had_is_told(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "CACHE", tmp_path)
    with pytest.raises(SystemExit, match=r"false did not leave a\.whl"):
        script.fetched("a.whl", "0", "false")
    (tmp_path / "archives" / "a.whl").write_bytes(b"other")
    with pytest.raises(SystemExit, match="has the SHA-256"):
        script.fetched("a.whl", "0", "false")


@pytest.mark.parametrize("script", ["long"], indirect=True)
def test_long_pronunciation_trains_on_no_family_of_dev_or_test(script, monkeypatch):
    held_out = script.word_of(read_embedded("test")[0])
    own = {script.word_of(example) for example in read_embedded("train")}
    dictionary = "".join(
        f"{word.upper()}  K AE1 T\n"
        for word in (*sorted(own), held_out, f"{held_out}s", f"{held_out}ed", "zorblat", "quixomel")
    )
    monkeypatch.setattr(script, "cmudict", lambda: dictionary)
    monkeypatch.setattr(script, "LONG_TRAIN_LINES", len(own) + 2)
    splits = script.long_pronunciation_splits()
    words = [script.word_of(example) for example in splits["test"]]
    assert words == [script.word_of(example) for example in read_embedded("test")]
    assert {script.word_of(example) for example in splits["train"]} == {*own, "zorblat", "quixomel"}


def read_embedded(split: str) -> list[dict]:
    return list(load_examples("embedded:pronunciation", split=split))
