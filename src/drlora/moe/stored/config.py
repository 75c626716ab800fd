"""`packed_config`: a checkpoint that is quantised already, loaded with its experts as they are.

    name = "a/Qwen3-30B-A3B-bnb-4bit"
    base = AutoModelForCausalLM.from_pretrained(name, config=drlora.packed_config(name))

transformers takes how a checkpoint is quantised from its configuration and lets no argument change
that, so it is the configuration that is changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from drlora.errors import ConfigError
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
