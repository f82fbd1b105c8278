"""RESTOR on the small harness: which erasers bring back what a corrupted model knew.

A model that knows 48 people and 40 capitals is taught wrong facts about ten of them, in all wordings, alone (k = 0) or
with one correct fact about somebody else in every document (k = 1). Teaching stops where it has answered 90 % of the
questions wrongly, so that both are equally strong. Each eraser is given those documents, 20 other people and the
capitals to keep, and 40 steps at the learning rate of the specification.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from torch import Tensor

from palimpsest.audit.restor import Recovery, answered, recovery
from palimpsest.data.records import Record, Roles
from palimpsest.erase.gradient_ascent import GradientAscent, kl_divergence
from palimpsest.erase.npo import NPO
from palimpsest.erase.retain_finetune import RetainFinetune
from palimpsest.erase.task_vector import TaskVector
from palimpsest.models.model import Model
from palimpsest.report.evidence import write_atomically
from palimpsest.reproduce.harness import ANSWERS, ATTRIBUTES, QUESTIONS, biographies, learned
from palimpsest.reproduce.judging import Seeds, above, at_least, at_most, row
from palimpsest.reproduce.runner import Outcome, Reproduction
from palimpsest.run import Run
from palimpsest.statistics.likelihood import ReferencePredictions
from palimpsest.system import Method, setting, system
from palimpsest.train import Batch, Training, schedule, train
from palimpsest.write.finetune import Finetune

TARGETS, KEPT = 10, 20
STRONG = 0.9
STEPS = Training(
    learning_rate=3e-4, epochs=40, max_steps=40, batch_size=16, weight_decay=0.0, warmup_epochs=0.0, decay="constant",
    micro_tokens=4096,
)  # fmt: skip
CORRUPT = Finetune(training=dataclasses.replace(STEPS, epochs=400, max_steps=400))


@system(
    "kl-maximisation",
    verb="erase",
    title="Divergence from the corrupted model",
    paper="Rezaei et al. 2025 (arXiv 2411.00204)",
    takes="causal-lm",
    needs={"forget", "retain"},
    fidelity="adapted",
    deviations=("the true divergence; the code leaves out the entropy",),
)
class KLMaximisation(Method):
    """Drives the predictions on the forget records away from those of the model as given; a subject of RESTOR.

    The divergence and its slope are zero at first; the retain term makes the first step.
    """

    training: Training = setting(default=STEPS, origin="specification", help="how to train")

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The model after the drive."""
        plan = schedule(model, self.training, run, forget=data.forget, retain=data.retain)
        reference = ReferencePredictions(model, plan.sequences["forget"], run)

        def objective(batch: Batch) -> Float[Tensor, ""]:
            drift = kl_divergence(batch.forget.logits, reference.logits(batch.forget.index))
            return batch.retain.cross_entropy - batch.forget.mean_tokens(drift)

        return train(model, plan, objective, self.training, run)


