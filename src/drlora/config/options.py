"""Options: settings that only some methods need, kept in `DrLoraConfig.options`.

    DrLoraConfig(start="hot", options={"hot_fraction": 0.25})

Rivals, controls and ablations are made of these, and of rules that a user registers with options of
their own. What everybody sets is a field of DrLoraConfig.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from drlora.errors import ConfigError, shown

EQUAL = "uniform"  # the start that reads no batch, if no option does
NOTHING = "none"  # the start after which no expert has a rank, for good
GRADIENT_ALL = "gradient-all"  # rows of A along the gradient, of target_modules too


@dataclass(frozen=True)
class Option:
    """What one option may be.

    Attributes:
        default: its value where it is not given; also says its type.
        says: what it does, in a line.
        choices: of a text.
        low: smallest number that is allowed.
        high: largest number that is allowed.
        above: a number must be greater than this.
        needs: another option, by whose default this one has no effect.
        of_start: whether it is of how ranks start.
    """

    default: Any
    says: str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    needs: str = ""
    of_start: bool = False

    def check(self, name: str, value: Any) -> Any:
        """`value`, as a number of the right kind.

        Raises:
            ConfigError: naming the option, its value and what it may be.
        """
        full = f"options.{name}={shown(value)}"
        if self.choices:
            if value not in self.choices:
                raise ConfigError(f"{full} is not known; choose one of {list(self.choices)}.")
            return value
        if isinstance(self.default, bool):
            if not isinstance(value, bool):
                raise ConfigError(f"{full} must be true or false.")
            return value
        if isinstance(self.default, (int, float)):
            return self._number(full, value)
        if self.default is not None and not isinstance(value, type(self.default)):
            raise ConfigError(f"{full} must be a {type(self.default).__name__}.")
        return value

    def _number(self, full: str, value: Any) -> Any:
        is_whole = isinstance(self.default, int)
        if isinstance(value, float) and is_whole and value.is_integer():
            value = int(value)
        fits = isinstance(value, int if is_whole else (int, float)) and not isinstance(value, bool)
        if not fits or not self.low <= value <= self.high or not self.above < value < math.inf:
            raise ConfigError(
                f"{full} must be a {'whole ' if is_whole else ''}number{self._bounds()}."
            )
        return value

    def _bounds(self) -> str:
        if self.above > -math.inf:
            high = f" and at most {self.high:g}" if self.high < math.inf else ""
            return f" greater than {self.above:g}{high}"
        if self.high < math.inf:
            return f" from {self.low:g} to {self.high:g}"
        return f" of at least {self.low:g}" if self.low > -math.inf else ""


HOT_FRACTION = Option(0.25, "share of a block's experts that `hot` takes", above=0, high=1)
"""Of start=hot; the method `hot` needs it to know r_max."""

# Those that have an effect whatever is chosen. Others are registered with what they belong to.
GENERAL: dict[str, Option] = {
    "routing_signal": Option(
        "topk_weight",
        "what counts as routing: the top-k weight (0 where not selected), the router's softmax "
        "probability, or the count of selections",
        choices=("topk_weight", "probability", "count"),
    ),
    "rank_importance": Option(
        "product",
        "importance of one rank: the paper's s_j, AdaLoRA's sensitivity (a sum; rows are kept by "
        "its average times how much it varies), or what the paper's released script computes "
        "(|sum of gradient times weight| of A plus that of B)",
        choices=("product", "sensitivity", "released"),
    ),
    "rank_per": Option(
        "expert",
        "whether the projections of an expert share one rank (the paper), or each has its own "
        "pool, saliency and quota",
        choices=("expert", "projection"),
    ),
    "start_a": Option(
        "random",
        "rows of A that experts own at the start: random, or along the strongest directions of "
        "the gradient of their expert's weight; with gradient-all those of `target_modules` too",
        choices=("random", "gradient", GRADIENT_ALL),
        of_start=True,
    ),
    "start_a_scale": Option(
        1.0,
        "length of experts' rows along the gradient, over that of a random one",
        above=0,
        needs="start_a",
        of_start=True,
    ),
    "start_batches": Option(
        8,
        "batches that routing is counted and gradients are taken over before the start",
        low=1,
        of_start=True,
    ),
    "b_lr_ratio": Option(
        1.0, "learning rate of B over that of A (LoRA+); `drlora train` sets it up", above=0
    ),
    "shared_outer": Option(
        False,
        "whether the factor at a block's input (A of gate and up) and the one at its output (B of "
        "down) are common to all experts; ranks are raised to as many numbers, with equal ranks",
    ),
    "budget_share": Option(
        1.0,
        "share of r_init and r_target, rounded up, that is left when the adapter is put in; "
        "alpha / rank stays as it is",
        above=0,
        high=1,
    ),
    "common_budget": Option(
        False,
        "whether the numbers that E * r_target rows of every block have are those of the experts "
        "and of `target_modules` together: ranks are set when the adapter is put in",
    ),
    "share_rows": Option(
        True,
        "on a model that transformers shards when it is loaded: whether the processes share out "
        "the rows of pools, or each has all of them (more memory, fewer collectives)",
    ),
    "split_by_active": Option(
        False,
        "whether ranks and alpha are divided by the number of experts a token uses when the "
        "adapter is put in (LoRA Without Regret)",
    ),
}


def check_options(
    given: Any,
    known: Mapping[str, Option],
    rules: Mapping[str, str],
    registered: Mapping[str, str],
) -> dict[str, Any]:
    """All options that have an effect with the chosen rules, as given or by default.

    Args:
        given: name -> value.
        known: every option that has an effect with these rules.
        rules: setting -> the rule that is chosen.
        registered: every option of any rule -> that rule, as `setting=name`.

    Raises:
        ConfigError: if one is unknown, has a wrong value, or has no effect with these rules.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"options={shown(given)} must be a mapping from names to values.")
    checked = {name: option.default for name, option in known.items()}
    for name, value in given.items():
        if name in known:
            checked[name] = known[name].check(name, value)
        elif name in registered:
            setting = registered[name].partition("=")[0]
            raise ConfigError(
                f"options.{name}={shown(value)} has no effect with {setting}={rules[setting]!r}: "
                f"it goes with {registered[name]}; leave it out."
            )
        else:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise ConfigError(
                f"options.{name}={shown(value)} is not known; "
                f"{f'did you mean {near[0]}? K' if near else 'k'}nown with these rules are "
                f"{', '.join(sorted(known))}."
            )
    for name, why in without_effect(checked, known, rules).items():
        raise ConfigError(
            f"options.{name}={shown(checked[name])} has no effect with {why}; leave it out."
        )
    return checked


def without_effect(
    options: Mapping[str, Any], known: Mapping[str, Option], rules: Mapping[str, str]
) -> dict[str, str]:
    """Options that differ from their default and yet change nothing -> what makes them idle.

    Args:
        options: name -> value; the others have their defaults.
        known: every option of the chosen rules.
        rules: setting -> the rule that is chosen.
    """
    values = {name: options.get(name, option.default) for name, option in known.items()}
    start, start_a = rules.get("start", EQUAL), values["start_a"]
    is_random = start_a == known["start_a"].default
    idle = {}
    for name, option in known.items():
        if values[name] == option.default:
            continue
        if option.of_start and start == NOTHING:
            idle[name] = f"start={start!r}"
        elif option.needs and values[option.needs] == known[option.needs].default:
            idle[name] = f"options.{option.needs}={shown(values[option.needs])}"
        elif name == "start_batches" and start == EQUAL and is_random:
            idle[name] = f"start={start!r} and options.start_a={shown(start_a)}"
    return idle
