"""The rules behind the verdict: each looks at before, after and gold, and returns a finding or nothing.

Low recall alone is no success: a model that is wrecked, collapsed or merely silent is called that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

from palimpsest.report.groups import Comparison, Group
from palimpsest.report.metrics import ATTACKS, metric
from palimpsest.report.sentences import (
    KEPT,
    MARGIN,
    attack,
    kept,
    left,
    percent,
    recall,
    recall_name,
    recites,
    within_margin,
)

Tone = Literal["good", "mixed", "bad"]

FEW = 10
"""Fewer erased examples than this prove nothing."""
WRECKED = 0.80
"""Less utility than this share is a wrecked model."""
COLLAPSED = 0.30
"""How much more repetition, gibberish or refusal makes low recall worthless."""
SIGNIFICANT = 0.05
RELEARNS = 0.50
"""Below this robustness, what was erased comes back over twice as fast as it is learned."""
SURPRISED = 2.0
"""How many times the perplexity on general text may rise before the model counts as wrecked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is true of the erasure; `headline` says it in one sentence, `text` adds the numbers."""

    kind: str
    tone: Tone
    headline: str
    text: str = ""


Rule = Callable[[Comparison, str], Finding | None]


def unmeasured(sides: Comparison, who: str) -> Finding | None:
    """Nothing to judge: no erased model, no model before, or no recall measured on both."""
    if recall_name(sides) is not None:
        return None
    missing = "No erased model is among the evidence." if sides.after is None else ""
    missing = missing or ("No model from before the erasure is among the evidence." if sides.before is None else "")
    return Finding(
        kind="unmeasured",
        tone="bad",
        headline=f"Whether the model has forgotten {who} could not be measured.",
        text=missing or "Every probe of recall failed on the model before or on the erased one.",
    )


def nothing_to_forget(sides: Comparison, who: str) -> Finding | None:
    """The model before was no better than gold, so no erasure can be shown."""
    before, _, gold = recall(sides)
    if before is None or before.value - (gold.value if gold else 0.0) >= MARGIN:
        return None
    verb, _ = recites(sides, who)
    return Finding(
        kind="nothing to forget",
        tone="mixed",
        headline=f"There was nothing to forget: the model did not {verb} {who} in the first place.",
        text="Recall before the erasure was already that of a model without this knowledge, so this shows nothing.",
    )


def not_forgotten(sides: Comparison, who: str) -> Finding | None:
    """More than half of the recall above gold is left."""
    rest = left(sides)
    if rest is None or rest <= 0.5 or within_margin(sides):
        return None
    verb, what = recites(sides, who)
    headline = f"The model still {verb}s {what}."
    return Finding(kind="not forgotten", tone="bad", headline=headline, text=_rest(sides, rest))


def collapsed(sides: Comparison, who: str) -> Finding | None:
    """Recall is low because the model babbles, repeats itself or refuses."""
    symptoms = {
        "gibberish/forget": ("it answers in gibberish", "of its answers to the erased questions are gibberish"),
        "repetition/forget": ("it repeats itself", "of what it says to the erased questions is repetition"),
        "refusals/forget": ("it refuses to answer", "of the erased questions are refused"),
    }
    found = {name: excess for name in symptoms if (excess := _excess(sides, name)) > COLLAPSED}
    if not found or sides.after is None:
        return None
    worst = max(found, key=lambda name: found[name])
    cause, share = symptoms[worst]
    text = f"{percent(sides.after.number(worst) or 0)} {share}"
    text += "; a refusal hides knowledge, it does not remove it." if worst.startswith("refusals") else "."
    headline = f"{_no_longer(sides, who)}, but only because {cause}."
    return Finding(kind="collapsed", tone="bad", headline=headline, text=text)


def wrecked(sides: Comparison, who: str) -> Finding | None:
    """Much of what should have stayed is gone too."""
    share = kept(sides)
    before, after = (_number(group, "perplexity/general") for group in (sides.before, sides.after))
    surprise = after / before if before and after is not None else 1.0
    if (share is None or share >= WRECKED) and surprise <= SURPRISED:
        return None
    if share is not None and share < WRECKED:
        text = f"Only {percent(share)} of its general utility is left."
    else:
        text = f"Ordinary text surprises it {surprise:.1f} times as much as before (perplexity)."
    headline = f"{_no_longer(sides, who)}, but it lost much of everything else too."
    return Finding(kind="wrecked", tone="bad", headline=headline, text=text)


def hidden(sides: Comparison, who: str) -> Finding | None:
    """The words are gone but the erased answers are still far more probable to the model than to gold."""
    for name in ("probability/forget", "extraction_strength/forget", "knowledge_memory/forget"):
        before, after, gold = (_number(group, name) for group in (sides.before, sides.after, sides.gold))
        if name == recall_name(sides) or before is None or after is None:
            continue
        floor = gold if gold is not None else 0.0
        # A measure that hardly saw the memory before cannot show that it is still there.
        if before - floor <= MARGIN:
            continue
        # The margin grows with what there was to erase, so that a small remainder of a large memory is not an alarm.
        if after - floor > max(MARGIN, 0.25 * (before - floor)):
            label = metric(name).title.partition(",")[0].lower()
            against = f", {gold:.2f} in a model that never saw them" if gold is not None else ""
            headline = f"The model no longer says what it had learned about {who}, but it still knows it."
            return Finding(
                kind="hidden", tone="bad", headline=headline, text=f"The {label} is still {after:.2f}{against}."
            )
    return None


def still_found(sides: Comparison, who: str) -> Finding | None:
    """A membership attack beats chance, and beats what it does against gold."""
    worst: tuple[float, str] | None = None
    for slug, title in ATTACKS.items():
        found = sides.after.get(f"auc/{slug}") if sides.after else None
        if found is None:
            continue
        gold = _number(sides.gold, f"auc/{slug}")
        beyond = found.value - max(0.5, gold if gold is not None else 0.5)
        certain = found.low is None or found.low > 0.5
        if beyond > MARGIN and certain and (worst is None or found.value > worst[0]):
            worst = (found.value, title)
    if worst is None:
        return None
    # The sentence about the quoted attack already says its number; only another attack is news.
    quoted = (attack(sides) or "").removeprefix("auc/")
    text = (
        ""
        if ATTACKS.get(quoted) == worst[1]
        else f"The strongest attack ({worst[1]}) reaches an AUC of {worst[0]:.2f}."
    )
    headline = f"{_no_longer(sides, who)}, but an attacker can still tell that it was trained on them."
    return Finding(kind="still found", tone="bad", headline=headline, text=text)


def over_forgotten(sides: Comparison, who: str) -> Finding | None:
    """The model knows less than one that never saw the records: the hole itself gives them away."""
    _, after, gold = recall(sides)
    name = attack(sides)
    found = sides.after.get(name) if sides.after and name else None
    floor = _number(sides.gold, name) if name else None
    reasons = []
    if after is not None and gold is not None and after.value < gold.value - MARGIN:
        classifies = recall_name(sides) == "accuracy/forget"
        less = "it is right about them less often" if classifies else "it repeats less of the answers"
        reasons.append(f"{less} than a model that never saw them")
    limit = (0.5 if floor is None else min(floor, 0.5)) - MARGIN
    if found is not None and found.value < limit and (found.high is None or found.high < 0.5):
        reasons.append(f"the erased records are less familiar to it than unseen ones (AUC {found.value:.2f})")
    if not reasons:
        return None
    text = reasons[0][0].upper() + reasons[0][1:] + "".join(f", and {reason}" for reason in reasons[1:]) + "."
    headline = f"{_no_longer(sides, who)}, but the erasure went too far: the hole it left can be seen."
    return Finding(kind="over-forgotten", tone="mixed", headline=headline, text=text)


def partly(sides: Comparison, who: str) -> Finding | None:
    """Recall fell, but not to gold's."""
    rest = left(sides)
    if rest is None or within_margin(sides) or rest > 0.5:
        return None
    against = "more than a model that never saw them would" if recall(sides)[2] else "a good part of it is left"
    verb, what = recites(sides, who)
    headline = f"The model {verb}s less of {what}, but {against}."
    return Finding(kind="partly forgotten", tone="mixed", headline=headline, text=_rest(sides, rest))


