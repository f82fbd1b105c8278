"""A page about a memory: what would fade next and why, how old what is in use is, and whether old things are found."""

from __future__ import annotations

import time
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup

from palimpsest.errors import PalimpsestError
from palimpsest.recall import reading
from palimpsest.recall.hema import ConversationMemory
from palimpsest.recall.salience import least_salient, prune_count, recently_retrieved, salience
from palimpsest.report import plots
from palimpsest.report.evidence import write_atomically
from palimpsest.report.page import memory as in_bytes

SAMPLE, BINS = 200, 8
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>Memory of {{ user }}</title><link rel="icon" href="data:,">
<style>{{ css }}</style></head><body>
<header class="top"><p class="brand" data-under="remembers">palimpsest</p>
<p class="meta">Memory of {{ user }}</p></header>
<main>
<section><h2>Now</h2><div class="wide"><table>
{% for name, value in facts %}<tr><th>{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}</table></div></section>
{% for title, text, svg in drawings %}<section><h2>{{ title }}</h2><p class="hint">{{ text }}</p>{{ svg }}</section>
{% endfor %}
<section><h2>Next to fade</h2><p class="hint">What the next pruning takes, least salient first. Pinned memories never
fade; being found delays it.</p><div class="wide"><table><tr><th>memory</th><th>why</th><th>text</th></tr>
{% for identity, reason, text in next %}<tr><td>{{ identity }}</td><td>{{ reason }}</td><td>{{ text }}</td></tr>
{% else %}<tr><td colspan="3">nothing</td></tr>
{% endfor %}</table></div></section>
</main></body></html>
"""


def write(memory: ConversationMemory, path: Path) -> Path:
    """The path of the written page."""
    return write_atomically(path, render(memory))


def render(memory: ConversationMemory) -> str:
    """The whole page as HTML; all texts of the memory are escaped. A memory that is empty raises."""
    items, engine = memory.items, memory.items.opened.engine
    state, ages = items.state, engine.ages(items.sight())
    if not len(ages.number):
        raise PalimpsestError(f"{memory.store} holds no memories of {memory.user!r} to draw.")
    delta = recently_retrieved(state.turn, ages.last_retrieved, memory.window)
    weights = salience(state.turn - ages.turn, delta, memory.strength, memory.decay, memory.bonus, memory.formula)
    count, _ = prune_count(len(weights), memory.fraction, state.carry)
    chosen = least_salient(weights, ages.turn, ages.number, ages.pinned, max(1, count))
    cut = float(weights[chosen].max()) if len(chosen) else None
    far, recall, latency = recall_by_age(memory)
    used = ages.last_retrieved >= 0
    turns = np.sort(ages.turn)
    places = np.unique(np.linspace(0, len(turns) - 1, 50).astype(int))
    drawings = [
        (
            "Salience",
            "New memories and those found lately weigh most; what lies left of the line fades next.",
            plots.histogram(weights.tolist(), "salience", cut, "fades next"),
        ),
        (
            "Age and use",
            "Each dot is a memory that was found at least once: how long ago it was said, and last found.",
            plots.points(
                (state.turn - ages.turn[used]).tolist(),
                (state.turn - ages.last_retrieved[used]).tolist(),
                "turns since it was said",
                "turns since it was last found",
            ),
        ),
        (
            "Is what is old still found?",
            f"For up to {SAMPLE} memories, the second half of their words is looked for: the share found among the "
            f"{memory.k} nearest, by age.",
            plots.against({"turns since it was said": far, "share found": recall}, "Recall by age"),
        ),
        (
            "Growth",
            "Memories in sight by the turn in which they were said.",
            plots.against({"turn": turns[places].tolist(), "memories": (places + 1.0).tolist()}, "Growth"),
        ),
    ]
    facts: list[tuple[str, Any]] = [
        ("turns", state.turn),
        ("memories in sight", len(items.all())),
        ("size", in_bytes(engine.bytes())),
        ("encoder", engine.encoder),
        ("search, median and 95th percentile", f"{np.median(latency):.1f} ms, {np.percentile(latency, 95):.1f} ms"),
        ("summary", state.summary or "none yet"),
    ]
    numbers = reading.chunks(engine, ages.number[chosen].tolist())
    reasons = memory.prune(dry_run=True) or {str(numbers[n][0]): "the least salient" for n in numbers}
    texts = reading.memories(engine, [int(identity) for identity in reasons])
    following = [
        (identity, reason, texts[int(identity)].record.title) for identity, reason in list(reasons.items())[:50]
    ]
    return (
        Environment(autoescape=True)
        .from_string(_PAGE)
        .render(
            user=memory.user,
            css=Markup(resources.files("palimpsest.report").joinpath("page.css").read_text(encoding="utf-8")),
            facts=facts,
            drawings=[(title, text, Markup(svg)) for title, text, svg in drawings],
            next=following,
        )
    )


def recall_by_age(memory: ConversationMemory) -> tuple[list[float], list[float], list[float]]:
    """Mean age (turns) and share found of up to eight bins of memories, and the milliseconds of every search."""
    every = memory.items.all()
    sample = [every[i] for i in np.unique(np.linspace(0, len(every) - 1, SAMPLE).astype(int))]
    now, found, took = memory.items.state.turn, [], []
    for item in sample:
        words = item.text.split()
        start = time.perf_counter()
        hits = memory.search(" ".join(words[len(words) // 2 :]), memory.k, touch=False)
        took.append(1000 * (time.perf_counter() - start))
        found.append(any(hit.identity == item.identity for hit in hits))
    age = np.array([now - item.turn for item in sample], float)
    bins = np.array_split(np.argsort(age, kind="stable"), min(BINS, len(sample)))
    share = np.array(found, float)
    return [float(age[b].mean()) for b in bins], [float(share[b].mean()) for b in bins], took
