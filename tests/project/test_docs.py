"""The code of the README and the pages runs: commands through the CLI, Python page by page.

What is not run has a comment `<!-- not run: reason -->` before it, or is named in `ELSEWHERE`.
Run: make test ARGS=tests/project/test_docs.py
"""

import dataclasses
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
import yaml
from peft import PeftModel, get_peft_model
from registries import as_they_were
from safetensors.torch import save_file
from tiny import make_batch, make_model
from tiny_run import save_all, save_examples

import drlora
from drlora.cli.main import main
from drlora.planning.plan import METHOD

ROOT = Path(__file__).parents[2]
PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
# Fences of these languages are text; what is said in them is tested where the page says.
TEXT = {"", "text", "diff", "yaml", "bibtex", "console"}
# Code that other tests run.
ELSEWHERE = {"README.md": "tests/project/test_readme.py", "tutorial.md": "test_notebooks",
             "free-gpu.md": "test_notebooks"}  # fmt: skip
# Page -> how many of its blocks are marked as not run, with the reason beside them.
NOT_RUN_HERE = {
    "many-processes.md": 4, "methods.md": 1, "quantised.md": 1, "serving.md": 2, "training.md": 2,
    "using-it.md": 1,
}  # fmt: skip
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*\Z")
SHORT = ["training.max_steps=2", "training.warmup_steps=0", "adapter.r_init=3"]


def blocks(page: str) -> list[tuple[str, str, str]]:
    """(language, code, reason not to run it) of each fenced block."""
    text, found = (ROOT / page).read_text("utf-8"), []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        reason = NOT_RUN.search(text[: match.start()])
        found.append((match[1], match[2], reason[1] if reason else ""))
    return found


def commands(page: str) -> list[str]:
    """Lines of indented blocks that call drlora; what has brackets is a synopsis."""
    text = (ROOT / page).read_text("utf-8")
    return [
        line
        for line in re.findall(r"^ {4,8}(drlora [a-z].*)$", text, re.M)
        if not re.search(r"\[\w+[ =.]|\[-|\[RUN|\.\.\.\]", line)
    ]


@pytest.fixture(autouse=True)
def registries():
    with as_they_were():
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the files that the pages name: a model, data, recipes, finished runs."""
    folder = tmp_path_factory.mktemp("pages")
    save_all(folder / "path" / "to")
    shutil.move(folder / "path/to/recipe.yaml", folder / "tiny.yaml")
    recipe = yaml.safe_load((folder / "tiny.yaml").read_text())
    for name in ("own-data", "embedded"):
        recipe["output_dir"] = f"runs/{name}"
        recipe["data"]["test"] = recipe["data"]["eval"]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    shutil.copytree(
        ROOT / "experiments",
        folder / "experiments",
        ignore=lambda d, n: [
            name
            for name in n
            if name in ("results", "tasks", "pretrain", "young_rows", "__pycache__")
        ],
    )
    save_examples(folder / "held-out.jsonl", 6)
    rule = next(code for _, code, _ in blocks("docs/extending.md") if "def sharp" in code)
    (folder / "my_rules.py").write_text(rule.partition("\n\n\ncheck_saliency")[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("own-data", "embedded"):
            assert main(["train", f"{name}.yaml", *SHORT]) == 0
        export = ["export", "runs/own-data", "-o"]
        for name in ("peft", "merged"):
            assert main([*export, f"out/{name}", "--format", name]) == 0
    return folder


NAMES = {
    "allenai/OLMoE-1B-7B-0924": "path/to/model",
    "RECIPE.yaml": "own-data.yaml",
    "MODEL": "path/to/model",
    "RUN": "runs/own-data",
}


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}" for name in PAGES)])
def test_commands(page, world, tmp_path, monkeypatch, capsys):
    """Training and comparing stop before the weights; the pages' own numbers of steps stay."""
    monkeypatch.setattr("sys.stdin", io.StringIO())  # of a chat
    monkeypatch.chdir(world)
    for line in commands(page):
        words = [NAMES.get(word, word) for word in shlex.split(line, comments=True)[1:]]
        verb = words[0]
        if verb == "init" and "--list" not in words:
            words = [*words, "-o", str(tmp_path / f"new-{len(list(tmp_path.iterdir()))}.yaml")]
        if verb == "plan":  # nothing is timed or trained
            new = str(tmp_path / f"new-{len(list(tmp_path.iterdir()))}.yaml")
            words = [word for word in words if word != "--range-test"]
            words = [*words, "--no-timing", "-o", new]
        if verb in ("train", "compare") and "--resume" not in words:
            words += [] if "--dry-run" in words else ["--dry-run"]
            if verb == "train":
                words.append(f"output_dir={tmp_path / 'new'}")
        elif "--resume" in words:
            assert main(words) == 2  # the world's runs are finished
            assert "finished" in capsys.readouterr().err
            continue
        if verb == "serve":  # no engine is started, and none need be here
            engine = tmp_path / "bin" / "vllm"
            engine.parent.mkdir(exist_ok=True)
            engine.touch(mode=0o755)
            monkeypatch.setenv("PATH", str(engine.parent), prepend=os.pathsep)
            words = [word for word in words if word != "--dry-run"] + ["--dry-run"]
        if verb == "export":
            words[words.index("-o") + 1] = str(tmp_path / str(len(list(tmp_path.iterdir()))))
        assert main(words) == 0, (line, capsys.readouterr().err)


