"""Causal tracing: where in a network, and at which words, a fact is recalled.

The subject's embeddings are drowned in noise, so that the network no longer knows whom a sentence is about; then one
inner state after the other is put back to what it was. Where that brings the answer back, the recall passes through.

Source: Meng et al. 2022 (arXiv 2202.05262), section 2; windows as in the code of MEMIT. Differs: the answer token is
the first one that carries the fact, so that answers which repeat their question can be traced; all occurrences of the
subject are corrupted.

    nu                       noise level: `noise` times the standard deviation of all subject embeddings
    p_clean     [facts]      probability of the answer token, nothing changed
    p_corr      [facts]      the same with a corrupted subject, mean over the noise samples
    IE(t, l)                 p with the state at token t, layer l put back, minus p_corr; AIE: mean over facts
    TE                       p_clean - p_corr
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.data.content import carries_fact
from palimpsest.data.encoding import Encoder
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.models.anatomy import anatomy
from palimpsest.models.generation import keeps_cache
from palimpsest.models.hooks import Call, watch
from palimpsest.models.model import Model
from palimpsest.run import Run


class NothingToTraceError(PalimpsestError):
    """The model knows none of the facts."""


class UntraceableError(PalimpsestError):
    """The record does not say of what subject it tells, or not before its answer."""


Kind = Literal["residual", "mlp", "attention"]

PLACES = ("before", "first subject token", "middle subject tokens", "last subject token", "between", "last token")
"""Rows of the effects: tokens by their place relative to the subject's last occurrence."""
SUBJECT = PLACES[1:4]
"""The subject's own rows, which are all that `Trace.layers` looks at."""
ROW_TOKENS = 8192
"""Tokens computed at once."""


@dataclasses.dataclass(frozen=True, eq=False)
class Fact:
    """A sentence cut before its answer token, and where its subject stands."""

    tokens: tuple[int, ...]
    answer: int
    spans: tuple[tuple[int, int], ...]

    @property
    def subject(self) -> list[int]:
        """The positions of the subject's tokens."""
        return [place for start, end in self.spans for place in range(start, end)]

    def places(self) -> Int[Tensor, " tokens"]:
        """For each token its row in `PLACES`."""
        start, end = self.spans[-1]
        place = torch.zeros(len(self.tokens), dtype=torch.long)
        place[start:end] = 2
        place[start], place[end:] = 1, 4
        place[end - 1] = 3
        place[-1] = 5 if end < len(self.tokens) else place[-1]
        return place


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """Average indirect effects, rows as `PLACES` (NaN where no token was traced), and probabilities a fact."""

    kind: Kind
    effects: Float[Tensor, "places layers"]
    p_clean: Float[Tensor, " facts"]
    p_corrupted: Float[Tensor, " facts"]
    skipped: int

    @property
    def total_effect(self) -> float:
        """TE, mean over facts."""
        return float((self.p_clean - self.p_corrupted).mean())

    def layers(self, width: int | None = None) -> tuple[int, ...]:
        """The contiguous layers with the largest effect at the subject; a third of all by default, rounded up."""
        by_layer = self.effects[1:4].nanmean(0)
        width = width or third(len(by_layer))
        sums = by_layer.unfold(0, width, 1).sum(-1)
        start = int(sums.argmax())
        return tuple(range(start, start + width))


def third(layers: int) -> int:
    """A third of the layers, rounded up."""
    return math.ceil(layers / 3)


def default_window(layers: int) -> int:
    """How many layers around one are put back together: 10 of 16 and more, 0.3 of the depth below."""
    return 10 if layers >= 16 else max(1, round(0.3 * layers))


