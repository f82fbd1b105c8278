"""ULD on the small harness, against itself without wrong answers and against methods that change the weights.

All methods get the same retain set: the retained people and 20 of the 40 capitals. The other 20 are in no method's
data; they are the text on which the assistant should be flat, and on which NPO and gradient difference slip.

The vocabulary has 212 words, and the most that can be subtracted is alpha log V: 0.75 as in the paper is 7.8 nats for
32,000 tokens and 4.0 here, less than what the target is sure of. So beta is 1, and alpha 1.25, the best of a sweep on a
validation seed, which needs no training; the table has the sweep. All else was fixed before any figure was seen.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from palimpsest.audit.answer_probability import probabilities
from palimpsest.audit.forget_quality import ForgetQuality
from palimpsest.audit.reading import Reading, Value, mean_value
from palimpsest.comparison import compare
from palimpsest.data.encoding import Encoder
from palimpsest.data.packing import pad
from palimpsest.data.records import Roles
from palimpsest.erase.npo import NPO
from palimpsest.erase.uld import ULD, uniform_divergence
from palimpsest.models.mixture import MixtureForCausalLM
from palimpsest.models.model import Model
from palimpsest.report.evidence import Evidence, ModelEvidence
from palimpsest.reproduce.harness import biographies, tokenizer
from palimpsest.reproduce.judging import above, at_least, at_most, row, values
from palimpsest.reproduce.runner import Outcome, Reproduction
from palimpsest.run import Run
from palimpsest.system import Method, Probe, system
from palimpsest.tasks import HARNESS, harness_task, tuned
from palimpsest.train import Training

SHOWN_FACTS = 20
"""Capitals that every method may train on; the others are held out."""
ALPHAS = (0.75, 1.0, 1.25, 1.5)

FULL = ULD(
    alpha=1.25,
    layers=2,
    silence=1.0,
    paraphrases=0,  # the forget set of the harness has all four wordings of every fact
    retain_records=160 + SHOWN_FACTS,  # as many as forget records, and the capitals; NPO has all 820
    training=Training(learning_rate=2e-3, epochs=40, batch_size=16, lora_rank=8, lora_alpha=16.0, micro_tokens=4096),
)
COLUMNS = {
    "forget P": "probability/forget",
    "retain P": "probability/retain",
    "held-out P": "probability/world",
    "log10 FQ": "log10_forget_quality",
    "KL to uniform, held out": "divergence",
}
ABLATED, GENEROUS = "uld without wrong answers", "uld on all retain records"
NAMES = ("before", "gold", "uld", ABLATED, GENEROUS, "npo", "gradient-difference")


def roles(seed: int) -> Roles:
    """The harness with half of the capitals in the retain set, where ULD takes its last records from."""
    known = biographies(seed)
    return known.replace(
        retain=[*known.retain, *known.world[:SHOWN_FACTS]], world=known.world[SHOWN_FACTS:], general=None
    )


@system("uld-assistant", verb="audit", title="What the assistant of ULD says", paper="", fidelity="adapted")
class Assistant(Probe):
    """How flat the assistant is on held-out facts, and how the mixture's answers change with its strength."""

    def measure(self, model: Model, data: Roles, run: Run, gold: Model | None = None) -> Reading:
        """`divergence`, KL(U || p) in nats a token, and for each alpha the main values; nothing of a single network."""
        found: list[Value] = []
        if isinstance(model.network, MixtureForCausalLM):
            packed = pad([dataclasses.replace(s, start=1) for s in Encoder.of(model).records(data.world)])
            with torch.no_grad():
                logits = packed.target_logits(model.network.member("assistant"))
            found.append(mean_value("divergence", uniform_divergence(logits).numpy(), unit="nats"))
            other = model.copy()
            for alpha in ALPHAS:
                other.network.adjust(alpha=alpha)
                for role in ("forget", "retain", "world"):
                    p = probabilities(other, data.probe(role), run)
                    found.append(mean_value(f"probability/{role}/{alpha}", p))
                quality = ForgetQuality().measure(other, data, run, gold)["log10_forget_quality"]
                found.append(dataclasses.replace(quality, name=f"{quality.name}/{alpha}"))
        return Reading(probe=self.facts.slug, values=tuple(found))


