"""`packed_config`: a checkpoint that is quantised already, loaded with its experts as they are.

    name = "a/Qwen3-30B-A3B-bnb-4bit"
    base = AutoModelForCausalLM.from_pretrained(name, config=drlora.packed_config(name))

transformers takes how a checkpoint is quantised from its configuration and lets no argument change
that, so it is the configuration that is changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from drlora.errors import ConfigError
from drlora.moe.loading import QuantisedExperts
from drlora.moe.packing import places_of
from drlora.moe.stored.base import FORMS, StoredForm
from drlora.moe.stored.refused import method_of, refuse_unknown
from drlora.ops.storage.packed import packed_format

METHOD = "drlora_stored"


def packed_config(
    model: str | PreTrainedConfig, storage: str | None = None, **kwargs: Any
) -> PreTrainedConfig:
    """The configuration with which a quantised checkpoint keeps its experts in few bits.

    Args:
        model: a folder or a name of the hub, or its configuration, which is changed.
        storage: what experts are kept as: `nf4`, `nf4-nested`, `int8`, `mxfp4` or `fp8`. Left out,
            as they are in the checkpoint, to the byte. Another than that, their numbers are
            rounded twice. To be given for compressed-tensors.
        kwargs: for `AutoConfig.from_pretrained`.

    Raises:
        ConfigError: if the checkpoint is not quantised, or in a way that cannot be kept.
    """
    config = AutoConfig.from_pretrained(model, **kwargs) if isinstance(model, str) else model
    name = model if isinstance(model, str) else config.name_or_path or type(config).__name__
    settings = stored_settings(config)
    if settings is None:
        raise ConfigError(
            f"the checkpoint {name} is not quantised; pack its experts while it is loaded, with "
            f"quantization_config=drlora.QuantisedExperts({storage or 'nf4'!r})."
        )
    refuse_unknown(name, settings)
    changed: Any = config
    changed.quantization_config = StoredExperts(storage, settings).to_dict()
    return config


def loading_settings(
    name: str, config: QuantisedExperts | None = None, **kwargs: Any
) -> dict[str, Any]:
    """What `from_pretrained(name, ...)` is given to keep experts in few bits.

    Of a checkpoint that is not quantised, that is `config`. Of one that is, experts stay as they
    are, or are packed again as `config` says; lists of experts are left to transformers.

    Args:
        name: a folder or a name of the hub.
        config: how experts are to be kept, or None.
        kwargs: for `AutoConfig.from_pretrained`.

    Raises:
        ConfigError: if the checkpoint is quantised in a way that cannot be kept.
    """
    architecture = AutoConfig.from_pretrained(name, **kwargs)
    settings = stored_settings(architecture)
    if settings is None:
        return {} if config is None else {"quantization_config": config}
    refuse_unknown(name, settings)
    if config is not None and config.rest:
        raise ConfigError(
            f"rest={config.rest!r} has no effect on {name}, which is quantised already; leave it "
            f"out, or load the model's 16-bit checkpoint."
        )
    if not _has_stacks(architecture, **kwargs):
        return {}
    form = FORMS[method_of(settings)](settings)
    if form.is_decoded and config is None:
        return {}
    changed = packed_config(architecture, config.storage if config is not None else None)
    return {"config": changed}


def _has_stacks(architecture: PreTrainedConfig, **kwargs: Any) -> bool:
    """Whether the model has matrices of all experts, that packed ones can take the places of."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(architecture, **kwargs)
    places = [place for module in skeleton.modules() for place in places_of(module)]
    return any(not place.flat_experts for place in places)


def stored_settings(config: PreTrainedConfig) -> dict[str, Any] | None:
    """`quantization_config` of a checkpoint, or of the language model in it; None without one."""
    for part in (config, config.get_text_config(decoder=True)):
        found = getattr(part, "quantization_config", None)
        if found is not None:
            return dict(found) if isinstance(found, Mapping) else found.to_dict()
    return None


@register_quantization_config(METHOD)
class StoredExperts(QuantizationConfigMixin):
    """What `packed_config` puts in the place of a checkpoint's `quantization_config`.

    Args:
        storage: what experts are kept as; None for as they are.
        settings: the checkpoint's own `quantization_config`.

    Raises:
        ConfigError: if there is no such storage, or the checkpoint is of a variant that is not
            known.
    """

    def __init__(self, storage: str | None, settings: Mapping[str, Any], **kwargs: Any) -> None:
        form = FORMS[method_of(settings)](settings)
        if form.is_decoded and storage is None:
            raise ConfigError(
                f"experts in {form.method} cannot be kept as they are; name the storage in which "
                f"they are packed again, for example packed_config(name, 'nf4')."
            )
        self.quant_method: Any = METHOD
        self.storage = packed_format(storage or form.storage).name
        self.settings = dict(settings)

    @property
    def form(self) -> StoredForm:
        """How the checkpoint keeps its matrices."""
        return FORMS[method_of(self.settings)](self.settings)
