"""Making a guard: the index of what is to be forgotten, and the prompts that its detector learns from."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from palimpsest.data.augmentation import QUESTION_FRAMES, paraphrases
from palimpsest.data.forbidden import (
    Extraction,
    Kept,
    asked_and_answered,
    contains,
    kept,
    normalise,
    phrases,
    strangers,
)
from palimpsest.data.records import Record, as_records
from palimpsest.errors import PalimpsestError
from palimpsest.models.detector import Calibration, Detector, Fitting, fit, penultimate_block, prompt_states
from palimpsest.models.encoder import SentenceEncoder
from palimpsest.models.guard_index import FIRST, Features, GuardedConfig
from palimpsest.models.guarded import GuardedForCausalLM
from palimpsest.models.model import Model
from palimpsest.models.restriction import Guarding
from palimpsest.models.wording import Wording
from palimpsest.models.wrapping import sizes_of
from palimpsest.run import Run
from palimpsest.system import setting, settings, to_dict

CUTS = (1.0, 0.66, 0.33)
"""After which shares of its beginning a text is taken to be gone on with."""
ALL = len(QUESTION_FRAMES)
SAME = 1e-2
"""Distance, as a share of their length, within which two vectors are of the same prompt."""


@settings
class Prompts:
    """Which prompts the detector learns from."""

    paraphrases: int = setting(default=2, at_least=0, origin="card", help="other wordings of each prompt")
    negatives: int = setting(default=400, at_least=2, origin="ours", help="most prompts that are not to be detected")
    strangers: int = setting(
        default=2, at_least=0, origin="card: needed", help="prompts about unknown people, for each forget record"
    )


@dataclass(frozen=True)
class Asked:
    """A prompt; `raw` is a text to be gone on with, else it is a question in the template."""

    text: str
    raw: bool = False


def wordings(record: Record, count: int, seed: int) -> list[Asked]:
    """A record's prompt and up to `count` others: paraphrases of a question, shorter beginnings of a text."""
    prompt, _ = asked_and_answered(record)
    if record.text is not None and record.prompt is None:
        words = prompt.split()
        cuts = (" ".join(words[: max(2, round(share * len(words)))]) for share in CUTS[: count + 1])
        return [Asked(text, raw=True) for text in dict.fromkeys(cuts)]
    others = paraphrases([Record(prompt=prompt, answer=".", subject=record.subject)], count, seed=seed)
    return [Asked(prompt), *(Asked(other.prompt or "") for other in others)]


