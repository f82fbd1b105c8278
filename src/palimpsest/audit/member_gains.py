"""Member gains: which tokens a memory beside a model makes likelier, and which it spoils.

A mean over a text hides what a memory is for: most tokens are ordinary and stay as they were, and a few rare ones, a
name or a date, go from hopeless to certain. Here every scored token has its probability under the first member of a
mixture alone and under the whole. It is for anything with members: `memory-decoder`, `knn-lm`, `uld`, `whp-decode`.

Source: the per-token comparison of Memory Decoder, Cao et al. 2025 (arXiv 2508.09874).

    p_1, p    probability of a true token under the first member alone, and under the mixture
    gain      log p - log p_1, nats
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float

from palimpsest.audit.answers import ROLES
from palimpsest.audit.reading import Reading, mean_value
from palimpsest.data.encoding import Encoded, Encoder
from palimpsest.data.packing import packer, rows
from palimpsest.data.records import Roles
from palimpsest.errors import PalimpsestError
from palimpsest.models.mixture import MixtureForCausalLM
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.likelihood import ROW_TOKENS
from palimpsest.system import Probe, setting, system


@torch.no_grad()
def member_log_probs(
    model: Model, sequences: Sequence[Encoded], run: Run
) -> dict[str, list[Float[np.ndarray, " targets"]]]:
    """Of each sequence's targets, under every member that reads tokens itself, and under the `mixture`.

    Raises where the model has no members.
    """
    network = model.network.eval()
    if not isinstance(network, MixtureForCausalLM):
        raise PalimpsestError(f"member-gains compares the members of a mixture, and {type(network).__name__} has none.")
    arrange = packer(network)
    found: dict[str, dict[int, Float[np.ndarray, " targets"]]] = {}
    for group in run.track(list(rows(sequences, ROW_TOKENS)), "members"):
        packed = arrange([sequences[i] for i in group]).to(model.device)
        keep, place = torch.unique(packed.at, return_inverse=True)
        owner = packed.owner.cpu().numpy()
        for name, log_p in network.scores(**packed.inputs(), logits_to_keep=keep).items():
            own = log_p[packed.row, place, packed.targets].cpu().numpy()
            for position, i in enumerate(group):
                found.setdefault(name, {})[i] = own[owner == position]
    return {name: [each[i] for i in range(len(sequences))] for name, each in found.items()}


@system(
    "member-gains",
    verb="audit",
    title="What a mixture adds, token by token",
    paper="Cao et al. 2025 (arXiv 2508.09874)",
    takes="causal-lm",
    uses={"forget", "retain", "real", "world", "train", "general"},
    fidelity="adapted",
    deviations=("the members of any mixture are compared, not only those of a memory",),
)
class MemberGains(Probe):
    """Mean gain of every role in nats a token, the share of tokens made likelier, and the tokens that changed most."""

    shown: int = setting(default=5, at_least=0, origin="ours", help="tokens named at either end")

    def measure(self, model: Model, data: Roles, run: Run, gold: Model | None = None) -> Reading:
        """`gain/<role>` and `likelier/<role>`; the verdict names tokens with their probability before and after."""
        encoder = Encoder.of(model)
        values, arrays, told = [], {}, []
        for role in dict.fromkeys((*ROLES, "train", "general")):
            if not (records := data.probe(role)):
                continue
            sequences = encoder.records(records)
            found = member_log_probs(model, sequences, run)
            first, mixed = next(iter(found.values())), found["mixture"]
            gains = [after - before for after, before in zip(mixed, first, strict=True)]
            values.append(mean_value(f"gain/{role}", [g.mean() for g in gains], unit="nats", seed=run.seed))
            values.append(mean_value(f"likelier/{role}", [(g > 0).mean() for g in gains], seed=run.seed))
            arrays[f"gain/{role}"] = np.concatenate(gains).tolist()
            tokens = [token for sequence in sequences for token in sequence.targets]
            told.append(f"{role}: {self._named(model, tokens, np.concatenate(first), np.concatenate(mixed))}")
        return Reading(probe=self.facts.slug, values=tuple(values), arrays=arrays, verdict="\n".join(told))

    def _named(self, model: Model, tokens: Sequence[int], first: np.ndarray, mixed: np.ndarray) -> str:
        order = np.argsort(first - mixed, kind="stable")

        def listed(places: np.ndarray) -> str:
            words = (
                f'"{model.tokenizer.decode([tokens[i]]).strip()}" {np.exp(first[i]):.2f} to {np.exp(mixed[i]):.2f}'
                for i in places
            )
            return ", ".join(words) or "none"

        gained = [i for i in order[: self.shown] if mixed[i] > first[i]]
        lost = [i for i in order[::-1][: self.shown] if mixed[i] < first[i]]
        return f"gained most: {listed(np.array(gained, int))}; lost most: {listed(np.array(lost, int))}"
