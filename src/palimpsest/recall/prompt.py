"""The prompt of a turn: system, summary, retrieved memories, the last turns and the user's words, under a hard budget.

What was retrieved is shown in the order in which it was said, each with its turn; what does not fit is dropped from the
least similar on. Tokens are those of the tokenizer that will read the prompt, counted on the whole rendered prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from palimpsest.errors import PalimpsestError
from palimpsest.recall.memories import Hit, Memory

Messages = tuple[Mapping[str, str], ...]
Count = Callable[[Messages], int]
"""Tokens of the rendered conversation, with all that a chat template adds."""
SUMMARY = "Summary of the conversation so far: {summary}"
RETRIEVED = "From earlier in the conversation:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the model is given. `shares` are the tokens of each part; together they are `tokens`."""

    messages: Messages
    tokens: int
    shares: Mapping[str, int]
    kept: tuple[Hit, ...]
    dropped: tuple[Hit, ...]
    cut: int = 0


def messages_of(system: str, summary: str, hits: Sequence[Hit], tail: Sequence[Memory], user: str) -> Messages:
    """The conversation as chat messages; all that is not said by one of the two stands in the system message."""
    spoken = sorted(hits, key=lambda hit: (hit.memory.turn, hit.number))
    lines = [f"[turn {hit.memory.turn}] {hit.memory.role}: {hit.text.strip()}" for hit in spoken]
    about = [system.strip(), SUMMARY.format(summary=summary.strip()) if summary.strip() else ""]
    about.append("\n".join([RETRIEVED, *lines]) if lines else "")
    head = "\n\n".join(part for part in about if part)
    return (
        *([{"role": "system", "content": head}] if head else []),
        *({"role": memory.role, "content": memory.text} for memory in tail),
        {"role": "user", "content": user},
    )


def compose(
    system: str,
    summary: str,
    hits: Sequence[Hit],
    tail: Sequence[Memory],
    user: str,
    *,
    budget: int,
    count: Count,
    strict: bool = True,
) -> Prompt:
    """The prompt with as many hits (best first) as fit into `budget` tokens.

    Where the rest alone is too long, raises; unless not `strict`: then the oldest of the last turns are left out.
    """
    kept, tail, cut = list(hits), list(tail), 0
    while (tokens := count(messages := messages_of(system, summary, kept, tail, user))) > budget:
        if kept:
            kept.pop()
        elif tail and not strict:
            tail.pop(0)
            cut += 1
        else:
            parts = "summary, last turns and user's text" if tail else "summary and user's text"
            raise PalimpsestError(
                f"the budget is {budget} tokens, but system text, {parts} take {tokens}. Raise the budget"
                + (", or compose with strict=False." if tail else ".")
            )
    steps = {
        "system": (system, "", (), ()),
        "summary": (system, summary, (), ()),
        "retrieved": (system, summary, kept, ()),
        "last turns": (system, summary, kept, tail),
    }
    shares, before = {}, 0
    for name, given in steps.items():
        head = messages_of(*given, user)[:-1]
        total = count(head) if head else 0
        shares[name], before = total - before, total
    shares["user"] = tokens - before
    return Prompt(
        messages=messages, tokens=tokens, shares=shares, kept=tuple(kept), dropped=tuple(hits[len(kept) :]), cut=cut
    )
