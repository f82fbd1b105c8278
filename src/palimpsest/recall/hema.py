"""A memory for conversations of any length: a summary that is always in the prompt, and all that was said, searchable.

*Compact memory* is a short summary, rewritten after every turn and condensed from its archived versions now and then;
*vector memory* keeps every utterance and brings the nearest ones back, word for word. A prompt made of both and the
last turns keeps to a token budget however long the conversation is. What is old and unused fades out of search; what
is to be forgotten is deleted so that none of its bytes are left. Use it where a conversation outgrows the context, or
where what was said must be found, corrected and truly deleted later. No language model and no server are needed.

Source: Ahn 2025 (arXiv 2504.16754); there is no official code.

    t        turns so far
    S_t      summary after turn t, at most `summary_tokens` tokens
    e_i      unit vector of chunk i (an utterance, split at sentence ends where it is long)
    a_i      t - turn of chunk i;  delta_i  1 where it was retrieved in the last `window` turns, else 0

    R_t = the k chunks with the largest <e_q, e_i>, without those of the last turns
    prompt = system, S_t-1, R_t in the order said, last turns, user       dropping the least similar of R_t to fit
    S_t = summarise(S_t-1, user + reply)
    every `cadence` turns:  archive S_t;  S_t = summarise("", all archived);
        fade the floor(fraction M + carry) chunks with the least w_i = lambda exp(-gamma a_i) + beta delta_i

The store is one SQLite file, or a PostgreSQL database with pgvector; see `sqlite_store` and `postgres_store`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import cached_property
from typing import Any, Literal, Self

from palimpsest.data.encoding import Encoder
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.recall import finding, reading
from palimpsest.recall.items import Gate, Items
from palimpsest.recall.memories import Change, Forgotten, Hit, Scope, Summary, View
from palimpsest.recall.opening import Opened, open_store
from palimpsest.recall.prompt import Prompt, compose
from palimpsest.recall.salience import Mode, least_salient, prune_count, recently_retrieved, salience
from palimpsest.recall.storage import MovedError
from palimpsest.recall.summary import ExtractiveSummariser, Summariser, without
from palimpsest.system import Store, setting, system

PAPER = "paper, implementation table"
OURS = "ours; the paper gives none"
SPOKEN = ("user", "assistant")
TRIES = 5


@system(
    "hema",
    verb="recall",
    title="Compact and vector memory of a conversation",
    paper="Ahn 2025 (arXiv 2504.16754)",
    takes="none",
    fidelity="paper only",
    deviations=(
        "salience rewards what was retrieved lately, as the text says; the printed formula rewards the opposite",
        "the number of chunks that fade carries its fraction over, so that small stores forget, too",
        "the summary is made of whole sentences of what was said; any other summariser can be given",
        "search is exact up to 50,000 chunks, then by cells without product quantisation",
        "faded chunks leave the search but stay in the store until they are forgotten",
    ),
)
class ConversationMemory(Store):
    """One user's memory in a store; every change is on the disk before the call returns."""

    store: str = setting(default=":memory:", origin="ours", help="file, or postgresql:// address")
    user: str = setting(default="default", origin="ours", help="whose memory it is")
    agent: str | None = setting(default=None, origin="ours", help="which agent's; none looks at all")
    run: str | None = setting(default=None, origin="ours", help="which conversation; none looks at all")
    encoder: str | None = setting(default=None, origin="ours", help="the store's own, else all-MiniLM-L6-v2")
    k: int = setting(default=8, at_least=1, origin=OURS, help="chunks that are retrieved for a prompt")
    budget: int = setting(default=3500, at_least=1, origin=PAPER, help="longest prompt, tokens of its reader")
    tail: int = setting(default=2, at_least=0, origin="paper, prompt template", help="last turns in the prompt")
    strength: float = setting(default=1.0, at_least=0, origin=PAPER, help="lambda, salience of what is new")
    decay: float = setting(default=0.002, at_least=0, origin=PAPER, help="gamma, per turn")
    bonus: float = setting(default=0.5, at_least=0, origin=PAPER, help="beta, for what was retrieved lately")
    window: int = setting(default=100, at_least=0, origin=PAPER, help="turns that count as lately")
    formula: Mode = setting(default="intended", origin="paper, text", help="as-printed: its formula")
    cadence: int = setting(default=100, at_least=1, origin=PAPER, help="turns between two prunings")
    fraction: float = setting(default=0.005, at_least=0, at_most=1, origin=PAPER, help="share that fades each time")
    summary_tokens: int = setting(default=60, at_least=1, origin=PAPER, help="longest summary, encoder's tokens")
    chunk_tokens: int = setting(default=256, at_least=8, origin=OURS, help="longest chunk, encoder's tokens")
    ranking: finding.Ranking = setting(default="dense", origin="paper", help="words: BM25; fused: both by rank")
    repeated: Literal["merge", "keep"] = setting(
        default="merge", origin="mem0", help="what `add` does with a known text"
    )
    diversity: float = setting(
        default=0.0,
        at_least=0,
        at_most=1,
        origin="ours",
        help="how unlike each other hits should be",
    )
    exact_below: int = setting(default=50_000, at_least=0, origin="ours", help="chunks that are searched one by one")

    @classmethod
    def open(
        cls,
        store: str,
        *,
        encoder: Any = None,
        summariser: Summariser | None = None,
        gate: Gate | None = None,
        reranker: finding.Reranker | None = None,
        must_exist: bool = False,
        read_only: bool = False,
        **settings: Any,
    ) -> Self:
        """The memory in a store, opened now; `encoder` may be an object with `name`, `width`, `encode`, `lengths`.

        `gate(record)` gives what every record is stored as, or raises: the place for taking out what is private.
        `reranker(query, texts)` gives scores by which the nearest candidates are ordered anew.
        """
        named = encoder if encoder is None or isinstance(encoder, str) else str(encoder.name)
        memory = cls(store=str(store), encoder=named, **settings)
        given = None if named is encoder else encoder
        memory.__dict__["_open"] = open_store(memory.store, named, given, must_exist=must_exist, read_only=read_only)
        own = {"summariser": summariser, "gate": gate, "reranker": reranker}
        memory.__dict__.update({name: value for name, value in own.items() if value is not None})
        return memory

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection to the store."""
        self._open.engine.close()

    @cached_property
    def _open(self) -> Opened:
        return open_store(self.store, self.encoder)

    @cached_property
    def summariser(self) -> Summariser:
        """What rewrites the compact memory."""
        return ExtractiveSummariser(self._open.encoder, self._open.encoder.lengths, self.summary_tokens)

    @cached_property
    def items(self) -> Items:
        """The memories one by one: look up, supersede, undo, pin, expire, restore, forget what a request means."""
        scope = Scope(user=self.user, agent=self.agent, run=self.run)
        return Items(
            opened=self._open,
            scope=scope,
            rewrite=self._rewritten,
            chunk_tokens=self.chunk_tokens,
            repeated=self.repeated,
            gate=vars(self).get("gate"),
        )

    @property
    def summary(self) -> str:
        """The compact memory."""
        return self.items.state.summary

    # --- the conversation --------------------------------------------------------------------------------------------

    def compile_prompt(
        self,
        user: str,
        tokenizer: Any,
        *,
        budget: int | None = None,
        system: str = "",
        touch: bool = True,
        strict: bool = True,
    ) -> Prompt:
        """The prompt for the user's text, counted by the tokenizer of the model that will read it."""
        budget, items = self.budget if budget is None else budget, self.items
        reader = Encoder(tokenizer, budget)
        last = reading.spoken(self._open.engine, items.sight(), self.tail, SPOKEN)
        shown = frozenset(items.numbers([memory.identity for memory in last]))  # not to be paid for twice
        hits = self.search(user, self.k, touch=touch, skip=shown)
        return compose(
            system,
            self.summary,
            hits,
            last,
            user,
            budget=budget,
            count=lambda messages: len(reader.conversation(messages)),
            strict=strict,
        )

    def add_turn(self, user: str, reply: str = "", *, happened: float | None = None) -> list[str]:
        """Stores what both said, rewrites the summary, and every `cadence` turns condenses it and lets chunks fade."""
        if not user.strip():
            raise PalimpsestError("the user's text is empty; there is no turn to remember.")
        said = {role: text for role, text in zip(SPOKEN, (user, reply), strict=True) if text.strip()}
        news = [self.items.news(Record(text=text), role=role, happened=happened) for role, text in said.items()]
        words = "\n".join("".join(chunk.text for chunk in chunks) for chunks in news)  # as the gate let them in
        for attempt in range(TRIES):
            # others may write while a summary is made; who keeps being too slow makes it while they wait
            with self._open.engine.transaction() if attempt == TRIES - 1 else nullcontext():
                state = self.items.state
                summary = self.summariser(state.summary, words)
                versions = [("running", summary)]
                if self._due(state.turn + 1, state.archived):
                    archived = [*(old.text for old in self.items.summaries() if old.kind == "archived"), summary]
                    versions += [("archived", summary), ("overall", self.summariser("", "\n".join(archived)))]
                with suppress(MovedError):
                    heads = self._open.storage.add(
                        self.items.scope,
                        news,
                        time.time(),
                        expected=state,
                        versions=versions,
                        extractive=self.summariser.extractive,
                    )
                    break
        if self._due(state.turn + 1, state.pruned):
            with self._open.engine.transaction():
                now = self.items.state
                if self._due(now.turn, now.pruned):  # no other process was quicker
                    self.prune()
            self._open.engine.accelerate(self.exact_below)
        return [str(head) for head in heads]

    def _due(self, turn: int, last: int) -> bool:
        """Whether a multiple of `cadence` lies after the last time, up to this turn."""
        return turn // self.cadence > last // self.cadence

    def prune(self, *, dry_run: bool = False) -> dict[str, str]:
        """Lets the least salient chunks fade; which, by identity, and why. `items.restore` brings one back."""
        engine = self._open.engine
        with nullcontext() if dry_run else engine.transaction():  # others must not prune by the same state
            state, ages = self.items.state, engine.ages(self.items.sight())
            count, carry = prune_count(len(ages.number), self.fraction, state.carry)
            weights = self._weights(ages.turn, ages.last_retrieved, state.turn)
            chosen = least_salient(weights, ages.turn, ages.number, ages.pinned, count)
            reasons = {
                int(ages.number[i]): f"salience {weights[i]:.3f}, {state.turn - int(ages.turn[i])} turns old, "
                + (f"last retrieved in turn {last}" if (last := ages.last_retrieved[i]) >= 0 else "never retrieved")
                for i in chosen.tolist()
            }
            if not dry_run:
                self._open.storage.fade(self.items.scope, reasons, carry, state.turn, time.time())
        heads = reading.chunks(engine, list(reasons))
        return {str(heads[number][0]): reason for number, reason in reasons.items()}

    # --- the store ---------------------------------------------------------------------------------------------------

    def add(self, record: Record, **how: Any) -> str:
        """The identity of what was stored; takes `metadata`, `happened`, `expires`, `pinned`, `role`, `vector`."""
        vector = how.pop("vector", None)
        return self.items.add([record], vectors=None if vector is None else [vector], **how)[0]

    def search(
        self,
        query: str,
        limit: int = 10,
        *,
        vector: Any = None,
        view: View = "current",
        as_of: float | None = None,
        where: Mapping[str, Any] | None = None,
        ranking: finding.Ranking | None = None,
        diversity: float | None = None,
        touch: bool = True,
        skip: frozenset[int] = frozenset(),
    ) -> list[Hit]:
        """The nearest chunks, best first; `diversity` from 0 to 1 makes them differ from each other.

        Being found counts as use, and delays fading, unless not `touch`.
        """
        sight, turn = self.items.sight(view, as_of=as_of, without=skip), self.items.state.turn
        asked = finding.Question(
            query,
            vector,
            limit,
            where,
            ranking or self.ranking,
            self.diversity if diversity is None else diversity,
            vars(self).get("reranker"),
        )
        hits = finding.find(self._open, asked, sight, lambda since, last: self._weights(since, last, turn))
        if touch and hits and not self._open.engine.read_only:
            self._open.storage.touch([hit.number for hit in hits], turn)
        return hits

    def update(self, identity: str, record: Record) -> None:
        """Replaces a memory; the history keeps what it was."""
        self.items.update(identity, record)

    def forget(self, identity: str, *, reason: str = "asked for", dry_run: bool = False) -> Forgotten:
        """Deletes a memory for good: once it returned, none of its bytes are left in the files of an embedded store."""
        return self.items.forget({identity: reason}, dry_run=dry_run)

    def history(self, identity: str | None = None) -> list[Change]:
        """Every change, oldest first; of one memory, or of all."""
        return self.items.history(identity)

    def _rewritten(self, summary: Summary, texts: Sequence[str]) -> str | None:
        """A summary without what is forgotten; one that is not made of sentences cannot be trusted, and goes."""
        return without(summary.text, texts) if self.summariser.extractive else None

    def _weights(self, turn: Any, last_retrieved: Any, now: int) -> Any:
        delta = recently_retrieved(now, last_retrieved, self.window)
        return salience(now - turn, delta, self.strength, self.decay, self.bonus, self.formula)