class StopEarly(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 2


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the pages' code takes for granted."""
    make_trainer = transformers.Trainer.__init__

    def new_trainer(trainer, *args, **kwargs):
        make_trainer(trainer, *args, **kwargs)
        trainer.add_callback(StopEarly())

    monkeypatch.setattr(transformers.Trainer, "__init__", new_trainer)
    monkeypatch.chdir(tmp_path)
    config = drlora.DrLoraConfig(r_init=8, r_target=16, r_max=32)
    model = get_peft_model(make_model(), config)
    (tmp_path / "ranks.json").write_text(json.dumps(drlora.rank_map(model)))
    rows = make_batch(rows=8)
    data = [{key: value[i] for key, value in rows.items()} for i in range(8)]
    arguments = transformers.TrainingArguments("out", max_steps=8, use_cpu=True, report_to="none")
    found = {name: getattr(drlora, name) for name in drlora.__all__}
    found |= dict(drlora=drlora, torch=torch, safetensors=safetensors)
    return found | dict(
        model=model, config=config, data=data, n=3750, total_steps=3750,
        batches=[make_batch(seed) for seed in range(4)], folder=tmp_path, arguments=arguments,
        Trainer=transformers.Trainer, PeftModel=PeftModel, get_peft_model=get_peft_model,
        Tensor=torch.Tensor, Signals=object, Family=object, save_file=save_file, step=2,
        dynamics=drlora.RankDynamics(model, 3750),
    )  # fmt: skip


def refresh(names):
    """Models that no block before has wrapped or trained, and an optimizer."""
    names["model"] = get_peft_model(make_model(), names["config"])
    trained = [p for p in names["model"].parameters() if p.requires_grad]
    names["base_model"] = make_model()
    names["optimizer"] = torch.optim.AdamW(trained)
    names["schedule"] = torch.optim.lr_scheduler.ConstantLR(names["optimizer"])


@pytest.mark.parametrize("page", PAGES)
def test_python(page, names):
    """Each block runs, in the order of the page."""
    for language, code, reason in blocks(f"docs/{page}"):
        assert language in TEXT | {"python", "bash", "sh"}, (page, language)
        if language == "python" and not reason and page not in ELSEWHERE:
            refresh(names)
            exec(compile(code, page, "exec"), names)
        assert language not in ("bash", "sh") or reason, (page, code)
        if language == "python":
            compile(code.replace(", ...)", ")"), page, "exec")


@pytest.fixture
def recipe_keys(monkeypatch):
    """tools/make_recipe_keys.py"""
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("make_recipe_keys")


def test_the_page_of_recipe_keys_is_what_the_code_says(recipe_keys):
    text = recipe_keys.PAGE.read_text("utf-8")
    assert text == recipe_keys.with_keys(text), "python tools/make_recipe_keys.py"
    keys = re.findall(r"^\| `([\w.]+)` \|", text, re.M)
    assert len(keys) == len(set(keys)) > 60
    known = set(fields_of(recipe_keys))
    assert known <= set(keys)


def fields_of(recipe_keys):
    """Every key that a recipe can have, but for those of `training`."""
    sections = {"data": recipe_keys.DataSection, "evaluation": recipe_keys.EvaluationSection}
    for field in dataclasses.fields(recipe_keys.Recipe):
        if field.name not in recipe_keys.SECTIONS:
            yield field.name
    for section, kind in sections.items():
        yield from (f"{section}.{field.name}" for field in dataclasses.fields(kind))
    yield from (f"adapter.{name}" for name in (*recipe_keys.adapter_settings(), "preset"))


@pytest.mark.parametrize("name", ["tutorial", "free-gpu"])
def test_notebooks(name, tmp_path, monkeypatch):
    """The cells run, and the notebook is the page."""
    spec = importlib.util.spec_from_file_location("make_tutorial", ROOT / "tools/make_tutorial.py")
    assert spec is not None and spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    page = ROOT / f"docs/{name}.md"
    assert page in maker.PAGES
    cells = maker.cells_of(page.read_text("utf-8"))
    monkeypatch.chdir(tmp_path)
    printed = maker.run(cells)
    if name == "tutorial":
        assert "mean 8.0" in printed[4] and "loaded: True\nmerged: True" in printed[5]
    else:
        assert "The yellow dog is | an animal" in printed[4] and "own.html" in printed[5]
    kept = json.loads(page.with_suffix(".ipynb").read_text("utf-8"))
    sources = [(cell["cell_type"], "".join(cell["source"])) for cell in kept["cells"]]
    assert sources == cells
    outputs = [cell["outputs"] for cell in kept["cells"] if cell["cell_type"] == "code"]
    shown = ["".join(out[0]["text"]) if out else "" for out in outputs]
    assert shown[0] == printed[0] and len(shown) == len(printed)


def test_every_verb_has_a_section_and_every_page_is_in_the_site():
    from drlora.cli.arguments import VERBS

    page = (ROOT / "docs/command-line.md").read_text("utf-8")
    assert re.findall(r"^## drlora (\w+)$", page, re.M) == list(VERBS)
    nav = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert all(f": {name}" in nav or f"- {name}" in nav for name in PAGES)


@pytest.mark.parametrize("tool", ["make_llms", "make_worked_runs"])
def test_what_tools_make_of_other_files_is_as_they_make_it_now(tool):
    done = subprocess.run([sys.executable, ROOT / f"tools/{tool}.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, f"run: python tools/{tool}.py"


def test_extras_and_the_workflow_name_what_there_is():
    """Every extra that a page names exists; the workflow calls verbs of the Makefile."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    pages = "".join((ROOT / f"docs/{name}").read_text("utf-8") for name in PAGES)
    assert set(re.findall(r"drlora\[(\w+)\]", pages)) <= set(extras)
    workflow = (ROOT / ".github/workflows/test.yml").read_text("utf-8")
    jobs = yaml.safe_load(workflow)["jobs"]
    assert jobs["gpu"]["if"] == "vars.GPU_RUNNER == 'true'"
    assert set(jobs["test"]["strategy"]["matrix"]["python"]) == {"3.11", "3.12", "3.13"}
    verbs = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
    assert set(re.findall(r"run: make ([a-z-]+)", workflow)) <= set(verbs)


def test_code_is_found():
    """What collects the code does not miss it."""
    pages = ["README.md", *(f"docs/{name}" for name in PAGES)]
    assert sum(len(commands(page)) for page in pages) >= 35
    python = [block for page in pages for block in blocks(page) if block[0] == "python"]
    assert len(python) >= 20
    marked = {name: [b for b in blocks(f"docs/{name}") if b[2]] for name in PAGES}
    counts = {name: len(found) for name, found in marked.items() if found}
    assert counts == {name: count for name, count in NOT_RUN_HERE.items() if name in PAGES}


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}" for name in PAGES)])
def test_yaml_and_other_commands(page):
    """YAML can be read; what make and python are asked for exists."""
    for language, code, _ in blocks(page):
        if language == "yaml":
            assert yaml.safe_load(code), (page, code)
    text = (ROOT / page).read_text("utf-8")
    verbs = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
    for verb in re.findall(r"^ {4,8}make ([a-z]+)", text, re.M):
        assert verb in verbs, (page, verb)
    for script in re.findall(r"^ {4,8}(?:\S+=\S+ )*python ([\w/.-]+\.py)", text, re.M):
        assert (ROOT / script).is_file(), (page, script)
    for module in re.findall(r"^ {4,8}(?:\S+=\S+ )*python -m (\S+)", text, re.M):
        assert importlib.util.find_spec(module), (page, module)


def test_every_page_and_recipe_says_the_same_of_which_method():
    names = ["README.md", *(f"docs/{n}.md" for n in ("index", "evidence", "methods", "planning"))]
    names += [f"src/drlora/recipes/{n}.yaml" for n in ("own-data", "embedded", "qwen3-30b-a3b")]
    for name in names:
        text = (ROOT / name).read_text("utf-8").replace("\n# ", "\n").replace("`", "")
        assert " ".join(METHOD.split()) in " ".join(text.split()), name
