"""Every MoE model class that is tested, and a tiny random model of each."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tiny_config import tiny_config

# Model classes that follow transformers' experts interface, flags and all.
INTERFACE = """
    AfmoeForCausalLM AriaForConditionalGeneration AriaTextForCausalLM AXK1ForCausalLM
    AXK2ForCausalLM BailingHybridForCausalLM BeamForCausalLM Cohere2MoeForCausalLM
    DeepseekOcr2ForConditionalGeneration DeepseekV2ForCausalLM DeepseekV32ForCausalLM
    DeepseekV3ForCausalLM DeepseekV4ForCausalLM Dots1ForCausalLM Dots3NoteForCausalLM
    Ernie4_5_MoeForCausalLM ExaoneMoeForCausalLM
    FlexOlmoForCausalLM FlintForCausalLM Gemma4ForConditionalGeneration Glm4MoeForCausalLM
    Glm4MoeLiteForCausalLM Glm4vMoeForConditionalGeneration Glm5NextForConditionalGeneration
    GlmMoeDsaForCausalLM GptOssForCausalLM GraniteMoeForCausalLM GraniteMoeHybridForCausalLM
    GraniteMoeSharedForCausalLM GraniteMoeSWAForCausalLM HunYuanMoEV1ForCausalLM HYV3ForCausalLM
    HYV4ForCausalLM Inkling2ForCausalLM InklingForCausalLM JambaForCausalLM
    KimiLinearForCausalLM Kolibri1ForCausalLM LagunaForCausalLM Lfm2MoeForCausalLM
    MellumForCausalLM MiMoV2FlashForCausalLM MiniMaxForCausalLM MiniMaxM2ForCausalLM
    MiniMaxM3VLForCausalLM Mistral4ForCausalLM MistralLarge4ForConditionalGeneration
    MixtralForCausalLM MuseSparkForConditionalGeneration NemotronHForCausalLM OlmoeForCausalLM
    OpenAIPrivacyFilterForTokenClassification PhimoeForCausalLM Qwen2MoeForCausalLM
    Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration Qwen3MoeForCausalLM
    Qwen3NextForCausalLM Qwen3OmniMoeThinkerForConditionalGeneration
    Qwen3VLMoeForConditionalGeneration Qwen4ExpForCausalLM SolarOpenForCausalLM
    UnlimitedOcrForConditionalGeneration ZayaForCausalLM
""".split()  # noqa: SIM905


# Those that do not, and so have a file in drlora.moe.families.
EXCEPTIONS = """
    DbrxForCausalLM JetMoeForCausalLM Llama4ForCausalLM Llama4ForConditionalGeneration
    LongcatFlashForCausalLM Step3p7ForConditionalGeneration
""".split()  # noqa: SIM905


ALL_CLASSES = INTERFACE + EXCEPTIONS


DOCS = Path(__file__).parents[1] / "docs"


SETTINGS = dict(r_init=2, r_target=4, r_max=8, lora_alpha=8.0, p_grow=0.5)


def make_base(class_name):
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = model_class(tiny_config(model_class.config_class)).requires_grad_(False)
    # Larger weights than the default 0.02, so that experts and routers matter to the output.
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=0.15)
    for module in model.modules():
        if getattr(module, "config", None) is not None:
            module.config._experts_implementation = "eager"
    return model.eval()
