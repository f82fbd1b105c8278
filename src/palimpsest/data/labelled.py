"""Records with a label as the inputs of a classifier: images ready for the network, or tokens.

An image goes through the model's image processor where it has one; without one `Record.image` must be what the network
takes. A text goes through the tokenizer, is cut at the longest context, and padded only where it is put into a batch.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from palimpsest.data.encoding import context_length
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.finite import is_finite
from palimpsest.ledger import weights_digest
from palimpsest.models.model import Model

SIDES = ("channels", "height", "width")
Read = Callable[[Record, str], tuple[dict[str, Tensor], int]]
"""Inputs of a record (named in errors as given), and how many tokens did not fit."""


@dataclasses.dataclass(frozen=True, slots=True)
class Labelled:
    """One example without a batch dimension: what the network takes by name, and the label it should give.

    `pad` is the token that fills up a shorter text in a batch; `cut` counts tokens that did not fit.
    """

    inputs: Mapping[str, Tensor]
    label: int
    index: int = 0
    pad: int = 0
    cut: int = 0

    @property
    def targets(self) -> tuple[int, ...]:
        """What is scored: the label alone."""
        return (self.label,)

    @property
    def size(self) -> int:
        """What it adds to a batch: the tokens of a text, 1 for an image."""
        return len(self.inputs["input_ids"]) if "input_ids" in self.inputs else 1

    @property
    def identity(self) -> tuple[Any, ...]:
        """What makes two examples the same to train on, quick to find: the very same inputs, and the label."""
        return (id(self.inputs), self.label)

    @property
    def content(self) -> tuple[Any, ...]:
        """The same as values that another process would find, too: the digest of the inputs, and the label."""
        return (weights_digest(dict(self.inputs)), self.label)


def labelled(
    model: Model,
    records: Sequence[Record],
    max_length: int | None = None,
    warn: Callable[[str], None] | None = None,
) -> list[Labelled]:
    """The examples in order, in the network's own precision; `max_length` in tokens cuts texts, and `warn` says so.

    Raises, naming the record, where a label is missing or none of the network's, where the record is of another kind
    than the network takes, or where an image has another shape than the network or the other images.
    """
    classes = class_count(model)
    takes = getattr(model.network, "main_input_name", "")
    if takes not in ("pixel_values", "input_ids"):
        raise PalimpsestError(f"{type(model.network).__name__} takes {takes}, expected pixel_values or input_ids.")
    images = takes == "pixel_values"
    limit = 0 if images else _longest(model, max_length)
    read = _image_reader(model) if images else _text_reader(model.tokenizer, limit)
    pad = 0 if images else _padding(model)
    examples: list[Labelled] = []
    for index, record in enumerate(records):
        where = f'record {index + 1} ("{record.title}")'
        label = _label(record, classes, where)
        if images and record.image is None:
            raise PalimpsestError(f"{where} has no image, but {type(model.network).__name__} classifies images.")
        inputs, cut = read(record, where)
        if images and examples and inputs[takes].shape != examples[0].inputs[takes].shape:
            found, expected = (list(x[takes].shape) for x in (inputs, examples[0].inputs))
            raise PalimpsestError(f"{where} has an image of shape {found}, the first has {expected}. Make them equal.")
        examples.append(Labelled(inputs, label, index, pad, cut))
    lost = [example.cut for example in examples if example.cut]
    if lost and warn is not None:
        many = f"{len(lost)} of {len(examples)} records are"
        warn(f"{many} longer than {limit} tokens; {sum(lost)} tokens were cut.")
    return examples


def collate(
    examples: Sequence[Labelled], device: torch.device | str
) -> tuple[dict[str, Tensor], Int[Tensor, " batch"]]:
    """The examples as one batch of inputs on a device, texts padded on the right, and their labels."""
    if not examples:
        raise PalimpsestError("there is nothing to classify: no example was given.")
    inputs = {name: _stacked(name, examples).to(device) for name in examples[0].inputs}
    return inputs, torch.tensor([example.label for example in examples], device=device)


def class_count(model: Model) -> int:
    """How many labels the network tells apart; raises where it is no classifier of single labels."""
    network = model.network
    if "Classification" not in type(network).__name__:
        raise PalimpsestError(f"{type(network).__name__} is no classifier.")
    problem = getattr(network.config, "problem_type", None)
    if problem not in (None, "single_label_classification") or network.config.num_labels < 2:
        raise PalimpsestError(
            f"{type(network).__name__} has {network.config.num_labels} labels and the problem type {problem}; expected "
            "two or more labels, of which one is right."
        )
    return int(network.config.num_labels)


def _label(record: Record, classes: int, where: str) -> int:
    if record.label is None:
        raise PalimpsestError(f"{where} has no label.")
    try:
        label = operator.index(record.label)
    except TypeError:
        raise PalimpsestError(f"{where} has the label {record.label!r}, expected a whole number.") from None
    if not 0 <= label < classes:
        raise PalimpsestError(f"{where} has the label {label}, but the network has labels 0 to {classes - 1}.")
    return label


def _image_reader(model: Model) -> Read:
    processor, dtype, config = model.processor, model.network.dtype, model.network.config
    sides = getattr(config, "image_size", None)
    size = tuple(sides) if isinstance(sides, (list, tuple)) else (sides, sides)
    expected = (getattr(config, "num_channels", None), *size)

    def read(record: Record, where: str) -> tuple[dict[str, Tensor], int]:
        if processor is not None:
            found = processor(record.image, return_tensors="pt").items()
            return {name: value[0].to(dtype) if value.is_floating_point() else value[0] for name, value in found}, 0
        pixels = record.image
        if not isinstance(pixels, (Tensor, np.ndarray)):
            raise PalimpsestError(
                f"{where} has an image of type {type(pixels).__name__}, but the model has no image processor: expected "
                "a tensor or array [channels, height, width] ready for the network."
            )
        pixels = torch.tensor(pixels) if isinstance(pixels, np.ndarray) else pixels
        if not pixels.is_floating_point() or not is_finite(pixels):
            kind = "values that are no numbers" if pixels.is_floating_point() else f"the type {pixels.dtype}"
            raise PalimpsestError(f"{where} has an image of {kind}, expected finite floating-point values.")
        sized = [want is None or want == got for want, got in zip(expected, pixels.shape, strict=False)]
        if pixels.ndim != 3 or not all(sized):
            shown = ", ".join(str(want or name) for want, name in zip(expected, SIDES, strict=True))
            raise PalimpsestError(f"{where} has an image of shape {list(pixels.shape)}, expected [{shown}].")
        return {"pixel_values": pixels.to(dtype)}, 0

    return read


def _text_reader(tokenizer: Any, limit: int) -> Read:
    def read(record: Record, where: str) -> tuple[dict[str, Tensor], int]:
        text = record.text or record.prompt
        if not text:
            raise PalimpsestError(f"{where} has neither a text nor a prompt to classify.")
        tokens = tokenizer(text)
        cut = max(0, len(tokens["input_ids"]) - limit)
        if cut:
            tokens = tokenizer(text, truncation=True, max_length=limit)
        if not tokens["input_ids"]:
            raise PalimpsestError(f"{where} has no token: the tokenizer makes nothing of it.")
        return {name: torch.tensor(values) for name, values in tokens.items()}, cut

    return read


def _longest(model: Model, max_length: int | None) -> int:
    limit = min(context_length(model.network.config), model.tokenizer.model_max_length)
    return min(limit, max_length or limit)


def _padding(model: Model) -> int:
    """The token that the network knows as padding; some look for the last token that is another one."""
    pad = getattr(model.network.config.get_text_config(), "pad_token_id", None)
    if pad is None:
        raise PalimpsestError(
            f"{type(model.network).__name__} does not say which token pads (config.pad_token_id is none). "
            "Set it: model.network.config.pad_token_id = model.tokenizer.pad_token_id."
        )
    return int(pad)


def _stacked(name: str, examples: Sequence[Labelled]) -> Tensor:
    values = [example.inputs[name] for example in examples]
    if "input_ids" not in examples[0].inputs:
        return torch.stack(values)
    fill = examples[0].pad if name == "input_ids" else 0
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)
