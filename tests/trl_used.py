"""Records what of TRL this package overrides or calls by its private names, as it was read.

    PYTHONPATH=src python tests/trl_used.py      adds the version that is installed

Run it after TRL's changes to what is named have been read and followed.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path

import trl
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.utils import add_fused_lm_head

RECORD = Path(__file__).with_suffix(".json")
USED = (
    # RunTrainer turns these off.
    _BaseTrainer._send_telemetry,
    _BaseTrainer.create_model_card,
    # SftTrainer takes the head off again or puts on one without metrics, and forms the loss.
    add_fused_lm_head,
    trl.SFTTrainer.__init__,
    trl.SFTTrainer.compute_loss,
    trl.SFTTrainer.prediction_step,
    trl.SFTTrainer._reject_skip_prepare_without_labels,
    # Data are tokenized before there is a model; the figures of an evaluation are in _metrics.
    trl.DPOTrainer.__init__,
    trl.DPOTrainer._prepare_dataset,
    trl.DPOTrainer.log,
    trl.KTOTrainer.__init__,
    trl.KTOTrainer._prepare_dataset,
    trl.KTOTrainer.log,
)


def used() -> dict[str, str]:
    """TRL's function -> a hash of its source."""
    found = {}
    for function in USED:
        text = inspect.getsource(inspect.unwrap(function))
        name = f"{function.__module__}.{function.__qualname__}"
        found[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return dict(sorted(found.items()))


def main() -> None:
    """Add the installed version to the record."""
    known = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {}
    known[trl.__version__] = used()
    RECORD.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n", "utf-8")
    print(f"{RECORD.name}: {len(known[trl.__version__])} functions of TRL {trl.__version__}")


if __name__ == "__main__":
    main()
