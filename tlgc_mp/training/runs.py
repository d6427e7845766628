"""The folder of a run: what lies where. Loads no torch.

OUTPUT/run.yaml                     the options it was started with, as --config takes them
OUTPUT/metrics.jsonl                JSON lines of steps and epochs
OUTPUT/result.json                  the row of a finished run: what it was, what came out, and where
OUTPUT/tensorboard/, OUTPUT/csv/    the same figures through DeepSpeed's monitors
OUTPUT/checkpoints/                 see :mod:`tlgc_mp.checkpoint.folder`
OUTPUT/profile/rank-K.json          with --profile: a trace of some steps
OUTPUT/lock                         locked while a run writes here; it says which process
OUTPUT/rank-K.traceback             of an exception that ended rank K
"""

LOCK = "lock"
OPTIONS = "run.yaml"
METRICS = "metrics.jsonl"
PROFILE = "profile"
RESULT = "result.json"
