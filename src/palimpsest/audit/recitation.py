"""Recitation: given the beginning of a text, does the model go on with it word for word?

Nothing need be known about why a text was learned by heart, so this measures untargeted memory too. A single changed
token makes an exact match fail although the text is still there: the distance and the looser match see that, and
`perturbations` asks again from beginnings that are shifted by a few tokens or longer by a few.

Source: Merullo et al. 2025 (arXiv 2510.24256) and the authors' code; prefix of 64 and suffix of 48 tokens.

    d         Levenshtein distance of the greedy continuation to the true suffix, tokens
    L         length of the suffix, tokens
    strict    share of texts with d = 0
    loose     share with 1 - d / L >= 0.75
    distance  mean d / L: higher is less memory
    longest   mean over texts of the longest exact beginning of a continuation, over all perturbations, tokens

    agreement nDCG@K of next-token rankings: the r-th token of the model has the gain K - q + 1, where q is its rank
              among the first K of the other model, else 0; divided by the DCG of that model's own ranking
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from palimpsest.audit.reading import Better, Reading, mean_value
from palimpsest.data.encoding import Encoded, Encoder
from palimpsest.data.packing import packer, rows
from palimpsest.data.records import Record, Roles
from palimpsest.errors import PalimpsestError
from palimpsest.models.generation import continue_tokens
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.likelihood import ROW_TOKENS
from palimpsest.system import Probe, setting, system

LOOSE = 0.75


@system(
    "recitation",
    verb="audit",
    title="Recitation of texts",
    paper="Merullo et al. 2025 (arXiv 2510.24256)",
    uses={"forget", "retain", "general"},
    fidelity="matches the official code",
    deviations=("of a question and its answer, the question is the prefix",),
)
class Recitation(Probe):
    """How much of a text's continuation comes back word for word."""

    prefix: int = setting(default=64, at_least=1, origin="paper", help="tokens of a text that are given")
    suffix: int = setting(default=48, at_least=1, origin="paper; quotes: 8", help="L, tokens to be recited")
    perturbations: int = setting(
        default=0, at_least=0, origin="ours; paper: 20", help="shifts of the beginning to try as well, tokens"
    )

    def measure(self, model: Model, data: Roles, run: Run, gold: Model | None = None) -> Reading:
        """`strict/<role>`, `loose/<role>`, `distance/<role>`, and with perturbations `longest/<role>`."""
        values, arrays, caveats = [], {}, []
        given = {role: data.probe(role) for role in ("forget", "retain", "general") if data.probe(role)}
        for role, records in given.items():
            texts = self._long_enough(model, records)
            if len(texts) < len(records):
                caveats.append(f"{role}: {len(records) - len(texts)} of {len(records)} texts are too short to be asked")
            if not texts:
                continue
            distance = np.array(self._distances(model, texts, run)) / self.suffix
            found = {"strict": distance == 0, "loose": 1 - distance >= LOOSE, "distance": distance}
            if self.perturbations:
                found["longest"] = np.array(self._longest(model, texts, run))
            for name, x in found.items():
                better: Better = "none" if role != "forget" else "higher" if name == "distance" else "lower"
                unit = "tokens" if name == "longest" else ""
                arrays[f"{name}/{role}"] = x.astype(float).tolist()
                values.append(mean_value(f"{name}/{role}", x.astype(float), better=better, unit=unit, seed=run.seed))
        if not values:
            raise PalimpsestError(
                f"recitation needs texts of {self.prefix} + {self.suffix} tokens in forget, retain or general; "
                + ("all are shorter." if given else "none is given.")
            )
        return Reading(probe=self.facts.slug, values=tuple(values), arrays=arrays, caveats=tuple(caveats))

    def _long_enough(self, model: Model, records: Sequence[Record]) -> list[tuple[Encoded, int]]:
        """The sequences that have a whole suffix, and where it begins."""
        sequences = Encoder.of(model).records(records)
        cuts = [(s, self.prefix if s.start == 1 else s.start) for s in sequences]
        return [(s, cut) for s, cut in cuts if cut + self.suffix <= len(s.tokens) - s.end]

    def _distances(self, model: Model, texts: Sequence[tuple[Encoded, int]], run: Run) -> list[int]:
        """d of each text."""
        told = continue_tokens(model, [s.tokens[:cut] for s, cut in texts], run, self.suffix, "reciting")
        true = [s.tokens[cut : cut + self.suffix] for s, cut in texts]
        return [Levenshtein.distance(list(a), list(b)) for a, b in zip(told, true, strict=True)]

    def _longest(self, model: Model, texts: Sequence[tuple[Encoded, int]], run: Run) -> list[int]:
        """The longest exact match of each text over all beginnings."""
        best = [0] * len(texts)
        for shift in range(self.perturbations + 1):
            for first in {0, shift}:
                asked = [(i, s, cut + shift) for i, (s, cut) in enumerate(texts) if shift < self.suffix]
                prompts = [s.tokens[first:cut] for _, s, cut in asked]
                told = continue_tokens(model, prompts, run, self.suffix - shift, "reciting")
                for (i, s, cut), continuation in zip(asked, told, strict=True):
                    best[i] = max(best[i], _same(continuation, s.tokens[cut : texts[i][1] + self.suffix]))
        return best


def _same(told: Sequence[int], true: Sequence[int]) -> int:
    """How many tokens agree before the first that does not."""
    pairs = enumerate(zip(told, true, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(told), len(true)))


def ranking_gain(
    logits: Float[Tensor, "positions vocabulary"], reference: Float[Tensor, "positions vocabulary"], k: int = 10
) -> Float[Tensor, " positions"]:
    """nDCG@k of the ranking by `logits` against that by `reference`, at each position; 1 where the first k agree."""
    if not 1 <= k <= logits.shape[-1]:
        raise PalimpsestError(f"k is {k}, expected 1 to {logits.shape[-1]}, the size of the vocabulary.")
    gains = torch.arange(k, 0, -1, dtype=torch.float32, device=logits.device)
    discount = 1 / torch.log2(torch.arange(2, k + 2, device=logits.device))
    own, other = logits.topk(k).indices, reference.topk(k).indices
    gained = ((own[:, :, None] == other[:, None, :]) * gains).sum(-1)
    return (gained * discount).sum(-1) / (gains * discount).sum()


@torch.no_grad()
def agreement(model: Model, reference: Model, records: Sequence[Record], run: Run, k: int = 10) -> float:
    """Mean nDCG@k of the model's next-token rankings against those of another one with the same vocabulary."""
    sequences = Encoder.of(model).records(records)
    arranged = packer(model.network)
    found = []
    for group in run.track(list(rows(sequences, ROW_TOKENS)), "comparing rankings"):
        packed = arranged([sequences[i] for i in group]).to(model.device)
        own, other = (packed.target_logits(m.network.eval()) for m in (model, reference))
        found.append(ranking_gain(own, other, k))
    return float(torch.cat(found).mean())
