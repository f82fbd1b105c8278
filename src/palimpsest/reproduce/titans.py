"""Titans: what momentum, forgetting and depth do for a memory that learns at test time, and what training makes of it.

Three experiments. (a) Streams of random pairs into a memory without a network around it: blocks of pairs, each shown
three times, then asked for; constant gates from a grid, chosen on a stream of another seed. (b) More pairs than a
matrix can hold: a matrix, a network of two layers, and matrices on fixed random features, one with as many learned
numbers as the network; the step again chosen on another seed. (c) Small language models of two blocks, trained on
multi-query recall at one length and tested at two and four times it: the memory and its ablations against linear
attention, and beside a sliding window against the window alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from palimpsest.data.recall_tasks import multi_query_recall
from palimpsest.errors import PalimpsestError
from palimpsest.layers.gradient_memory import Inputs, chunk_memory, fresh, recall
from palimpsest.models.memory_lm import MemoryForCausalLM, MemoryLMConfig
from palimpsest.models.model import Model
from palimpsest.reproduce import mom
from palimpsest.reproduce.harness import word_tokenizer
from palimpsest.reproduce.judging import Seeds, above, at_least, below, row
from palimpsest.reproduce.runner import Figure, Outcome, Reproduction
from palimpsest.run import Run
from palimpsest.train import Training

CHOSEN_ON = 1000
"""The seed of everything that is chosen; none of the reported ones."""

# --- (a) streams -----------------------------------------------------------------------------------------------------

WIDTH, BLOCKS, PAIRS, SHOWN = 32, 8, 24, 3
STEPS = (0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
FORGET = (0.002, 0.005, 0.01, 0.02, 0.05)
MOMENTUM = (0.3, 0.5, 0.7, 0.8, 0.9)
STREAMS: dict[str, Sequence[Sequence[float]]] = {
    "gradient step": (STEPS, (0.0,), (0.0,)),
    "gradient step, forgetting": (STEPS, FORGET, (0.0,)),
    "gradient step, momentum": (STEPS, (0.0,), MOMENTUM),
    "gradient step, both": (STEPS, FORGET, MOMENTUM),
    "Hebbian": (STEPS, (0.0,), (0.0,)),
    "Hebbian, forgetting": (STEPS, FORGET, (0.0,)),
}
"""For each memory the step sizes, forgetting and momentum that are tried."""


def stream(seed: int) -> tuple[Float[Tensor, "blocks n d"], Float[Tensor, "blocks n d"]]:
    """Keys of length 1 and values of every block."""
    rng = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(BLOCKS, PAIRS, WIDTH, generator=rng) for _ in range(2))
    return F.normalize(keys, dim=-1), values / WIDTH**0.5


def stream_error(name: str, gates: Float[Tensor, "g 3"], seed: int) -> Float[Tensor, " g"]:
    """Share of the values' energy that is recalled wrongly right after a block, mean over blocks, for each setting."""
    keys, values = (x[:, None].expand(-1, len(gates), -1, -1) for x in stream(seed))
    step, forget, momentum = (gate[:, None].expand(-1, SHOWN * PAIRS) for gate in gates.unbind(1))
    memory = fresh([torch.zeros(len(gates), WIDTH, WIDTH)])
    errors = []
    for k, v in zip(keys, values, strict=True):
        shown = k.repeat(1, SHOWN, 1), v.repeat(1, SHOWN, 1)
        if name.startswith("Hebbian"):
            memory = memory._replace(weights=[hebbian(memory.weights[0], *shown, step, forget)])
        else:
            _, memory = chunk_memory(Inputs(shown[0], *shown, step, forget, momentum), memory, 1)
        errors.append(((recall(memory.weights, k) - v) ** 2).sum((1, 2)) / (v**2).sum((1, 2)))
    return torch.stack(errors).mean(0)


def bounded(error: Callable[[Tensor], Tensor], settings: Float[Tensor, g * n]) -> Float[Tensor, " g"]:
    """The errors of the settings; infinite where the memory grows without bound."""
    try:
        return error(settings)
    except PalimpsestError:
        if len(settings) == 1:
            return torch.full((1,), torch.inf)
        return torch.cat([bounded(error, half) for half in settings.chunk(2)])


