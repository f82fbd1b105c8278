"""What each measured value means: its title, direction, format, how near is near, and what it is blind to."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from palimpsest.audit.reading import Better

Section = Literal["Forgetting", "Being found out", "What must stay", "Health of the text", "Other"]
Closeness = Literal["at", "near", "far"]
SECTIONS: tuple[Section, ...] = ("Forgetting", "Being found out", "What must stay", "Health of the text", "Other")
ROLES = {
    "forget": "erased records",
    "retain": "retained records",
    "real": "real people",
    "world": "world facts",
    "general": "general text",
    "holdout": "unseen records like them",
    "test": "unseen other records",
}
FORGOTTEN = ("forget", "holdout")
"""Roles that an erased model should know no better than one that never learned them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """Facts about one value. Up to `near` from gold a value is at gold, up to three times that near it."""

    title: str
    section: Section = "Other"
    better: Better = "none"
    near: float = 0.05
    relative: bool = False
    bounds: tuple[float, float] = (-math.inf, math.inf)
    style: Literal["share", "p", "decimal"] = "share"
    short: str = ""
    blind: str = ""

    def clip(self, number: float) -> float:
        """The number inside the bounds of the metric."""
        return min(max(number, self.bounds[0]), self.bounds[1])

    def show(self, number: float | None) -> str:
        """The number as text, with a true minus sign."""
        if number is None or not math.isfinite(number):
            return "\N{EM DASH}"
        if self.style == "p":
            return p_value(number)
        return f"{number:z.{1 if self.style == 'decimal' else 2}f}".replace("-", "\N{MINUS SIGN}")

    def closeness(self, number: float, gold: float) -> Closeness:
        """How close a value is to the gold model's."""
        if self.style == "p":
            return "at" if number >= 0.05 else "near" if number >= 0.001 else "far"
        distance = abs(number - gold) / (max(abs(gold), 1e-12) if self.relative else 1)
        # A hair more than the margin, so that 0.35 against 0.30 counts as 0.05 apart and not as 0.0500000001.
        return "at" if distance <= self.near + 1e-9 else "near" if distance <= 3 * self.near + 1e-9 else "far"


def p_value(p: float) -> str:
    """A p-value in two digits: 0.43, 0.0012, 3.1e-19 with a superscript exponent."""
    if p >= 0.01 or p == 0:
        return f"{p:.2f}" if p else "0"
    if p >= 0.0001:
        return f"{p:.2g}"
    mantissa, exponent = f"{p:.1e}".split("e")
    return f"{mantissa}×10{str(int(exponent)).translate(_SUPERSCRIPT)}"


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_UNIT = (0.0, 1.0)
_BLIND_ATTACK = (
    "Membership AUC tells apart erased records and records never seen; with few records an AUC near 0.5 has a wide "
    "interval, and a stronger attack than the ones tried may exist."
)

