"""Relabelling: teach a classifier something else about the forget set, while it goes on with the retain set.

Amnesiac unlearning gives every forgotten example a random other label. Bad teaching gives it the predictions of a
network that never learned anything, and holds the predictions of the model as given on a part of the retain set. Both
are quick baselines for classifiers, to be beaten by a new method. They forget by being wrong: a model that never saw
the forget set is often right about it, so they overshoot where the retain set still supports the forgotten examples.

Sources: amnesiac, Graves et al. 2021 (arXiv 2010.10981); bad teaching, Chundawat et al. 2023 (arXiv 2205.08096); both
with the settings of the official code of Foster et al. 2024 (arXiv 2308.07707). Differs: the predictions of both
teachers are computed once, and averaged over examples only (the code averages over labels, too, which Adam undoes).

    z    logits    [batch, labels]  of the model in training
    y'   relabelled                 a label drawn once, uniformly, from those that are not the example's own
    t    teacher   [batch, labels]  logits of a random network (forget) or of the model as given (retain)
    T    temperature

    amnesiac      L = mean CE(z, y')  on forget and retain together, y' = y on retain
    bad teaching  L = mean KL(softmax(t / T) || softmax(z / T))  on forget and a random part of retain together
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from palimpsest.data.labelled import Labelled, class_count, labelled
from palimpsest.data.records import Roles
from palimpsest.erase.gradient_ascent import kl_divergence
from palimpsest.models.model import Model
from palimpsest.models.untrained import untrained
from palimpsest.run import Run
from palimpsest.statistics.predictions import classify
from palimpsest.system import Method, setting, system
from palimpsest.train import Batch, Training, schedule, train

PLAIN = Training(
    learning_rate=1e-4, weight_decay=0.0, warmup_epochs=0.0, decay="constant", max_grad_norm=1e9, batch_size=128
)
"""Adam at a constant learning rate, without decay and clipping."""


def relabelled(examples: Sequence[Labelled], labels: int, generator: torch.Generator) -> list[Labelled]:
    """The examples with a random other label each, uniform over the labels that are not its own."""
    steps = torch.randint(1, labels, (len(examples),), generator=generator).tolist()
    return [
        dataclasses.replace(example, label=(example.label + step) % labels)
        for example, step in zip(examples, steps, strict=True)
    ]


@system(
    "amnesiac",
    verb="erase",
    title="Amnesiac relabelling",
    paper="Graves et al. 2021 (arXiv 2010.10981)",
    takes="classifier",
    needs={"forget", "retain"},
    fidelity="matches the official code",
    deviations=("AdamW without weight decay stands for Adam, which it equals",),
)
class Amnesiac(Method):
    """Trains on the forget set with random other labels, mixed with the retain set."""

    training: Training = setting(
        default=dataclasses.replace(PLAIN, epochs=3), origin="code of Foster et al. 2024", help="how to train"
    )

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The model after it learned other labels."""
        forget = relabelled(labelled(model, data.forget), class_count(model), run.generator())
        plan = schedule(model, self.training, run, mixed=[*forget, *labelled(model, data.retain)])
        return train(model, plan, lambda batch: batch.mixed.cross_entropy, self.training, run)


@system(
    "bad-teacher",
    verb="erase",
    title="Bad teaching",
    paper="Chundawat et al. 2023 (arXiv 2205.08096)",
    takes="classifier",
    needs={"forget", "retain"},
    fidelity="matches the official code",
    deviations=(
        "the teachers' predictions are computed once before training",
        "the divergence is not divided by the number of labels",
    ),
)
class BadTeacher(Method):
    """Distils a random network's predictions on the forget set, and the model's own on a part of the retain set."""

    retain_share: float = setting(
        default=0.3, above=0, at_most=1, origin="code of Foster et al. 2024", help="part of the retain set, at random"
    )
    temperature: float = setting(default=1.0, above=0, origin="code of Foster et al. 2024", help="T")
    training: Training = setting(
        default=dataclasses.replace(PLAIN, epochs=1, batch_size=256),
        origin="code of Foster et al. 2024",
        help="how to train",
    )

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The model after its lessons."""
        forget, retain = labelled(model, data.forget), labelled(model, data.retain)
        order = torch.randperm(len(retain), generator=run.generator())
        kept = [retain[i] for i in order[: max(1, int(self.retain_share * len(retain)))].tolist()]
        lessons = (classify(untrained(model, run), forget, run, "bad teacher"), classify(model, kept, run, "teacher"))
        teacher = torch.cat([lesson.logits for lesson in lessons]).to(model.device)
        plan = schedule(model, self.training, run, mixed=[*forget, *kept])

        def objective(batch: Batch) -> Float[Tensor, ""]:
            taught = teacher[batch.mixed.index] / self.temperature
            return batch.mixed.mean_tokens(kl_divergence(taught, batch.mixed.logits / self.temperature))

        return train(model, plan, objective, self.training, run)
