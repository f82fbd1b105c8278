"""What a guarded model knows of what is to be forgotten, and what it decides about a prompt.

A detector reads the state of the prompt's last token (or the sentence encoder's vector of its words). Where it is sure,
the items nearest to the prompt are looked up, with all that is indexed about their subjects. Items that were added
later have detectors of their own, asked only where one of them is retrieved, so that other prompts never change. The
index lies in the config, its digest among the weights, so that the ledger covers it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from palimpsest.errors import PalimpsestError
from palimpsest.models.detector import Detector, probability
from palimpsest.models.encoder import SentenceEncoder, sentence_encoder
from palimpsest.models.hooks import capture
from palimpsest.models.restriction import Decision, Forbidden, Guarding
from palimpsest.models.wording import Wording
from palimpsest.models.wrapping import WrapperConfig, config_of
from palimpsest.system import replace, to_dict

Features = Literal["hidden", "encoder"]
FIRST = 0
"""The detector of the items that the guard was made with; those added later have detectors of their own."""


class GuardedConfig(WrapperConfig):
    """Config of the network inside, settings, index and the detectors' thresholds; sizes are the network's."""

    model_type = "palimpsest_guarded"

    network: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None
    items: list[dict[str, Any]] | None = None
    detectors: list[dict[str, Any]] | None = None
    features: str = "hidden"
    watched: str = ""
    width: int = 0
    encoder: str = ""
    encoder_width: int = 0
    kept_prompts: int = 0


class GuardIndex(PreTrainedModel):
    """The network as `unguarded`, the detectors, and the index of what is not to be said: it decides about prompts."""

    config: GuardedConfig
    config_class = GuardedConfig
    base_model_prefix = ""

    index: Float[Tensor, "items encoder_width"]
    kept: Float[Tensor, "prompts width"]
    recipe: Tensor

    def __init__(self, config: GuardedConfig, network: Any = None) -> None:
        attention = config._attn_implementation
        super().__init__(config)
        self.rule = replace(Guarding(), "a guarded model", config.settings or {})
        if network is None:
            how: dict[str, Any] = {"dtype": torch.get_default_dtype(), "trust_remote_code": False}
            how |= {"attn_implementation": attention} if attention else {}
            network = AutoModelForCausalLM.from_config(config_of(config.network or {}), **how)
        self.unguarded = network
        self.detectors = nn.ModuleList(Detector(config.width, each["hidden"]) for each in config.detectors or ())
        self.register_buffer("index", torch.zeros(len(config.items or ()), config.encoder_width))
        self.register_buffer("kept", torch.zeros(config.kept_prompts, config.width))
        self.register_buffer("recipe", self._recipe())
        self.wording: Wording | None = None
        self.decisions: list[Decision] = []
        self._forbidden: dict[tuple[str, ...], Forbidden] = {}
        self.post_init()

    @property
    def items(self) -> list[dict[str, Any]]:
        """What is to be forgotten: id, prompt, subject and phrases of every item."""
        shown = ("id", "prompt", "subject", "phrases")
        return [{field: item[field] for field in shown} for item in self._items if item["phrases"]]

    @property
    def encoder(self) -> SentenceEncoder:
        """The sentence encoder, loaded where it is first needed; raises where it is not the one of the index."""
        found = sentence_encoder(self.config.encoder)
        if found.width != self.config.encoder_width:
            raise PalimpsestError(
                f"the sentence encoder {found.name} gives {found.width} numbers a text, but the index was made with "
                f"{self.config.encoder_width}. Use the one that it was made with."
            )
        return found

    def adjust(self, **changes: Any) -> Self:
        """Changes settings, for instance `threshold` or `beams`, on this network; nothing is trained again."""
        self.rule = replace(self.rule, "a guarded model", changes)
        self.config.settings = to_dict(self.rule)
        self._seal()
        return self

    def remove(self, ids: Sequence[str]) -> None:
        """Lifts the guard off items: prompts and phrases are deleted, and what retrieves them is answered freely.

        The vector of the prompt stays, so that the item is known as one that is no longer guarded.
        """
        known = {item["id"] for item in self.items}
        if unknown := [name for name in ids if name not in known]:
            raise PalimpsestError(f"no item has the id {unknown[0]!r}. `items` lists them.")
        if not known - set(ids):
            raise PalimpsestError("no item would be left to guard. Use the network inside: `unguarded`.")
        self.config.items = [
            {"id": "", "prompt": "", "subject": "", "phrases": [], "detector": -1} if item["id"] in ids else item
            for item in self._items
        ]
        self._seal()

    def _decide(self, states: Float[Tensor, "prompts width"] | None, texts: Sequence[str]) -> list[Decision]:
        """What is to be done about prompts, by their hidden states or, where these do not count, their words."""
        if not len(self.detectors):
            raise PalimpsestError("the detector of this guarded model is untrained. Make one with `erase guard`.")
        vectors: Tensor | None = None
        if not self._watches:
            vectors = states = self._encoded(texts)
        assert states is not None
        p = [[probability(z) for z in detector(states).tolist()] for detector in self.detectors]
        bounds = [each["threshold"] if self.rule.threshold is None else self.rule.threshold for each in self._trained]
        found = [Decision(probability=x, threshold=bounds[FIRST], guarded=False) for x in p[FIRST]]
        asked = [i for i, x in enumerate(p[FIRST]) if x >= bounds[FIRST] or len(p) > 1]
        if not asked:
            return found
        vectors = self._encoded([texts[i] for i in asked]) if vectors is None else vectors[asked]
        alike = vectors @ self.index.float().cpu().T
        for i, row in zip(asked, alike, strict=True):
            items = self._nearest(row)
            own = {self._items[j]["detector"] for j in items}
            sure = [d for d in own - {FIRST} if p[d][i] >= bounds[d]]
            if not items or not (sure or p[FIRST][i] >= bounds[FIRST]):
                continue
            if p[FIRST][i] < bounds[FIRST]:
                items = [j for j in items if self._items[j]["detector"] in sure]
                found[i].probability, found[i].threshold = p[sure[0]][i], bounds[sure[0]]
            found[i].guarded = True
            found[i].items = tuple(self._items[j]["id"] for j in items)
            found[i].similarity = tuple(float(row[j]) for j in items)
            found[i].phrases = self._phrases(found[i].items).automaton.phrases
        return found

    def _nearest(self, alike: Float[Tensor, " items"]) -> list[int]:
        """The most similar items and their ties, best first, and the others about the same; none that was removed."""
        order = alike.sort(descending=True, stable=True)
        last = order.values[min(self.rule.items, len(alike)) - 1]
        near = order.indices[order.values >= last - self.rule.tie].tolist()
        near = [i for i in near if self._items[i]["phrases"]]
        # "when" and "where" was somebody born are nearly the same to an encoder: the other facts count, too
        subjects = {self._items[i]["subject"] for i in near} - {""} if self.rule.scope == "subject" else set()
        return near + [i for i, item in enumerate(self._items) if item["subject"] in subjects and i not in near]

    def _phrases(self, ids: tuple[str, ...]) -> Forbidden:
        if ids not in self._forbidden:
            phrases = [phrase for item in self._items if item["id"] in ids for phrase in item["phrases"]]
            self._forbidden[ids] = Forbidden(phrases, self._words.pieces(self.config.vocab_size), self.encoder)
        return self._forbidden[ids]

    def _encoded(self, texts: Sequence[str]) -> Float[Tensor, "texts encoder_width"]:
        return self.encoder.encode([self._words.question(text) for text in texts])

    @torch.no_grad()
    def _states(self, ids: Tensor, mask: Tensor) -> Tensor | None:
        """The watched output at the last token of prompts that are padded, if at all, on the left."""
        if not self._watches:
            return None
        with capture({"states": self.unguarded.get_submodule(self.config.watched)}) as seen:
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            self.unguarded(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1)
        return seen["states"][:, -1]

    @property
    def _watches(self) -> bool:
        return self.config.features == "hidden"

    @property
    def _items(self) -> list[dict[str, Any]]:
        return self.config.items or []

    @property
    def _trained(self) -> list[dict[str, Any]]:
        return self.config.detectors or []

    @property
    def _device(self) -> torch.device:
        return next(self.unguarded.parameters()).device

    @property
    def _words(self) -> Wording:
        if self.wording is None:
            raise PalimpsestError("this guarded model has no tokenizer to read prompts with. Load it from its folder.")
        return self.wording

    def _seal(self) -> None:
        self._forbidden.clear()
        self.recipe = self._recipe().to(self.recipe.device)

    def _recipe(self) -> Tensor:
        """SHA-256 of settings, index and thresholds, as bytes among the weights, so that digests and ledger see it."""
        told = [to_dict(self.rule), self._items, self._trained, self.config.encoder, self.config.watched]
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).digest()
        return torch.tensor(list(digest), dtype=torch.uint8, device="cpu")