def measure(seeds: Sequence[int], folder: Path, run: Run) -> Outcome:
    """All models of every seed, the sweep of alpha, and the time of a step."""
    task = harness_task(("answer-probability", "forget-quality"))
    task = dataclasses.replace(task, name="harness-uld", roles=roles, probes=(*task.probes, Assistant()))
    everything = len(roles(0).retain)
    ablated = dataclasses.replace(FULL, perturbed=0)
    methods: list[Method] = [FULL, ablated, dataclasses.replace(FULL, retain_records=everything)]
    found = compare(task, [*methods, *tuned(NAMES[5:], HARNESS)], folder, seeds=seeds, run=run)
    return judge(found, speedup(run))


def judge(found: Evidence, faster: float) -> Outcome:
    """The outcome that the evidence shows; `faster` is how many times an NPO step takes the time of ULD's."""
    groups = {name: [model for model in found.models if _name(model) == name] for name in NAMES}
    table = {name: {c: values(models, value) for c, value in COLUMNS.items()} for name, models in groups.items()}
    rows = [row(name, table[name]) for name in NAMES]
    for alpha in ALPHAS:
        swept = {column: values(groups["uld"], f"{value}/{alpha}") for column, value in COLUMNS.items()}
        rows.append(row(f"uld, alpha {alpha}", swept))
    before, uld, ablated, npo = (table[name] for name in ("before", "uld", ABLATED, "npo"))
    checks = (
        at_least("log10 forget quality rises by at least 8", uld["log10 FQ"], before["log10 FQ"] + 8),
        at_least("retain P stays above 0.9 of before", uld["retain P"], 0.9 * before["retain P"]),
        at_least("held-out P stays above 0.95 of before", uld["held-out P"], 0.95 * before["held-out P"]),
        above("held-out P stays above NPO's", uld["held-out P"], npo["held-out P"]),
        at_least("wrong answers save at least 0.2 of retain P", uld["retain P"], ablated["retain P"] + 0.2),
        at_most("on held-out text the assistant is within 1 nat of uniform", uld["KL to uniform, held out"], 1.0),
        at_least("an NPO step takes at least 1.5 times as long", np.array([faster]), 1.5),
    )
    return Outcome(
        rows=rows,
        checks=checks,
        note="The wrong answers that the probes measure are other values of the same attribute, as are those that ULD "
        f"trains on; forget quality is flattered by that. An NPO step took {faster:.2f} times as long as one of ULD "
        "(8 blocks of width 512, the assistant has 2, the same 16 pairs of records).",
    )


def speedup(run: Run, steps: int = 6) -> float:
    """Seconds of a full-model NPO step over those of an assistant step, same records, on a network where it shows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tokenizer()
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), num_attention_heads=8, **sizes, **ids))
    model, data = Model(network.eval(), words), roles(0)
    short = dataclasses.replace(FULL.training, max_steps=steps)
    full = dataclasses.replace(short, lora_rank=0, lora_alpha=None)
    methods = (NPO(training=full), dataclasses.replace(FULL, training=short))
    npo, uld = (seconds_a_step(method, model, data, run) for method in methods)
    return npo / uld


def seconds_a_step(method: Method, model: Model, data: Roles, run: Run) -> float:
    """The median time between the ends of two training steps."""
    ticks: list[float] = []

    def clock(step: int, student: Model) -> bool:
        ticks.append(time.perf_counter())
        return False

    method.apply(model, data, run.replace(stop=clock, progress=False, folder=None))
    return float(np.median(np.diff(ticks)))


def _name(model: ModelEvidence) -> str:
    if model.name != "uld":
        return model.name
    if not model.settings["perturbed"]:
        return ABLATED
    return GENEROUS if model.settings["retain_records"] > FULL.retain_records else "uld"


REPRODUCTION = Reproduction(
    claim="An assistant that knows only the forget records, subtracted while decoding, forgets them and leaves what it "
    "was never shown alone, where methods that change the weights do not.",
    source="Ji et al. 2024 (arXiv 2406.08607)",
    setting="A 0.23 M-parameter model over 48 generated biographies, 8 people to forget; 20 of 40 capitals in the "
    "retain set of every method, 20 held out. Assistant: 2 of 4 blocks, rank 8, beta 1, alpha 1.25, rate 0.01.",
    paper="Llama-2-7B-chat, TOFU 10 %, forget quality / utility / retain ROUGE-L: target 2e-19 / .62 / 98.2, ULD .52 / "
    ".62 / 85.9, NPO+GD .29 / .53 / 41.1, GA+KL 2e-4 / .05 / 18.6; without augmented data FQ 1e-7.",
    measure=measure,
)