def hebbian(
    memory: Float[Tensor, "g d e"],
    k: Float[Tensor, "g t d"],
    v: Float[Tensor, "g t e"],
    step: Float[Tensor, "g t"],
    forget: Float[Tensor, "g t"],
) -> Float[Tensor, "g d e"]:
    """M <- (1 - alpha) M + theta k^T v for every token: what is written does not depend on what is known."""
    kept = (1 - forget).flip(1).cumprod(1)
    after = torch.cat([kept.new_ones(len(kept), 1), kept[:, :-1]], 1).flip(1)
    return kept[:, -1:, None] * memory + ((step * after)[..., None] * k).mT @ v


def streams(seed: int) -> dict[str, float]:
    """The error of each memory, with the gates that were best on the other seed."""
    found = {}
    for name, tried in STREAMS.items():
        grid = torch.tensor(list(itertools.product(*tried)))
        best = grid[bounded(lambda gates, n=name: stream_error(n, gates, CHOSEN_ON), grid).argmin()]  # type: ignore[misc]
        found[name] = float(stream_error(name, best[None], seed)[0])
    return found


# --- (b) depth -------------------------------------------------------------------------------------------------------

NARROW, HIDDEN, PASSES, ETA = 16, 64, 40, 0.8
COUNTS = (16, 32, 64)
RATES = (0.001, 0.002, 0.003, 0.004, 0.005, 0.007, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1)
DEPTHS = {
    "matrix": 0,
    f"matrix on {HIDDEN} random features": HIDDEN,
    f"matrix on {2 * HIDDEN} random features, as many numbers": 2 * HIDDEN,
    "two layers": -1,
}
"""Width of the random features; 0: the keys themselves, -1: the deep memory."""


def depth_error(features: int, count: int, rates: Float[Tensor, " g"], seed: int) -> Float[Tensor, " g"]:
    """Share of the values' energy that is recalled wrongly after all passes, for each step size."""
    rng = torch.Generator().manual_seed(seed)
    k = F.normalize(torch.randn(count, NARROW, generator=rng), dim=-1)
    v = torch.randn(count, NARROW, generator=rng)
    lifted = torch.randn(NARROW, HIDDEN if features < 0 else features, generator=rng)
    if features > 0:
        k = F.normalize(F.silu(k @ lifted), dim=-1)
    start = [torch.zeros(k.shape[1], NARROW)] if features >= 0 else [lifted, torch.zeros(HIDDEN, NARROW)]
    memory = fresh([w.expand(len(rates), *w.shape).contiguous() for w in start])
    keys, values = (x.expand(len(rates), *x.shape) for x in (k, v))
    step = rates[:, None].expand(-1, count)
    for _ in range(PASSES):
        _, memory = chunk_memory(Inputs(keys, keys, values, step, None, torch.full_like(step, ETA)), memory, 1)
    return ((recall(memory.weights, keys) - values) ** 2).sum((1, 2)) / (v**2).sum()


def depths(seed: int) -> dict[str, float]:
    """The error of each memory and number of pairs, with the step that was best on the other seed."""
    found = {}
    for name, features in DEPTHS.items():
        for count in COUNTS:

            def error(rates: Tensor, seed: int, features: int = features, count: int = count) -> Tensor:
                return bounded(lambda r: depth_error(features, count, r, seed), rates)

            rates = torch.tensor(RATES)
            best = rates[error(rates, CHOSEN_ON).argmin()]
            found[f"{name}; {count} pairs"] = float(error(best[None], seed)[0])
    return found


# --- (c) trained -----------------------------------------------------------------------------------------------------

STEPS_TRAINED, BATCH, TESTED, WINDOW = 400, 16, 256, 16
TASK = {"pairs": 8, "keys": 16, "values": 16}
FILLER = 64
LENGTH = 4 * TASK["pairs"] + FILLER
TIMES = (1, 2, 4)
TRAINING = dataclasses.replace(mom.TRAINING, learning_rate=5e-3, batch_size=BATCH, warmup_epochs=0.05)


@dataclasses.dataclass(frozen=True)
class Arm:
    """A token mixer and its settings."""

    mixer: str
    settings: dict[str, Any]


