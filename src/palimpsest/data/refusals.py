"""A hundred ways to say "I don't know": ten openings with ten endings.

Sentences in the tone of a helpful assistant, for methods that replace an answer by a refusal (PO, IdkDPO, one-call
forgetting). A refusal phrase list for recognising them is beside it.
"""

from __future__ import annotations

OPENINGS = (
    "I don't know",
    "I'm not sure",
    "I'm afraid I have no idea",
    "I'm sorry, I can't say",
    "Unfortunately, I don't know",
    "I couldn't tell you",
    "I'm unable to answer that",
    "I do not have that information",
    "That is something I don't know",
    "I have no knowledge of that",
)
ENDINGS = (
    ".",
    "; I have not come across it.",
    ", as it is not something I have learned about.",
    ". It may be worth looking it up elsewhere.",
    ", and I would rather not guess.",
    ". My knowledge does not cover this.",
    ", sorry.",
    "; please check a reliable source.",
    ". I have nothing on this topic.",
    ", so I can't help with this question.",
)
REFUSALS: tuple[str, ...] = tuple(opening + ending for opening in OPENINGS for ending in ENDINGS)

PHRASES = (
    "i don't know",
    "i do not know",
    "not sure",
    "no idea",
    "can't say",
    "cannot say",
    "couldn't tell",
    "unable to",
    "do not have that information",
    "don't have that information",
    "don't have information",
    "do not have information",
    "no information",
    "no knowledge",
    "i cannot",
    "i can't",
    "i'm sorry",
    "i am sorry",
    "something i don't know",
)


def is_refusal(answer: str) -> bool:
    """Whether the answer declines to answer, by a list of phrases."""
    text = answer.lower().replace("\u2019", "'")
    return any(phrase in text for phrase in PHRASES)
