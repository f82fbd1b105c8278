"""A datastore as a member of a mixture: a causal language model that looks up what followed similar hidden states.

It reads what goes into the last feed-forward layer of the first member and answers with log-probabilities; where and
how many neighbours is in its config. Keys lie among the weights as the bits of float16, so that no change of precision
touches them; settings lie there, too, as a digest, and so does an approximate index. The keys are the states of the
first member as it was: where that is trained afterwards, they grow stale, and the datastore is to be built again.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from palimpsest.errors import PalimpsestError
from palimpsest.models.anatomy import anatomy
from palimpsest.models.hooks import INPUT
from palimpsest.models.mixture import foundation
from palimpsest.models.neighbours import (
    FLOOR,
    Neighbours,
    check_asked,
    closeness,
    distribution,
    index_bytes,
    index_of,
)


def key_place(network: Any) -> str:
    """Where the keys of a datastore come from: the input of the feed-forward layer of the last block, after its norm.

    The name is that of the module in the network, with a mark that its input is meant. Of a mixture it is a place in
    the network that the mixture rests on.
    """
    bottom = foundation(network)
    parts = anatomy(bottom)
    last = len(parts.blocks()) - 1
    found = [part for role in ("mlp", "mlp_up") for part in parts.find(role) if part.layer == last]
    if not found:
        raise PalimpsestError(
            f"the last block of {type(bottom).__name__} has no feed-forward layer that is known here."
        )
    prefix = next(name for name, module in network.named_modules() if module is bottom)
    return f"{prefix}.{found[0].path}".lstrip(".") + INPUT


class DatastoreConfig(PreTrainedConfig):
    """Sizes of the datastore, where its keys come from, and how it is asked."""

    model_type = "palimpsest_datastore"

    reads: str = ""
    vocab_size: int = 0
    hidden_size: int = 0
    rows: int = 0
    index_size: int = 0
    k: int = 1024
    temperature: float = 1.0


class DatastoreForCausalLM(PreTrainedModel):
    """The tokens that followed the nearest stored states. Nothing in it is trained, and no gradient goes through it."""

    config: DatastoreConfig
    config_class = DatastoreConfig
    base_model_prefix = ""
    holds_texts = True

    keys: Tensor
    values: Tensor
    lists: Tensor
    recipe: Tensor

    def __init__(self, config: DatastoreConfig) -> None:
        super().__init__(config)
        self.register_buffer("keys", torch.zeros(config.rows, config.hidden_size, dtype=torch.int16))
        self.register_buffer("values", torch.zeros(config.rows, dtype=torch.int32))
        self.register_buffer("lists", torch.zeros(config.index_size, dtype=torch.uint8))
        self.register_buffer("recipe", self._recipe())
        self._known: tuple[Any, Neighbours] | None = None
        self.post_init()

    @classmethod
    def of(cls, rows: Neighbours, *, reads: str, vocabulary: int, k: int, temperature: float) -> DatastoreForCausalLM:
        """The member that looks up these rows; the keys are not copied."""
        check_asked(k, temperature, len(rows))
        approximate = None if rows.exact else index_bytes(rows.index)
        network = cls(
            DatastoreConfig(
                reads=reads,
                vocab_size=vocabulary,
                hidden_size=rows.width,
                k=k,
                temperature=temperature,
                rows=0,
            )
        )
        network.config.rows = len(rows)
        network.config.index_size = 0 if approximate is None else len(approximate)
        network.keys = rows.keys.view(torch.int16)
        network.values = rows.values.to(torch.int32)
        network.lists = network.lists if approximate is None else approximate
        network._known = (network._stamp(), rows)
        return network.eval()

    def __getstate__(self) -> dict[str, Any]:
        """Without what was made ready for searching: it shares its numbers with the keys, and is soon made again."""
        return {**self.__dict__, "_known": None}

    def adjust(self, *, k: int | None = None, temperature: float | None = None) -> DatastoreForCausalLM:
        """Changes how many neighbours count, or how sharply."""
        k = self.config.k if k is None else k
        temperature = self.config.temperature if temperature is None else temperature
        check_asked(k, temperature, len(self.keys))
        self.config.k, self.config.temperature = k, temperature
        self.recipe = self._recipe().to(self.recipe.device)
        return self

    def forward(self, states: Float[Tensor, "batch positions width"]) -> CausalLMOutput:
        """Log-probabilities of the next token at every position; float32."""
        rows = self.rows()
        # at padding a state can be anything; at a token, where it is no number, the first member's logits are none
        queries = states.detach().flatten(0, 1).float().nan_to_num(0.0, 0.0, 0.0)
        near, found = rows.search(queries, self.config.k)
        p = distribution(
            closeness(near, self.config.temperature), rows.values[found.clamp_min(0)], self.config.vocab_size
        )
        return CausalLMOutput(logits=p.log().clamp_min(FLOOR).view(*states.shape[:2], -1).to(states.device))

    def rows(self) -> Neighbours:
        """The stored rows with their index, which is made again where the stored ones are no longer the same."""
        if self._known is None or self._known[0] != self._stamp():
            index = index_of(self.lists) if len(self.lists) else None
            self._known = (
                self._stamp(),
                Neighbours(
                    self.keys.cpu().view(torch.float16), self.values.cpu(), exact_up_to=len(self.keys), index=index
                ),
            )
        return self._known[1]

    def _stamp(self) -> tuple[Any, ...]:
        return tuple((t.data_ptr(), t._version) for t in (self.keys, self.values, self.lists))

    def _recipe(self) -> Tensor:
        """SHA-256 of how it is asked, as bytes: a tensor among the weights, so that digests and ledger cover it."""
        told = json.dumps([self.config.reads, self.config.k, self.config.temperature])
        return torch.tensor(list(hashlib.sha256(told.encode()).digest()), dtype=torch.uint8)

    def _supports_default_dynamic_cache(self) -> bool:
        return False


AutoConfig.register(DatastoreConfig.model_type, DatastoreConfig, exist_ok=True)
AutoModelForCausalLM.register(DatastoreConfig, DatastoreForCausalLM, exist_ok=True)
