"""What a user may hand to `drlora export` and `drlora eval`: where its model and its data are.

    a run directory            `drlora train`
    a folder with an adapter   `save_pretrained`, a checkpoint, an export as peft or per-expert
    a folder with a model      an export as merged

An export says which run it came from; where that is still there, its data and settings are used.
Paths in what is stored are followed as `drlora.io.places` says.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft.utils.constants import TOKENIZER_CONFIG_NAME

from drlora.errors import CheckpointError, shown
from drlora.evaluation.measure import EvaluationSection
from drlora.io.files import home, read_adapter_config, read_json
from drlora.io.places import Place, leads_somewhere
from drlora.io.run_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, EXPORT_RECORD
from drlora.ops.storage.packed import FORMATS
from drlora.runs.data_section import DataSection
from drlora.runs.quantise import QuantiseSection
from drlora.runs.recipe import Recipe
from drlora.runs.rundir import RunDir

KINDS = ("DRLORA", "LORA")
LEARNED = ("assistant_only_loss", "completion_only_loss", "truncation_mode")


@dataclass(frozen=True)
class Source:
    """An adapter or a model; reads as drlora.runs.loading's `NamesModel`.

    Attributes:
        folder: what the user named.
        adapter: PEFT's name of the adapter's type, `DRLORA` or `LORA`; None for a whole model.
        model: the base model, or the model.
        tokenizer: the folder itself where one was saved in it; None for the model's.
        dtype: of the base model: the run's, or that of the export.
        data: of the run's recipe, or None.
        evaluation: of the run's recipe, or the default.
        quantise: how the base of an adapter is kept.
        tokens: settings of the run's trainer that decide which tokens of its data are learned.
        run: the run that an export says it was made from, also where it is gone; else None.
    """

    folder: Path
    adapter: str | None
    model: str
    tokenizer: str | None
    dtype: str
    trust_remote_code: bool
    data: DataSection | None = None
    evaluation: EvaluationSection = EvaluationSection()
    quantise: QuantiseSection = QuantiseSection()
    tokens: dict[str, Any] = field(default_factory=dict)
    run: Path | None = None


def find_source(folder: Path, model: str | None = None, trust_remote_code: bool = False) -> Source:
    """What is in `folder`.

    Args:
        folder: a run directory, or a folder with an adapter or a model.
        model: the base model, where the adapter does not say or it has moved.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        CheckpointError: if there is nothing, the run is unfinished, or the model is not known.
    """
    folder = Path(home(str(folder)))
    run = RunDir(folder)
    if run.config.is_file():
        recipe = run.read_config()
        if not run.adapter.is_file():
            raise CheckpointError(
                f"{folder} has no {ADAPTER_WEIGHTS}: the run is not finished. Continue it "
                f"with: {run.resume_command}"
            )
        read_adapter_config(folder, ADAPTER_WEIGHTS)
        tokenizer = _tokenizer_in(folder) or recipe.tokenizer
        source = Source(
            folder, "DRLORA", model or recipe.model, tokenizer, recipe.dtype, trust_remote_code
        )
        return _with_recipe(source, recipe)
    if (folder / "config.json").is_file() and not (folder / ADAPTER_CONFIG).is_file():
        return _of_export(Source(folder, None, str(folder), None, "auto", trust_remote_code))
    return _of_adapter(folder, model, trust_remote_code)


def _of_adapter(folder: Path, model: str | None, trust_remote_code: bool) -> Source:
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} is neither a run directory nor a saved adapter: it has no {name}."
            )
    said = read_adapter_config(folder, ADAPTER_WEIGHTS)
    kind = said.get("peft_type")
    if kind not in KINDS:
        raise CheckpointError(
            f"the adapter in {folder} is of type {shown(kind)}; {' and '.join(KINDS)} can be read."
        )
    record = _record(folder)
    base = model or _base(folder, said, record)
    tokenizer, dtype = _tokenizer_in(folder), _dtype(record)
    source = Source(
        folder, kind, base or "", tokenizer, dtype, trust_remote_code, quantise=_kept(said)
    )
    source = _of_export(source)
    if model:  # whatever the run has
        source = replace(source, model=model)
    if not source.model:
        raise CheckpointError(
            f"the adapter in {folder} does not say what its base model is; name it with --model."
        )
    return source


def _base(folder: Path, said: dict[str, Any], record: dict[str, Any]) -> str | None:
    """The base model of an adapter: what it names itself, then what its export's record names."""
    place = Place.of(folder, record.get("output"))
    names = [said.get("base_model_name_or_path"), record.get("base_model")]
    known = [place.find(name) for name in names if name and isinstance(name, str)]
    return next((name for name in known if not _is_lost(name)), next(iter(known), None))


def _is_lost(name: str) -> bool:
    """Whether `name` is a path from the root on, and nothing is there; a hub's name is not lost."""
    return Path(name).is_absolute() and not leads_somewhere(name)


def _of_export(source: Source) -> Source:
    """With the data and settings of the run that an export was made from, where it still is."""
    record = _record(source.folder)
    named = record.get("adapter")
    if not isinstance(named, str):
        return source
    place = Place.of(source.folder, record.get("output"))
    run = RunDir(Path(place.find(named)))
    source = replace(source, run=run.path)
    if not _is_run(run):
        return source
    recipe = run.read_config()
    if source.adapter is not None:
        is_the_runs = source.model in ("", run.stored_config().model) or _is_lost(source.model)
        source = replace(
            source,
            model=recipe.model if is_the_runs else source.model,
            tokenizer=source.tokenizer or recipe.tokenizer,
            dtype=recipe.dtype if source.dtype == "auto" else source.dtype,
        )
    return _with_recipe(source, recipe)


def _with_recipe(source: Source, recipe: Recipe) -> Source:
    """Also refuse trust on hearsay.

    A folder may come from somebody else; that its config.yaml trusts code is not enough.
    """
    if recipe.trust_remote_code and not source.trust_remote_code:
        raise CheckpointError(
            f"the run of {source.folder} was made with trust_remote_code: true; code that comes "
            f"with a model runs only where you say so too, with --trust-remote-code."
        )
    # What was merged has another base in it, and PEFT puts its LoRA on no packed experts.
    quantise = recipe.quantise if source.adapter == "DRLORA" else QuantiseSection()
    return replace(
        source,
        data=recipe.data,
        evaluation=recipe.evaluation,
        quantise=quantise,
        tokens={name: recipe.training[name] for name in LEARNED if name in recipe.training},
    )


def _record(folder: Path) -> dict[str, Any]:
    """What an export says of itself; empty for what is none."""
    path = folder / EXPORT_RECORD
    return read_json(path) if path.is_file() else {}


def _dtype(record: dict[str, Any]) -> str:
    """That the export was made and compared in."""
    found = record.get("dtype")
    return found if found in ("float32", "bfloat16", "float16") else "auto"


def _kept(said: dict[str, Any]) -> QuantiseSection:
    """How the base was kept that an adapter was trained on, as far as it says."""
    own = said.get("record")
    storage = own.get("storage") if isinstance(own, dict) else None
    return QuantiseSection(experts=storage) if storage in FORMATS else QuantiseSection()


def _tokenizer_in(folder: Path) -> str | None:
    return str(folder) if (folder / TOKENIZER_CONFIG_NAME).is_file() else None


def _is_run(run: RunDir) -> bool:
    try:
        return run.config.is_file()
    except (OSError, ValueError):  # no path at all
        return False
