"""Make the task `sums`: add and subtract numbers of up to two digits.

    python -m venv .cache/gym && .cache/gym/bin/pip install reasoning-gym==0.1.25
    .cache/gym/bin/python experiments/tasks/sums.py

Source: the generator `chain_sum` of reasoning-gym. Writes experiments/tasks/data/sums; the README
there says how it is split, and why these are no word problems.
"""

from importlib.metadata import version

from common import COMMITTED, SEED, TRAIN_LINES, Grouped, Splits, main, make_example, split_by_key

VERSION = "0.1.25"
DRAWN = 150_000


def sums_splits(digits: int = 2, drawn: int = DRAWN, train_lines: int = TRAIN_LINES) -> Splits:
    """Each expression once; two numbers that meet in one split meet in no other."""
    import reasoning_gym

    if version("reasoning-gym") != VERSION:
        raise SystemExit(f"this wants reasoning-gym=={VERSION}, not {version('reasoning-gym')}")
    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": digits}
    items = reasoning_gym.create_dataset("chain_sum", size=drawn, seed=SEED, **settings)
    examples: dict[str, Grouped] = {}
    for index in range(drawn):
        item = items[index]
        expression = item["metadata"]["expression"]
        one, _, other = expression.split(" ")
        key = " ".join(sorted((one, other)))
        examples[expression] = (make_example(f"{expression} =", [item["answer"]]), {key})
    return split_by_key(examples.values(), train_lines)


if __name__ == "__main__":
    main(sums_splits, __doc__, COMMITTED / "sums")
