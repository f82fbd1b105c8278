"""Stranger distillation: make the model treat the person as somebody it never heard of.

What would the model say about a person it never saw? It can be asked: put a stranger's name into the question and
the answer, and read off its predictions. Averaged over several strangers they say how likely each next word is for
anyone; the model is trained to predict just that for the real name, while its predictions on the retain set are held.
It neither refuses nor falls below what a model that never saw the records would give, so it needs no stopping rule. Use
it when the records name their subject; where a question by its wording alone gives the fact away, strangers give it
away too.

Source: our own definition. Related: Who's Harry Potter (Eldan and Russinovich 2023, arXiv 2310.02238) replaces names by
generic ones in the text; UNDIAL (Dong et al. 2024, arXiv 2402.10052) distils from adjusted predictions of the model.

    p_ref   reference  [targets, vocab]  predictions of the model as given
    S               strangers, names that are in no record
    q_t     teacher    [targets, vocab]  mean over S of p_ref(. | question and answer so far, with the stranger's name);
                                         at the tokens of the name itself: p_ref(. | real name)
    f               facts                1 where the true token y_t carries the fact (see `palimpsest.data.content`)
    c               caution              how far those are lowered: a learned fact is likelier for strangers, too

    q_t <- softmax(log q_t - c f_t onehot(y_t))
    L = mean_t KL(q_t || p) on forget  +  retain_weight mean_t KL(p_ref || p) on retain
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from difflib import SequenceMatcher

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.data.augmentation import renamed
from palimpsest.data.content import carries_fact
from palimpsest.data.encoding import Encoded, Encoder
from palimpsest.data.fictitious import people
from palimpsest.data.records import Record, Roles
from palimpsest.erase.gradient_ascent import retain_loss
from palimpsest.erase.undial import lowered
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.likelihood import ReferencePredictions
from palimpsest.system import Method, setting, system
from palimpsest.train import Batch, Training, schedule, train


def with_name(record: Record, stranger: str) -> Record:
    """The record with its subject's name, whole or in parts, replaced by the stranger's."""
    subject = record.subject
    assert subject is not None

    def swap(text: str) -> str:
        return renamed(text, {subject: stranger})

    chat = record.messages and tuple({**message, "content": swap(message["content"])} for message in record.messages)
    prompt, answer, text = (given and swap(given) for given in (record.prompt, record.answer, record.text))
    return dataclasses.replace(record, prompt=prompt, answer=answer, text=text, messages=chat)


def aligned(own: Sequence[int], swapped: Sequence[int]) -> Int[Tensor, " targets"]:
    """For each token of the own answer the place of the same token in the swapped one; -1 inside the name."""
    place = torch.full((len(own),), -1, dtype=torch.long)
    for a, b, size in SequenceMatcher(None, own, swapped, autojunk=False).get_matching_blocks():
        place[a : a + size] = torch.arange(b, b + size)
    return place


class Teacher:
    """What the model predicts about strangers at the targets of the forget sequences."""

    def __init__(
        self, model: Model, sequences: Sequence[Encoded], records: Sequence[Record], names: Sequence[str], run: Run
    ) -> None:
        encoder = Encoder.of(model)
        self._many, self._count = len(names), len(sequences)
        swapped = [
            encoder.record(with_name(record, name), index) for name in names for index, record in enumerate(records)
        ]
        self._places = [
            aligned(sequences[i % self._count].targets, other.targets).to(model.device)
            for i, other in enumerate(swapped)
        ]
        if all(with_name(record, names[0]) == record for record in records):
            raise PalimpsestError(
                "stranger: no forget record mentions its subject by name; nothing would be forgotten."
            )
        self._own = ReferencePredictions(model, sequences, run)
        self._strangers = ReferencePredictions(model, swapped, run)

    def probabilities(self, index: Int[Tensor, " batch"]) -> Float[Tensor, "targets vocabulary"]:
        """q at all targets of the sequences with these positions, one sequence after the other."""
        return torch.cat([self._of(int(i)) for i in index])

    def _of(self, i: int) -> Float[Tensor, "targets vocabulary"]:
        own = self._own.logits(torch.tensor([i])).softmax(-1)
        total, seen = torch.zeros_like(own), own.new_zeros(len(own), 1)
        for k in range(self._many):
            j = k * self._count + i
            place = self._places[j]
            known = place >= 0
            total[known] += self._strangers.logits(torch.tensor([j]))[place[known]].softmax(-1)
            seen[known] += 1
        return torch.where(seen > 0, total / seen.clamp_min(1), own)


@system(
    "stranger",
    verb="erase",
    title="Stranger distillation",
    paper="our own definition",
    takes="causal-lm",
    needs={"forget", "retain"},
    fidelity="our own definition",
    deviations=("strangers' names come from the generator that also names the fictitious people of the demo",),
)
class Stranger(Method):
    """Distils the model's own predictions about strangers into its predictions about the forgotten."""

    caution: float = setting(
        default=8.0,
        at_least=0,
        origin="ours, validation people",
        help="how far the logit of a word that carries the fact is lowered",
    )
    strangers: int = setting(default=4, at_least=1, origin="ours", help="how many names the teacher averages over")
    retain_weight: float = setting(
        default=2.0, at_least=0, origin="ours, validation people", help="weight of the divergence on retain"
    )
    training: Training = setting(default=Training(learning_rate=5e-5), origin="ours", help="how to train")

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The model after the distillation."""
        nameless = next((record for record in data.forget if not record.subject), None)
        if nameless is not None:
            raise PalimpsestError(f'stranger: the forget record "{nameless.title}" has no subject to replace.')
        plan = schedule(model, self.training, run, forget=data.forget, retain=data.retain)
        taken = {record.subject for records in data.values() for record in records}
        candidates = dict.fromkeys(
            r.subject for r in people(4 * self.strangers + 40, seed=run.seed + 1, facts_per_person=1)
        )
        names = [name for name in candidates if name and name not in taken][: self.strangers]
        teacher = Teacher(model, plan.sequences["forget"], data.forget, names, run)
        facts = [carries_fact(model.tokenizer, sequence).to(model.device) for sequence in plan.sequences["forget"]]
        hold = retain_loss("kl", model, plan, run)

        def objective(batch: Batch) -> Float[Tensor, ""]:
            forget, mask = batch.forget, torch.cat([facts[int(i)] for i in batch.forget.index])
            stranger = teacher.probabilities(forget.index).clamp_min(1e-30).log()
            q = lowered(stranger, forget.targets, mask, self.caution).softmax(-1)
            divergence = (torch.xlogy(q, q) - q * forget.logits.log_softmax(-1)).sum(-1)
            return forget.mean_tokens(divergence) + self.retain_weight * hold(batch)

        return train(model, plan, objective, self.training, run)
