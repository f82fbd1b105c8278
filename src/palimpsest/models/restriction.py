"""Decoding that turns away from phrases: what each next token is charged for, in generation and in scoring.

    log p    log-probability of a candidate     s    the text with it
    r        largest matched share of a phrase at the end of s
    W        last w words of s, at word ends    w    words of the longest phrase + 2
    c        max_f cos(enc(W), enc(f))          l    weights

    hard        s ends, or has just ended, a phrase                                  dropped
    look-ahead  s ends inside a phrase                                               - l_p r
    soft        a word ends with the candidate, c > delta                            - l_s (c - delta) / (1 - delta)
                                                c > delta_hard                       dropped

Candidates are the 2 B + c' likeliest tokens of each of B beams; where all of all beams are dropped, four times as many,
and where they are dropped too the sequence ends, or is the refusal if nothing was said yet. It is a processor of logits
for transformers' own greedy decoding, sampling and beam search, which take sums of what it returns: beams, their length
normalisation and their caches are those of transformers, so that nothing but the charges differs from a search without
them. States are kept by the tokens that led to them, which is right whichever beams survive. Sampling draws from all
tokens that are not dropped.

A word ends where the next token begins with anything but a letter or digit, so its window is the same for all of those
tokens: one text a beam for the encoder, and tokens with whole words inside only where they are candidates.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from palimpsest.data.forbidden import spelled
from palimpsest.errors import PalimpsestError
from palimpsest.models.encoder import SentenceEncoder
from palimpsest.models.phrases import Automaton, Pieces, advance
from palimpsest.system import setting, settings

WIDER = 4


@settings
class Guarding:
    """What is guarded and how hard the decoder is turned away; all of it can be changed on a guarded model."""

    threshold: float | None = setting(
        default=None, at_least=0, origin="card", help="probability from which a prompt is guarded; None: validated"
    )
    items: int = setting(default=1, at_least=1, origin="card", help="most similar forget items whose phrases count")
    scope: Literal["item", "subject"] = setting(
        default="subject",
        origin="ours; card: item",
        help="whether all that is indexed about the subject of a retrieved item counts, or the item alone",
    )
    tie: float = setting(default=0.02, at_least=0, origin="card", help="cosine within which items count as equal")
    beams: int = setting(default=4, at_least=1, origin="card", help="beams of a guarded answer; 1: greedy")
    candidates: int = setting(default=8, at_least=0, origin="card", help="candidates of a beam above twice the beams")
    hard_match: bool = setting(default=True, origin="card", help="phrases are never completed")
    prefix_weight: float = setting(default=2.0, at_least=0, origin="card", help="lambda_p, charge for begun phrases")
    soft_weight: float = setting(default=10.0, at_least=0, origin="card", help="lambda_s, charge for likeness")
    similarity: float = setting(default=0.6, above=0, below=1, origin="card", help="delta, cosine that is charged")
    drop_similarity: float = setting(
        default=0.85, above=0, at_most=1, origin="card", help="delta_hard, cosine that is dropped; 1: none is"
    )
    floor: float = setting(default=20.0, above=0, origin="card", help="charge for a hard match in scoring, nats")
    refusal: str = setting(
        default="I'm sorry, I can't say.", origin="ours", help="the answer where nothing else is left"
    )

    def __post_init__(self) -> None:
        if self.drop_similarity <= self.similarity:
            raise PalimpsestError(
                f"drop_similarity is {self.drop_similarity:g}, expected above similarity ({self.similarity:g})."
            )
        if not self.refusal.strip():
            raise PalimpsestError("refusal is empty: there must be something to say where nothing else is left.")

    @property
    def soft(self) -> bool:
        """Whether likeness counts at all."""
        return self.soft_weight > 0 or self.drop_similarity < 1

    @property
    def idle(self) -> bool:
        """Whether no phrase can change anything."""
        return not (self.hard_match or self.prefix_weight or self.soft)


@dataclass
class Step:
    """One step of the best beam: its text so far, and the candidates that were dropped or charged (nats)."""

    text: str
    dropped: tuple[str, ...]
    penalised: dict[str, float]


@dataclass
class Decision:
    """What was decided about one prompt, and what the decoder met with; `forced` is how the answer was cut short."""

    probability: float
    threshold: float
    guarded: bool
    items: tuple[str, ...] = ()
    similarity: tuple[float, ...] = ()
    phrases: tuple[str, ...] = ()
    dropped: int = 0
    penalised: int = 0
    forced: str = ""
    answer: str = ""
    trace: list[Step] = field(default_factory=list)


class Forbidden:
    """Phrases as the decoder needs them: their automaton, their vectors, and what was found out on the way."""

    def __init__(self, phrases: Sequence[str], pieces: Pieces, encoder: SentenceEncoder) -> None:
        self.automaton = Automaton(phrases)
        self.pieces = pieces
        self.words = max((len(phrase.split()) for phrase in self.automaton.phrases), default=0) + 2
        self._encoder = encoder
        self._vectors: Float[Tensor, "phrases width"] | None = None
        self._likeness: dict[str, float] = {}
        self._charges: dict[tuple[int, tuple[int, ...]], tuple[Tensor, Tensor, Tensor]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Forbidden:
        return self  # copies of a model share it: it never changes but for what it remembers

    def begin(self, prompt: str) -> int:
        """The state after a prompt: a phrase may begin in it."""
        longest = max(map(len, self.automaton.phrases), default=0)
        return self.automaton.read(self.automaton.begin, spelled(prompt[-4 * longest - 16 :]))

    def charged(
        self, state: int, pending: tuple[int, ...], device: torch.device
    ) -> tuple[Int[Tensor, " tokens"], Float[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
        """Tokens that hit or begin a phrase, the matched share r, and which of them hit."""
        if (state, pending) not in self._charges:
            states, hits = self.pieces.outcomes(self.automaton, state, pending)
            share = np.where(self.pieces.blank, 0, self.automaton.fraction[states])
            place = np.flatnonzero(hits | (share > 0))
            found = (torch.from_numpy(place), torch.from_numpy(share[place]).float(), torch.from_numpy(hits[place]))
            self._charges[state, pending] = tuple(part.to(device) for part in found)  # type: ignore[assignment]
        return self._charges[state, pending]

    def likeness(self, windows: Sequence[str]) -> list[float]:
        """The largest cosine of each text with a phrase; new texts are encoded in one batch."""
        if not self.automaton.phrases:
            return [-1.0] * len(windows)
        if self._vectors is None:
            self._vectors = self._encoder.encode(self.automaton.phrases)
        new = [text for text in dict.fromkeys(windows) if text not in self._likeness]
        if new:
            best = (self._encoder.encode(new) @ self._vectors.T).amax(1).tolist()
            self._likeness.update(zip(new, best, strict=True))
        return [self._likeness[text] for text in windows]

    def scored(self, tokens: Sequence[int], prompt: str, rule: Guarding, device: torch.device) -> list[_Charges]:
        """The charges of all tokens at each position of an answer and after it: hard matches and begun phrases."""
        node, found = self.begin(prompt), []
        pending: tuple[int, ...] = ()
        for token in (*tokens, None):
            place, share, hit = self.charged(node, pending, device)
            charge = rule.prefix_weight * share
            found.append((place, torch.where(hit, rule.floor, charge) if rule.hard_match else charge))
            if token is not None:
                text, pending = self.pieces.read(token, pending)
                node, _ = advance(self.automaton, node, spelled(text))
        return found


_Charges = tuple[Int[Tensor, " tokens"], Float[Tensor, " tokens"]]


@dataclass(slots=True)
class _State:
    """A beam: where its text is in the automaton, and whether it is over or was dropped."""

    node: int
    text: str = ""
    pending: tuple[int, ...] = ()
    ended: bool = False
    dead: bool = False
    dropped: Tensor | None = None  # by token, what the step after this state took away


class Restriction(LogitsProcessor):
    """Charges the next tokens of every beam; `decisions` of the prompts are filled in on the way."""

    def __init__(
        self,
        rule: Guarding,
        forbidden: Sequence[Forbidden],
        prompts: Sequence[str],
        decisions: Sequence[Decision],
        stop: Sequence[int],
        refusal: Sequence[int],
        *,
        rows: int,
        sampling: bool,
        tracing: bool = False,
    ) -> None:
        self.rule, self.forbidden, self.decisions = rule, forbidden, decisions
        self.stop, self.refusal = list(stop), tuple(refusal)
        self.rows, self.sampling, self.tracing = rows, sampling, tracing
        self.begin = [each.begin(prompt) for each, prompt in zip(forbidden, prompts, strict=True)]
        self._width: int | None = None
        self._states: dict[tuple[int, tuple[int, ...]], _State] = {}
        self._closing: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores with the charges; dropped candidates, and without sampling all that are none, are -inf."""
        if self._width is None:
            self._width = input_ids.shape[1]
        said = [tuple(row) for row in input_ids[:, self._width :].tolist()]
        known = {(i // self.rows, tokens): self._state(i // self.rows, tokens) for i, tokens in enumerate(said)}
        self._states = known
        states = [known[i // self.rows, tokens] for i, tokens in enumerate(said)]
        charged = self._charge(states, scores)
        result = scores.clone()
        for prompt in range(len(states) // self.rows):
            rows = range(prompt * self.rows, (prompt + 1) * self.rows)
            live = [i for i in rows if not (states[i].ended or states[i].dead)]
            if self.decisions[prompt].forced == "refusal":
                self._refuse(result, scores, live, said)
            elif live:
                self._restrict(prompt, result, scores, charged, live, states, said)
        for i, state in enumerate(states):
            state.dropped = torch.isneginf(result[i])
        return result

    def _state(self, prompt: int, tokens: tuple[int, ...]) -> _State:
        if not tokens:
            return _State(self.begin[prompt])
        if (prompt, tokens) in self._states:
            return self._states[prompt, tokens]
        last, token = self._states[prompt, tokens[:-1]], tokens[-1]
        dead = last.dead or (last.dropped is not None and bool(last.dropped[token]))
        if last.ended or token in self.stop:
            return _State(last.node, last.text, ended=True, dead=dead)
        each = self.forbidden[prompt]
        text, pending = each.pieces.read(token, last.pending)
        node, _ = advance(each.automaton, last.node, spelled(text))
        return _State(node, last.text + text, pending, dead=dead)

    def _charge(self, states: Sequence[_State], scores: Tensor) -> Tensor:
        """Scores less all charges; what is dropped is -inf."""
        rule, charged = self.rule, scores.clone()
        open_rows = [i for i, state in enumerate(states) if not (state.ended or state.dead)]
        closing = self._ending(scores)
        windows = {i: self._window(states[i].text, i) for i in open_rows if _inside_word(states[i].text)}
        likeness = self._likeness(windows) if rule.soft else {}
        for i in open_rows:
            place, share, hit = self.forbidden[i // self.rows].charged(states[i].node, states[i].pending, scores.device)
            charged[i, place] -= rule.prefix_weight * share
            if rule.hard_match:
                charged[i, place[hit]] = -torch.inf
            if i in likeness and (taken := self._taken(likeness[i])):
                charged[i, closing] -= taken
        if rule.soft:
            self._charge_inner(states, open_rows, scores, charged)
        return charged

    def _charge_inner(self, states: Sequence[_State], rows: Sequence[int], scores: Tensor, charged: Tensor) -> None:
        """The likeness of candidates that have whole words inside."""
        found: list[tuple[int, int]] = []
        for i in rows:
            pieces = self.forbidden[i // self.rows].pieces
            top = scores[i].topk(min(self._width_of_search(), scores.shape[-1])).indices.tolist()
            found += [(i, token) for token in top if pieces.inner[token]]
        texts: dict[tuple[int, int], str] = {}
        for i, token in found:
            text = states[i].text + self.forbidden[i // self.rows].pieces.texts[token]
            closed = re.match(r"(?s).*\w(?=\W)", text)
            if closed and len(closed[0]) > len(states[i].text):
                texts[i, token] = self._window(closed[0], i)
        for prompt in {i // self.rows for i, _ in texts}:
            own = [place for place in texts if place[0] // self.rows == prompt]
            for (i, token), c in zip(
                own, self.forbidden[prompt].likeness([texts[place] for place in own]), strict=True
            ):
                charged[i, token] -= self._taken(c)

    def _likeness(self, windows: dict[int, str]) -> dict[int, float]:
        found: dict[int, float] = {}
        for prompt in {i // self.rows for i in windows}:
            own = [i for i in windows if i // self.rows == prompt]
            found.update(zip(own, self.forbidden[prompt].likeness([windows[i] for i in own]), strict=True))
        return found

    def _taken(self, likeness: float) -> float:
        rule = self.rule
        if rule.drop_similarity < 1 and likeness > rule.drop_similarity:
            return torch.inf
        return rule.soft_weight * max(0.0, likeness - rule.similarity) / (1 - rule.similarity)

    def _window(self, text: str, row: int) -> str:
        return " ".join(text.split()[-self.forbidden[row // self.rows].words :])

    def _ending(self, scores: Tensor) -> Tensor:
        """Which tokens end a word that stands before them."""
        if self._closing is None:
            closing = np.array(self.forbidden[0].pieces.opens)
            closing[[token for token in self.stop if token < len(closing)]] = True
            self._closing = torch.from_numpy(closing).to(scores.device)
        return self._closing

    def _width_of_search(self) -> int:
        # transformers looks at one candidate more a beam for every end mark
        return max(2 * self.rows + self.rule.candidates, (1 + len(self.stop)) * self.rows)

    def _restrict(
        self,
        prompt: int,
        result: Tensor,
        scores: Tensor,
        charged: Tensor,
        live: Sequence[int],
        states: Sequence[_State],
        said: Sequence[tuple[int, ...]],
    ) -> None:
        """Writes what is left of the candidates, wider where none is, and an end where nothing is."""
        width, decision = self._width_of_search(), self.decisions[prompt]
        for wide in (width, WIDER * width):
            top = scores[live].topk(min(wide, scores.shape[-1])).indices
            left = charged[live].gather(1, top)
            if not torch.isneginf(left).all():
                break
        before = scores[live].gather(1, top)
        taken = torch.where(torch.isneginf(before), 0.0, before - left)
        decision.dropped += int(torch.isinf(taken).sum())
        decision.penalised += int((torch.isfinite(taken) & (taken > 0)).sum())
        if self.tracing:
            decision.trace.append(self._step(prompt, states[live[0]], top[0].tolist(), taken[0].tolist()))
        if torch.isneginf(left).all():
            decision.forced = "end" if said[live[0]] else "refusal"
            if decision.forced == "refusal":
                self._refuse(result, scores, live, said)
            else:
                for i in live:
                    self._force(result, scores, i, self.stop[0])
        elif self.sampling:
            result[live] = charged[live]
        else:
            result[live] = torch.full_like(charged[live], -torch.inf).scatter(1, top, left)

    def _step(self, prompt: int, state: _State, tokens: Sequence[int], taken: Sequence[float]) -> Step:
        texts = self.forbidden[prompt].pieces.texts
        shown = [(texts[token] or "(end)" if token in self.stop else texts[token], t)
                 for token, t in zip(tokens, taken, strict=True)]  # fmt: skip
        return Step(
            text=state.text,
            dropped=tuple(text for text, t in shown if t == torch.inf),
            penalised={text: t for text, t in shown if 0 < t < torch.inf},
        )

    def _refuse(self, result: Tensor, scores: Tensor, live: Sequence[int], said: Sequence[tuple[int, ...]]) -> None:
        for i in live:
            done = len(said[i])
            self._force(result, scores, i, (*self.refusal, self.stop[0])[min(done, len(self.refusal))])

    def _force(self, result: Tensor, scores: Tensor, row: int, token: int) -> None:
        score = scores[row, token]
        result[row] = -torch.inf
        result[row, token] = torch.where(torch.isfinite(score), score, 0.0)


def _inside_word(text: str) -> bool:
    """Whether a separator would end a word now."""
    return bool(text) and not spelled(text[-1]).endswith(" ") and spelled(text[-1]) != ""
