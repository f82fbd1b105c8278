"""Representations after unlearning: did the network forget, or only its last layer?

Accuracy on forget and retain sets looks at the logits. A model whose head alone was edited passes, and all that it knew
is still in its features; another passes because its features are wrecked. The probe compares features with those of a
model that never saw the forget set (gold): CKA, and how well frozen features tell the classes of other data apart. A
gap to a second gold model says how much of a difference is chance. Use it beside the accuracies of every erasure.

Downstream data are roles whose name begins with `downstream`. Where their classes lie close to the forget set's
(`closest_classes` finds such a forget set), true forgetting must show as lower transfer; compare with gold, not with 0.
CKA of few records is biased upwards (see the unbiased values), and a gold that began its training from the same weights
as the model before is nearer to it for that alone.

Source: UUEF (Kim et al. 2025, arXiv 2503.06991) and its code. Full text not readable: AGL, AGR and the words are ours.

    u, o, g, g'            the model, the one before, gold, and a second gold
    m_r     logit          share of right labels (classifier) or tokens (language model) on role r
    h       features       [records, width]  what a classifier's head is given; a language model's last normalised
                           states, mean over positions
    t_s     knn            accuracy of k neighbours (cosine) on part of s, taught on the rest

    AGL  = prod_r (1 - |m_r(u) - m_r(g)|)                                             r: forget, retain, holdout, test
    AGR  = mean of 1 - |t_s(u) - t_s(g)| over downstream sets, CKA(u, g) on forget, CKA(u, g) on retain
    H-LR = 2 AGL AGR / (AGL + AGR)
    AGR rescaled = (AGR(u) - AGR(o)) / (AGR(g') - AGR(o)): 0 as if nothing had been done, 1 as retrained
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from palimpsest.audit.features import DOWNSTREAM, LOGIT_ROLES, Part, Seen, Transfer, look, parts_of
from palimpsest.audit.reading import Better, Reading, Value, mean_value
from palimpsest.data.labelled import class_count
from palimpsest.data.records import Roles, digest
from palimpsest.errors import PalimpsestError
from palimpsest.guard import kind_of
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.likeness import Pair, check_single
from palimpsest.system import Probe, setting, system

Words = Literal["unchanged", "classifier-only", "collapsed", "close to retrained", "in between"]
SAME, MARGIN, HALF = 0.99, 0.1, 0.5
"""CKA from which on features are the same; what is a difference; the share of likeness below which all is lost."""


def agl(own: Sequence[float], gold: Sequence[float]) -> float:
    """Agreement of the logits: the product of 1 - |gap| of every score."""
    return math.prod(1 - abs(a - b) for a, b in zip(own, gold, strict=True))


def agr(gaps: Sequence[float], cka: Sequence[float]) -> float:
    """Agreement of the representations: the mean of 1 - |gap| and the values of CKA; NaN where one of them is."""
    return float(np.mean([*(1 - abs(gap) for gap in gaps), *cka]))


def h_lr(logits: float, representation: float) -> float:
    """Harmonic mean of AGL and AGR; 0 where one of them is."""
    total = logits + representation
    return 2 * logits * representation / total if total else 0.0


def rescaled(value: float, before: float, second: float) -> float:
    """Where AGR lies between the model before (0) and a second gold (1); NaN where gold is no better than before."""
    return (value - before) / (second - before) if second > before else math.nan


def in_words(
    logits: tuple[float, float],
    to_gold: Mapping[str, float],
    to_before: float,
    floor: Mapping[str, float],
    ceiling: Mapping[str, float] | None,
) -> Words:
    """The verdict from AGL (of the model, and of the one before) and CKA by set.

    `floor` is CKA(before, gold); `ceiling` CKA(second gold, gold), without which nothing but gold's own features count
    as close: 1. `to_before` is taken on the forget set.
    """
    most = dict.fromkeys(to_gold, 1.0) if ceiling is None else ceiling
    if any(map(math.isnan, (*to_gold.values(), to_before))):
        return "collapsed"
    if to_gold["retain"] < HALF * min(floor["retain"], most["retain"]):
        return "collapsed"
    if to_before >= SAME:
        return "classifier-only" if logits[0] - logits[1] > MARGIN else "unchanged"
    near = {s: most[s] - min(max((most[s] - floor[s]) / 2, 0), MARGIN) for s in to_gold}
    close = all(to_gold[s] >= near[s] for s in to_gold)
    return "close to retrained" if close and logits[0] >= 1 - MARGIN else "in between"


Sets = Mapping[str, Seen]
"""What is seen of some models, by set."""
SENTENCES: Mapping[str, str] = {
    "unchanged": "features and answers are those of the model before",
    "classifier-only": "the answers changed, the features of the forget set are those of the model before: what it "
    "knew is still there",
    "collapsed": "its features are wrecked: even on the retain set little is left of what it shared with gold",
    "close to retrained": "answers and features are those of a model that never saw the forget set",
    "in between": "its features are neither those of the model before nor gold's",
}


def agreement(who: str, own: Sets, reference: Sets) -> tuple[float, float]:
    """AGL and AGR of a model in `own` against gold in `reference`."""
    roles = [name for name in LOGIT_ROLES if name in own]
    downstream = [name for name in own if name.startswith(DOWNSTREAM)]
    m, m_gold = ([float(sets[s].logit[one].mean()) for s in roles] for sets, one in ((own, who), (reference, "gold")))
    gaps = [float(own[s].knn[who].mean() - reference[s].knn["gold"].mean()) for s in downstream]
    return agl(m, m_gold), agr(gaps, list(likeness(own, (who, "gold")).values()))


def likeness(sets: Sets, pair: Pair) -> dict[str, float]:
    """CKA of the features of two models on the forget and the retain set."""
    return {s: sets[s].cka[pair]["features"] for s in ("forget", "retain")}


@system(
    "truly-forgetting",
    verb="audit",
    title="Representations against a retrained model: CKA and transfer",
    paper="Kim et al. 2025 (arXiv 2503.06991)",
    takes="causal-lm or classifier",
    needs={"forget", "retain"},
    uses={"holdout", "test", "downstream"},
    beside={"before", "second_gold"},
    fidelity="adapted",
    deviations=(
        "AGL, AGR, H-LR and the verdict in words are our reading of names, whose formulas could not be read",
        "CKA is taken over all records, with its unbiased estimate; the code takes the mean over batches of 512",
        "neighbours and linear probe see the penultimate features; the code's neighbours see the logits",
        "at least 200 retain records are searched for neighbours where a tenth is fewer",
    ),
)
class TrulyForgetting(Probe):
    """Likeness of the features to gold's and to those before, transfer to other data, and the logits beside them."""

    transfer: Transfer = setting(default=Transfer(), origin="official code", help="neighbours and linear probe")
    batch_mean: int | None = setting(
        default=None, at_least=3, origin="ours; official code: 512", help="records a batch of a mean CKA; None: one CKA"
    )
    batch_size: int = setting(default=32, at_least=1, origin="ours", help="records at once: memory, not result")

    def measure(
        self,
        model: Model,
        data: Roles,
        run: Run,
        gold: Model | None = None,
        *,
        before: Model | None = None,
        second_gold: Model | None = None,
    ) -> Reading:
        """`agl`, `agr`, `h_lr` and their parts; with `before`, how much of it is left, and a verdict in words.

        By set: `logit`, `logit_gap`, `cka_gold`, `cka_before`, `cka_floor` (before against gold), `cka_ceiling` (second
        gold against gold), `knn`, `linear`, both of gold as well; arrays: CKA by layer on forget and retain.
        """
        if gold is None:
            raise PalimpsestError(f"{self.facts.slug} compares with a model that never saw the forget set; pass gold.")
        known = {"gold": gold, "before": before, "second": second_gold}
        references = {name: other for name, other in known.items() if other is not None}
        self._check({"the model": model} | references)
        remarks: list[str] = []
        parts = parts_of(data, self.transfer, self.facts.slug, remarks)
        for remark in remarks:
            run.warn(remark)
        ends = [(name, "gold") for name in references if name != "gold"]
        reference = self._seen(references, ends, parts, run, list(references))
        beside = {name: other for name, other in references.items() if name != "second"}
        pairs = [("measured", name) for name in beside]
        own = self._seen({"measured": model} | beside, pairs, parts, run, ["measured"])
        return self._reading(own, reference, remarks, run)

    def _check(self, models: Mapping[str, Model]) -> None:
        for name, model in models.items():
            check_single(name, model)
        kinds = {name: kind_of(model) == "classifier" for name, model in models.items()}
        if len(set(kinds.values())) > 1:
            raise PalimpsestError(f"{self.facts.slug} compares models of one kind, found classifiers and others.")
        if not kinds["the model"]:
            if self.transfer.features == "logits":
                raise PalimpsestError(
                    f"{self.facts.slug}: features is 'logits'; a language model has none of a record."
                )
            return
        labels = {name: class_count(model) for name, model in models.items()}
        for name, count in labels.items():
            if count != labels["the model"]:
                raise PalimpsestError(f"{name} has {count} labels, the model {labels['the model']}.")

    def _seen(
        self, models: Mapping[str, Model], pairs: list[Pair], parts: list[Part], run: Run, scored: list[str]
    ) -> Sets:
        """What every set shows, computed once for these weights."""
        weights = tuple((name, model.digest()) for name, model in models.items())
        key = (self.facts.slug, self, weights, tuple((part.name, digest(part.records)) for part in parts))
        if key not in run.cache:
            given = {"scored": scored, "batch_mean": self.batch_mean, "batch_size": self.batch_size}
            run.cache[key] = {p.name: look(models, pairs, p, run, self.transfer, **given) for p in parts}  # type: ignore[arg-type]
        return run.cache[key]

    def _reading(self, own: Sets, reference: Sets, remarks: list[str], run: Run) -> Reading:
        values: list[Value] = []
        arrays: dict[str, list[float] | list[str]] = {}

        def one(name: str, value: float, n: int, better: Better = "none") -> None:
            values.append(Value(name=name, value=value, n=n, better=better))

        def mean(name: str, samples: np.ndarray, gold: np.ndarray) -> None:
            values.append(mean_value(name, samples, better="gold", seed=run.seed))
            head, _, tail = name.partition("/")
            one(f"{head}_gold/{tail}", float(gold.mean()), len(gold))
            arrays[name] = samples.tolist()

        for s, seen in own.items():
            also, n = reference[s], seen.records
            if "measured" in seen.logit:
                mean(f"logit/{s}", seen.logit["measured"], also.logit["gold"])
                one(f"logit_gap/{s}", abs(float(seen.logit["measured"].mean() - also.logit["gold"].mean())), n, "lower")
            one(f"cka_gold/{s}", seen.cka["measured", "gold"]["features"], n, "higher")
            one(f"cka_gold_unbiased/{s}", seen.unbiased["measured", "gold"], n, "higher")
            if ("measured", "before") in seen.cka:
                one(f"cka_before/{s}", seen.cka["measured", "before"]["features"], n)
            for name, who in (("cka_floor", "before"), ("cka_ceiling", "second")):
                if (who, "gold") in also.cka:
                    one(f"{name}/{s}", also.cka[who, "gold"]["features"], n)
            if "measured" in seen.knn:
                mean(f"knn/{s}", seen.knn["measured"], also.knn["gold"])
                mean(f"linear/{s}", seen.linear["measured"], also.linear["gold"])
            for (_, other), layers in seen.cka.items():
                if len(layers) > 2:  # the blocks, too
                    arrays |= {f"layers/{s}": list(layers), f"cka_{other}_by_layer/{s}": list(layers.values())}
        flat = sorted({(who, s) for sets in (own, reference) for s, seen in sets.items() for who in seen.collapsed})
        caveats = [f"all features of the {s} set are equal in the {who} model: no CKA there" for who, s in flat]
        n, agl_, agr_ = own["forget"].records, *agreement("measured", own, reference)
        for name, value in (("agl", agl_), ("agr", agr_), ("h_lr", h_lr(agl_, agr_))):
            one(name, value, n, "higher")
        for who in (who for who in ("before", "second") if who in reference["forget"].logit):
            for name, value in zip(("agl", "agr"), agreement(who, reference, reference), strict=True):
                one(f"{name}_{who}", value, n)
        said = {value.name: value.value for value in values}
        if {"agr_before", "agr_second"} <= set(said):
            one("agr_rescaled", rescaled(agr_, said["agr_before"], said["agr_second"]), n, "higher")
        return Reading(
            probe=self.facts.slug,
            values=tuple(values),
            arrays=arrays,
            caveats=(*remarks, *caveats),
            verdict=_told(own, reference, agl_, said["agl_before"]) if "agl_before" in said else "",
        )


def _told(own: Sets, reference: Sets, logits: float, logits_before: float) -> str:
    """The verdict, what it means, and the numbers that it rests on."""
    to_gold, to_before = (likeness(own, ("measured", other)) for other in ("gold", "before"))
    ceiling = likeness(reference, ("second", "gold")) if "second" in reference["forget"].logit else None
    floor = likeness(reference, ("before", "gold"))
    words = in_words((logits, logits_before), to_gold, to_before["forget"], floor, ceiling)
    figures = [f"AGL {logits:.2f}"]
    for s in ("forget", "retain"):
        most = "" if ceiling is None else f", where a second gold has {ceiling[s]:.2f}"
        figures.append(f"CKA on {s} {to_before[s]:.2f} to before, {to_gold[s]:.2f} to gold{most}")
    return f"{words}: {SENTENCES[words]} ({'; '.join(figures)})"
