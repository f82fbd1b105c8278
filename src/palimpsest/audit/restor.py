"""Recovery (RESTOR): does a model that was taught wrong facts come back to what it knew, once they are unlearned?

Forgetting a wrong answer is not the same as knowing the right one again. A clean model answers correctly; continued
training on wrong facts corrupts it; unlearning is given exactly those documents. The probe says how often a model
answers correctly and how often with the corrupted object, and how probable it finds each; `recovery` makes scores of
three models. Facts that the clean model never knew say nothing and are left out.

Source: RESTOR (Rezaei et al. 2025, arXiv 2411.00204). Differs: greedy answers and a match of words judge, not samples
and a language model; the scores are ours, the paper shows the accuracies.

    A      accuracy    share of facts answered with the right object
    C      corrupted   share of facts answered with the corrupted one
    phi = (C_corr - C_unl) / (C_corr - C_clean)      how much of the corruption is forgotten
    rho = (A_unl - A_corr) / (A_clean - A_corr)      how much of the knowledge is back: 1 restored, below 0 damaged
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float

from palimpsest.audit.answers import generated, scored
from palimpsest.audit.reading import Reading, mean_value
from palimpsest.data.encoding import Encoder
from palimpsest.data.records import Record, Roles
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.system import Probe, setting, system

Judge = Callable[[str, Record, str], bool]
"""Whether an answer to the record's question gives this object: `judge(answer, record, object)`."""
SMALLEST_GAP = 0.2
FEW = 20
ARTICLES = frozenset({"a", "an", "the"})


def words(text: str) -> list[str]:
    """The words of a text in lower case, without articles and punctuation."""
    return [word for word in re.findall(r"\w+", text.casefold()) if word not in ARTICLES]


def object_words(answer: str, question: str, others: Sequence[str] = ()) -> list[str]:
    """What an answer says beyond its question: the words that neither the question nor all other answers have."""
    common = set(words(question))
    if others:
        common |= set.intersection(*(set(words(other)) for other in others))
    return [word for word in words(answer) if word not in common] or words(answer)


def matches(answer: str, record: Record, option: str) -> bool:
    """Whether the answer has all the words that make the option differ from its alternatives."""
    known = (record.answer or "", *record.wrong)
    wanted = object_words(option, record.prompt or "", [other for other in known if other != option])
    return set(wanted) <= set(words(answer))


@dataclasses.dataclass(frozen=True)
class Answered:
    """Of every fact: whether the right and the corrupted object were answered, and mean log-probabilities, nats."""

    right: Bool[np.ndarray, " facts"]
    corrupted: Bool[np.ndarray, " facts"]
    log_prob: Mapping[str, Float[np.ndarray, " facts"]]


def answered(model: Model, facts: Sequence[Record], run: Run, max_new_tokens: int, judge: Judge = matches) -> Answered:
    """The model's answers to the facts, judged, and how probable it finds right, corrupted and random objects."""
    check_facts(facts)
    texts = generated(model, facts, run, max_new_tokens)
    texts = [text.strip().split("\n")[0] for text in texts]
    right = [judge(text, fact, fact.answer or "") for text, fact in zip(texts, facts, strict=True)]
    wrong = [judge(text, fact, fact.wrong[0]) for text, fact in zip(texts, facts, strict=True)]
    encoder = Encoder.of(model)
    options = [(fact.answer or "", *fact.wrong) for fact in facts]
    flat = scored(
        model, [encoder.pair(f.prompt or "", o) for f, os in zip(facts, options, strict=True) for o in os], run
    )
    rest = iter(-answer.mean_nll for answer in flat)
    levels = [[next(rest) for _ in os] for os in options]
    log_prob = {
        "correct": np.array([level[0] for level in levels]),
        "corrupted": np.array([level[1] for level in levels]),
        "random": np.array([np.mean(level[2:]) if len(level) > 2 else np.nan for level in levels]),
    }
    return Answered(np.array(right), np.array(wrong), log_prob)


def check_facts(facts: Sequence[Record]) -> None:
    """Raises where a fact cannot be asked, has no corrupted object, or has it among its right answers."""
    if not facts:
        raise PalimpsestError("there is no fact to ask about.")
    for fact in facts:
        if fact.prompt is None or fact.answer is None or not fact.wrong:
            raise PalimpsestError(f'"{fact.title}" is no fact for RESTOR: it needs prompt, answer and a wrong answer.')
        if fact.wrong[0] in (fact.answer, fact.paraphrase):
            raise PalimpsestError(f'the corrupted object of "{fact.title}" is among its right answers.')


