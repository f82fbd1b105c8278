"""What holds for every method and probe: checked inputs, the seed, evaluation mode, and a ledger of what was done."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from palimpsest import __version__
from palimpsest.errors import PalimpsestError
from palimpsest.ledger import Entry
from palimpsest.run import Run, stopwatch
from palimpsest.system import Facts, slug_of, to_dict

if TYPE_CHECKING:
    from palimpsest.data.records import Roles
    from palimpsest.models.model import Model

Apply = Callable[..., Any]
Measure = Callable[..., Any]
KEEPS_WEIGHTS = ("guard", "retrain")
"""Erasers that leave the weights they are given alone: one only holds words back, the other starts anew."""


def guarded_apply(apply: Apply) -> Apply:
    """`apply` with the checks before it and the ledger entry after it."""

    @functools.wraps(apply)
    def guarded(self: Any, model: Model, data: Roles, run: Run | None = None) -> Model:
        from palimpsest.statistics.examples import evaluating

        model, data = expected(model, data, slug_of(self))
        run = run or Run()
        run = run.replace(notes={}, job=json.dumps([run.job, slug_of(self), to_dict(self)], sort_keys=True))
        check_inputs(self.facts, slug_of(self), model, data)
        before = model.digest()
        history = model.ledger
        with stopwatch() as cost, run.seeded(), evaluating(model.network):
            result = apply(self, model, data, run)
        entry = Entry(
            method=slug_of(self),
            settings=to_dict(self),
            seed=run.seed,
            version=__version__,
            data={role: digest for role, digest in data.digest().items() if role in self.facts.needs | self.facts.uses},
            weights_before=before,
            weights_after=result.digest(),
            seconds=cost["seconds"],
            peak_bytes=cost["peak_bytes"],
            notes=run.notes,
        )
        result.ledger = history.add(entry)
        result.network.eval()
        return result

    return guarded


def guarded_measure(measure: Measure) -> Measure:
    """`measure` in evaluation mode; all models are in the mode they were in afterwards."""

    @functools.wraps(measure)
    def guarded(
        self: Any, model: Model, data: Roles, run: Run, gold: Model | None = None, **others: Model | None
    ) -> Any:
        from palimpsest.statistics.examples import evaluating

        model, data = expected(model, data, self.facts.slug)
        with contextlib.ExitStack() as stack:
            for each in (model, gold, *others.values()):
                if each is not None:
                    stack.enter_context(evaluating(each.network))
            return measure(self, model, data, run, gold, **others)

    return guarded


def expected(model: Any, data: Any, slug: str) -> tuple[Model, Roles]:
    """Model and roles; a plain mapping becomes roles, anything else raises."""
    from palimpsest.data.records import Roles
    from palimpsest.models.model import Model

    if not isinstance(model, Model):
        raise PalimpsestError(
            f"{slug}: expected a palimpsest Model, found {type(model).__name__}. "
            "palimpsest.load(name) gives one, and palimpsest.Model(network, tokenizer) wraps one."
        )
    if not isinstance(data, Mapping):
        raise PalimpsestError(f"{slug}: expected Roles(forget=..., retain=...), found {type(data).__name__}.")
    return model, data if isinstance(data, Roles) else Roles(**data)


def check_inputs(facts: Facts, slug: str, model: Model, data: Roles) -> None:
    """Raises one sentence where the model is of the wrong kind, a role is missing or empty, or roles overlap."""
    from palimpsest.data.records import check_disjoint

    check_kind(facts, slug, model)
    if facts.verb == "erase" and slug not in KEEPS_WEIGHTS and looks_up(model):
        raise PalimpsestError(
            f"{slug}: this model looks up a datastore, which holds its texts in clear and which no eraser of weights "
            "reaches. Erase from the model without it, and build the datastore again without these records "
            "(palimpsest write knn-lm)."
        )
    for role in sorted(facts.needs):
        data.require(role, by=slug)
    for role in sorted(facts.uses):
        if role in data and not data[role]:
            raise PalimpsestError(f"the {role} set is empty. Leave the role out, or fill it.")
    if facts.verb == "erase" and "forget" in data and "retain" in data:
        check_disjoint(data["forget"], data["retain"], ("forget", "retain"))


def looks_up(model: Model) -> bool:
    """Whether the model looks up texts that it holds beside its weights."""
    return any(getattr(module, "holds_texts", False) for module in model.network.modules())


def check_kind(facts: Facts, slug: str, model: Model) -> None:
    """Raises where the system does not take this kind of model, naming those that do."""
    kind = kind_of(model)
    if _fits(facts, kind):
        return
    from palimpsest.system import catalogue

    fitting = [name for name, other in catalogue().items() if other.verb == facts.verb and _fits(other, kind)]
    raise PalimpsestError(
        f"{slug} takes a {facts.takes}, but {type(model.network).__name__} is a {kind}. "
        f"Systems of this verb for a {kind}: {', '.join(fitting) or 'none'}."
    )


def _fits(facts: Facts, kind: str) -> bool:
    taken = facts.takes.split(" or ")
    return facts.takes == "none" or kind in taken or (kind == "mixture-of-experts" and "causal-lm" in taken)


def kind_of(model: Model) -> str:
    """`classifier`, `mixture-of-experts` or `causal-lm`."""
    name = type(model.network).__name__
    if "Classification" in name:
        return "classifier"
    config = model.network.config
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    return "mixture-of-experts" if any(getattr(config, field, 0) for field in experts) else "causal-lm"
