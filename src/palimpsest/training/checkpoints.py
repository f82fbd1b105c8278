"""Where a training keeps its checkpoints, and which of them a killed run goes on from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.training.schedule import Schedule
from palimpsest.training.settings import Training

COMPLETE = "complete"
"""The file that marks a checkpoint as written to its end."""


def job_folder(folder: Path, model: Model, plan: Schedule, training: Training, run: Run, label: str) -> Path:
    """A folder of its own for exactly this job: no checkpoint of another is taken up, an old one only to resume.

    `label` tells one training of a method from another with the same data and settings.
    """
    settings = json.dumps([run.job, label, dataclasses.asdict(training), run.seed, model.digest(), plan.digest()])
    job = Path(folder) / "checkpoints" / hashlib.sha256(settings.encode()).hexdigest()[:16]
    if not run.resume:
        shutil.rmtree(job, ignore_errors=True)
    job.mkdir(parents=True, exist_ok=True)
    return job


def remember(memory: Mapping[str, Any], checkpoint: Path, process: int) -> None:
    """Writes into the checkpoint what a method's own functions must know to go on from it."""
    (checkpoint / f"memory-{process}.json").write_text(json.dumps(memory), encoding="utf-8")


def remembered(checkpoint: str, process: int) -> dict[str, Any]:
    """What this process wrote there."""
    return json.loads((Path(checkpoint) / f"memory-{process}.json").read_text(encoding="utf-8"))


def last_good(job: Path) -> str | None:
    """The newest checkpoint that was written to its end."""
    whole = [path.parent for path in job.glob(f"checkpoint-*/{COMPLETE}")]
    return str(max(whole, key=lambda path: int(path.name.partition("-")[2]))) if whole else None