@system(
    "restor",
    verb="audit",
    title="Recovery of corrupted knowledge (RESTOR)",
    paper="Rezaei et al. 2025 (arXiv 2411.00204)",
    needs={"forget"},
    uses={"retain"},
    fidelity="adapted",
    deviations=(
        "greedy answers and a match of words judge, the paper samples and asks a language model",
        "questions are asked in the model's own template, the paper gives five solved ones",
    ),
)
class Restor(Probe):
    """How often the right and the corrupted object are answered; the first wrong answer is the corrupted one."""

    max_new_tokens: int = setting(default=40, at_least=1, origin="paper: 200 in all", help="longest answer, tokens")

    def measure(self, model: Model, data: Roles, run: Run, gold: Model | None = None) -> Reading:
        """`accuracy/<role>` and, for forget, `corrupted/forget` and `log_prob/<option>`, nats a token."""
        values, arrays = [], {}
        for role in ("forget", "retain"):
            facts = data.probe(role)
            if role == "retain" and not (facts := [r for r in facts if r.prompt is not None and r.wrong]):
                continue
            found = answered(model, facts, run, self.max_new_tokens)
            values.append(mean_value(f"accuracy/{role}", found.right, better="gold", seed=run.seed))
            arrays[f"accuracy/{role}"] = found.right.astype(float).tolist()
            if role == "forget":
                values.append(mean_value("corrupted/forget", found.corrupted, better="lower", seed=run.seed))
                arrays["corrupted/forget"] = found.corrupted.astype(float).tolist()
                for option, levels in found.log_prob.items():
                    if np.isfinite(levels).any():
                        mean = levels[np.isfinite(levels)]
                        values.append(mean_value(f"log_prob/{option}", mean, unit="nats", seed=run.seed))
                        arrays[f"log_prob/{option}"] = levels.tolist()
        return Reading(probe=self.facts.slug, values=tuple(values), arrays=arrays)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recovery:
    """Scores of one model between a clean and a corrupted one, and by how sure the clean model was of the facts."""

    phi: float
    rho: float
    accuracy: float
    corrupted: float
    collateral: float
    rho_by_confidence: tuple[float, ...]
    facts: int


def scores(accuracy: tuple[float, float, float], corrupted: tuple[float, float, float]) -> tuple[float, float]:
    """phi and rho from the rates of clean, corrupted and unlearned model; raises where the gap is too small to tell."""
    clean, corr, unl = accuracy
    if clean - corr < SMALLEST_GAP:
        raise PalimpsestError(
            f"the corrupted model answers {corr:.2f} of the facts correctly and the clean one {clean:.2f}: the gap is "
            f"below {SMALLEST_GAP}, so recovery is not defined. Corrupt longer."
        )
    spread = corrupted[1] - corrupted[0]
    phi = (corrupted[1] - corrupted[2]) / spread if spread > 0 else float("nan")
    return phi, (unl - corr) / (clean - corr)


def recovery(
    models: Mapping[str, Model],
    facts: Sequence[Record],
    run: Run,
    *,
    untouched: Sequence[Record] = (),
    max_new_tokens: int = 40,
    judge: Judge = matches,
) -> dict[str, Recovery]:
    """The scores of every model; `clean` and `corrupted` must be among them.

    Only facts that the clean model answers correctly count. `collateral` is the change of accuracy on `untouched`
    facts against the clean model.
    """
    for name in ("clean", "corrupted"):
        if name not in models:
            raise PalimpsestError(f"recovery needs the model {name!r} (given: {', '.join(models) or 'none'}).")
    check_facts(facts)
    same = {tuple(sorted(model.tokenizer.get_vocab().items())) for model in models.values()}
    if len(same) > 1:
        raise PalimpsestError("the models have different tokenizers; their answers cannot be compared.")
    found = {name: answered(model, facts, run, max_new_tokens, judge) for name, model in models.items()}
    aside = {
        name: float(answered(model, untouched, run, max_new_tokens, judge).right.mean()) if untouched else float("nan")
        for name, model in models.items()
    }
    known = found["clean"].right
    if known.sum() < FEW:
        run.warn(f"only {int(known.sum())} of {len(facts)} facts are known to the clean model; the scores are rough.")
    if not known.any():
        raise PalimpsestError(f"the clean model knows none of the {len(facts)} facts: there is nothing to recover.")
    order = np.argsort(found["clean"].log_prob["correct"][known], kind="stable")
    thirds = [part for part in np.array_split(order, 3) if len(part)]
    return {name: _recovered(name, found, known, thirds, aside) for name in models}


def _recovered(
    name: str,
    found: Mapping[str, Answered],
    known: Bool[np.ndarray, " facts"],
    thirds: Sequence[np.ndarray],
    aside: Mapping[str, float],
) -> Recovery:
    trio = [found[model] for model in ("clean", "corrupted", name)]
    right = [of.right[known] for of in trio]
    wrong = [float(of.corrupted[known].mean()) for of in trio]
    accuracy = [float(of.mean()) for of in right]
    phi, rho = scores((accuracy[0], accuracy[1], accuracy[2]), (wrong[0], wrong[1], wrong[2]))
    rates = [[float(of[part].mean()) for of in right] for part in thirds]
    return Recovery(
        phi=phi,
        rho=rho,
        accuracy=accuracy[2],
        corrupted=wrong[2],
        collateral=aside[name] - aside["clean"],
        rho_by_confidence=tuple((u - k) / (c - k) if c > k else float("nan") for c, k, u in rates),
        facts=int(known.sum()),
    )