def negatives(
    forget: Sequence[Record], retain: Sequence[Record], general: Sequence[Record], how: Prompts, seed: int
) -> list[Asked]:
    """Prompts that are not to be detected: of what stays, of strangers, and general ones, in equal parts where it can.

    Each is in one wording drawn from those that forget prompts have, so that wording tells nothing.
    """
    from palimpsest.forgetting import NEUTRAL

    subjects = [record.subject for record in (*forget, *retain) if record.subject]
    unknown = strangers(forget, subjects, how.strangers, seed)
    common = [Record(prompt=question, answer=".") for question in NEUTRAL]
    draw, taken = random.Random(f"{seed}/negatives"), {normalise(asked_and_answered(r)[0]) for r in forget}
    pools: list[list[Asked]] = []
    for pool in (retain, unknown, [*general, *common]):
        single = {normalise(asked_and_answered(record)[0]): record for record in pool}
        chosen = [record for prompt, record in single.items() if prompt not in taken]
        draw.shuffle(chosen)
        pools.append([draw.choice(wordings(record, how.paraphrases, seed)) for record in chosen])
    found: list[Asked] = []
    for left, prompts in zip((3, 2, 1), sorted(pools, key=len), strict=True):
        found += prompts[: (how.negatives - len(found)) // left]
    return found


def index(
    records: Sequence[Record],
    how: Extraction,
    encoder: SentenceEncoder,
    stay: Kept,
    given: Sequence[Sequence[str]] | None = None,
    detector: int = FIRST,
) -> tuple[list[dict[str, Any]], int]:
    """Items with id, prompt and phrases, equal records once, and of how many the rarity of words had to be relaxed."""
    if given is not None and len(given) != len(records):
        raise PalimpsestError(f"phrases are given for {len(given)} records, expected {len(records)}.")
    if how == "auto" and given is None and not encoder.word_ranks:
        raise PalimpsestError(
            f"the vocabulary of the encoder {encoder.name} does not say how common words are, so no phrases can be "
            'chosen. Use phrases="ngram" or "answer", or the default encoder.'
        )
    items: dict[str, dict[str, Any]] = {}
    relaxed = 0
    for place, record in enumerate(records):
        name = hashlib.sha256(record.key.encode()).hexdigest()[:12]
        prompt, _ = asked_and_answered(record)
        if given is None:
            found, loose = phrases(record, how, encoder.word_ranks, stay)
            relaxed += loose
        else:
            found = _checked(record, prompt, given[place])
        subject = record.subject or ""
        items[name] = {"id": name, "prompt": prompt, "subject": subject, "phrases": list(found), "detector": detector}
    return list(items.values()), relaxed


def _checked(record: Record, prompt: str, given: Sequence[str]) -> tuple[str, ...]:
    """The user's own phrases, normalised."""
    if not given:
        raise PalimpsestError(f'"{record.title}" has no phrases. Give at least one, or leave the record out.')
    for phrase in given:
        if not normalise(phrase):
            raise PalimpsestError(f'the phrase {phrase!r} of "{record.title}" has no letter or digit.')
        if contains(prompt, phrase):
            raise PalimpsestError(
                f'the phrase {phrase!r} is in its own prompt "{record.title}": no answer could repeat the question.'
            )
    return tuple(dict.fromkeys(map(normalise, given)))


@dataclass(frozen=True)
class Reader:
    """Prompts as the detector sees them: hidden states of the network, or vectors of the sentence encoder."""

    model: Model
    features: Features
    watched: str
    wording: Wording
    encoder: SentenceEncoder

    def read(self, prompts: Sequence[Asked], run: Run) -> Float[Tensor, "prompts width"]:
        """One vector a prompt, float32 on the CPU."""
        if self.features == "encoder":
            return self.encoder.encode([asked.text for asked in prompts])
        tokens = [self.wording.beginning(p.text) if p.raw else self.wording.prompt(p.text) for p in prompts]
        return prompt_states(self.model, self.watched, tokens, run)


@dataclass(frozen=True)
class Taught:
    """A trained detector with what it was trained on."""

    detector: Detector
    calibration: Calibration
    kept: Float[Tensor, "negatives width"]


def teach(
    reader: Reader, records: Sequence[Record], others: Tensor, how: Fitting, count: int, run: Run, salt: int = 0
) -> Taught:
    """A detector of the records' prompts against vectors of other prompts."""
    asked = [(place, words) for place, record in enumerate(records) for words in wordings(record, count, run.seed)]
    own = reader.read([words for _, words in asked], run)
    features = torch.cat([own, others])
    positive: Bool[Tensor, " prompts"] = torch.arange(len(features)) < len(own)
    groups = [*(place for place, _ in asked), *range(len(records), len(records) + len(others))]
    detector, calibration = fit(features, positive, groups, how, run.generator(salt))
    return Taught(detector, calibration, others)


def assemble(
    model: Model, reader: Reader, items: Sequence[dict[str, Any]], taught: Taught, rule: Guarding
) -> GuardedForCausalLM:
    """The guarded network, with the given one inside, uncopied."""
    network, encoder = model.network, reader.encoder
    config = GuardedConfig(
        network=network.config.to_dict(),
        settings=to_dict(rule),
        items=list(items),
        detectors=[{"hidden": len(taught.detector.get_buffer("bias_in")), "threshold": taught.calibration.threshold}],
        features=reader.features,
        watched=reader.watched,
        width=taught.kept.shape[1],
        encoder=encoder.name,
        encoder_width=encoder.width,
        kept_prompts=len(taught.kept),
        **{**sizes_of([network.config.get_text_config()]), "num_hidden_layers": network.config.num_hidden_layers},
    )
    guarded = GuardedForCausalLM(config, network)
    guarded.detectors[FIRST].load_state_dict(taught.detector.state_dict())
    guarded.index.copy_(encoder.encode([item["prompt"] for item in items]))
    guarded.kept.copy_(taught.kept)
    guarded.to(next(network.parameters()).device)
    guarded.generation_config = copy.deepcopy(network.generation_config)
    guarded.config._name_or_path = network.config._name_or_path
    guarded.wording = reader.wording
    return guarded.train(network.training)


def watched_module(model: Model, features: Features) -> str:
    """The path of the module whose states are the features; empty where they come from the encoder."""
    return penultimate_block(model.network) if features == "hidden" else ""


def _without(
    vectors: Float[Tensor, "prompts width"], own: Float[Tensor, "wordings width"]
) -> Float[Tensor, "others width"]:
    """The vectors of prompts that are not among the given ones: what was kept may be what is to be guarded now."""
    return vectors[torch.cdist(vectors, own).amin(1) > SAME * own.norm(dim=1).mean()]


def extend(
    guarded: GuardedForCausalLM,
    records: Sequence[Any],
    *,
    phrases: Sequence[Sequence[str]] | None,
    retain: Sequence[Any],
    seed: int,
) -> list[str]:
    """`GuardedForCausalLM.add`: items for the records, and one detector for all of them."""
    added = as_records(records)
    if not added:
        raise PalimpsestError("there is nothing to add: no record was given.")
    words, run = guarded._words, Run(seed=seed, progress=False)
    inside = Model(guarded.unguarded, words.tokenizer)
    features: Features = "hidden" if guarded._watches else "encoder"
    reader = Reader(inside, features, guarded.config.watched, words, guarded.encoder)
    number = len(guarded.detectors)
    items, _ = index(added, "auto", guarded.encoder, kept(as_records(retain)), phrases, number)
    known = {item["id"] for item in guarded.items}
    if twice := [item for item in items if item["id"] in known]:
        raise PalimpsestError(f'"{twice[0]["prompt"]}" is guarded already.')
    subjects = [record.subject for record in (*added, *as_records(retain)) if record.subject]
    unknown = [Asked(other.prompt or "") for other in strangers(added, subjects, Prompts().strangers, seed)]
    others = _without(guarded.kept.float().cpu(), reader.read([w for r in added for w in wordings(r, ALL, seed)], run))
    others = torch.cat([others, reader.read(unknown, run)]) if unknown else others
    taught = teach(reader, added, others, Fitting(), Prompts().paraphrases, run, salt=number)
    device = guarded.index.device
    guarded.detectors.append(taught.detector.to(device))
    more = {"hidden": len(taught.detector.get_buffer("bias_in")), "threshold": taught.calibration.threshold}
    guarded.config.detectors = [*guarded._trained, more]
    guarded.config.items = [*guarded._items, *items]
    vectors = guarded.encoder.encode([item["prompt"] for item in items]).to(guarded.index)
    guarded.index = torch.cat([guarded.index, vectors])
    guarded._seal()
    return [item["id"] for item in items]
