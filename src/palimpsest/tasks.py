"""The tasks that methods are compared on.

    harness   a 0.23 M model over biographies of 48 people: minutes for all methods and seeds
    people    the embedded language model over fictitious people: the demo
    tofu      the embedded language model on TOFU

Every task states how the model learns and, for each method, the settings that differ from the published defaults; these
were chosen on data that the tables do not use (`VALIDATION_SEED`).
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from palimpsest.audit.battery import probes
from palimpsest.comparison import Task
from palimpsest.data.records import Roles
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.system import Method, create, facts_of
from palimpsest.train import Training
from palimpsest.write.finetune import Finetune

VALIDATION_SEED = 1000
"""Settings are chosen on data of this seed and later ones; tables use seeds below it."""

BASELINES = (
    "gradient-ascent",
    "gradient-difference",
    "kl-minimisation",
    "po",
    "idk-dpo",
    "npo",
    "simnpo",
    "rmu",
    "whp",
    "task-vector",
    "llmu",
    "retain-finetune",
)
"""Every published baseline of the library that starts from the model that learned."""

HARNESS: Mapping[str, Mapping[str, Any]] = {
    "*": {
        "training.learning_rate": 3e-4,
        "training.epochs": 5,
        "training.micro_tokens": 4096,
        "reinforce.learning_rate": 3e-4,
    },
    "gradient-difference": {"training.learning_rate": 3e-3},
    "po": {"training.learning_rate": 3e-3},
    "idk-dpo": {"training.learning_rate": 3e-3},
    "npo": {"training.learning_rate": 3e-3},
    "simnpo": {"training.learning_rate": 3e-3},
    "rmu": {"training.learning_rate": 1e-3},
    "whp": {"reinforce.learning_rate": 1e-3},
    "whp-decode": {"reinforce.learning_rate": 1e-3},
    "retain-finetune": {"training.learning_rate": 3e-3},
    "stranger": {"training.learning_rate": 3e-3},
    "flat": {"training.learning_rate": 1e-3},
    "uld": {"training.learning_rate": 1e-2},
    "selective-amnesia": {"training.learning_rate": 1e-3},
    "ssd": {"alpha": 1.5},
    "loss-curvature": {"rho": 0.8},
    "balanced-subnet": {"training.learning_rate": 0.1, "ratio": 0.05},
    "scrub": {"training.learning_rate": 1e-3},
}
"""The best of four values of each method's main setting by `palimpsest.tuning`, on one validation seed; `*`: others.

For `iau` no value was better than doing nothing, and for `guard` all were as good: they keep their own.
"""
EMBEDDED: Mapping[str, Mapping[str, Any]] = {
    "*": {
        "training.learning_rate": 5e-5,
        "training.epochs": 8,
        "training.batch_size": 8,
        "training.warmup_epochs": 0.5,
        "reinforce.learning_rate": 5e-5,
        "reinforce.batch_size": 8,
    },
    "gradient-ascent": {"training.learning_rate": 3e-5},
    "gradient-difference": {"training.learning_rate": 1e-4},
    "kl-minimisation": {"training.learning_rate": 3e-5},
    "po": {"training.learning_rate": 1e-4},
    "idk-dpo": {"training.learning_rate": 1e-4},
    "npo": {"training.learning_rate": 3e-5},
    "simnpo": {"training.learning_rate": 1e-4},
    "rmu": {"training.learning_rate": 3e-5},
    "whp": {"reinforce.learning_rate": 3e-4},
    "whp-decode": {"reinforce.learning_rate": 3e-4},
    "task-vector": {"training.learning_rate": 3e-5},
    "llmu": {"training.learning_rate": 3e-5},
    "retain-finetune": {"training.learning_rate": 1e-4},
    "stranger": {"training.learning_rate": 1e-4, "training.epochs": 10},
    "undial": {"training.learning_rate": 3e-5},
    "flat": {"training.learning_rate": 3e-5},
    "uld": {"training.learning_rate": 1e-3},
    "iau": {"learning_rate": 1e-4},
    "balanced-subnet": {"training.learning_rate": 0.1},
    "selective-amnesia": {"training.learning_rate": 1e-4},
    "scrub": {"training.learning_rate": 1e-4},
}
"""The better of two or three values of each method's main setting on people of a validation seed; `*`: the others."""
PEOPLE: Mapping[str, Mapping[str, Any]] = {
    **EMBEDDED,
    "*": {**EMBEDDED["*"], "training.epochs": 5},
    "stranger": {"training.learning_rate": 1e-4, "training.epochs": 6},
}
"""As `EMBEDDED`, but short enough for a demo."""

SHORT = Finetune(training=Training(learning_rate=1.5e-4, epochs=6, batch_size=8, warmup_epochs=0.5))
"""How the embedded model learns a few dozen short facts."""


