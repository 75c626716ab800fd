"""The names of a run's files, each spelt once; light, for the command line reads them too."""

CONFIG = "config.yaml"  # the resolved recipe; the mark of a run
RECORD = "run.json"  # what the run holds fast when it begins
METRICS = "metrics.jsonl"  # one line a log entry or evaluation
GROWTH_LOG = "growth.jsonl"  # one line a grant
EVENT_LOG = "events.jsonl"  # what each event knew of every expert
RESULT = "result.json"  # the outcome; the mark of a finished run
EARLIER_RESULTS = "result-at-*.json"  # of a run that was given more steps
CHECKPOINTS = "checkpoints"
REPORT = "report.html"
ADAPTER_CONFIG = "adapter_config.json"  # these two are PEFT's
ADAPTER_WEIGHTS = "adapter_model.safetensors"
EXPORT_RECORD = "drlora_export.json"
README = "README.md"
