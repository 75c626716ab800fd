"""Every setting of DR-LoRA in one place, checked when it is made.

`DrLoraConfig` is an ordinary PEFT configuration: `get_peft_model(model, DrLoraConfig(...))` works
once `drlora` has been imported. The names follow PEFT where PEFT has a name (`lora_alpha`,
`lora_dropout`, `use_rslora`, `modules_to_save`) and the paper where it has one (`r_init`,
`r_target`, `r_max`, `p_grow`, `beta`, `gamma`); source: arXiv 2601.04823.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, InitVar, dataclass, field, fields
from typing import Any, Literal

from drlora.config.checks import (
    AUTO,
    HoldsRanks,
    in_range,
    number,
    one_of,
    refuse_other_than_names,
    refuse_other_than_tokens,
    target_names,
    whole_number,
)
from drlora.config.methods import method_settings
from drlora.config.options import GENERAL, GRADIENT_ALL, NOTHING, check_options, without_effect
from drlora.config.peft_type import DRLORA, SavedConfig
from drlora.config.registry import (
    ALLOCATIONS,
    ENGINES,
    REGISTRIES,
    WITH_OPTIONS,
    known_options,
    registered_options,
)
from drlora.errors import ConfigError, shown

PROJECTION_SETS = (
    ("gate_up", "down"),
    ("gate", "up", "down"),
    ("up", "down"),
    ("gate_up",),
    ("gate", "up"),
    ("gate",),
    ("up",),
    ("down",),
)
RECORDED = ("base_model_type", "gate_up_order", "schedule")  # what `record` may hold
# Setting -> what it may be; those of others are in registries.
CHOICES: dict[str, tuple[str, ...]] = {
    "budget_scope": ("layer", "model"),
    "router": ("frozen", "train"),
    "young_rows": ("inherit", "own", "shared"),
}

PRESETS: dict[str, dict[str, Any]] = {
    # With the defaults, which are the published ones in runs of these lengths.
    # OLMoE-1B-7B: 38,000 steps, batch 16, lr 2e-5 linear, weight decay 0.
    "paper-v3": dict(r_init=32, r_target=64, r_max=128, projections=["up", "down"], router="train"),
    # One fine-tune per task: 3,750 steps, batch 48.
    "paper-v5": dict(r_init=8, r_target=16, r_max=32, projections=["up", "down"], router="train"),
}


@dataclass
class DrLoraConfig(SavedConfig):
    """Settings of one DR-LoRA adapter.

    Args:
        r_init: rank of every expert at the start, >= 1.
        r_target: mean rank of the budget; `E * r_target` rows are stored per block and projection.
        r_max: no expert grows beyond it.
        lora_alpha: LoRA's alpha; `None` means `2 * r_target` (the paper's alpha = 2 r).
        use_rslora: scale by alpha / sqrt(r_target) instead of alpha / r_target. Either way the
            scaling is one constant and does not follow an expert's live rank.
        lora_dropout: dropout probability on the adapter's input, in [0, 1).
        projections: which matrices of an expert get an adapter: `gate_up` and `down` (one adapter
            over the fused gate and up), or any of `gate`, `up`, `down` on their own.
        beta: decay of the moving averages of routing frequency and rank importance, in [0, 1).
        gamma: exponent of the rank penalty (r + 1) ** gamma, >= 0.
        p_grow: an expert gains at most max(1, floor(p_grow * (r_max - r_init))) ranks at one event.
            `auto` is the published 0.1, or as much more as the budget needs in a short run.
        grow_every: optimizer steps between two growth events (T_grow). `auto` is the published 200,
            or less in a run that would have fewer than 16 events with it.
        warmup_steps: the first event is at its end: a number of steps if >= 1, else a fraction of
            the run. Set it to the learning rate's warm-up.
        settle_steps: no growth in the last so many steps of the run; below 1 a fraction of it.
            `auto` is the published 200, or a tenth of a run that is shorter than 2,000 steps.
        saliency: what growth goes by: `product` (the paper's f g / (r + 1) ** gamma), `routing`
            (without g), `importance` (without f), `random` (nothing; drawn from the seed that
            torch had when the adapter was made), or a rule that was registered
            (`drlora.config.registry.SALIENCIES`).
        allocation: `grow` from r_init up to r_target, or `prune` from r_init down to r_target, as
            in AdaLoRA: the ranks of least importance go, whosever they are; or a policy that was
            registered (`ALLOCATIONS`).
        start: how ranks are placed before the first step: `uniform` gives every expert r_init;
            `routing` gives them r_init on average, in proportion to how tokens are routed; `hot`
            gives as much to the experts that are used most, and none to the others; `gradient`
            gives it to the strongest directions of the gradient, whose ever they are
            (`drlora.place_ranks`; the callback and `drlora train` call it); or a way that was
            registered (`STARTS`). `none` gives no expert a rank, and only `target_modules` learn.
        budget_scope: whether each `layer` has its own budget, or all layers of the `model` compete
            for one; then a layer may need up to E * r_max rows, and so many are stored.
        router: `frozen`, or `train`: trained from the end of the warm-up and saved with the
            adapter.
        young_rows: what Adam does with a row that wakes up late. `own`: its bias is corrected from
            its own birth, exactly (torch's Adam and AdamW; others fall back to `inherit`);
            `inherit`: its second moment starts at the mean of its expert's older rows, which costs
            nothing between events; `shared`: nothing is done, as in a plain Adam (first steps up
            to 6.6 times larger). See docs/rank-pool.md.
        engine: how the adapted experts are computed; `auto` takes `loop` on a CPU and
            tries `triton` and `grouped` on a GPU. `triton` needs a GPU and the triton package.
            What `drlora.ops.register_engine` was given can be named too.
        target_modules: further linear layers that get PEFT's ordinary LoRA in the same adapter,
            such as attention or shared experts: a list of names or endings of names, a regular
            expression that a full name must match, `all-linear`, `all-stack` or `all-attention`.
            Their rank does not grow.
        target_rank: rank of these layers; `None` means `r_target`.
        target_alpha: their alpha; `None` gives alpha / rank the value that it has for the experts.
            `use_rslora` and `lora_dropout` hold for them too.
        modules_to_save: further modules that are trained in full and saved with the adapter.
        trainable_token_indices: ids of tokens whose embeddings alone are trained, as in PEFT: a
            list, or a dictionary from the name of an embedding layer to one. TRL asks for it where
            a chat template brings new tokens.
        experts: full names of the experts modules to adapt; `None` means all, and is filled in when
            the adapter is put in.
        options: settings that only some methods need, by name (docs/methods.md has the list); what
            is not given is filled in.
        record: no setting. What was found when the adapter was put in, and is compared when it is
            loaded (`base_model_type`, `gate_up_order`, `storage`, `fingerprint`), and the
            `schedule` that it was trained by.

    Raises:
        ConfigError: naming the setting, its value and the way out.
    """

    r_init: int = 8
    r_target: int = 16
    r_max: int = 32
    lora_alpha: float | None = None
    use_rslora: bool = False
    lora_dropout: float = 0.0
    projections: list[str] = field(default_factory=lambda: ["gate_up", "down"])
    beta: float = 0.9
    gamma: float = 1.2
    p_grow: float | Literal["auto"] = AUTO
    grow_every: int | Literal["auto"] = AUTO
    warmup_steps: float = 0.03
    settle_steps: float | Literal["auto"] = AUTO
    saliency: str = "product"
    allocation: str = "grow"
    start: str = "uniform"
    budget_scope: str = "layer"
    router: str = "frozen"
    young_rows: str = "own"
    engine: str = "auto"
    target_modules: list[str] | str | None = None
    target_rank: int | None = None
    target_alpha: float | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    experts: list[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] | None = None
    use_dora: InitVar[bool] = False  # no setting: PEFT's classes of LoRA ask for it

    def __post_init__(self, use_dora: bool) -> None:
        self.peft_type = DRLORA
        super().__post_init__()
        if use_dora:
            raise ConfigError(
                f"use_dora={use_dora} is not supported: DoRA divides by the norm of each row of "
                f"W + B A, for which the weights of all experts would be read in each step; leave "
                f"it out (docs/peft-behaviour.md says more)."
            )
        for name, choices in CHOICES.items():
            one_of(self, name, choices)
        one_of(self, "engine", (AUTO, *ENGINES.names()))
        self._check_rules()
        self._check_ranks()
        self._check_numbers()
        self._check_names()
        if self.lora_alpha is None:
            self.lora_alpha = 2.0 * self.r_target
        self._check_targets()

    @classmethod
    def preset(cls, name: str, **changes: Any) -> DrLoraConfig:
        """The published settings `paper-v3` or `paper-v5`, with `changes` on top."""
        return cls(**{**preset_settings(name), **changes})

    @classmethod
    def for_method(cls, name: str, **settings: Any) -> DrLoraConfig:
        """The settings that a method stands for (`drlora.config.methods`), on top of `settings`.

        Options that are given and have no effect with the method's rules are left out, so that one
        set of settings does for all methods.
        """
        defaults = {f.name: f.default for f in fields(cls) if f.default is not MISSING}
        given = settings.get("options") or {}
        fixed = dict(method_settings(name, {**defaults, **settings, "options": given}))
        options = fixed.pop("options", {})
        rules = {s: fixed.get(s, settings.get(s, defaults[s])) for s in WITH_OPTIONS}
        known = known_options(rules)
        chosen = {**given, **options}
        useless = registered_options().keys() - known.keys()
        useless |= without_effect(chosen, known, rules).keys()
        kept = {key: value for key, value in chosen.items() if key not in useless}
        return cls(**{**settings, **fixed, "options": kept})

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """What a saved configuration says, with what version 0.1 had as settings put in its place.

        PEFT calls this when it reads adapter_config.json.
        """
        return with_options_apart(super().check_kwargs(**kwargs))

    def option(self, name: str) -> Any:
        """The value of an option.

        Raises:
            KeyError: if no option of that name goes with the rules of this configuration.
        """
        return self.options[name]

    def recorded(self, name: str) -> Any:
        """What `record` holds under a name, or None."""
        return (self.record or {}).get(name)

    def note(self, **values: Any) -> None:
        """Put values into `record`."""
        self.record = {**(self.record or {}), **values}

    @property
    def scaling(self) -> float:
        """The factor on B A x: constant over the run and equal for all experts."""
        assert self.lora_alpha is not None
        divisor = math.sqrt(self.r_target) if self.use_rslora else self.r_target
        return self.lora_alpha / divisor

    @property
    def grows(self) -> bool:
        """Whether any rank is left to grant after the start."""
        return self.r_init < self.r_target

    @property
    def starts_from_data(self) -> bool:
        """Whether experts own nothing until `drlora.place_ranks` has seen a few batches."""
        if self.start == NOTHING:
            return False
        return self.start != "uniform" or self.option("start_a") != "random"

    def pool_rows(self, num_experts: int) -> int:
        """Rows that a block of `num_experts` experts stores for each projection."""
        policy = self._policy
        return policy.rows(self, num_experts) if policy else self.budget_rows(num_experts)

    def budget_rows(self, num_experts: int) -> int:
        """Rows that hold the budget: E * r_target, or what one layer may have of the model's."""
        return num_experts * (self.r_max if self.budget_scope == "model" else self.r_target)

    def resolve_warmup(self, total_steps: int) -> int:
        """`warmup_steps` as a number of steps of a run of `total_steps`."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil(self.warmup_steps * total_steps)

    def _check_ranks(self) -> None:
        for name in ("r_init", "r_target", "r_max"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{name}={value!r} must be a whole number.")
        if self.r_init < 1:
            raise ConfigError(
                f"r_init={self.r_init} must be at least 1: an expert without a rank has no "
                f"gradient to be judged by, so it would never be chosen to grow."
            )
        if self._policy:
            self._policy.check(self)
        is_fixed = self.r_init == self.r_target and self.allocation == "grow"
        if self.start == NOTHING and not (is_fixed and self.target_modules):
            raise ConfigError(
                f"start={NOTHING!r} gives no expert a rank, so nothing can grow, and only layers "
                f"in target_modules learn: r_init={self.r_init} must be r_target={self.r_target} "
                f"under allocation='grow', and target_modules={self.target_modules!r} must name "
                f"some; or choose another start."
            )

    @property
    def _policy(self) -> HoldsRanks | None:
        """None in inference, where one of a user's need not be registered."""
        known = self.allocation in ALLOCATIONS
        return ALLOCATIONS[self.allocation] if known else None

    def _check_numbers(self) -> None:
        in_range(self, "beta", 0, 1)
        in_range(self, "lora_dropout", 0, 1)
        in_range(self, "gamma", 0, None)
        in_range(self, "warmup_steps", 0, None)
        if self.lora_alpha is not None and not 0 < number(self, "lora_alpha") < math.inf:
            raise ConfigError(f"lora_alpha={self.lora_alpha} must be greater than 0.")
        if self.p_grow != AUTO and not 0 < number(self, "p_grow") <= 1:
            raise ConfigError(f"p_grow={self.p_grow} must lie in (0, 1], or be {AUTO!r}.")
        whole_number(self, "grow_every", 1, "steps", may_be_auto=True)
        if not (isinstance(self.settle_steps, float) and 0 < self.settle_steps < 1):
            whole_number(self, "settle_steps", 0, "steps", may_be_auto=True)

    def _check_rules(self) -> None:
        """In inference rules decide nothing, so those of a user's need not be registered then."""
        rules = {setting: getattr(self, setting) for setting in WITH_OPTIONS}
        missing = [name for setting, name in rules.items() if name not in REGISTRIES[setting]]
        if missing and self.inference_mode:
            return
        for setting, name in rules.items():
            REGISTRIES[setting][name]
        self.options = check_options(
            self.options, known_options(rules), rules, registered_options()
        )
        if self.options.get("move_share") and self.r_max == self.r_init:
            raise ConfigError(
                f"options.move_share={self.options['move_share']} needs experts that can grow: "
                f"raise r_max={self.r_max} above r_init={self.r_init}."
            )

    def _check_names(self) -> None:
        if not isinstance(self.use_rslora, bool):
            raise ConfigError(f"use_rslora={shown(self.use_rslora)} must be true or false.")
        for name in ("projections", "target_modules", "modules_to_save", "experts"):
            refuse_other_than_names(self, name)
        refuse_other_than_tokens(self, "trainable_token_indices")
        if isinstance(self.projections, str):
            self.projections = [self.projections]
        chosen = list(self.projections)
        for candidate in PROJECTION_SETS:
            if len(chosen) == len(candidate) and set(chosen) == set(candidate):
                self.projections = list(candidate)
                return
        raise ConfigError(
            f"projections={chosen} is not understood; choose one of "
            f"{[list(candidate) for candidate in PROJECTION_SETS]}."
        )

    def _check_targets(self) -> None:
        assert self.lora_alpha is not None
        if not self.target_modules:
            given: dict[str, Any] = {n: getattr(self, n) for n in ("target_rank", "target_alpha")}
            if self.options.get("start_a") == GRADIENT_ALL:
                given["options.start_a"] = GRADIENT_ALL
            for name, value in given.items():
                if value is not None:
                    raise ConfigError(
                        f"{name}={value} has no effect without target_modules; name "
                        f"the layers, for example target_modules='all-linear', or leave it out."
                    )
            self.target_modules = None
            return
        if not isinstance(self.target_modules, str):
            self.target_modules = target_names(self.target_modules)
        rank = self.target_rank = self.r_target if self.target_rank is None else self.target_rank
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ConfigError(f"target_rank={rank!r} must be a whole number of at least 1.")
        if self.target_alpha is None:  # the same scaling
            ratio = self.lora_alpha * rank / self.r_target
            self.target_alpha = self.scaling * math.sqrt(rank) if self.use_rslora else ratio
        if not 0 < number(self, "target_alpha") < math.inf:
            raise ConfigError(f"target_alpha={self.target_alpha} must be greater than 0.")


def with_options_apart(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a file of version 0.1 or later holds, as DrLoraConfig takes them.

    Version 0.1 had among the settings what are options since, what is found at injection, and
    `use_dora`, which had to be False.
    """
    defaults = {f.name: f.default for f in fields(DrLoraConfig)}
    rules = {setting: saved.get(setting, defaults[setting]) for setting in WITH_OPTIONS}
    if "options" in saved or "record" in saved:
        options = saved.get("options") or {}
        idle = without_effect(options, GENERAL, rules)  # which later versions refuse
        return {**saved, "options": {k: v for k, v in options.items() if k not in idle}}
    known, others = known_options(rules), registered_options()
    kept = {k: v for k, v in saved.items() if k not in (*known, *others, *RECORDED, "use_dora")}
    options = {k: saved[k] for k in known if saved.get(k, known[k].default) != known[k].default}
    record = {k: saved[k] for k in RECORDED if saved.get(k) is not None}
    return {**kept, "options": options, "record": record or None}


def preset_settings(name: str) -> dict[str, Any]:
    """The settings that the preset `name` changes.

    Raises:
        ConfigError: if there is no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset={name!r} is not known; choose one of {sorted(PRESETS)}.")
    return PRESETS[name]
