"""Word problems with worked solutions, as messages: what the realistic model is trained on.

    python -m venv .cache/gym && .cache/gym/bin/pip install reasoning-gym==0.1.25
    .cache/gym/bin/python experiments/realistic/problems.py --out .cache/realistic

Source: the generator `gsm_symbolic` of reasoning-gym (Apache-2.0). Problems are short (at most 400
characters with their solution, so about 160 tokens with a chat template), and no question is in
both files. Templates repeat between them: held-out loss here says that a run works, no more.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

VERSION = "0.1.25"
DRAWN, SEED, LONGEST = 4_000, 7, 400
TRAIN, TEST = 1_000, 93


def problems() -> Iterator[dict[str, list[dict[str, str]]]]:
    """Each question once, with its solution."""
    import reasoning_gym

    if version("reasoning-gym") != VERSION:
        raise SystemExit(f"this wants reasoning-gym=={VERSION}, not {version('reasoning-gym')}")
    drawn = reasoning_gym.create_dataset("gsm_symbolic", size=DRAWN, seed=SEED)
    seen = set()
    for index in range(DRAWN):
        item = drawn[index]
        question = item["question"].split(" Give the result as")[0].strip()
        solution = (item["metadata"].get("answer_cot") or item["answer"]).strip()
        if question in seen or len(question) + len(solution) > LONGEST:
            continue
        seen.add(question)
        yield {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": solution},
            ]
        }


def main() -> None:
    """Write train.jsonl and test.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(".cache/realistic"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in problems()]
    if len(rows) < TRAIN + TEST:
        raise SystemExit(f"only {len(rows)} problems are short enough; draw more than {DRAWN}")
    for name, part in (("train", rows[:TRAIN]), ("test", rows[TRAIN : TRAIN + TEST])):
        (out / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
        print(f"{out / f'{name}.jsonl'}: {len(part)} lines")


if __name__ == "__main__":
    main()