@torch.inference_mode()
def trace(
    model: Model,
    records: Sequence[Record | Fact],
    run: Run,
    *,
    kind: Kind = "mlp",
    noise: float = 3.0,
    samples: int = 10,
    window: int | None = None,
    places: Sequence[str] = PLACES,
) -> Trace:
    """The effects of putting back the outputs of blocks, MLPs or attentions, at every layer and token of `places`.

    `window` layers around each are put back together (one for `residual`); 0 means one. Facts whose answer token the
    model does not predict are skipped and counted. Raises where a subject is not in its sentence, or no fact is left.
    Every token costs a forward pass over the rest of the sentence for each layer and sample.
    """
    network = model.network.eval()
    modules = _modules(network, kind)
    facts = [record if isinstance(record, Fact) else fact_of(model, record) for record in records]
    known = [fact for fact in facts if _predicted(network, fact, model.device) == fact.answer]
    if not known:
        raise NothingToTraceError(
            f"none of {len(facts)} facts can be traced: the model predicts the answer token of none of them."
        )
    width = 1 if kind == "residual" else (default_window(len(modules)) if window is None else max(1, window))
    level = noise * _spread(network, known, model.device)
    effects = torch.zeros(len(PLACES), len(modules), dtype=torch.float64)
    counts = torch.zeros(len(PLACES), 1, dtype=torch.float64)
    clean, corrupted = [], []
    for fact in run.track(known, "tracing"):
        tracer = _Tracer(network, modules, fact, level, samples, width, run, model.device)
        rows = fact.places()
        traced = torch.isin(rows, torch.tensor([PLACES.index(place) for place in places])).nonzero()[:, 0]
        effects.index_add_(0, rows[traced], tracer.effects(traced))
        counts.index_add_(0, rows[traced], torch.ones(len(traced), 1, dtype=torch.float64))
        clean.append(tracer.p_clean)
        corrupted.append(tracer.p_corrupted)
    return Trace(
        kind=kind,
        effects=torch.where(counts > 0, effects / counts, math.nan).float(),
        p_clean=torch.tensor(clean),
        p_corrupted=torch.tensor(corrupted),
        skipped=len(facts) - len(known),
    )