def damaged(sides: Comparison, who: str) -> Finding | None:
    """Some of what should have stayed is gone."""
    share = kept(sides)
    if share is None or not WRECKED <= share < KEPT:
        return None
    headline = f"{_no_longer(sides, who)}, at a price: it kept {percent(share)} of its general utility."
    return Finding(kind="damaged", tone="mixed", headline=headline)


def returns(sides: Comparison, who: str) -> Finding | None:
    """Relearning brings the knowledge back faster than a fresh model learns it."""
    robustness = _number(sides.after, "robustness")
    if robustness is None or robustness >= RELEARNS:
        return None
    text = "After a little training on a few erased records the rest returns"
    text += f" {1 / robustness:.1f} times as fast" if robustness > 0.05 else " many times as fast"
    text += " as a model that never saw them learns it: part of it was hidden, not removed."
    return Finding(
        kind="returns", tone="mixed", headline=f"{_no_longer(sides, who)}, but it is quickly taught again.", text=text
    )


def told_apart(sides: Comparison, who: str) -> Finding | None:
    """A test on truth ratios tells the model from gold."""
    quality = sides.after.get("forget_quality") if sides.after else None
    if quality is None or quality.value >= SIGNIFICANT:
        return None
    shown = metric("forget_quality").show(quality.value)
    text = f"A statistical test tells its judgement of right and wrong answers from gold's (forget quality p = {shown})"
    side = _side(sides)
    headline = f"{_no_longer(sides, who)}, but it can still be told from a model that never saw them."
    return Finding(kind="told apart", tone="mixed", headline=headline, text=text + (f": {side}." if side else "."))