def harness_task(battery: Sequence[str] | None = None) -> Task:
    """The small harness; every probe that it can serve."""
    from palimpsest.reproduce.harness import LEARNING, biographies, new_model

    chosen = probes(battery, max_new_tokens=12)
    return Task(
        name="harness",
        question="Can eight of 48 people be erased from a small model that knows them all?",
        source="generated biographies, 48 people, 5 attributes, 40 capitals",
        start=new_model,
        roles=biographies,
        learn=LEARNING,
        probes=tuple(_smaller(probe) for probe in chosen),
        max_new_tokens=12,
    )


def _smaller(probe: Any) -> Any:
    """Probe settings for the harness: its learning rate is 30 times that of a pretrained model."""
    if probe.facts.slug == "relearning":
        attack = Training(
            learning_rate=1e-3, epochs=10, batch_size=8, warmup_epochs=0.0, decay="constant", micro_tokens=4096
        )
        return dataclasses.replace(probe, training=attack)
    if probe.facts.slug in ("verbatim-memory", "knowledge-memory"):
        return dataclasses.replace(probe, max_new_tokens=12)
    return probe


def _shorter(probe: Any) -> Any:
    """Probe settings for a few dozen facts and a few minutes: no gradient norms, a short relearning attack."""
    if probe.facts.slug == "membership":
        return dataclasses.replace(probe, gradients=False)
    if probe.facts.slug == "relearning":
        return dataclasses.replace(probe, points=2, training=dataclasses.replace(probe.training, epochs=3))
    return probe


def people_task(
    people: int = 8,
    forget: int = 3,
    facts: int = 4,
    learn: Finetune | None = None,
    battery: Sequence[str] | None = None,
    max_new_tokens: int = 32,
) -> Task:
    """The embedded model over fictitious people."""
    from palimpsest.data.fictitious import roles

    def data(seed: int) -> Roles:
        made = roles(people, forget, holdout_count=forget, seed=seed, facts_per_person=facts)
        return made.replace(
            retain_probe=made["retain"][: forget * facts],
            world=made["world"][:12],
            real=made["real"][:12],
            general=made["general"][:10],
        )

    return Task(
        name=f"people-{people}-{forget}-{facts}",
        question=f"Can {forget} of {people} people be erased from a language model that learned facts about them?",
        source=f"generated: {people} fictitious people, {facts} facts each",
        start=lambda seed: embedded(),
        roles=data,
        learn=learn or SHORT,
        probes=tuple(_shorter(probe) for probe in probes(battery, max_new_tokens=max_new_tokens)),
        max_new_tokens=max_new_tokens,
    )


def tofu_task(
    split: str = "forget05",
    source: Path | None = None,
    authors: int | None = None,
    forget_authors: int | None = None,
    most: int | None = None,
    learn: Finetune | None = None,
    battery: Sequence[str] | None = None,
    max_new_tokens: int = 200,
) -> Task:
    """The embedded model on TOFU, or on a stated part of its authors; at most `most` records measure each role."""
    from palimpsest.data.tofu import tofu

    @functools.cache
    def data(seed: int) -> Roles:
        made = tofu(split, source, authors=authors, forget_authors=forget_authors)
        measured = {role: made.probe(role)[:most] for role in ("forget", "retain", "real", "world")}
        probed = {f"{role}_probe": records or None for role, records in measured.items()}
        return made if most is None else made.replace(**probed)

    return Task(
        name=f"tofu-{split}-{authors or 'all'}-{forget_authors or 'all'}",
        question=f"Can the authors of TOFU {split} be erased from a language model that learned all?",
        source=f"TOFU {split}" + (f", {authors} retained authors" if authors else ""),
        start=lambda seed: embedded(),
        roles=data,
        learn=learn or Finetune(),
        probes=tuple(probes(battery, max_new_tokens=max_new_tokens)),
        max_new_tokens=max_new_tokens,
    )


def embedded() -> Model:
    """The embedded language model."""
    from palimpsest.models.loading import load

    return load()


def tuned(
    names: Sequence[str], table: Mapping[str, Mapping[str, Any]], extra: Mapping[str, Any] | None = None
) -> list[Method]:
    """Methods by slug with the settings of the task; the user's own settings come last."""
    methods = []
    for name in names:
        if facts_of(name).verb not in ("write", "keep", "erase", "fit"):
            raise PalimpsestError(f"{name} measures a model; only systems that change one can be compared.")
        wanted = {**table.get("*", {}), **table.get(name, {}), **(extra or {})}
        own = {field.name for field in dataclasses.fields(create(name))}
        methods.append(create(name, **{key: value for key, value in wanted.items() if key.partition(".")[0] in own}))
    return methods
