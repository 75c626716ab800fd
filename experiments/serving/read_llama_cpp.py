"""llama.cpp's logits on a CPU: python read_llama_cpp.py JOB.json; see compare.py.

The model and the adapter are converted by llama.cpp's own scripts, as a user does, into float32.
One thing is taught to them: how the embedded tokenizer splits texts, which they do not know by its
hash. Prompts are token ids here, so nothing depends on it.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np

HOME = Path(sys.prefix) / "src" / "llama.cpp"
SPLITS_LIKE = "smollm"  # digits one by one, then GPT-2's bytes
CONVERT = "--convert"


def convert(script: str, words: list[str]) -> None:
    """Run one of llama.cpp's converters in this process."""
    sys.path[:0] = [str(HOME), str(HOME / "gguf-py")]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: SPLITS_LIKE
    sys.argv = [str(HOME / script), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")


def converted(script: str, source: str, to: Path, *more: str) -> Path:
    """The GGUF file of a folder, converted in a process of its own where it is missing."""
    if not to.is_file():
        command = [sys.executable, __file__, CONVERT, script, "--outtype", "f32"]
        subprocess.run([*command, "--outfile", str(to), *more, source], check=True)
    return to


def main() -> None:
    """Read the job, convert, run the engine, write logits and greedy tokens."""
    if sys.argv[1] == CONVERT:
        convert(sys.argv[2], sys.argv[3:])
        return
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    out = Path(job["out"])
    gguf = out.parent / f"{Path(job['model']).name}.gguf"
    words = [str(converted("convert_hf_to_gguf.py", job["model"], gguf))]
    prompts, raw = out.with_suffix(".txt"), out.with_suffix(".bin")
    prompts.write_text("".join(" ".join(map(str, ids)) + "\n" for ids in job["ids"]), "utf-8")
    words += [str(prompts), str(raw), str(job["new_tokens"])]
    if job["adapter"]:
        lora = out.with_suffix(".lora.gguf")
        base = ("--base", job["model"])
        words.append(str(converted("convert_lora_to_gguf.py", job["adapter"], lora, *base)))
    program = Path(sys.prefix) / "bin" / "llama_logits"
    done = subprocess.run([program, *words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"llama.cpp ended with {done.returncode}")
    greedy = [list(map(int, line.split())) for line in done.stdout.splitlines()]
    positions = sum(map(len, job["ids"]))
    logits = np.fromfile(raw, np.float32).reshape(positions, -1)
    np.savez(out, logits=logits, greedy=np.array(greedy))


if __name__ == "__main__":
    main()
