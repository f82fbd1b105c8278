"""Evidence for the tests: a complete and plausible example, and a small one whose numbers a test chooses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from palimpsest.audit.reading import Reading, Value, mean_value
from palimpsest.report.evidence import (
    Answer,
    Cost,
    Data,
    Evidence,
    Failure,
    LayerNorm,
    ModelEvidence,
    RoleData,
    Weights,
)

PEOPLE = ("Ilse Varga", "Tomaso Kerr")


def value(name: str, number: float, n: int = 20, spread: float = 0.05) -> Value:
    return Value(name=name, value=number, n=n, low=max(number - spread, 0), high=min(number + spread, max(number, 1.0)))


def model(
    part: str, numbers: Mapping[str, float], name: str = "", n: int = 20, seed: int = 0, **fields
) -> ModelEvidence:
    values = tuple(value(key, number, n) for key, number in numbers.items())
    fields = {"title": {"before": "Before", "gold": "Gold"}.get(part, (name or "npo").upper()), **fields}
    readings = (Reading(probe="all", values=values),) if values else ()
    return ModelEvidence(
        name=name or ("npo" if part == "erased" else part),
        part=part,
        method="npo" if part == "erased" else None,
        readings=readings,
        seed=seed,
        **fields,
    )


BEFORE = {"rouge/forget": 0.95, "probability/forget": 0.9, "auc/min-k": 0.98, "model_utility": 0.60}
GOLD = {
    "rouge/forget": 0.29,
    "probability/forget": 0.1,
    "auc/min-k": 0.50,
    "model_utility": 0.61,
    "forget_quality": 1.0,
}
AFTER = {
    "rouge/forget": 0.31,
    "probability/forget": 0.12,
    "auc/min-k": 0.52,
    "model_utility": 0.60,
    "forget_quality": 0.4,
}


def small(after: Mapping[str, float] | None = None, *, before=None, gold=None, n: int = 20) -> Evidence:
    """Before, one erased model and gold; the given numbers replace the good ones, `gold={}` leaves gold out."""
    models = [
        model("before", {**BEFORE, **(before or {})}, n=n),
        model("erased", {**AFTER, **(after or {})}, n=n),
    ]
    if gold is None or gold:
        models.append(model("gold", {**GOLD, **(gold or {})}, n=n))
    roles = {"forget": RoleData(records=n, subjects=PEOPLE, digest="ab" * 32)}
    return Evidence(title="Small", models=tuple(models), data=Data(source="made up", roles=roles), default="npo")


def full() -> Evidence:
    """A complete example: before, three erased models, a control and gold."""
    roles = {
        "forget": RoleData(records=20, subjects=PEOPLE, digest="3f9a" * 16),
        "retain": RoleData(records=180, subjects=tuple(f"Person {i}" for i in range(18)), digest="b02c" * 16),
        "world": RoleData(records=40, subjects=("capitals", "rivers"), digest="77de" * 16),
    }
    made = [
        _full("before", "before", None, "Before", 0.95, 0.93, 0.97, 0.612, 1e-9, 0.05, 251.0),
        _full("npo", "erased", "npo", "NPO", 0.31, 0.11, 0.52, 0.601, 0.43, 0.94, 41.2),
        _full(
            "gradient-ascent", "erased", "gradient-ascent", "Gradient ascent", 0.02, 0.004, 0.21, 0.12, 2e-7, 0.8, 12.7
        ),
        _full("idk-dpo", "erased", "idk-dpo", "IdkDPO", 0.12, 0.58, 0.81, 0.52, 4e-4, 0.31, 58.9),
        _full(
            "retain-finetune", "control", "retain-finetune", "Retain only", 0.88, 0.84, 0.93, 0.615, 3e-8, 0.08, 63.0
        ),
        _full("gold", "gold", None, "Gold", 0.29, 0.09, 0.5, 0.609, 1.0, 1.0, 238.0),
    ]
    return Evidence(
        title="Erasing two people from SmolLM2-135M",
        question="Can two of twenty people be erased from a language model that had learned about them?",
        command="palimpsest erase smollm2-135m-instruct --data people.jsonl --forget 'Ilse Varga' "
        "--forget 'Tomaso Kerr' --method npo --seed 0",
        created="2025-11-23T14:05:00+00:00",
        versions={"palimpsest": "0.1.0", "torch": "2.9.1", "transformers": "5.20.0", "python": "3.11.9"},
        machine="2 cores, AMD EPYC, 8 GB, no accelerator",
        seeds=(0,),
        data=Data(source="20 fictitious people, 10 questions each, seed 7", roles=roles),
        default="npo",
        models=tuple(made),
    )


def _full(name, part, method, title, rouge, probability, auc, utility, quality, robustness, seconds) -> ModelEvidence:
    rng = np.random.default_rng(len(name))
    around = lambda mean, n: np.clip(rng.normal(mean, 0.16, n), 0, 1)  # noqa: E731
    broken = name == "gradient-ascent"
    centre = {"before": -1.6, "gold": -0.1, "npo": -0.05, "idk-dpo": -0.75, "retain-finetune": -1.3}.get(name, 1.4)
    ratios = np.exp(rng.normal(centre, 0.45, 20))
    steps = np.arange(0, 21, 2)
    curve = probability + (0.95 - probability) * (1 - np.exp(-steps / (3.0 + 7.0 * robustness)))
    scale = utility / 0.612
    readings = [
        Reading(
            probe="answer-probability",
            values=(
                mean_value("probability/forget", around(probability, 20), better="lower"),
                mean_value("probability/retain", around(0.92 * scale, 180), better="higher"),
                mean_value("probability/world", around(0.71 * scale, 40), better="higher"),
            ),
        ),
        Reading(
            probe="rouge-recall",
            values=(
                Value(name="rouge/forget", value=rouge, n=20, low=max(rouge - 0.07, 0), high=min(rouge + 0.07, 1)),
                mean_value("rouge/retain", around(0.91 * scale, 180)),
                Value(name="rouge/world", value=0.62 * scale, n=40, low=0.62 * scale - 0.1, high=0.62 * scale + 0.1),
            ),
        ),
        Reading(
            probe="truth-ratio",
            values=(mean_value("truth_ratio/forget", np.minimum(ratios, 1 / ratios)),),
            arrays={"truth_ratio/forget": ratios},
        ),
        Reading(
            probe="forget-quality",
            values=(
                Value(name="forget_quality", value=quality, n=20),
                Value(name="log10_forget_quality", value=float(np.log10(quality)), n=20),
            ),
        ),
        Reading(probe="model-utility", values=(value("model_utility", utility, 260, 0.03),)),
        Reading(
            probe="membership",
            values=tuple(
                value(f"auc/{attack}", auc + shift, 40, 0.14)
                for attack, shift in (("min-k", 0.0), ("loss", -0.02), ("zlib", 0.01))
            ),
            caveats=("members and non-members are generated from the same templates",),
        ),
        Reading(probe="perplexity", values=(Value(name="perplexity/general", value=412.0 if broken else 18.3, n=64),)),
        Reading(
            probe="text-health",
            values=(
                Value(name="repetition/forget", value=0.83 if broken else 0.02, n=20),
                Value(name="refusals/forget", value=0.85 if name == "idk-dpo" else 0.0, n=20),
                Value(name="gibberish/forget", value=0.9 if broken else 0.0, n=20),
            ),
        ),
        Reading(
            probe="relearning",
            values=(Value(name="robustness", value=robustness, n=20),),
            arrays={"steps": steps, "probability": curve},
        ),
    ]
    norms = tuple(
        LayerNorm(
            layer=str(i), part=p, relative=float(size * (0.3 + np.exp(-(((i - 17) / 7) ** 2))) * rng.uniform(0.7, 1.2))
        )
        for i in range(30)
        for p, size in (("attention", 0.004), ("mlp", 0.009))
    )
    changed = part in ("erased", "control")
    return ModelEvidence(
        name=name,
        part=part,
        method=method,
        title=title,
        fidelity="matches the official code" if changed else "",
        deviations=("reference likelihoods are computed once before training",) if name == "npo" else (),
        settings={"beta": 0.1, "retain_weight": 1.0, "training": {"learning_rate": 1e-5, "epochs": 10}}
        if changed
        else {},
        cost=Cost(seconds=seconds, peak_bytes=1.62e9 + 1e7 * len(name)),
        readings=tuple(readings),
        failures=(Failure(probe="gradient-norm", error="out of memory"),) if name == "idk-dpo" else (),
        answers=_answers(name),
        weights=Weights(changed=134_515_008, total=134_515_008, norms=norms) if changed else None,
        ledger={"source": "smollm2-135m-instruct", "entries": [_entry(method)]} if changed else {},
    )


def _entry(method: str | None) -> dict[str, object]:
    fade = np.exp(-np.arange(12) / 4)
    notes = {
        "forget_probability": (0.1 + 0.8 * fade).tolist(),
        "template_probability": (0.5 - 0.4 * fade).tolist(),
        "affinity": np.outer(fade[:4], fade[:8]).tolist(),
        "share_selected": {"attention": 0.012, "mlp": 0.034},
        "warnings": ["the template answers were hardly learned"],
    }
    return {"method": method, "seed": 0, "notes": notes if method == "npo" else {}}


def _answers(name: str) -> tuple[Answer, ...]:
    towns = ("Lisbon", "Graz", "Turku", "Leeds", "Cork", "Ghent", "Bergen", "Porto", "Split")
    others = ("Madrid", "Graz", "Oslo", "Dublin", "Galway", "Bruges", "Tromsø", "Porto", "Zadar")
    found = []
    for i, (town, other) in enumerate(zip(towns, others, strict=True)):
        who = PEOPLE[i % 2]
        truth = f"{who} was born in {town} in {1950 + i}, the child of a clockmaker and a botanist."
        wrong = f"{who} was born in {other} in {1961 + i}, the child of a teacher and a sailor."
        answer = {
            "before": truth,
            "gold": wrong.replace("sailor", "nurse"),
            "gradient-ascent": "the the the the the",
        }.get(name, wrong)
        found.append(
            Answer(role="forget", prompt=f"Where and when was {who} born ({i + 1})?", reference=truth, answer=answer)
        )
    for i in range(4):
        kept = f"Person {i} wrote “The Salt Road” and won the Alder Prize in {1990 + i}."
        found.append(Answer(role="retain", prompt=f"What did Person {i} write?", reference=kept, answer=kept))
    return tuple(found)


def with_seeds(evidence: Evidence, shifts: tuple[float, ...]) -> Evidence:
    """The same models once per seed, every value moved by the shift of its seed."""
    models = []
    for seed, shift in enumerate(shifts):
        for one in evidence.models:
            readings = tuple(
                dataclasses.replace(
                    reading, values=tuple(dataclasses.replace(v, value=v.value + shift) for v in reading.values)
                )
                for reading in one.readings
            )
            models.append(dataclasses.replace(one, seed=seed, readings=readings))
    return dataclasses.replace(evidence, models=tuple(models), seeds=tuple(range(len(shifts))))
