"""Several networks over the same records: their features layer by layer, how alike they are, and whose are kept.

Layers go by what they are and not by their names: blocks as `1`, `2`, ..., `features` for what a classifier's head is
given or a language model's last normalised states, `logits` for what a classifier's head says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.guard import kind_of
from palimpsest.models.anatomy import anatomy
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.representations import CrossProducts, Represented, representations
from palimpsest.statistics.transfer import class_means, ranked_by_similarity

Pair = tuple[str, str]
Kept = Literal["features", "logits"]


@dataclasses.dataclass(frozen=True)
class Compared:
    """What one pass of several models over some records shows.

    `products` give CKA by pair of models and layer; `features` are the kept vectors by model and layer, in the order of
    the chosen records; `labels` are a classifier's most probable labels.
    """

    products: dict[Pair, dict[str, CrossProducts]]
    features: dict[tuple[str, str], Float[Tensor, "kept width"]]
    labels: dict[str, Int[Tensor, " records"]]


def check_single(name: str, model: Model) -> None:
    """Raises where the model is made of several networks: their layers cannot be told whose they are."""
    if model.network.config.model_type == "palimpsest_mixture":
        raise PalimpsestError(f"{name} is a mixture of models, which has no features of its own. Compare its members.")


def by_layer(
    model: Model, records: Sequence[Record], run: Run, *, all_layers: bool = True, batch_size: int = 32
) -> Iterator[Represented]:
    """The representations of batch after batch by layer; without `all_layers`, those of no block."""
    parts = anatomy(model.network)
    blocks = [part.name for part in parts.blocks()]
    if classifies := kind_of(model) == "classifier":
        last = parts.select("classifier_head").parts[-1].name
        named = {"features": f"{last}:input", "logits": last}
    else:
        last = next((part.name for part in parts.find("final_norm")), blocks[-1] if blocks else "final_norm")
        named = {"features": last}
    if all_layers:
        named = {str(place): name for place, name in enumerate(blocks, 1)} | named
    wanted = list(dict.fromkeys(name.partition(":")[0] for name in named.values()))
    head = last if classifies else None
    for found in representations(model, records, wanted, run, inputs=head, batch_size=batch_size, label="features"):
        yield Represented(found.index, {label: found.layers[name] for label, name in named.items()})


def compared(
    models: Mapping[str, Model],
    pairs: Sequence[Pair],
    records: Sequence[Record],
    run: Run,
    *,
    all_layers: bool = False,
    kept: Bool[Tensor, " records"] | None = None,
    keep: Sequence[Kept] = ("features",),
    batch_size: int = 32,
) -> Compared:
    """One pass of every model over the records, side by side: nothing is held but sums, and the layer to keep.

    Raises where features are not finite, or where the networks have other layers or cut the records differently.
    """
    for name, model in models.items():
        check_single(name, model)
    chosen = torch.zeros(len(records), dtype=torch.bool) if kept is None else kept
    place = chosen.cumsum(0) - 1
    found = Compared({pair: {} for pair in pairs}, {}, {})
    streams: dict[int, Iterator[Represented]] = {}
    for model in models.values():  # a model under two names goes through the records once
        shown = run if not streams else run.replace(progress=False)
        if id(model) not in streams:
            streams[id(model)] = by_layer(model, records, shown, all_layers=all_layers, batch_size=batch_size)
    for batches in zip(*streams.values(), strict=True):
        of_model = dict(zip(streams, batches, strict=True))
        seen = {name: of_model[id(model)] for name, model in models.items()}
        index = batches[0].index
        mine = chosen[index]
        for name, batch in seen.items():
            _check(name, batch, batches[0])
            for layer in keep if mine.any() else ():
                values = batch.layers[layer].cpu()
                rows = found.features.setdefault((name, layer), values.new_empty(int(chosen.sum()), values.shape[1]))
                rows[place[index][mine]] = values[mine]
            if "logits" in batch.layers:
                labels = found.labels.setdefault(name, torch.empty(len(records), dtype=torch.long))
                labels[index] = batch.layers["logits"].argmax(-1).cpu()
        for first, second in pairs:
            for layer, x in seen[first].layers.items():
                sums = found.products[first, second].setdefault(layer, CrossProducts())
                sums.add(x, seen[second].layers[layer])
    return found


def _check(name: str, batch: Represented, first: Represented) -> None:
    if not torch.equal(batch.index, first.index) or batch.layers.keys() != first.layers.keys():
        raise PalimpsestError(
            f"the {name} model has other layers than the first ({', '.join(batch.layers)}; {', '.join(first.layers)}) "
            "or cuts the records differently. Compare models of one architecture and tokenizer."
        )
    for layer, values in batch.layers.items():
        if not torch.isfinite(values).all():
            raise PalimpsestError(f"the {name} model gives values that are not finite (layer {layer}).")


def classes_of(records: Sequence[Record]) -> Int[Tensor, " records"] | None:
    """The class of each record: its label, else its subject as a number; None where not all have one."""
    if all(record.label is not None for record in records):
        return torch.tensor([int(record.label or 0) for record in records])
    if not all(record.subject for record in records):
        return None
    names = {name: place for place, name in enumerate(sorted({record.subject or "" for record in records}))}
    return torch.tensor([names[record.subject or ""] for record in records])


def unlabelled(records: Sequence[Record]) -> list[Record]:
    """The records with a label that every classifier has: the labels of other data are none of its own."""
    return [dataclasses.replace(record, label=0) for record in records]


def closest_classes(
    encoder: Model, known: Sequence[Record], downstream: Sequence[Record], count: int, run: Run
) -> list[int]:
    """The `count` classes of `known` whose mean features are closest to those of a downstream class, closest first.

    To choose a forget set whose loss must show downstream. The encoder should not be the model under study where
    another is at hand; `transfer.ranked_by_similarity` ranks embeddings of class names as well.
    """
    means = []
    for records in (known, downstream):
        if not records or (classes := classes_of(records)) is None:
            raise PalimpsestError("classes are compared: every record needs a label or a subject.")
        every = torch.ones(len(records), dtype=torch.bool)
        seen = compared({"encoding": encoder}, (), unlabelled(records), run, kept=every)
        means.append(class_means(seen.features["encoding", "features"], classes))
    (names, of_known), (_, of_others) = means
    if not 1 <= count <= len(names):
        raise PalimpsestError(f"count is {count}, expected 1 to {len(names)}, the number of known classes.")
    return ranked_by_similarity(of_known, of_others, names)[:count]
