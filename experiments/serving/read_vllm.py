"""vLLM's logits on a CPU: python read_vllm.py JOB.json, in vLLM's environment; see compare.py.

Logits are taken after every prefix of a prompt: `prompt_logprobs` with LoRA does not run on a CPU.
"""

from __future__ import annotations

import json
import os
import sys

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
)
VOCABULARY = 4096


def main() -> None:
    """Read the job, run the engine, write logits and greedy tokens."""
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    import numpy as np
    import vllm_experts
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    settings, request = {}, None
    if job["adapter"]:
        vllm_experts.install()
        is_3d = job["format"] == "peft"
        settings = {"enable_lora": True, "max_loras": 1, "max_lora_rank": job["vllm_rank"]}
        if is_3d and job["family"] != "gpt_oss":
            settings["enable_mixed_moe_lora_format"] = True
        request = LoRARequest("a", 1, job["adapter"], is_3d_lora_weight=is_3d)
    engine = LLM(
        model=job["model"], dtype="float32", max_model_len=256, enforce_eager=True,
        max_logprobs=VOCABULARY, logprobs_mode="raw_logits", **settings,
    )  # fmt: skip

    def asked(prompts: list[list[int]], how: SamplingParams) -> list:
        given = [{"prompt_token_ids": ids} for ids in prompts]
        return engine.generate(given, how, lora_request=request, use_tqdm=False)

    once = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, detokenize=False)
    prefixes = [ids[:end] for ids in job["ids"] for end in range(1, len(ids) + 1)]
    tables = [answer.outputs[0].logprobs[0] for answer in asked(prefixes, once)]
    logits = np.array(
        [[table[token].logprob for token in range(VOCABULARY)] for table in tables], np.float32
    )
    on = SamplingParams(
        temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, detokenize=False
    )
    greedy = [list(answer.outputs[0].token_ids) for answer in asked(job["ids"], on)]
    np.savez(job["out"], logits=logits, greedy=np.array(greedy))


if __name__ == "__main__":
    main()