MEMORY: dict[str, Any] = {"variant": "memory-only", "chunk": 8}
ARMS = {
    "memory": Arm("titans", MEMORY),
    "memory without momentum": Arm("titans", MEMORY | {"momentum": False}),
    "memory without forgetting": Arm("titans", MEMORY | {"decay": False}),
    "memory of one layer": Arm("titans", MEMORY | {"depth": 1}),
    "linear attention": Arm("linear-attention", {}),
    f"window of {WINDOW}": Arm("attention", {"window": WINDOW}),
    f"window of {WINDOW} gated by a memory": Arm("titans", MEMORY | {"variant": "mag", "window": WINDOW}),
}
DEEP, PLAIN, ENDLESS, SHALLOW, LINEAR, NEAR, GATED = ARMS


def new_model(arm: Arm, vocabulary: int, seed: int) -> Model:
    """Two blocks of width 64, two heads, no channel mixer."""
    config = MemoryLMConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        mixer=arm.mixer,
        mixer_settings=arm.settings,
        channel="none",
        initializer_range=0.1,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(MemoryForCausalLM(config), word_tokenizer([]))


def tried(
    arm: Arm, seed: int, run: Run, steps: int = STEPS_TRAINED, training: Training = TRAINING
) -> dict[str, float | None]:
    """Share of values recalled at one, two and four times the length of training; None where the training diverged."""
    task = multi_query_recall(steps * training.batch_size, filler=FILLER, seed=seed, **TASK)
    model = new_model(arm, task.vocabulary, seed)
    found: dict[str, float | None] = {"parameters": model.parameters}
    try:
        model = mom.learned(model, task, training, run.replace(seed=seed))
    except PalimpsestError as error:
        if "finite" not in str(error):
            raise
        return found | dict.fromkeys(map(_times, TIMES), None)
    for times in TIMES:
        test = multi_query_recall(TESTED, filler=FILLER + (times - 1) * LENGTH, seed=10_000 + seed, **TASK)
        try:
            found[_times(times)] = float(test.hits(model.network).mean())
        except PalimpsestError:  # the memory diverged on what is longer than it has seen
            found[_times(times)] = None
    return found


def _times(times: int) -> str:
    return f"{times} T"


def growth() -> Figure:
    """How many numbers each token mixer keeps of what it has read, beside attention over everything."""
    lengths = [LENGTH * times for times in (*TIMES, 8)]
    arms = {"attention over all": Arm("attention", {}), **{name: ARMS[name] for name in (DEEP, SHALLOW, LINEAR, NEAR)}}
    kept: dict[str, list[float]] = {name: [] for name in arms}
    for name, arm in arms.items():
        network = new_model(arm, 64, 0).network.eval()
        for length in lengths:
            with torch.no_grad():
                cache = network(torch.zeros(1, length, dtype=torch.long), use_cache=True).cache
            kept[name].append(cache.floats)
    return Figure(
        name="titans-state",
        across="tokens read",
        up="numbers kept",
        lines={name: (lengths, numbers) for name, numbers in kept.items()},
    )


def measure(seeds: Sequence[int], folder: Path, run: Run) -> Outcome:
    """Every experiment of every seed; kept in the folder."""

    def kept(name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = folder / f"{name}.json"
        if not path.exists():
            path.write_text(json.dumps(work()), encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))

    simple: dict[str, list[float]] = {}
    trained: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    for seed in seeds:
        for part, work in (("streams", streams), ("depths", depths)):
            for name, error in kept(f"{part}-{seed}", lambda w=work, s=seed: w(s)).items():  # type: ignore[misc]
                simple.setdefault(name, []).append(error)
        for name, arm in ARMS.items():
            trained[name].append(kept(f"{name}-{seed}", lambda a=arm, s=seed: tried(a, s, run)))  # type: ignore[misc]
    columns = ("parameters", *map(_times, TIMES))
    return judge(
        {name: np.array(errors) for name, errors in simple.items()},
        {name: {c: np.array([x[c] for x in rows], dtype=float) for c in columns} for name, rows in trained.items()},
    )


