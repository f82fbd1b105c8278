"""Classification: how often a classifier is right, whether it betrays what it was trained on, how random it looks.

The measures that papers on forgetting in classifiers report. A low accuracy on the forget set is no success by itself:
a model that never saw the set is right about much of it, and a wrecked one about nothing. The goal is to come close to
gold, with the accuracy of the other roles unharmed. The attack looks at one number an example and at one model; a
stronger one may find more. A high ZRF score says that predictions look random, which a model that never saw the
images need not do either.

Sources: membership attack on the entropy, official code of Foster et al. 2024 (arXiv 2308.07707); ZRF, Chundawat et al.
2023 (arXiv 2205.08096); attack on the loss, Yeom et al. 2018 (arXiv 1709.01604).

    p        model's prediction          [labels]
    q        of a random network         [labels]   same architecture, never trained
    m        (p + q) / 2
    H        entropy of p, nats

    accuracy      share of examples whose most probable label is right
    member        a logistic regression on H, trained to tell retain (1) from test and holdout (0), both classes weighed
                  alike; value = share of the forget set that it calls 1
    auc/loss      P(loss of a holdout example > loss of a forget example), ties counted half
    ZRF           mean 1 - (KL(p || m) + KL(q || m)) / 2, nats: 1 looks random, 1 - log 2 least so
    ZRF official  mean over examples and labels of (m log(m / p) + m log(m / q)) / 2, taken from 1
    KL to gold    mean KL(gold || p), nats
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from palimpsest.audit.membership import auc_value
from palimpsest.audit.reading import Reading, Value, mean_value
from palimpsest.data.labelled import class_count
from palimpsest.data.records import Record, Roles, digest
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.models.untrained import untrained
from palimpsest.run import Run
from palimpsest.statistics.predictions import Predictions, classify
from palimpsest.system import Probe, setting, system

ROLES = ("forget", "retain", "holdout", "test", "validation")
"""The sets that are looked at, where the data has them."""
FORGOTTEN = ("forget", "holdout")
Divergence = Literal["jensen-shannon", "official"]


def predicted(model: Model, records: Sequence[Record], run: Run) -> Predictions:
    """The predictions for these records, computed once for these weights."""
    key = ("predictions", model.digest(), digest(records))
    if key not in run.cache:
        run.cache[key] = classify(model, records, run)
    return run.cache[key]


def divergence(
    log_p: Float[Tensor, "examples labels"], log_q: Float[Tensor, "examples labels"], kind: Divergence
) -> Float[Tensor, " examples"]:
    """What ZRF takes from 1: Jensen-Shannon divergence of each example, nats; official: its mirror over the labels."""
    log_m = torch.logaddexp(log_p, log_q) - np.log(2)
    if kind == "jensen-shannon":
        both = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
        return both.sum(-1) / 2
    return (log_m.exp() * (2 * log_m - log_p - log_q)).mean(-1) / 2


def called_members(
    members: Float[np.ndarray, " a"], others: Float[np.ndarray, " b"], asked: Float[np.ndarray, " c"]
) -> Float[np.ndarray, " c"]:
    """1 where the attack calls an entropy that of a member; it learns from entropies of known members and others."""
    from sklearn.linear_model import LogisticRegression

    known = np.concatenate([members, others])[:, None]
    truth = np.concatenate([np.ones(len(members)), np.zeros(len(others))])
    return LogisticRegression(class_weight="balanced").fit(known, truth).predict(asked[:, None])


@system(
    "classification",
    verb="audit",
    title="Classification: accuracy, membership, ZRF",
    paper="Foster et al. 2024 (arXiv 2308.07707)",
    takes="classifier",
    uses={"forget", "retain", "holdout", "test", "validation"},
    fidelity="matches the official code",
    deviations=("ZRF is the Jensen-Shannon divergence of each example; the official mean over labels is a setting",),
)
class Classification(Probe):
    """Accuracy of every role, a membership attack on the forget set, its likeness to a random network, KL to gold."""

    zrf: Divergence = setting(
        default="jensen-shannon", origin="Chundawat et al. 2023; their code: official", help="what ZRF is taken from"
    )

    def measure(self, model: Model, data: Roles, run: Run, gold: Model | None = None) -> Reading:
        """`accuracy/<role>`, `member/forget`, `auc/loss`, `zrf/<role>` and `kl/<role>`, as far as the roles go."""
        given = {role: data.probe(role) for role in ROLES if data.probe(role)}
        if not given:
            raise PalimpsestError(f"classification needs one of the roles {', '.join(ROLES)}.")
        found = {role: predicted(model, records, run) for role, records in given.items()}
        values: list[Value] = []
        arrays: dict[str, np.ndarray] = {}

        def mean(name: str, samples: Tensor | np.ndarray, better: Literal["higher", "lower", "gold"]) -> None:
            arrays[name] = np.asarray(samples, dtype=float)
            values.append(mean_value(name, arrays[name], better=better, seed=run.seed))

        for role, own in found.items():
            mean(f"accuracy/{role}", own.correct, "gold" if role in FORGOTTEN else "higher")
        if {"forget", "retain"} <= set(found) and {"test", "holdout"} & set(found):
            unseen = list({r.key: r for role in ("test", "holdout") for r in given.get(role, [])}.values())
            known = (found["retain"], predicted(model, unseen, run), found["forget"])
            mean("member/forget", called_members(*(np.asarray(x.entropy) for x in known)), "gold")
        if set(FORGOTTEN) <= set(found):
            arrays |= {f"loss/{role}": np.asarray(found[role].nll) for role in FORGOTTEN}
            values.append(auc_value("auc/loss", arrays["loss/forget"], arrays["loss/holdout"], run.seed))
        if forgotten := [role for role in FORGOTTEN if role in found]:
            random = untrained(model, run)
            for role in forgotten:
                log_q = predicted(random, given[role], run).log_probabilities
                mean(f"zrf/{role}", 1 - divergence(found[role].log_probabilities, log_q, self.zrf), "gold")
        if gold is not None and gold is not model:
            if class_count(gold) != class_count(model):
                raise PalimpsestError(f"gold has {class_count(gold)} labels, the model {class_count(model)}.")
            for role, own in found.items():
                log_gold = predicted(gold, given[role], run).log_probabilities
                mean(f"kl/{role}", (log_gold.exp() * (log_gold - own.log_probabilities)).sum(-1), "lower")
        return Reading(
            probe=self.facts.slug, values=tuple(values), arrays={name: x.tolist() for name, x in arrays.items()}
        )