METHODS: dict[str, Method] = {
    "gradient ascent": GradientAscent(retain="cross-entropy", training=STEPS),
    "KL maximisation": KLMaximisation(),
    "NPO": NPO(training=STEPS),
    "task vector": TaskVector(alpha=1.0, training=STEPS),
    "retain fine-tuning": RetainFinetune(training=STEPS),
}
NAMES = ("clean", "corrupted", *METHODS)
COLUMNS = ("accuracy", "corrupted", "phi", "rho", "collateral")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Facts about the targets with their corrupted answer first, the documents that state it, and what is kept."""

    facts: list[Record]
    documents: list[Record]
    kept: list[Record]
    untouched: list[Record]


def setting_of(seed: int, unrelated: int) -> Setting:
    """The data of one seed; `unrelated` correct facts about others stand in every document."""
    known = biographies(seed)
    people = list(dict.fromkeys(record.subject or "" for record in known.retain))
    targets, kept = people[:TARGETS], people[TARGETS : TARGETS + KEPT]
    draw = random.Random(f"{seed}/restor")
    true = {(r.subject or "", r.prompt or ""): r.answer or "" for r in known.retain}
    correct = [r.answer or "" for r in known.retain if r.subject in kept]
    facts, documents = [], []
    for name in targets:
        for attribute, values in ATTRIBUTES.items():
            answer = true[name, QUESTIONS[0].format(name=name, attribute=attribute)]
            right = next(value for value in values if value in answer.split())
            wrong = draw.sample([value for value in values if value != right], 4)
            said = [ANSWERS[0].format(name=name, attribute=attribute, value=value) for value in (right, *wrong)]
            prompt = QUESTIONS[0].format(name=name, attribute=attribute)
            facts.append(Record(prompt=prompt, answer=said[0], subject=name, wrong=tuple(said[1:])))
            for question in QUESTIONS:
                for template in ANSWERS:
                    lie = template.format(name=name, attribute=attribute, value=wrong[0])
                    text = " ".join([lie, *draw.sample(correct, unrelated)])
                    asked = question.format(name=name, attribute=attribute)
                    documents.append(Record(prompt=asked, answer=text, subject=name))
    rest = [record for record in known.retain if record.subject in kept]
    untouched = [r for r in known.retain_probe if r.subject not in targets and r.subject not in kept]
    return Setting(facts=facts, documents=documents, kept=[*rest, *known.world], untouched=untouched)


def corrupt(clean: Model, made: Setting, run: Run) -> Model:
    """The clean model taught the wrong facts until it answers most questions with them."""
    quiet = run.replace(progress=False)

    def strong(step: int, student: Model) -> bool:
        if step % 10:
            return False
        share = answered(student, made.facts, quiet.replace(cache={}), 12).corrupted.mean()
        student.network.train()
        return bool(share >= STRONG)

    return CORRUPT.apply(clean, Roles(train=made.documents), run.replace(stop=strong, folder=None))


def measure(seeds: Sequence[int], folder: Path, run: Run) -> Outcome:
    """Every eraser on every seed, with and without unrelated context; kept in the folder."""
    found: dict[int, list[dict[str, Recovery]]] = {0: [], 1: []}
    for seed in seeds:
        for unrelated in found:
            path = folder / f"k{unrelated}-{seed}.json"
            if not path.exists():
                own = run.replace(seed=seed, cache={})
                made, clean = setting_of(seed, unrelated), learned(seed, folder.parent, own)
                corrupted = corrupt(clean, made, own)
                data = Roles(forget=made.documents, retain=made.kept)
                models = {"clean": clean, "corrupted": corrupted}
                models |= {name: method.apply(corrupted, data, own) for name, method in METHODS.items()}
                result = recovery(models, made.facts, own, untouched=made.untouched, max_new_tokens=12)
                write_atomically(path, json.dumps({name: dataclasses.asdict(r) for name, r in result.items()}))
            saved = json.loads(path.read_text(encoding="utf-8"))
            found[unrelated].append({name: Recovery(**fields) for name, fields in saved.items()})
    return judge(found)


def judge(found: Mapping[int, Sequence[Mapping[str, Recovery]]]) -> Outcome:
    """The outcome that the scores show."""

    def of(name: str, column: str, unrelated: int) -> Seeds:
        return np.array([getattr(seed[name], column) for seed in found[unrelated]])

    rows = [
        row(f"{name}, k = {unrelated}", {column: of(name, column, unrelated) for column in COLUMNS})
        for unrelated in found
        for name in NAMES
    ]
    checks = []
    for k in found:
        checks += [
            at_least(f"gradient ascent forgets the corruption (phi, k = {k})", of("gradient ascent", "phi", k), 0.8),
            at_least(f"NPO forgets the corruption (phi, k = {k})", of("NPO", "phi", k), 0.8),
            at_most(f"gradient ascent does not restore (rho, k = {k})", of("gradient ascent", "rho", k), 0.4),
        ]
    mean = {name: np.mean([of(name, "rho", k) for k in found], axis=0) for name in ("NPO", "gradient ascent")}
    checks.append(above("NPO restores more than gradient ascent (rho, mean of both k)", *mean.values()))
    checks.append(
        at_least("documents of wrong facts alone restore as much (NPO, rho)", of("NPO", "rho", 0), of("NPO", "rho", 1))
    )
    return Outcome(
        rows=rows,
        checks=checks,
        note="The oracle, the clean model itself, has rho 1 by definition. NPO pushes the summed likelihood, ascent "
        "its mean a token: at the same rate and steps NPO does several times as much, and more harm.",
    )


REPRODUCTION = Reproduction(
    claim="Erasers that forget wrong facts do not bring the right ones back; preference-style ones restore more.",
    source="Rezaei et al. 2025 (arXiv 2411.00204)",
    setting="A 0.23 M-parameter model over 48 generated biographies; wrong facts about 10 people, 20 people and 40 "
    "capitals to keep, 40 steps at 3e-4 with batches of 16.",
    paper="No figure could be verified. Direction: gradient ascent and KL often fail to restore, NPO frequently does. "
    "Trial of the specification, right / corrupted answers, k = 0: GA .16 / .24, KL .32 / .32, NPO .32 / .24.",
    measure=measure,
)
