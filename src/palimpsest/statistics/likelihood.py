"""What a model gives to the tokens of given sequences, in one streamed pass.

Sequences are packed so that shared beginnings are computed once; of the logits only a few numbers a target are kept.

Sources: Min-K++ moments, Zhang et al. 2024 (arXiv 2404.02936), eq. 3.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from palimpsest.data.encoding import Encoded
from palimpsest.data.labelled import Labelled
from palimpsest.data.packing import Packed, packer, rows
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.predictions import classify

ROW_TOKENS = 512
"""Distinct tokens a packed row: long enough for full speed, short enough that attention within it stays cheap."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """Numbers a target, over all sequences one after the other; `owner` says whose target it is."""

    log_prob: Float[np.ndarray, " targets"]
    mean: Float[np.ndarray, " targets"]
    deviation: Float[np.ndarray, " targets"]
    correct: Bool[np.ndarray, " targets"]
    owner: Int[np.ndarray, " targets"]
    count: Int[np.ndarray, " sequences"]

    def nll(self) -> Float[np.ndarray, " sequences"]:
        """S: summed negative log-likelihood of each sequence, nats."""
        return -np.bincount(self.owner, weights=self.log_prob, minlength=len(self.count))

    def mean_nll(self) -> Float[np.ndarray, " sequences"]:
        """A: negative log-likelihood a token of each sequence, nats."""
        return self.nll() / self.count

    def split(self, values: np.ndarray) -> list[np.ndarray]:
        """A number per target as one array a sequence."""
        return np.split(values, np.cumsum(self.count)[:-1])


def token_scores(
    logits: Float[Tensor, "targets vocabulary"], targets: Int[Tensor, " targets"]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probability of each target, mean and standard deviation of the log-probability, whether it is the argmax.

    mean = sum_v p log p; deviation^2 = sum_v p (log p - mean)^2, clamped at 1e-6.
    """
    log_p = logits.log_softmax(-1)
    log_prob = log_p.gather(1, targets[:, None])[:, 0]
    p = log_p.exp()
    mean = torch.einsum("tv,tv->t", p, log_p)
    spread = log_p.sub_(mean[:, None]).square_()
    deviation = torch.einsum("tv,tv->t", p, spread).clamp_min(1e-6).sqrt()
    return log_prob, mean, deviation, logits.argmax(-1) == targets


@torch.no_grad()
def score(model: Model, sequences: Sequence[Encoded], run: Run, label: str = "scoring") -> Scores:
    """The scores of every target of the sequences under the model."""
    if not sequences:
        raise PalimpsestError("there is nothing to score: no sequence was given.")
    network = model.network.eval()
    device, arrange = model.device, packer(model.network)
    count = np.array([len(sequence.targets) for sequence in sequences])
    first = np.concatenate([[0], np.cumsum(count)])
    numbers = np.empty((3, first[-1]), dtype=np.float32)
    correct = np.empty(first[-1], dtype=bool)
    groups = list(rows(sequences, ROW_TOKENS))
    for group in run.track(groups, label):
        packed = arrange([sequences[i] for i in group]).to(device)
        *values, right = token_scores(packed.target_logits(network), packed.targets)
        place = np.concatenate([np.arange(first[i], first[i + 1]) for i in group])
        numbers[:, place] = torch.stack(values).cpu().numpy()
        correct[place] = right.cpu().numpy()
    owner = np.repeat(np.arange(len(sequences)), count)
    return Scores(numbers[0].astype(float), numbers[1].astype(float), numbers[2].astype(float), correct, owner, count)


@torch.no_grad()
def sequence_nll(model: Model, sequences: Sequence[Any], run: Run) -> Float[Tensor, " sequences"]:
    """S: summed negative log-likelihood of each `Encoded` sequence under the model as it is now, nats.

    Of a `Labelled` example it is that of its label.
    """
    if sequences and isinstance(sequences[0], Labelled):
        return classify(model, sequences, run, "reference").nll.to(model.device)
    network = model.network.eval()
    arrange = packer(network)
    result = torch.empty(len(sequences))
    for group in run.track(list(rows(sequences, ROW_TOKENS)), "reference"):
        packed = arrange([sequences[i] for i in group]).to(model.device)
        nll = torch.nn.functional.cross_entropy(packed.target_logits(network), packed.targets, reduction="none")
        result[group] = packed.per_sequence(nll).cpu()
    return result.to(model.device)


class ReferencePredictions:
    """What a model predicts at the targets of some sequences, without keeping the model.

    Kept are the inputs of its output layer (width numbers a target instead of vocabulary) and a copy of that layer; of
    a network that does not show them (a mixture), the logits themselves.
    """

    def __init__(
        self, model: Model, sequences: Sequence[Encoded], run: Run, chosen: Sequence[int] | None = None
    ) -> None:
        network = model.network.eval()
        # some have no part that ends before the output layer (Llama 4's language model)
        head = None if network.base_model is network else network.get_output_embeddings()
        self._head = None if head is None else copy.deepcopy(head).requires_grad_(False)
        self._config = network.config.get_text_config()
        self._states: dict[int, Tensor] = {}
        wanted = sorted(set(range(len(sequences)) if chosen is None else chosen))
        members = [sequences[i] for i in wanted]
        arrange = packer(network)
        with torch.no_grad():
            for group in run.track(list(rows(members, ROW_TOKENS)), "reference"):
                packed = arrange([members[i] for i in group]).to(model.device)
                if head is None:
                    states = packed.target_logits(network)
                else:
                    states = network.base_model(**packed.inputs()).last_hidden_state[packed.row, packed.at]
                    if not self._states:
                        self._check(states, packed, network)
                for place, i in enumerate(group):
                    self._states[wanted[i]] = states[packed.owner == place].clone()

    def logits(self, index: Int[Tensor, " batch"]) -> Float[Tensor, "targets vocabulary"]:
        """The logits at all targets of the sequences with these positions, one sequence after the other."""
        with torch.no_grad():
            return self._finish(torch.cat([self._states[int(i)] for i in index]))

    def _finish(self, states: Float[Tensor, "targets width"]) -> Float[Tensor, "targets vocabulary"]:
        if self._head is None:
            return states
        logits = self._head(states).float()
        if scale := getattr(self._config, "logits_scaling", None):
            logits = logits / scale
        if scale := getattr(self._config, "logit_scale", None):
            logits = logits * scale
        if cap := getattr(self._config, "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        return logits

    def _check(self, states: Tensor, packed: Packed, network: Any) -> None:
        expected = packed.target_logits(network)
        if not torch.allclose(self._finish(states), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            raise PalimpsestError(
                f"{type(network).__name__} changes its logits after the output layer in a way that is not known here; "
                "its predictions cannot be kept as hidden states."
            )
