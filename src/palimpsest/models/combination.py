"""How the next-token distributions of two models become one: the rules of a mixture.

    z_1, z_2   logits of the two  [..., vocabulary]     a: alpha     w: weight     r: rate     V: vocabulary size

    interpolate   log((1 - w) softmax(z_1) + w softmax(z_2))
    difference    z_1 - a (log softmax(z_2) + log V), where the filter keeps a token
    hold-down     z_1 - a relu(z_2 - z_1)
    contrast      (1 + a) z_1 - a z_2, where the filter keeps a token
    filter        keeps token v where  z_1[v] >= min(max z_1 + log r, k-th largest of z_1)

A token that a filter drops keeps the first model's logit when a sequence is scored, so that no likelihood is infinite,
and is excluded (-inf) when text is generated (`decoding`). Each rule is a function and, with its settings, a class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from palimpsest.system import setting, settings

Logits = Float[Tensor, "*n vocab"]


def interpolate(base: Logits, other: Logits, weight: float) -> Logits:
    """Log-probabilities of the mixture of the two distributions, `weight` of it from the other."""
    share, rest = (math.log(x) if x > 0 else -math.inf for x in (weight, 1 - weight))
    return torch.logaddexp(base.log_softmax(-1) + rest, other.log_softmax(-1) + share)


def fitted(logits: Logits, width: int) -> Logits:
    """The logits for `width` tokens: others are dropped, missing ones next to impossible.

    Models of one family fill their vocabularies up to different sizes; those tokens are never meant.
    """
    return F.pad(logits[..., :width], (0, max(0, width - logits.shape[-1])), value=-1e4)


def kept(logits: Logits, rate: float, least: int = 1) -> Bool[Tensor, "*n vocab"]:
    """Tokens at least `rate` times as likely as the most likely one, which is kept, and the `least` most likely."""
    threshold = logits.amax(-1, keepdim=True) + (math.log(rate) if rate > 0 else -math.inf)
    if least > 1:
        threshold = torch.minimum(threshold, logits.topk(least, -1).values[..., -1:])
    return logits >= threshold


def difference(
    target: Logits, assistant: Logits, alpha: float, rate: float = 0.0, *, centre: bool = True, decoding: bool = False
) -> Logits:
    """Ji et al. 2024 (arXiv 2406.08607), eq. 1 and section 3.4: what the assistant knows is subtracted.

    Centred, the assistant's logits are log softmax + log V: a uniform one changes nothing, whatever the filter drops.
    """
    vocabulary = target.shape[-1]
    taken = assistant.log_softmax(-1) + math.log(vocabulary) if centre else assistant
    combined = target - alpha * taken
    if rate == 0:
        return combined
    keep = kept(target, rate, math.floor(rate * vocabulary))
    return torch.where(keep, combined, -math.inf if decoding else target)


def hold_down(base: Logits, reinforced: Logits, alpha: float) -> Logits:
    """Eldan and Russinovich 2023 (arXiv 2310.02238), eq. 1: what reinforcement raises is held down."""
    return base - alpha * F.relu(reinforced - base)


def contrast(expert: Logits, other: Logits, alpha: float, rate: float = 0.0, *, decoding: bool = False) -> Logits:
    """Chen et al. 2025 (arXiv 2504.08809), as in VCD: away from the other, among the expert's plausible tokens."""
    combined = (1 + alpha) * expert - alpha * other
    return combined if rate == 0 else torch.where(kept(expert, rate), combined, -math.inf if decoding else expert)


@settings
class Interpolate:
    """Probabilities are averaged."""

    name: ClassVar[str] = "interpolate"
    fits_widths: ClassVar[bool] = True
    weight: float = setting(
        default=0.25, at_least=0, at_most=1, origin="kNN-LM (arXiv 1911.00172)", help="share of the second member"
    )

    def combine(self, first: Logits, second: Logits, decoding: bool) -> Logits:
        """Log-probabilities."""
        return interpolate(first, fitted(second, first.shape[-1]), self.weight)

    @property
    def alone(self) -> int | None:
        """The only member that counts, if it is only one."""
        return int(self.weight) if self.weight in (0, 1) else None


@settings
class Difference:
    """The second member's logits are subtracted."""

    name: ClassVar[str] = "difference"
    alpha: float = setting(default=0.75, at_least=0, origin="ULD, TOFU", help="how much is subtracted")
    rate: float = setting(
        default=0.01, at_least=0, below=1, origin="ULD", help="filter: least share of the likeliest token; 0: none"
    )
    centre: bool = setting(
        default=True, origin="ours; the official code: False", help="a uniform second member changes nothing"
    )

    def combine(self, first: Logits, second: Logits, decoding: bool) -> Logits:
        """Logits."""
        return difference(first, second, self.alpha, self.rate, centre=self.centre, decoding=decoding)

    @property
    def alone(self) -> int | None:
        """The only member that counts, if it is only one."""
        return 0 if self.alpha == 0 else None


@settings
class HoldDown:
    """What the second member raises is held down."""

    name: ClassVar[str] = "hold-down"
    alpha: float = setting(default=1.0, at_least=0, origin="MUSE", help="how strongly")

    def combine(self, first: Logits, second: Logits, decoding: bool) -> Logits:
        """Logits."""
        return hold_down(first, second, self.alpha)

    @property
    def alone(self) -> int | None:
        """The only member that counts, if it is only one."""
        return 0 if self.alpha == 0 else None


@settings
class Contrast:
    """The first member is pushed away from the second."""

    name: ClassVar[str] = "contrast"
    alpha: float = setting(default=1.0, at_least=0, origin="VCD, evaluation scripts", help="how far")
    rate: float = setting(
        default=0.1, at_least=0, at_most=1, origin="VCD", help="filter: least share of the likeliest token; 0: none"
    )

    def combine(self, first: Logits, second: Logits, decoding: bool) -> Logits:
        """Logits."""
        return contrast(first, second, self.alpha, self.rate, decoding=decoding)

    @property
    def alone(self) -> int | None:
        """The only member that counts, if it is only one."""
        return 0 if self.alpha == 0 else None


Rule = Interpolate | Difference | HoldDown | Contrast
RULES: Mapping[str, Any] = {rule.name: rule for rule in (Interpolate, Difference, HoldDown, Contrast)}
