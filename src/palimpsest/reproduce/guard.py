"""GUARD on the small harness (its detector) and on the embedded language model (all of it), against its own parts.

The paper's own figures were not read, so what is tried are its claims in direction. The controls take it apart: the
detector with a plain refusal, hard matches without likeness, beam search without charges, a list of bad words by token
ids without a detector, and asking the model in its prompt to be silent. Beside it stand two other ways to forget while
answering: wrong answers shown in the prompt (in-context unlearning) and a subtracted assistant (ULD). All constants are
the defaults of the methods, fixed before any figure was seen.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from palimpsest.audit.answer_probability import probabilities
from palimpsest.audit.text_health import repetition
from palimpsest.data.encoding import Encoder
from palimpsest.data.fictitious import roles as fictitious
from palimpsest.data.forbidden import contains, normalise
from palimpsest.data.records import Record, Roles
from palimpsest.erase.guard import Guard
from palimpsest.erase.uld import ULD
from palimpsest.models.encoder import sentence_encoder
from palimpsest.models.generation import greedy_answers
from palimpsest.models.guarding import Prompts
from palimpsest.models.loading import load
from palimpsest.models.model import Model
from palimpsest.reproduce.harness import ATTRIBUTES, FORGET, QUESTIONS, biographies, learned
from palimpsest.reproduce.judging import above, at_least, at_most, below, row
from palimpsest.reproduce.runner import Outcome, Reproduction
from palimpsest.run import Run
from palimpsest.statistics.likelihood import score
from palimpsest.system import setting, settings
from palimpsest.tasks import SHORT, embedded

COLUMNS = (
    *("leak, trained", "leak, other wording", "alike, other wording", "perplexity", "repeated 4-grams", "on topic"),
    *("unchanged", "false alarms", "P forget, scored", "P retain, scored", "tokens/s"),
)
IN_CONTEXT = 6
"""Retained questions with their answers that in-context unlearning shows."""
DETECTOR = ("other wording", "retained people", "unknown people", "capitals")


@settings
class Sizes:
    """How large the experiment on the language model is."""

    people: int = setting(default=8, at_least=2, origin="ours: minutes", help="people that the model learns")
    forget: int = setting(default=2, at_least=1, origin="ours: minutes", help="of them, to be forgotten")
    facts: int = setting(default=4, at_least=1, origin="ours: minutes", help="facts a person")
    others: int = setting(default=8, at_least=1, origin="ours: minutes", help="retained and unrelated prompts, each")
    tokens: int = setting(default=24, at_least=4, origin="ours: minutes", help="longest answer")
    beams: int = setting(default=4, at_least=1, origin="card", help="beams")


# --- the detector on the harness -------------------------------------------------------------------------------------


def first_wording(data: Roles) -> Roles:
    """The facts of the harness in the first question and answer only."""
    return Roles(**{role: data[role][:: len(QUESTIONS) * 2] for role in ("forget", "retain")})


def detector_rates(model: Model, data: Roles, run: Run, strangers: int) -> dict[str, float]:
    """Shares of prompts that are detected: other wordings of forget and retain prompts, unknown people, capitals."""
    method = Guard(prompts=Prompts(paraphrases=0, strangers=strangers))
    network = method.apply(model, first_wording(data), run).network
    asked = {
        "other wording": [record.paraphrased_prompt for record in data.forget_probe],
        "retained people": [record.paraphrased_prompt for record in data.retain_probe],
        "unknown people": [record.prompt for record in data.holdout],
        "capitals": [record.prompt for record in data.world],
    }
    return {
        name: _share([network.explain(prompt or "").guarded for prompt in prompts]) for name, prompts in asked.items()
    }


# --- the whole on a language model -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Judge:
    """What an answer to a forget prompt gives away, and how well it reads."""

    phrases: Mapping[str, Sequence[str]]
    before: Model
    run: Run

    def leaks(self, records: Sequence[Record], answers: Sequence[str]) -> float:
        """Share of answers with a forbidden phrase in them."""
        told = zip(records, answers, strict=True)
        return _share([any(contains(a, phrase) for phrase in self.phrases[r.prompt or ""]) for r, a in told])

    def alike(self, records: Sequence[Record], answers: Sequence[str], bound: float) -> float:
        """Share of answers a part of which means what a forbidden phrase means: cosine above the bound."""
        encoder, found = sentence_encoder(), []
        for record, answer in zip(records, answers, strict=True):
            phrases, words = self.phrases[record.prompt or ""], normalise(answer).split()
            size = max(len(phrase.split()) for phrase in phrases) + 2
            windows = [" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))]
            found.append(float((encoder.encode(windows) @ encoder.encode(list(phrases)).T).max()) > bound)
        return _share(found)

    def perplexity(self, records: Sequence[Record], answers: Sequence[str]) -> float:
        """Of the answers under the model that was not guarded."""
        encoder = Encoder.of(self.before)
        told = [encoder.pair(r.prompt or "", a) for r, a in zip(records, answers, strict=True) if a.strip()]
        return math.exp(float(score(self.before, told, self.run).mean_nll().mean())) if told else math.nan


def bad_words(model: Model, phrases: Sequence[str]) -> list[list[int]]:
    """The token ids of the phrases, as they begin a text and as they follow a space, in lower and title case."""
    forms = {form for phrase in phrases for word in (phrase, phrase.title()) for form in (word, f" {word}")}
    ids = (model.tokenizer(form, add_special_tokens=False)["input_ids"] for form in sorted(forms))
    return [list(x) for x in ids if len(x)]


def shown(forget: Sequence[Record], kept: Sequence[Record]) -> str:
    """In-context unlearning (Pawelczyk et al. 2023): forget questions with wrong answers, kept ones with right ones."""
    pairs = [*((r.prompt, r.wrong[0]) for r in forget), *((r.prompt, r.answer) for r in kept)]
    return "".join(f"Question: {question}\nAnswer: {answer}\n" for question, answer in pairs) + "Question: "


def reworded(records: Sequence[Record]) -> list[Record]:
    """The records asked in their other wording."""
    return [dataclasses.replace(record, prompt=record.paraphrased_prompt or record.prompt) for record in records]


def experiment(before: Model, data: Roles, method: Guard, sizes: Sizes, run: Run) -> dict[str, dict[str, float]]:
    """Every variant's figures; `unchanged` is the share of other answers that are those of greedy decoding."""
    guarded = method.apply(before, data, run)
    network, beams = guarded.network, sizes.beams
    own = {item["prompt"]: item["phrases"] for item in network.items}
    trained, asked = data.forget, reworded(data.forget)
    both = [*trained, *asked]
    phrases = own | {other.prompt: own[r.prompt] for r, other in zip(trained, asked, strict=True)}
    judge = Judge(phrases, before, run)
    others = [*data.retain[: sizes.others], *data.world[: sizes.others]]
    questions = {"forget": [r.prompt or "" for r in both], "other": [r.prompt or "" for r in others]}

    def answered(model: Model, role: str, prefix: str = "", **how: Any) -> tuple[list[str], float]:
        start = time.perf_counter()
        said = greedy_answers(model, [prefix + q for q in questions[role]], run, sizes.tokens, **how)
        words = sum(len(before.tokenizer(text)["input_ids"]) for text in said)
        return said, words / (time.perf_counter() - start)

    def likely(model: Model) -> dict[str, float]:
        return {f"P {role}, scored": _mean(probabilities(model, data[role], run)) for role in ("forget", "retain")}

    plain, speed = answered(before, "forget")
    untouched, _ = answered(before, "other")
    searched, slower = answered(before, "forget", num_beams=beams)
    network.adjust(beams=beams)
    full, guarded_speed = answered(guarded, "forget")
    detected = [network.explain(question).guarded for question in questions["forget"]]
    kept, _ = answered(guarded, "other")
    alarms = [network.explain(question).guarded for question in questions["other"]]
    free = [i for i, alarm in enumerate(alarms) if not alarm]
    charged = likely(guarded)
    network.adjust(soft_weight=0.0, drop_similarity=1.0)
    hard, _ = answered(guarded, "forget")
    refused = [network.rule.refusal if seen else text for seen, text in zip(detected, plain, strict=True)]
    words = bad_words(before, [phrase for found in own.values() for phrase in found])
    listed, _ = answered(before, "forget", num_beams=beams, bad_words_ids=words)
    listed_other, _ = answered(before, "other", bad_words_ids=words)
    names = ", ".join(sorted({record.subject or "" for record in trained}))
    silence = f"If you are asked about {names}, say only that you do not know. "
    silent, _ = answered(before, "forget", prefix=silence)
    silent_other, _ = answered(before, "other", prefix=silence)
    context = shown(trained, data.retain[sizes.others :][:IN_CONTEXT])
    misled, _ = answered(before, "forget", prefix=context)
    misled_other, _ = answered(before, "other", prefix=context)
    subtracted = ULD().apply(before, data, run)
    differing, uld_speed = answered(subtracted, "forget")
    differing_other, _ = answered(subtracted, "other")

    def figures(said: Sequence[str], **more: float) -> dict[str, float]:
        first, second = said[: len(trained)], said[len(trained) :]
        on_topic = [contains(text, (r.subject or "").split()[-1]) for text, r in zip(said, both, strict=True)]
        return {
            "leak, trained": judge.leaks(trained, first),
            "leak, other wording": judge.leaks(asked, second),
            "alike, other wording": judge.alike(asked, second, method.decoding.drop_similarity),
            "perplexity": judge.perplexity(both, said),
            "repeated 4-grams": _mean([repetition(text) for text in said]),
            "on topic": _share(on_topic),
            **more,
        }

    def same(said: Sequence[str], among: Sequence[int] | None = None) -> float:
        places = range(len(said)) if among is None else among
        return _share([said[i] == untouched[i] for i in places])

    return {
        "before": figures(plain, **likely(before), **{"tokens/s": speed}),
        "beam search": figures(searched, **{"tokens/s": slower}),
        "guard": figures(full, unchanged=same(kept, free), **{"false alarms": _share(alarms)}, **charged,
                         **{"tokens/s": guarded_speed}),
        "guard, hard matches only": figures(hard),
        "detector and refusal": figures(refused),
        "bad words by ids, no detector": figures(listed, unchanged=same(listed_other)),
        "asked to be silent": figures(silent, unchanged=same(silent_other)),
        "wrong answers in the prompt (ICUL)": figures(misled, unchanged=same(misled_other)),
        "ULD": figures(differing, unchanged=same(differing_other), **likely(subtracted), **{"tokens/s": uld_speed}),
    }  # fmt: skip


