"""What tests/test_corpus.py runs on a local Ray, in a process of its own, as it leaves others behind."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import ray
import ray.data
from click.testing import CliRunner

import pyqe
from pyqe.cli import main
from pyqe.cli.options import load_model


def load(model: str, head: str) -> pyqe.QualityEstimator:
    return pyqe.QualityEstimator(*load_model(model, "float32", "cpu"), pyqe.SigmoidHead.from_pretrained(head))


def scored_rows(model: str, head: str) -> list[dict[str, object]]:
    """Texts through ``RayScorer``, one of them bad."""
    rows = ray.data.from_items([{"text": "one two", "n": 1}, {"text": None, "n": 2}, {"text": "x", "n": 3}])
    scorer = {"fn_constructor_args": [partial(load, model, head)], "fn_constructor_kwargs": {"signals": ["quality"]}}
    pool = ray.data.ActorPoolStrategy(size=1)
    found = rows.map_batches(pyqe.RayScorer, batch_format="pyarrow", compute=pool, num_cpus=1, **scorer)
    return sorted(found.take_all(), key=lambda row: row["n"])


commands, model, head, target = json.loads(sys.argv[1]), *sys.argv[2:]
ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, object_store_memory=80 << 20)
results = [CliRunner().invoke(main, command) for command in commands]
report = {
    "commands": [[result.exit_code, result.stderr] for result in results],
    "rows": scored_rows(model, head),
}
Path(target).write_text(json.dumps(report, default=list))
ray.shutdown()
