"""lm-eval on a run's exports, offline. Skipped where lm-eval is missing: it brings 35 packages.

Run: .venv/bin/python -m pip install lm-eval==0.4.13, then
make test ARGS=tests/evaluation/test_lm_eval.py
"""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from tiny_run import save_all, save_model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from drlora.cli.main import main

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

TASK = """
task: reversed_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{completion}}}}"
target_delimiter: ""
metric_list: [{{metric: perplexity}}]
"""


def mean_loss(model, tokenizer, data):
    """Mean over examples of the summed negative log-likelihood of the completion."""
    losses = []
    for line in data.read_text().splitlines():
        record = json.loads(line)
        prompt, answer = (tokenizer.encode(record[key]) for key in ("prompt", "completion"))
        with torch.no_grad():
            logits_LV = model.eval()(torch.tensor([prompt + answer])).logits[0, :-1]
        answer_logits_NV, targets_N = logits_LV[len(prompt) - 1 :], torch.tensor(answer)
        losses.append(F.cross_entropy(answer_logits_NV, targets_N, reduction="sum").item())
    return sum(losses) / len(losses)


def test_exports_give_the_adapters_perplexity(tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="pip install lm-eval==0.4.13")
    tasks = pytest.importorskip("lm_eval.tasks")
    recipe = save_all(tmp_path)
    save_model_folder(tmp_path / "model", vocab_size=31)  # as many as the tokenizer has
    assert main(["train", str(recipe)]) == 0
    run, base, data = tmp_path / "run", tmp_path / "model", tmp_path / "eval.jsonl"
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run)
    wanted = math.exp(mean_loss(adapter, AutoTokenizer.from_pretrained(base), data))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(TASK.format(data=data))
    manager = tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    for format in ("peft", "per-expert", "merged"):
        out = tmp_path / format
        assert main(["export", str(run), "--format", format, "-o", str(out)]) == 0
        source = f"pretrained={out}" if format == "merged" else f"pretrained={base},peft={out}"
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"{source},dtype=float32",
            tasks=["reversed_words"],
            task_manager=manager,
            device="cpu",
            bootstrap_iters=0,
        )
        perplexity = found["results"]["reversed_words"]["perplexity,none"]
        assert perplexity == pytest.approx(wanted, rel=1e-4)