class _Tracer:
    """All traces of one fact: row 0 is clean, every cell (token, layer) has `samples` corrupted rows.

    What stands before a token is the same in all of its cells, so it is computed once and kept as the network's cache.
    """

    def __init__(
        self,
        network: Any,
        modules: dict[str, Any],
        fact: Fact,
        level: float,
        samples: int,
        width: int,
        run: Run,
        device: torch.device,
    ) -> None:
        self.network, self.modules, self.fact, self.samples, self.width = network, modules, fact, samples, width
        self.device = device
        self.names = {name: layer for layer, name in enumerate(modules)}
        size = network.get_input_embeddings().weight.shape[1]
        drawn = torch.randn(samples, len(fact.subject), size, generator=run.generator())
        self.noise = level * drawn.to(device)
        self.p_clean = self.p_corrupted = math.nan

    def effects(self, tokens: Int[Tensor, " traced"]) -> Float[Tensor, "traced layers"]:
        """IE(t, l) of these tokens, in their order; 0 before the first subject token, where nothing was changed."""
        layers, length = len(self.modules), len(self.fact.tokens)
        p, _ = self._run(torch.empty(0, dtype=torch.long), 0, length, None)
        self.p_clean, self.p_corrupted = float(p[0]), float(p[1:].mean())
        effect = torch.zeros(len(tokens), layers, dtype=torch.float64)
        past, start = None, 0
        for row, token in enumerate(tokens.tolist()):
            if token < self.fact.spans[0][0]:
                continue
            if token > start and keeps_cache(self.network):
                _, past = self._run(torch.empty(0, dtype=torch.long), start, token, past)
                start = token
            at_once = max(1, ROW_TOKENS // ((length - start) * self.samples))
            for part in torch.arange(layers).split(at_once):
                p, _ = self._run(part, start, length, self._repeated(past, len(part)), token)
                effect[row, part] = p[1:].view(len(part), -1).double().mean(1) - self.p_corrupted
        return effect

    def _repeated(self, past: Any, groups: int) -> Any:
        """The cache of the clean row and of the corrupted rows, these once a group."""
        if past is None:
            return None
        corrupted = torch.arange(1, 1 + self.samples, device=self.device).repeat(groups)
        past = copy.deepcopy(past)
        past.batch_select_indices(torch.cat([corrupted.new_zeros(1), corrupted]))
        return past

    def _run(
        self, layers: Int[Tensor, " groups"], start: int, end: int, past: Any, token: int = 0
    ) -> tuple[Float[Tensor, " rows"], Any]:
        """p of the clean row and of the corrupted ones, and the cache; tokens before `start` are in `past`.

        Every group of corrupted rows has its own layer, around which the states of `token` are put back.
        """
        groups = max(1, len(layers))
        ids = torch.tensor([self.fact.tokens[start:end]], device=self.device).expand(1 + groups * self.samples, -1)

        def forward(call: Call, output: Any) -> Any:
            if call.key == "embedding":
                return self._corrupted(output, groups, start, end)
            return self._restored(call.key, output, layers, token - start)

        embedding = self.network.get_input_embeddings()
        with watch({"embedding": embedding, **self.modules}, forward=forward):
            out = self.network(input_ids=ids, cache=past, use_cache=end < len(self.fact.tokens), logits_to_keep=1)
        return out.logits[:, -1].float().softmax(-1)[:, self.fact.answer], out.get("cache")

    def _corrupted(self, states: Tensor, groups: int, start: int, end: int) -> Tensor:
        subject = torch.tensor(self.fact.subject)
        here = (subject >= start) & (subject < end)
        changed = states.clone()
        changed[1:, subject[here] - start] += self.noise[:, here].repeat(groups, 1, 1).to(states.dtype)
        return changed

    def _restored(self, name: str, output: Any, layers: Int[Tensor, " groups"], token: int) -> Any:
        states = output if isinstance(output, Tensor) else output[0]
        distance = self.names[name] - layers
        inside = (distance >= -(self.width // 2)) & (distance < self.width - self.width // 2)
        if not bool(inside.any()):
            return None
        rows = 1 + (inside.nonzero() * self.samples + torch.arange(self.samples)).flatten()
        changed = states.clone()
        changed[rows, token] = states[0, token]
        return changed if isinstance(output, Tensor) else (changed, *output[1:])


def fact_of(model: Model, record: Record) -> Fact:
    """The record up to its first answer token that carries the fact; raises where its subject does not occur in it."""
    if record.prompt is None or record.answer is None:
        raise UntraceableError(f'"{record.title}" cannot be traced: it has no prompt with an answer.')
    if not record.subject:
        raise UntraceableError(f'"{record.title}" cannot be traced: it has no subject.')
    sequence = Encoder.of(model).pair(record.prompt, record.answer)
    telling = carries_fact(model.tokenizer, sequence).nonzero().flatten().tolist() or [0]
    end = sequence.start + telling[0]
    tokens = sequence.tokens[:end]
    spans = find_spans(model.tokenizer, record.subject, tokens)
    if not spans:
        raise UntraceableError(f'"{record.title}" cannot be traced: its subject {record.subject!r} is not in it.')
    return Fact(tokens, sequence.tokens[end], spans)


def find_spans(tokenizer: Any, subject: str, tokens: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Where the subject's tokens stand, as half-open ranges; with and without a space in front of it."""
    wanted = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" " + subject, subject)]
    found = {
        (start, start + len(ids))
        for ids in wanted
        for start in range(len(tokens) - len(ids) + 1)
        if ids and list(tokens[start : start + len(ids)]) == list(ids)
    }
    return tuple(sorted(found))


def _modules(network: Any, kind: Kind) -> dict[str, Any]:
    parts = anatomy(network).select({"residual": "block", "mlp": "mlp", "attention": "attention"}[kind]).parts
    return {part.name: part.module for part in parts}


def _predicted(network: Any, fact: Fact, device: torch.device) -> int:
    ids = torch.tensor([fact.tokens], device=device)
    return int(network(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].argmax())


def _spread(network: Any, facts: Sequence[Fact], device: torch.device) -> float:
    """Standard deviation of all embedding entries of all subject tokens, as the network reads them (some scale)."""
    ids = torch.tensor([fact.tokens[place] for fact in facts for place in fact.subject], device=device)
    return float(network.get_input_embeddings()(ids).detach().float().std())
