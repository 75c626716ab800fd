"""What importing drlora costs, and that PEFT knows its method whatever is imported first.

Run: make test ARGS=tests/project/test_imports.py
"""

import json
import pickle
import subprocess
import sys

import pytest
from peft import get_peft_model
from tiny import make_model

import drlora
from drlora.cli.arguments import VERBS

HEAVY = ("torch", "transformers", "peft", "datasets", "matplotlib", "numpy")
LIGHT = """
import json, sys, time
from drlora.cli.main import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as ended:
        assert ended.code == 0, words
print([name for name in sys.argv[2:] if name in sys.modules], time.process_time())
"""


def in_a_fresh_process(code, *words):
    """What `python -c CODE WORDS` prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_version_completion_and_lists_import_nothing_heavy():
    """Of all of them together at most half a second of a processor is taken."""
    asked = [
        ["--help"],
        ["--version"],
        *([verb, "--help"] for verb in VERBS),
        [],
        ["init", "--list"],
    ]
    asked.append(["--print-completion", "bash"])
    said = in_a_fresh_process(LIGHT, json.dumps(asked), *HEAVY)
    heavy, _, seconds = said.splitlines()[-1].rpartition(" ")
    assert heavy == "[]"
    assert float(seconds) < 0.5


def test_importing_drlora_imports_nothing_heavy():
    code = "import sys, drlora, drlora.embedded, drlora.io\n"
    code += "print([name for name in sys.argv[1:] if name in sys.modules])"
    assert in_a_fresh_process(code, *HEAVY).strip() == "[]"


KNOWS = """
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from drlora.config.peft_type import AFTER_SAVE
assert "DRLORA" in [kind.value for kind in PEFT_TYPE_TO_TUNER_MAPPING]
assert "DRLORA" in [kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING]
assert hasattr(PeftModel.create_or_update_model_card, "__wrapped__") and len(AFTER_SAVE) == 1
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "drlora.registration"]
"""
LOADED = """
from drlora.adapter.layer import DrLoraExperts
assert any(isinstance(module, DrLoraExperts) for module in model.modules())
"""
# What a program does in a process that has torch and transformers, but neither PEFT nor drlora.
PROGRAMS = {
    "drlora then peft": "import drlora, peft" + KNOWS,
    "peft then drlora": "import peft, drlora" + KNOWS,
    "a part of peft": "import drlora, peft.tuners.lora" + KNOWS,
    "a part of drlora": "import drlora.ops.parts, drlora.config.adapter" + KNOWS,
    "drlora's own use of peft": "import drlora\ndrlora.DrLoraConfig" + KNOWS,
    "a wing as an attribute": "import drlora\ndrlora.runs, drlora.config.DrLoraConfig" + KNOWS,
    "the runs": "import drlora.compare.worker" + KNOWS,
    "transformers' Trainer": "import drlora\nfrom transformers import Trainer" + KNOWS,
    "transformers' arguments": "import drlora\nfrom transformers import TrainingArguments" + KNOWS,
    "an import that failed": """
import drlora
sys.modules["peft.utils"] = None
try:
    import peft
except ImportError:
    del sys.modules["peft.utils"]
else:
    assert False
import peft
""" + KNOWS,
    "unpickling": "config = pickle.loads(CONFIG)\nassert config.r_max == 5" + KNOWS,
    "load_adapter": """
import drlora
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(FOLDER + "/base")
model.load_adapter(FOLDER + "/adapter")
""" + LOADED,
    "AutoPeftModel": """
import drlora
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(FOLDER + "/adapter")
""" + LOADED,
}  # fmt: skip
FORKS = """
import json, os, pickle, sys, traceback
import accelerate, torch, transformers.modeling_utils
assert "peft" not in sys.modules and "drlora" not in sys.modules
found, (programs, FOLDER, config) = {}, json.load(sys.stdin)
for name, program in programs.items():
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            exec(program, {"sys": sys, "pickle": pickle, "FOLDER": FOLDER,
                           "CONFIG": bytes.fromhex(config)})
        except BaseException:
            os.write(write, traceback.format_exc()[-4000:].encode())
        os._exit(0)
    os.close(write)
    with open(read) as said:
        found[name] = said.read()
    os.wait()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def complaints(tmp_path_factory):
    """Program -> what it died of, in forks of one process, which imports torch only once."""
    folder = tmp_path_factory.mktemp("imports")
    base, config = make_model(), drlora.DrLoraConfig(r_init=2, r_target=3, r_max=5)
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    get_peft_model(base, config).save_pretrained(folder / "adapter")
    given = json.dumps([PROGRAMS, str(folder), pickle.dumps(config).hex()])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS],
        input=given, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("program", PROGRAMS)
def test_peft_knows_the_method(program, complaints):
    assert complaints[program] == ""


def test_public_names_are_where_the_package_says():
    """The lazy names, those that type checkers see and those of __all__ are the same."""
    for name in drlora.__all__:
        found = getattr(drlora, name)
        assert name == "__version__" or found.__name__ == name
    lazy = set(drlora._HOMES)
    assert lazy < set(drlora.__all__) and set(drlora.__all__) <= set(dir(drlora))
    assert not [name for name in set(drlora.__all__) - lazy if name not in vars(drlora)]
    for name, module in drlora._HOMES.items():
        assert getattr(drlora, name).__module__ == f"drlora.{module}"
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_ours'"):
        drlora.nothing_of_ours  # noqa: B018