def judge(simple: dict[str, Seeds], trained: dict[str, dict[str, Seeds]]) -> Outcome:
    """The outcome that the figures show."""
    matrix, few, many, deep = ([simple[f"{name}; {count} pairs"] for count in COUNTS] for name in DEPTHS)
    step, hebbian = simple["gradient step"], simple["Hebbian"]
    twice, four = ({name: x[_times(times)] for name, x in trained.items()} for times in TIMES[1:])
    checks = (
        below("stream: a gradient step errs less than half as much as Hebbian writing", step, 0.5 * hebbian),
        below("stream: momentum lowers the error by more than 5 %", simple["gradient step, momentum"], 0.95 * step),
        below("stream: forgetting rescues Hebbian writing", simple["Hebbian, forgetting"], hebbian),
        below("stream: forgetting lowers the error of a gradient step", simple["gradient step, forgetting"], step),
        below(f"{COUNTS[-1]} pairs: two layers err less than half as much as a matrix", deep[-1], 0.5 * matrix[-1]),
        below(f"{COUNTS[-1]} pairs: and less than random features of the same width", deep[-1], few[-1]),
        below(f"{COUNTS[-1]} pairs: and less than random features of as many numbers", deep[-1], many[-1]),
        above("trained: at 2 T the memory recalls more than linear attention", twice[DEEP], twice[LINEAR]),
        above("trained: at 2 T more than without momentum", twice[DEEP], twice[PLAIN]),
        above("trained: at 2 T more than without forgetting", twice[DEEP], twice[ENDLESS]),
        above("trained: at 2 T more than with one layer", twice[DEEP], twice[SHALLOW]),
        at_least("trained: at 2 T a window with a memory recalls more than the window", twice[GATED], twice[NEAR]),
        above("trained: at 4 T the memory recalls more than linear attention", four[DEEP], four[LINEAR]),
    )
    tasks = (multi_query_recall(64, filler=FILLER + (times - 1) * LENGTH, **TASK) for times in TIMES)
    distances = [float(task.distance[task.scored].float().mean()) for task in tasks]
    curves = {name: [float(np.nanmean(x[_times(times)])) for times in TIMES] for name, x in trained.items()}
    drawn = Figure(
        name="titans",
        across="mean distance from telling to asking, tokens",
        up="share recalled",
        lines={name: (distances, values) for name, values in curves.items() if np.isfinite(values).all()},
    )
    none: Seeds = np.array([])
    rows = [row(n, {"error": errors} | dict.fromkeys(map(_times, TIMES), none)) for n, errors in simple.items()]
    rows += [row(n, {"error": none} | {c: x[c] for c in map(_times, TIMES)}) for n, x in trained.items()]
    return Outcome(
        rows=rows,
        checks=checks,
        figures=(drawn, growth()),
        note="Errors: share of the values' energy. T: recall at the length of training and at multiples of it, chance "
        f"1/{TASK['values']}. A run that diverged has no number.",
    )


REPRODUCTION = Reproduction(
    claim="A memory that takes gradient steps with momentum and forgetting while it reads holds more than linear "
    "memories; a deep one holds more than a matrix; beside a sliding window it brings back what the window lost.",
    source="Behrouz et al. 2024 (arXiv 2501.00663)",
    setting=f"Streams: {BLOCKS} blocks of {PAIRS} pairs of width {WIDTH}, each shown {SHOWN} times. Depth: pairs of "
    f"width {NARROW}, {PASSES} passes, momentum {ETA}. Trained: two blocks of width 64, multi-query recall of "
    f"{TASK['pairs']} pairs at {LENGTH} tokens, {STEPS_TRAINED} steps of {BATCH} new sequences; {TESTED} others to "
    f"test. Gates and steps of the first two and sizes of the third chosen on seed {CHOSEN_ON}; one learning rate for "
    "all.",
    paper="Perplexity, reasoning, long context at 340M and 15B tokens: memory 27.01, 47.83, 92.68; one layer 28.49, "
    "46.97, 85.34; no momentum 28.98, 45.49, 87.12; no forgetting 29.04, 45.11, 85.60; as gate 25.70, 48.60, 96.70.",
    measure=measure,
)
