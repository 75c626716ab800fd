"""Make the task `sums`: add and subtract numbers of up to two digits.

    python -m venv .cache/gym && .cache/gym/bin/pip install reasoning-gym==0.1.25
    .cache/gym/bin/python experiments/tasks/sums.py

Source: the generator `chain_sum` of reasoning-gym. Writes experiments/tasks/data/sums; the README
there says how it is split, and why these are no word problems.
"""

from importlib.metadata import version

from common import COMMITTED, SEED, Grouped, Splits, main, make_example, split_by_key

VERSION = "0.1.25"
DRAWN = 150_000


def sums_splits() -> Splits:
    """Each expression once; two numbers that meet in one split meet in no other."""
    import reasoning_gym

    if version("reasoning-gym") != VERSION:
        raise SystemExit(f"this wants reasoning-gym=={VERSION}, not {version('reasoning-gym')}")
    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    drawn = reasoning_gym.create_dataset("chain_sum", size=DRAWN, seed=SEED, **settings)
    examples: dict[str, Grouped] = {}
    for index in range(DRAWN):
        item = drawn[index]
        expression = item["metadata"]["expression"]
        one, _, other = expression.split(" ")
        key = " ".join(sorted((one, other)))
        examples[expression] = (make_example(f"{expression} =", [item["answer"]]), {key})
    return split_by_key(examples.values())


if __name__ == "__main__":
    main(sums_splits, __doc__, COMMITTED / "sums")
