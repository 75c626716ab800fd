"""The names of the files of runs, adapters and exports, each spelt once."""

CONFIG = "config.yaml"  # the resolved recipe; the mark of a run
RECORD = "run.json"  # what the run holds fast when it begins
FORECAST = "forecast.json"  # memory and time as they were said before
METRICS = "metrics.jsonl"  # one line a log entry or evaluation
GROWTH_LOG = "growth.jsonl"  # one line a grant
EVENT_LOG = "events.jsonl"  # what each event knew of every expert
RESULT = "result.json"  # the outcome; the mark of a finished run
EARLIER_RESULT = "result-at-{}.json"  # after so many steps, of a run that was given more
REPORT = "report"  # and the ending of its format
CHECKPOINTS = "checkpoints"  # the folder of those below
CHECKPOINT = "checkpoint-{}"  # the Trainer's, after so many steps
MANIFEST = "manifest.json"  # of a checkpoint, written last
TRAINER_STATE = "trainer_state.json"  # the Trainer's, of a checkpoint
LOCK = ".lock"  # held by the process that trains, and gone with it

ADAPTER_CONFIG = "adapter_config.json"  # PEFT's, of an adapter; these two as well
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MLX_WEIGHTS = "adapters.safetensors"  # mlx-lm's, of an adapter
GGUF_ADAPTER = "adapter.gguf"  # llama.cpp's
README = "README.md"  # the card of an adapter, what is said of an export, the page of a comparison

EXPORT_RECORD = "drlora_export.json"
