"""Which engines read an export, what each needs, and how that is known: one table.

Each row is an engine at a version. `seen` says what was really run; where nothing was, the row says
so. The pages, the plan, the README of an export and `drlora verify` take what they say from here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from drlora.io.run_files import GGUF_ADAPTER

LAYOUTS = ("peft", "per-expert", "mlx", "gguf", "sglang", "merged")
# What vLLM takes for --max-lora-rank.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Model types whose router vLLM computes inside the experts, where LoRA on it is not found.
VLLM_ROUTERS = ("qwen3_moe",)
# Families of which an engine was given adapters of ours.
TRIED = ("olmoe", "qwen3_moe", "mixtral", "qwen2_moe", "gpt_oss")
# Model types whose checkpoint calls the experts otherwise than transformers' modules.
RENAMED = ("mixtral", "minimax", "minimax_m2", "phimoe")


@dataclass(frozen=True)
class Facts:
    """What decides who reads an adapter or a model.

    Attributes:
        layout: one of `LAYOUTS`: 3-D LoRA on target_parameters, 2-D keys, the own forms of mlx-lm,
            llama.cpp and SGLang, or whole weights.
        model_type: of the base's configuration.
        rank: the one rank of all; 0 if merged.
        has_modules: whether modules were trained in full (`modules_to_save`).
        has_router_lora: whether there is LoRA on routers.
        peft_loads: whether PEFT itself loads such a folder.
    """

    layout: str
    model_type: str
    rank: int = 0
    has_modules: bool = False
    has_router_lora: bool = False
    peft_loads: bool = True


@dataclass(frozen=True)
class Reading:
    """What an engine does with an export.

    Attributes:
        engine: its name.
        version: that was looked at.
        reads: whether it reads it as it is; None where nobody tried.
        why: what it needs, or what it does instead.
        command: how to serve it; "" if there is none.
        seen: how this is known.
    """

    engine: str
    version: str
    reads: bool | None
    why: str
    command: str
    seen: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        says = {True: "reads it", False: "does not read it", None: "not tried"}[self.reads]
        return f"{self.engine} {self.version}: {says}{'; ' if self.why else ''}{self.why}"


_Verdict = tuple[bool | None, str, str]
_REFUSED_MODULES = "refuses modules trained in full (modules_to_save)"
_NO_3D = "refuses LoRA on stacked experts: use per-expert"


def vllm_rank(rank: int) -> int | None:
    """The smallest --max-lora-rank that is enough; None if vLLM has none."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def _peft(facts: Facts) -> _Verdict:
    if facts.layout == "merged":
        return True, "transformers alone", ""
    if not facts.peft_loads:
        return False, f"PEFT does not load per-expert keys of {facts.model_type!r}", ""
    return True, "PeftModel.from_pretrained", ""


def _llama_cpp(facts: Facts) -> _Verdict:
    needs = "its converter needs sentencepiece" if facts.model_type == "mixtral" else ""
    base = "python convert_hf_to_gguf.py {model} --outfile base.gguf"
    if facts.layout == "merged" and facts.model_type == "gpt_oss":
        why = "serves it, with logits that are off as they are of the base"
        return None, why, base.format(model="THIS_FOLDER")
    if facts.layout == "merged":
        return True, needs, base.format(model="THIS_FOLDER")
    if facts.layout == "peft":
        return False, _NO_3D, ""
    if facts.has_modules:
        return False, _REFUSED_MODULES, ""
    base = base.format(model="BASE_MODEL")
    if facts.layout == "gguf":
        return True, needs, f"{base}; llama-server -m base.gguf --lora THIS_FOLDER/{GGUF_ADAPTER}"
    convert = "python convert_lora_to_gguf.py --base BASE_MODEL --outfile a.gguf THIS_FOLDER"
    return True, needs, f"{base}; {convert}; llama-server -m base.gguf --lora a.gguf"


