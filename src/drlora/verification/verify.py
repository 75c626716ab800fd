"""Check an adapter on an MoE model, whoever made it.

    found = drlora.verify("folder of the adapter", base="folder of the model")
    found.is_sound          # no fault
    found.findings          # faults and warnings, by name

No weight of the base is needed for most of it; what is read is read expert by expert.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model

from drlora.adapter.embeddings import fit_embeddings
from drlora.errors import CheckpointError, ConfigError, first_line
from drlora.export.base_weights import Base, find_base, other_weights
from drlora.export.engines import VLLM_RANKS, Facts, Reading, readings
from drlora.export.updates import unread_keys
from drlora.io.files import home, local_path
from drlora.io.run_files import ADAPTER_CONFIG
from drlora.moe.stored.config import stored_settings
from drlora.moe.stored.refused import method_of
from drlora.verification.checks import few, fits, measure, relative, touched, whole
from drlora.verification.contents import Contents, read_contents
from drlora.verification.findings import Finding, fault, warning
from drlora.verification.keys import ROUTERS
from drlora.verification.merges import Merged, compare_merged, judge_merged, other_base

_COPY = ".modules_to_save."
_LAYOUTS = {"packed": "peft", "apart": "per-expert", "stacked": "sglang"}


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        adapter: its folder.
        base: the model that it was compared with; None if there was none.
        type: PEFT's, of the adapter, or `MLX`.
        layouts: how the experts' updates are stored: packed, stacked, apart, pool.
        blocks: number of blocks with an update.
        experts: number of experts in a block.
        ranks: smallest and largest rank of an expert.
        packing: `right`, `wrong` or `not told`; None where nothing is packed.
        shares: matrix -> its largest update as a share of the weight's norm, where the base's
            weights are there.
        merged: what became of each matrix in a merged model.
        engines: what each does with it.
        findings: faults first.
    """

    adapter: str
    base: str | None
    type: str
    layouts: tuple[str, ...]
    blocks: int
    experts: int
    ranks: tuple[int, int]
    packing: str | None
    shares: dict[str, float]
    merged: tuple[Merged, ...]
    engines: tuple[Reading, ...]
    findings: tuple[Finding, ...]

    @property
    def is_sound(self) -> bool:
        """Whether there is no fault; warnings do not count."""
        return not any(finding.is_fault for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **{k: v for k, v in vars(self).items() if k not in ("merged", "engines", "findings")},
            "is_sound": self.is_sound,
            **{k: [one.to_dict() for one in getattr(self, k)] for k in ("merged", "engines")},
            "findings": [one.to_dict() for one in self.findings],
        }


@torch.no_grad()
def verify(
    folder: str | Path, base: str | None = None, merged: str | Path | None = None
) -> Verification:
    """Check the adapter in `folder`.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors, or mlx-lm's
            adapters.safetensors.
        base: the model that it is for, a folder or `embedded`; by default the one that the adapter
            names, if it is on this machine.
        merged: a folder with the base that the adapter was merged into; needs the base's weights.

    Raises:
        CheckpointError: if a file is missing or damaged.
        ConfigError: if `base` is not there, or `merged` is given without its weights, or those are
            quantised.
    """
    path = Path(home(str(folder)))
    contents, found_base = _with_base(path, base)
    sizes, findings = measure(contents)
    findings += touched(contents, sizes)
    findings += whole(contents, found_base)
    shares: dict[str, float] = {}
    matrices: list[Merged] = []
    unread: list[Finding] = []
    if found_base is not None:
        wrong = fits(contents, found_base)
        findings += wrong
        if not wrong:
            shares, large = relative(contents, sizes, found_base)
            unread = _read_by_peft(contents, found_base)
            findings += large + unread
        if merged is not None and not wrong:
            weights = other_weights(home(str(merged)))
            if not found_base.weights.files:
                raise ConfigError(f"base={found_base.name!r} has no weights to compare with.")
            _refuse_codes(found_base)
            other = other_base(contents, found_base, weights)
            findings += other
            if not other:
                matrices, unseen = compare_merged(contents, found_base, weights)
                findings += judge_merged(matrices) + unseen
    elif merged is not None:
        raise ConfigError("a merged model is compared with its base; name it with base (--base).")
    ranks = _ranks(contents)
    findings += _beyond(contents, ranks)
    findings.sort(key=lambda finding: not finding.is_fault)
    return Verification(
        str(folder),
        found_base.name if found_base else None,
        contents.type,
        tuple(sorted(contents.kinds)),
        len({update.module for update in contents.updates}),
        max((len(update.experts) for update in contents.updates), default=0),
        ranks,
        sizes.packing.verdict if sizes.packing else None,
        shares,
        tuple(matrices),
        tuple(_engines(contents, found_base, ranks, peft_loads=not unread)),
        tuple(findings),
    )