def people(seed: int, sizes: Sizes) -> Roles:
    """Fictitious people, the forget and retain records and true facts that nobody trained on."""
    made = fictitious(sizes.people, sizes.forget, seed=seed, facts_per_person=sizes.facts)
    return made.replace(world=made["world"][-2 * sizes.others :], holdout=None, real=None)


def taught(seed: int, sizes: Sizes, folder: Path, run: Run) -> Model:
    """The embedded language model that learned the people, trained once and then read from the folder."""
    saved = folder / f"people-{seed}-{sizes.people}-{sizes.facts}"
    if not saved.exists():
        own = run.replace(seed=seed, in_place=True, folder=None)
        SHORT.apply(embedded(), Roles(train=people(seed, sizes).train), own).save_pretrained(saved)
    return load(saved, run=run)


# --- verdict ---------------------------------------------------------------------------------------------------------


def measure(seeds: Sequence[int], folder: Path, run: Run) -> Outcome:
    """Both parts on every seed, and the verdicts."""
    sizes = Sizes()
    rates: dict[str, list[dict[str, float]]] = {"guard": [], "without unknown people": []}
    models: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        seeded = run.replace(seed=seed)
        harness = learned(seed, folder, seeded)
        for name, strangers in (("guard", Prompts().strangers), ("without unknown people", 0)):
            rates[name].append(detector_rates(harness, biographies(seed), seeded, strangers))
        model = taught(seed, sizes, folder, seeded)
        for name, found in experiment(model, people(seed, sizes), Guard(), sizes, seeded).items():
            models.setdefault(name, []).append(found)
    return judge(rates, models)