def _vllm(facts: Facts) -> _Verdict:
    if facts.layout == "merged":
        return True, "", "vllm serve THIS_FOLDER"
    rank = vllm_rank(facts.rank)
    if facts.has_modules:
        return False, _REFUSED_MODULES, ""
    if facts.has_router_lora and facts.model_type in VLLM_ROUTERS:
        return False, "leaves LoRA on routers of this model out without a word: use merged", ""
    if rank is None:
        return False, f"its largest rank is {VLLM_RANKS[-1]}, and this has {facts.rank}", ""
    serve = f"vllm serve BASE_MODEL --enable-lora --max-lora-rank {rank}"
    if facts.layout == "per-expert":
        return True, f"--max-lora-rank {rank}", f"{serve} --lora-modules a=THIS_FOLDER"
    if facts.model_type == "gpt_oss":
        return True, f"--max-lora-rank {rank}", f"{serve} --lora-modules a=THIS_FOLDER"
    if facts.model_type in RENAMED:
        ignored = "accepts it and leaves the experts as the base has them: they have other names"
        return False, f"{ignored}; use per-expert", ""
    flag, module = (
        "--enable-mixed-moe-lora-format",
        ("""'{"name":"a","path":"THIS_FOLDER","is_3d_lora_weight":true}'"""),
    )
    return True, f"{flag}, is_3d_lora_weight", f"{serve} {flag} --lora-modules {module}"


def _sglang(facts: Facts) -> _Verdict:
    if facts.layout == "merged":
        return None, "", "python -m sglang.launch_server --model-path THIS_FOLDER"
    if facts.layout == "peft":
        return False, "finds no target_modules: use sglang or per-expert", ""
    if facts.has_modules:
        return False, _REFUSED_MODULES, ""
    if facts.has_router_lora:
        return False, "has no LoRA on routers: use merged", ""
    if facts.layout == "per-expert" and facts.model_type == "mixtral":
        return False, "does not know the names w1, w2, w3 in target_modules: use sglang", ""
    serve = "python -m sglang.launch_server --model-path BASE_MODEL --lora-paths a=THIS_FOLDER"
    return True, "", serve


def _mistral_rs(facts: Facts) -> _Verdict:
    if facts.model_type not in ("qwen3_moe", "mixtral"):
        return None, "has no OLMoE" if facts.model_type == "olmoe" else "", ""
    if facts.layout == "merged":
        return True, "where config.json is in the form of the hub (rope_theta)", ""
    if facts.layout == "peft":
        return False, "refuses it, or leaves the experts out beside other LoRA: use per-expert", ""
    if facts.has_modules:
        return False, _REFUSED_MODULES, ""
    return True, "", ""


def _mlx(facts: Facts) -> _Verdict:
    if facts.layout == "merged" and facts.model_type == "gpt_oss":
        return False, "does not read its experts in 16 or 32 bits, the base's neither", ""
    if facts.layout == "merged":
        return (
            True,
            "where config.json is in the form of the hub (rope_theta)",
            ("mlx_lm.server --model THIS_FOLDER"),
        )
    if facts.layout == "mlx":
        return True, "", "mlx_lm.server --model BASE_MODEL --adapter-path THIS_FOLDER"
    return False, "reads adapters of its own format alone: use mlx", ""


def _transformers_serve(facts: Facts) -> _Verdict:
    if facts.layout == "merged":
        return True, "", "transformers serve THIS_FOLDER"
    return False, "asks for a tokenizer and a whole model: use merged", ""


# Engine, version, what was run, the rule.
ENGINES: tuple[tuple[str, str, str, Callable[[Facts], _Verdict]], ...] = (
    ("PEFT", "0.21.2 with transformers 5.23", "logits compared", _peft),
    ("llama.cpp", "11434", "logits compared, on a CPU", _llama_cpp),
    ("vLLM", "0.32.0", "logits compared, on a CPU, its expert kernel replaced", _vllm),
    ("SGLang", "0.5.23", "its loader run, buffers compared", _sglang),
    ("mistral.rs", "0.9.5", "greedy text compared, on a CPU", _mistral_rs),
    ("mlx-lm", "0.32.2", "logits compared, on a CPU", _mlx),
    ("transformers serve", "5.19", "answers looked at", _transformers_serve),
)


# Layouts that one engine reads.
_OWN = {"mlx": "mlx-lm", "gguf": "llama.cpp", "sglang": "SGLang"}


def readings(facts: Facts) -> list[Reading]:
    """What each engine does with an adapter or a model of which this is known."""
    found = []
    for engine, version, seen, rule in ENGINES:
        reads, why, command = rule(facts)
        if _OWN.get(facts.layout, engine) != engine:
            reads, why, command = False, f"this is a format of {_OWN[facts.layout]}'s own", ""
        if facts.model_type not in TRIED and engine != "PEFT":
            reads = None if reads else reads
            why = f"{why}{'; ' if why else ''}the rule of other families, not tried on this one"
            seen = "by the rule of other families"
        found.append(Reading(engine, version, reads, why, command, seen))
    return found