def _refuse_codes(base: Base) -> None:
    """Raises:
    ConfigError: if the base's files have codes of few bits, which a merged model is not beside.
    """
    settings = stored_settings(base.model.config)
    if settings is not None:
        raise ConfigError(
            f"base={base.name!r} is quantised ({method_of(settings)}), so a merged model cannot be "
            f"compared with its files; name the 16-bit checkpoint, or leave merged (--merged) out."
        )


def _with_base(path: Path, base: str | None) -> tuple[Contents, Base | None]:
    """The adapter and its base; one that the adapter names may be gone."""
    bare: Contents | None = None
    if base is None:
        bare = read_contents(path, None)
        named = bare.config.get("base_model_name_or_path")
        if not isinstance(named, str) or not (named == "embedded" or local_path(named)):
            return bare, None
        try:
            found = find_base(named)
        except ConfigError:
            return bare, None
    else:
        found = find_base(home(base))
    try:
        return read_contents(path, found), found
    except CheckpointError:
        if bare is not None or not (path / ADAPTER_CONFIG).is_file():
            raise
        return read_contents(path, None), found  # of another base; what differs is told below


def _ranks(contents: Contents) -> tuple[int, int]:
    ranks = [
        update.factors(expert)[0].shape[0] if update.rank is None else update.rank
        for update in contents.updates
        for expert in (update.experts if update.rank is None else update.experts[:1])
    ]
    return min(ranks, default=0), max(ranks, default=0)


def _beyond(contents: Contents, ranks: tuple[int, int]) -> list[Finding]:
    if contents.kinds == {"pool"} or ranks[1] <= VLLM_RANKS[-1]:
        return []
    detail = f"rank {ranks[1]}, and vLLM takes at most {VLLM_RANKS[-1]}"
    return [warning("rank-beyond-engine", "", detail)]


def _read_by_peft(contents: Contents, base: Base) -> list[Finding]:
    """What PEFT itself finds of the file on a model without weights."""
    if contents.kinds & {"pool", "stacked"} or contents.type != "LORA":
        return []
    config = PeftConfig.from_pretrained(str(contents.folder))
    config.base_model_name_or_path = None
    tensors = {key: torch.empty(shape, device="meta") for key, shape in contents.shapes.items()}
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own = copy.deepcopy(base.model)
            fit_embeddings(own, contents.folder)  # PEFT wants that done before it loads
            model = get_peft_model(own, config)
            assert isinstance(model, PeftModel)
            missing, unexpected = unread_keys(model, tensors)
    except (ValueError, KeyError, RuntimeError, TypeError, IndexError) as error:
        missing, unexpected = [first_line(error)], []
    # Embeddings that were resized and trained in full: PEFT writes them twice and reads them once.
    copies = {key for key in tensors if key.replace(_COPY, ".") in tensors and _COPY in key}
    unexpected = [key for key in unexpected if key not in copies]
    if not missing and not unexpected:
        return []
    detail = f"missing {few(missing, 2) or 'nothing'}; unexpected {few(unexpected, 2) or 'nothing'}"
    if "apart" in contents.kinds:
        return [warning("keys-of-transformers-4", base.model_type, f"engines read them; {detail}")]
    return [fault("unread-keys", base.model_type, detail)]


def _engines(
    contents: Contents, base: Base | None, ranks: tuple[int, int], peft_loads: bool
) -> list[Reading]:
    layout = _LAYOUTS.get(next(iter(contents.kinds), "")) if len(contents.kinds) == 1 else None
    if layout is None or base is None:
        return []
    if contents.is_mlx:
        layout = "mlx"
    routers = [key for key in contents.keys.values() if key.leaf in ROUTERS]
    modules = any(key.kind == "whole" for key in contents.keys.values())
    facts = Facts(
        layout,
        base.model_type,
        ranks[1],
        has_modules=modules or bool(contents.config.get("modules_to_save")),
        has_router_lora=any(key.kind == "lora" for key in routers),
        peft_loads=peft_loads,
    )
    return readings(facts)