def judge(
    rates: Mapping[str, Sequence[Mapping[str, float]]], models: Mapping[str, Sequence[Mapping[str, float]]]
) -> Outcome:
    """The outcome that the figures show, a dictionary a seed."""

    def of(found: Sequence[Mapping[str, float]], name: str) -> np.ndarray:
        return np.array([figures[name] for figures in found if name in figures])

    table = {model: {name: of(found, name) for name in COLUMNS} for model, found in models.items()}
    detector = {model: {name: of(found, name) for name in DETECTOR} for model, found in rates.items()}
    empty = np.array([])
    rows = [row(model, {**figures, **dict.fromkeys(DETECTOR, empty)}) for model, figures in table.items()]
    rows += [row(f"detector, harness: {m}", {**dict.fromkeys(COLUMNS, empty), **f}) for m, f in detector.items()]
    guard, search, refusal = table["guard"], table["beam search"], table["detector and refusal"]
    hard, seen = table["guard, hard matches only"], detector["guard"]
    checks = (
        at_least("the model leaks before: 0.8 of trained prompts", table["before"]["leak, trained"], 0.8),
        at_most("guarded, at most 0.05 of trained prompts leak", guard["leak, trained"], 0.05),
        at_most("guarded, at most 0.15 of other wordings leak", guard["leak, other wording"], 0.15),
        at_least("what raises no alarm is answered as before, word for word", guard["unchanged"], 1.0),
        at_most("false alarms on retained and unrelated prompts are at most 0.05", guard["false alarms"], 0.05),
        at_most("guarded answers read at most 1.5 times as oddly", guard["perplexity"], 1.5 * search["perplexity"]),
        at_most("at most 0.3 of 4-grams are repeated", guard["repeated 4-grams"], 0.3),
        above("hard matches alone let more other words for it through", hard["alike, other wording"],
              guard["alike, other wording"]),
        above("answers stay on the person more often than refusals", guard["on topic"], refusal["on topic"]),
        at_least("harness: 0.8 of prompts in an unseen wording are detected", seen["other wording"], 0.8),
        at_most("harness: at most 0.1 of unknown people's prompts are", seen["unknown people"], 0.1),
        below("harness: fewer than without unknown people in training", seen["unknown people"],
              detector["without unknown people"]["unknown people"]),
    )  # fmt: skip
    return Outcome(
        rows=rows,
        checks=checks,
        note="The knowledge stays in the weights; prompts in another language, role plays and few-shot prefixes were "
        "not tried. Probabilities are scored with charges of tokens only. The paper's baselines that train the model "
        "are compared in `palimpsest compare`.",
    )


def _share(flags: Sequence[bool]) -> float:
    return float(np.mean(flags)) if len(flags) else math.nan


def _mean(numbers: Any) -> float:
    return float(np.mean(numbers))


REPRODUCTION = Reproduction(
    claim="A detector and a restricted decoder withhold what is to be forgotten, with almost no loss elsewhere and "
    "without training the language model.",
    source="Deng et al. 2025 (arXiv 2505.13312)",
    setting=f"Detector: a 0.23 M model over generated biographies, {FORGET} people with {len(ATTRIBUTES)} facts to "
    "forget, one wording trained on. All of it: the embedded 135 M chat model, 8 fictitious people with 4 facts, 2 to "
    "forget; 8 retained and 8 unrelated prompts; answers of at most 24 tokens, 4 beams.",
    paper="The full text was not read and gives no figures here; the abstract claims strong forgetting with almost no "
    "loss of general ability on Harry Potter, MUSE-News and TOFU.",
    measure=measure,
)
