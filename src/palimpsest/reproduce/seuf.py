"""SEUF on a small mixture of experts that learned facts of six topics, one of which is to be forgotten.

Every way of unlearning is gradient ascent until a quarter of the topic's facts is left, at the learning rate (1e-3 or
3e-3) that kept more of the others on seed 1000; what differs is which weights may move. A step is the whole topic. With
eight experts, those of which a layer needs for 15 % of its affinity are one, so that the rival ESFT is the row
"top expert of every layer".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from palimpsest.audit.answers import answers
from palimpsest.audit.reading import Reading, Value, mean_value
from palimpsest.comparison import Task, compare
from palimpsest.data.records import Record, Roles
from palimpsest.erase.gradient_ascent import GradientAscent
from palimpsest.erase.seuf import SEUF
from palimpsest.models.anatomy import anatomy
from palimpsest.models.hooks import Call, watch
from palimpsest.models.model import Model
from palimpsest.report.evidence import Evidence
from palimpsest.reproduce.harness import word_tokenizer
from palimpsest.reproduce.judging import Seeds, above, at_least, at_most, row, tabled
from palimpsest.reproduce.runner import Outcome, Reproduction
from palimpsest.run import Run
from palimpsest.statistics.experts import routing, routing_overlap
from palimpsest.system import Method, Probe, setting, system
from palimpsest.train import Batch, Training
from palimpsest.write.finetune import Finetune

TOPICS, ENTITIES, RELATIONS, EXPERTS = 6, 12, 3, 8
TARGET = 0.25
BALANCE = 0.01
LEARNING = Training(
    learning_rate=3e-3, epochs=150, batch_size=72, weight_decay=0.0, warmup_epochs=1.0, micro_tokens=4096
)
ASCENT = Training(
    learning_rate=1e-3,
    epochs=300,
    batch_size=64,
    weight_decay=0.0,
    warmup_epochs=0.0,
    decay="constant",
    micro_tokens=4096,
)


def facts(seed: int = 0) -> Roles:
    """`entity relation` and its value: entities, relations and values of a topic are words of that topic alone."""
    draw = torch.Generator().manual_seed(seed)
    topics = [
        [
            Record(prompt=f"e{t}x{e} r{t}x{r}", answer=f"v{t}x{int(torch.randint(ENTITIES, (), generator=draw))}")
            for e in range(ENTITIES)
            for r in range(RELATIONS)
        ]
        for t in range(TOPICS)
    ]
    retain = [record for topic in topics[1:] for record in topic]
    return Roles(train=[*topics[0], *retain], forget=topics[0], retain=retain)


def new_model(seed: int = 0) -> Model:
    """A mixture of experts that knows nothing: width 32, two layers of eight experts, two of which are chosen."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    kinds = {"e": ENTITIES, "r": RELATIONS, "v": ENTITIES}
    words = word_tokenizer([f"{kind}{t}x{i}" for kind, n in kinds.items() for t in range(TOPICS) for i in range(n)])
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    experts: dict[str, Any] = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    ids = {"pad_token_id": words.pad_token_id, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    config = Qwen3MoeConfig(
        vocab_size=len(words), num_key_value_heads=4, max_position_embeddings=32, **sizes, **experts, **ids
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(Qwen3MoeForCausalLM(config).eval(), words)


@system(
    "balanced-finetune",
    verb="write",
    title="Fine-tuning that keeps the experts of a mixture evenly used",
    paper="Fedus et al. 2022 (arXiv 2101.03961)",
    takes="mixture-of-experts",
    needs={"train"},
    fidelity="paper only",
)
class Balanced(Finetune):
    """Fine-tuning with the load-balancing loss N sum_i f_i P_i, of shares of tokens and mean router probabilities."""

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The model that learned the records."""
        student = model if run.in_place else model.copy()
        routers = {part.name: part.module for part in anatomy(student.network).find("router")}
        seen: dict[str, Any] = {}

        def keep(call: Call, output: Any) -> None:
            seen[call.key] = output

        def penalty(batch: Batch) -> torch.Tensor:
            losses = []
            for name in routers:
                _, probability, used = routing(name, seen[name])
                shares = used.float().mean(0) / used.sum(1).float().mean()
                losses.append(EXPERTS * (shares * probability.mean(0)).sum())
            return BALANCE * torch.stack(losses).mean()

        with watch(routers, forward=keep):
            return Finetune(training=self.training).apply(student, data, run.replace(in_place=True, penalty=penalty))


@system(
    "ascent-until-forgotten",
    verb="erase",
    title="Gradient ascent on some of the weights until the topic is gone",
    paper="",
    takes="mixture-of-experts",
    needs={"forget"},
    fidelity="adapted",
)
class Until(Method):
    """Gradient ascent that ends when at most a quarter of the facts is left."""

    where: Literal["all", "routers", "experts", "seuf"] = setting(default="seuf", origin="ours", help="what may move")
    scope: Literal["network", "layer", "every layer"] = setting(default="network", origin="paper", help="see seuf")
    choice: Literal["most", "least", "random"] = setting(default="most", origin="paper", help="see seuf")
    anchor: float = setting(default=1.0, at_least=0, origin="paper", help="see seuf")
    rank: int = setting(default=0, at_least=0, origin="ours", help="rank of adapters on all linear layers; 0: none")
    learning_rate: float = setting(default=1e-3, above=0, origin="seed 1000", help="learning rate")

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The model as it was when the target was reached, or after all steps."""
        quiet = Run(seed=run.seed, progress=False)

        def gone(step: int, student: Model) -> bool:
            left = accuracy(student, data.forget, quiet.replace(cache={}))
            student.network.train()
            return left <= TARGET

        work = run.replace(stop=gone, in_place=False, folder=None)
        training = dataclasses.replace(ASCENT, learning_rate=self.learning_rate, lora_rank=self.rank)
        if self.where in ("all", "routers"):
            student = model.copy()
            if self.where == "routers":
                student.network.requires_grad_(False)
                for part in anatomy(student.network).find("router"):
                    part.module.requires_grad_(True)
            result = GradientAscent(training=training).apply(student, data, work.replace(in_place=True))
            result.network.requires_grad_(True)
        else:
            confined = {"experts": 2 * EXPERTS, "router": "none", "anchor": 0.0} if self.where == "experts" else {}
            options: dict[str, Any] = {"scope": self.scope, "choice": self.choice, "anchor": self.anchor, **confined}
            result = SEUF(method="gradient-ascent", training=training, **options).apply(model, data, work)
        run.note(**result.ledger.entries[-1].notes)
        run.note(routing_overlap=routing_overlap(result, model, data.forget, run))
        return result


def accuracy(model: Model, records: Sequence[Record], run: Run) -> float:
    """Share of the records whose value is the most likely token."""
    return float(torch.tensor([float(a.correct[a.words].all()) for a in answers(model, list(records), run)]).mean())


@system(
    "seuf-measures",
    verb="audit",
    title="Facts known, choice of experts, share of weights that moved",
    paper="",
    takes="mixture-of-experts",
    fidelity="adapted",
)
class Measures(Probe):
    """How many facts of the topic and of the others are known; what the method noted."""

    def measure(self, model: Model, data: Roles, run: Run, gold: Model | None = None) -> Reading:
        """`forget` and `utility` (accuracies); `overlap` and `trained` where the method noted them."""
        found = []
        for name, role in (("forget", "forget"), ("utility", "retain")):
            right = [float(a.correct[a.words].all()) for a in answers(model, data[role], run)]
            found.append(mean_value(name, right, seed=run.seed))
        notes = model.ledger.entries[-1].notes
        for name, noted in (("overlap", "routing_overlap"), ("trained", "trained_share")):
            if noted in notes:
                found.append(Value(name=name, value=notes[noted], n=1))
        return Reading(probe=self.facts.slug, values=tuple(found))


METHODS: dict[str, Method] = {
    "all weights": Until(where="all", learning_rate=3e-3),
    "all experts": Until(where="experts"),
    "routers": Until(where="routers"),
    "adapters of rank 4": Until(where="all", rank=4),
    "seuf": Until(learning_rate=3e-3),
    "seuf without anchor": Until(anchor=0.0, learning_rate=3e-3),
    "random expert": Until(choice="random", learning_rate=3e-3),
    "least used expert": Until(choice="least"),
    "top expert of every layer": Until(scope="every layer"),
}
COLUMNS = ("forget", "utility", "overlap", "trained")


def task() -> Task:
    """The mixture that learned all topics."""
    return Task(
        name="topics-seuf",
        question="Is the topic gone, and are the others still there?",
        source="216 facts of six topics, entity relation value",
        start=new_model,
        roles=facts,
        learn=Balanced(training=LEARNING),
        probes=(Measures(),),
        max_new_tokens=1,
    )


def measure(seeds: Sequence[int], folder: Path, run: Run) -> Outcome:
    """All ways of every seed."""
    return judge(compare(task(), list(METHODS.values()), folder, seeds=seeds, run=run))


def judge(found: Evidence) -> Outcome:
    """The outcome that the evidence shows."""
    table = tabled(found.models, METHODS, dict(zip(COLUMNS, COLUMNS, strict=True)))
    seuf, whole, chance, least = (
        table[title] for title in ("seuf", "all weights", "random expert", "least used expert")
    )
    checks = (
        at_most("SEUF reaches the target", seuf["forget"], TARGET),
        above("its utility is above that of a random expert", seuf["utility"], chance["utility"]),
        above("and of the least used one", seuf["utility"], least["utility"]),
        at_least("by 5 points on average", _mean(seuf["utility"] - chance["utility"]), 0.05),
        at_least("its routing overlaps 0.1 more than that of all weights", seuf["overlap"], whole["overlap"] + 0.1),
        at_least("its utility is within 2 points of all weights", seuf["utility"], whole["utility"] - 0.02),
    )
    return Outcome(
        rows=[row(title, columns) for title, columns in table.items()],
        checks=checks,
        note="That one expert is 5 % of the weights is how this model is built and says nothing.",
    )


def _mean(numbers: Seeds) -> Seeds:
    return numbers.mean(keepdims=True)


REPRODUCTION = Reproduction(
    claim="Unlearning through the one expert that the forget set uses most keeps the choice of experts and the rest of "
    "the knowledge, where the same loss on another expert does not.",
    source="Zhuang et al. 2025 (arXiv 2411.18797)",
    setting="A mixture of 2 x 8 experts, two chosen, that learned 216 facts of six topics with no word in common; "
    "gradient ascent on one topic until at most 0.25 of its facts are known.",
    paper="DeepSeek-V2-Lite on WMDP-Cyber, gradient ascent (forget, utility): before .380, .555; all weights .246, "
    ".315; SEUF .270, .510; with a loss on representations, SEUF .286, .542 and a random expert .272, .518.",
    measure=measure,
)