def no_gold(sides: Comparison, who: str) -> Finding | None:
    """There is no recall of a model that never saw the records to compare with."""
    before, _, gold = recall(sides)
    if gold is not None or before is None:
        return None
    verb, what = recites(sides, who)
    headline = f"The model {verb}s far less of {what}, but nothing proves that it forgot."
    text = "No model that never saw them was measured, so what not knowing would look like is not known here."
    return Finding(kind="no gold", tone="mixed", headline=headline, text=text)


def too_few(sides: Comparison, who: str) -> Finding | None:
    """So few examples, or so wide an interval, that the outcome may be luck."""
    before, after, gold = recall(sides)
    if before is None or after is None:
        return None
    halfway = (before.value + (gold.value if gold else 0.0)) / 2
    if after.n >= FEW and (after.high is None or after.high < halfway):
        return None
    count = "1 example" if after.n == 1 else f"{after.n} examples"
    verb, what = recites(sides, who)
    headline = f"On {count} the model no longer {verb}s {what}; that is too few to prove it."
    return Finding(kind="too few", tone="mixed", headline=headline, text=f"With only {count}, this may be luck.")


def forgotten(sides: Comparison, who: str) -> Finding | None:
    """Recall is gold's: the good case, and only a headline where no graver finding stands before it."""
    if not within_margin(sides):
        return None
    return Finding(kind="forgotten", tone="good", headline=f"{_no_longer(sides, who)}.")


RULES: tuple[Rule, ...] = (
    unmeasured,
    nothing_to_forget,
    not_forgotten,
    collapsed,
    wrecked,
    hidden,
    still_found,
    over_forgotten,
    partly,
    damaged,
    returns,
    told_apart,
    no_gold,
    too_few,
    forgotten,
)
"""In order of gravity: the first that finds something gives the headline."""


def _no_longer(sides: Comparison, who: str) -> str:
    verb, what = recites(sides, who)
    return f"The model {f'no longer {verb}s' if within_margin(sides) else f'{verb}s less of'} {what}"


def _rest(sides: Comparison, rest: float) -> str:
    beyond = " beyond a model that never saw them" if recall(sides)[2] else ""
    return f"{percent(min(rest, 1.0))} of what it knew{beyond} is still there."


def _number(group: Group | None, name: str) -> float | None:
    return group.number(name) if group else None


def _excess(sides: Comparison, name: str) -> float:
    after = _number(sides.after, name)
    usual = [number for group in (sides.before, sides.gold) if (number := _number(group, name)) is not None]
    return 0.0 if after is None else after - max(usual, default=0.0)


def _side(sides: Comparison) -> str:
    arrays = [group.arrays("truth_ratio/forget") if group else [] for group in (sides.after, sides.gold)]
    if not all(arrays):
        return ""
    after, gold = (float(np.median(np.concatenate(found))) for found in arrays)
    return "it still leans towards the right answers" if after < gold else "it leans away from the right answers"