_METRICS: dict[str, Metric] = {
    "rouge": Metric(
        title="Recall (ROUGE-L)",
        short="Recall",
        bounds=_UNIT,
        blind="ROUGE-L compares wording: the same fact told in other words escapes it, and a well-formed wrong answer "
        "shares words with the right one.",
    ),
    "probability": Metric(
        title="Answer probability",
        short="Probability",
        bounds=_UNIT,
        blind="Probability looks at one wording of each answer: the model may still know the fact in another wording.",
    ),
    "truth_ratio": Metric(
        title="Truth ratio",
        short="Truth ratio",
        bounds=_UNIT,
        blind="The truth ratio is taken from a handful of written wrong answers; others could give another.",
    ),
    "extraction_strength": Metric(
        title="Extraction strength",
        bounds=_UNIT,
        blind="Extraction strength and exact memorisation follow the most probable token of one prompt only: sampling "
        "or another prompt may bring out more.",
    ),
    "exact_memorisation": Metric(title="Exact memorisation", bounds=_UNIT),
    "ks_distance": Metric(
        title="Distance of truth ratios from gold's (KS)", section="Forgetting", better="lower", bounds=_UNIT
    ),
    "relearned": Metric(
        title="Probability after the relearning attack", section="Being found out", better="gold", bounds=_UNIT
    ),
    "verbatim_memory": Metric(title="Verbatim memory", bounds=_UNIT),
    "knowledge_memory": Metric(title="Knowledge memory", bounds=_UNIT),
    "forget_quality": Metric(
        title="Forget quality (p against gold)",
        short="Forget quality",
        section="Forgetting",
        better="higher",
        bounds=_UNIT,
        style="p",
        blind="Forget quality is a p-value: with few examples even a poor erasure is not told apart from gold, so a "
        "high value is absence of proof, not proof.",
    ),
    "log10_forget_quality": Metric(
        title="log₁₀ of forget quality",
        section="Forgetting",
        better="higher",
        near=1.3,
        bounds=(-math.inf, 0.0),
        style="decimal",
    ),
    "robustness": Metric(
        title="Robustness to relearning",
        short="Relearning",
        section="Being found out",
        better="higher",
        bounds=_UNIT,
        blind="The relearning attack has a fixed number of steps and one learning rate; a patient attacker has more.",
    ),
    "privleak": Metric(
        title="PrivLeak",
        section="Being found out",
        better="gold",
        near=10.0,
        style="decimal",
        blind="PrivLeak divides by gold's own AUC, so it is noisy wherever few records make that uncertain.",
    ),
    "auc": Metric(
        title="Membership attack",
        section="Being found out",
        better="gold",
        bounds=_UNIT,
        blind=_BLIND_ATTACK,
    ),
    "model_utility": Metric(
        title="Model utility",
        short="Utility",
        section="What must stay",
        better="higher",
        bounds=_UNIT,
        blind="Model utility covers the tested questions only; skills that no set asks about (code, other languages) "
        "are not in it.",
    ),
    "perplexity": Metric(
        title="Perplexity",
        short="Perplexity",
        section="What must stay",
        better="lower",
        relative=True,
        bounds=(1.0, math.inf),
        style="decimal",
        blind="Perplexity averages over tokens of general text: rare knowledge can go without moving it.",
    ),
    "accuracy": Metric(
        title="Accuracy",
        bounds=_UNIT,
        blind="Accuracy looks at the last layer only: a model whose head alone was changed passes, and what it knew is "
        "still in its features.",
    ),
    "gain": Metric(
        title="What the mixture adds to a token, nats",
        blind="A gain is over the first member of the mixture: it says nothing of what that one already knew.",
    ),
    "likelier": Metric(title="Tokens that the mixture makes likelier", bounds=_UNIT),
    "member": Metric(title="Called members by their entropy", section="Being found out", better="gold", bounds=_UNIT),
    "zrf": Metric(title="Randomness of predictions (ZRF)", section="Forgetting", better="gold", bounds=_UNIT),
    "kl": Metric(title="Divergence from gold (KL)", better="lower", bounds=(0.0, math.inf)),
    "agl": Metric(
        title="Agreement of logits with gold (AGL)", section="Forgetting", better="higher", bounds=_UNIT, near=0.02
    ),
    "agr": Metric(
        title="Agreement of representations with gold (AGR)",
        section="Forgetting",
        better="higher",
        bounds=_UNIT,
        blind="AGR is high even for a model that forgot nothing: read it against that of the model before.",
    ),
    "agr_rescaled": Metric(
        title="AGR between before (0) and a second gold (1)", section="Forgetting", better="higher", near=0.2
    ),
    "h_lr": Metric(title="Harmonic mean of AGL and AGR", section="Forgetting", better="higher", bounds=_UNIT),
    "logit": Metric(title="Right labels or tokens", better="gold", bounds=_UNIT),
    "cka_gold": Metric(
        title="Likeness of features to gold's (CKA)",
        better="higher",
        near=0.1,
        bounds=_UNIT,
        blind="CKA of few records is biased upwards, and two models that never saw the erased records differ, too: a "
        "gap smaller than theirs is chance.",
    ),
    "knn": Metric(title="Classes told apart by nearest neighbours", better="gold", near=0.1, bounds=_UNIT),
    "linear": Metric(title="Classes told apart by a linear probe", better="gold", near=0.1, bounds=_UNIT),
    "repetition": Metric(title="Repetition", section="Health of the text", better="lower", bounds=_UNIT),
    "refusals": Metric(
        title="Refusals",
        section="Health of the text",
        better="gold",
        bounds=_UNIT,
        blind="Refusals are found by a list of phrases: an unusual refusal is missed.",
    ),
    "gibberish": Metric(title="Gibberish", section="Health of the text", better="lower", bounds=_UNIT),
}
_NEITHER = ("gain", "likelier")
"""Heads of values that are neither good nor bad."""
_ALIKE = ("kl", "logit", "cka_gold", "knn", "linear")
"""Heads that compare with gold whatever the role."""
ATTACKS = {
    "min-k": "Min-K%",
    "min-k++": "Min-K%++",
    "loss": "loss",
    "zlib": "zlib",
    "gradient-norm": "gradient norm",
    "reference": "reference",
}
KEY = (
    "rouge/forget",
    "probability/forget",
    "forget_quality",
    "auc/min-k",
    "model_utility",
    "rouge/world",
    "gibberish/forget",
    "accuracy/forget",
    "member/forget",
    "accuracy/test",
)


def metric(name: str) -> Metric:
    """The facts about a value by its name, such as `rouge/forget`; an unknown name gives a plain metric."""
    head, _, tail = name.partition("/")
    known = _METRICS.get(head)
    if known is None:
        return Metric(title=name.replace("_", " ").replace("/", ", "))
    if head == "auc":
        attack = ATTACKS.get(tail, tail)
        return dataclasses.replace(known, title=f"Membership attack, {attack} (AUC)", short=f"AUC {attack}")
    if not tail:
        return known
    section: Section = known.section
    better = known.better
    if section == "Other" and head not in _NEITHER:
        erased = tail in FORGOTTEN
        section = "Forgetting" if erased else "Other" if tail.startswith("downstream") else "What must stay"
        if head == "truth_ratio":
            better = "higher"
        elif head == "accuracy" and erased:
            better = "gold"
        elif head not in _ALIKE:
            better = "lower" if erased else "higher"
    role = ROLES.get(tail, tail)
    short = f"{known.short or known.title}, {tail}"
    return dataclasses.replace(known, title=f"{known.title}, {role}", section=section, better=better, short=short)


def rank(name: str) -> tuple[int, int, int, str]:
    """The place of a value in a table: by section, metric, then role."""
    head, _, tail = name.partition("/")
    heads, tails = list(_METRICS), [*ROLES, *ATTACKS]
    return (
        SECTIONS.index(metric(name).section),
        heads.index(head) if head in heads else len(heads),
        tails.index(tail) if tail in tails else len(tails),
        name,
    )
