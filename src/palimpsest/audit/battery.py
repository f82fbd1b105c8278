"""An audit: a list of probes on one model; the failure of one probe does not lose the others."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable
from typing import Any

from palimpsest.audit.answers import prepare
from palimpsest.audit.reading import Reading
from palimpsest.data.records import Roles
from palimpsest.errors import PalimpsestError, nearest
from palimpsest.guard import check_kind, expected, kind_of
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.system import Probe, catalogue, create

TOFU_BATTERY = ("answer-probability", "rouge-recall", "truth-ratio", "forget-quality", "model-utility")
"""What TOFU reports."""

STANDARD_BATTERY = (
    *TOFU_BATTERY,
    "extraction-strength",
    "exact-memorisation",
    "verbatim-memory",
    "knowledge-memory",
    "privleak",
    "membership",
    "perplexity",
    "relearning",
    "text-health",
)
"""Every probe of an erasure from a language model."""

CLASSIFIER_BATTERY = ("classification",)
"""The quick measures of an erasure from a classifier; `truly-forgetting` looks at the features, and needs gold."""


@dataclasses.dataclass(frozen=True)
class Audit:
    """The readings of one model, and the probes that failed with their reasons."""

    readings: tuple[Reading, ...]
    failures: tuple[dict[str, str], ...] = ()

    def __getitem__(self, name: str) -> Any:
        """The first value of that name among all readings."""
        for reading in self.readings:
            for value in reading.values:
                if value.name == name:
                    return value
        known = [value.name for reading in self.readings for value in reading.values]
        lost = "; ".join(f"{failed['probe']} was not measured: {failed['error']}" for failed in self.failures)
        raise KeyError(f"there is no value {name!r}. {nearest(name, known)} {lost}".strip())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"readings": [reading.to_dict() for reading in self.readings], "failures": list(self.failures)}


def probes(
    chosen: str | Probe | Iterable[str | Probe] | None = None,
    max_new_tokens: int | None = None,
    model: Model | None = None,
) -> list[Probe]:
    """The probes meant by names or instances; the whole battery for this kind of model where none is named.

    `max_new_tokens` shortens the answers of probes that generate as TOFU does, and makes them share the generations.
    """
    if chosen is None:
        classifies = model is not None and kind_of(model) == "classifier"
        chosen = CLASSIFIER_BATTERY if classifies else STANDARD_BATTERY
    made = []
    for item in [chosen] if isinstance(chosen, str | Probe) else chosen:
        probe = create(item) if isinstance(item, str) else item
        if not isinstance(probe, Probe):
            raise PalimpsestError(f"{item} is not a probe. Probes: {', '.join(_probe_slugs())}.")
        if max_new_tokens is not None and probe.facts.slug in ("rouge-recall", "model-utility", "text-health"):
            probe = dataclasses.replace(probe, max_new_tokens=max_new_tokens)  # type: ignore[type-var]
        made.append(probe)
    return made


def _probe_slugs() -> list[str]:
    return [slug for slug, facts in catalogue().items() if facts.verb == "audit"]


def audit(
    model: Model,
    data: Roles,
    probes_: str | Probe | Iterable[str | Probe] | None = None,
    run: Run | None = None,
    gold: Model | None = None,
    *,
    before: Model | None = None,
    second_gold: Model | None = None,
) -> Audit:
    """The readings of all probes on one model, with gold as the reference of those that compare.

    `before` and `second_gold`, another model that never saw the forget set, go to the probes that ask for them. Where
    no probes are given they are those of the whole battery for this kind of model.
    """
    run = run or Run()
    model, data = expected(model, data, "audit")
    chosen = probes(probes_, model=model)
    known = {"before": before, "second_gold": second_gold}
    readings, failures = [], []
    if kind_of(model) != "classifier":
        with contextlib.suppress(PalimpsestError):  # a probe that needs what cannot be scored says so itself
            prepare(model, data, run)
    for probe in chosen:
        start = time.perf_counter()
        try:
            check_kind(probe.facts, probe.facts.slug, model)
            beside: dict[str, Any] = {name: known[name] for name in probe.facts.beside}
            reading = probe.measure(model, data, run, gold=gold, **beside)
        except Exception as error:
            told = f"{error}" if isinstance(error, PalimpsestError) else f"{type(error).__name__}: {error}"
            failures.append({"probe": probe.facts.slug, "error": told})
            said = f"{probe.facts.slug} was not measured: {told}"
            if run.cache.setdefault(("said", said), said) is said:  # once, however many models lack the same
                run.tell(said)
            continue
        readings.append(dataclasses.replace(reading, seconds=time.perf_counter() - start))
    return Audit(tuple(readings), tuple(failures))
