"""A causal language model made of two: their next-token distributions are combined at every step.

Memory that is added or held back without touching a weight of the model: a second network beside it says what to add
(a memory of a domain) or what to take away (an assistant that knows only what is to be forgotten). The mixture is a
transformers model of its own: `forward`, `generate` with one key-value cache a member, one folder when it is saved.
How two distributions become one is a rule of `palimpsest.models.combination`; where its settings leave one member alone
(alpha 0, weight 0 or 1), the other is not run and the result is that member's, bit for bit.

A member is any registered causal language model. One whose config states `reads` takes no tokens: it is given the
output of that module of the first member (or what goes into it, `NAME:input`), [batch, positions, width], and answers
with logits (a memory that looks up or maps hidden states). Rule and settings are in the config; their digest lies with
the weights, so that the ledger covers them. Loading runs no code from the folder; by transformers alone it needs this
module to be imported.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg

from palimpsest.errors import PalimpsestError, nearest
from palimpsest.models.combination import RULES, Rule
from palimpsest.models.hooks import INPUT, capture
from palimpsest.models.model import Model
from palimpsest.models.wrapping import WrapperConfig, config_of, sizes_of
from palimpsest.system import replace, to_dict


class MixtureConfig(WrapperConfig):
    """Names and configs of the members, the rule with its settings, and the tensors that members share.

    Sizes are those that the rest of the library asks a language model for: the first member's, or what all can do.
    """

    model_type = "palimpsest_mixture"

    names: list[str] | None = None
    members: list[dict[str, Any]] | None = None
    rule: str = "difference"
    settings: dict[str, Any] | None = None
    shared: dict[str, str] | None = None

    def combination(self) -> Rule:
        """The rule with its settings; unknown ones raise."""
        if self.rule not in RULES:
            raise PalimpsestError(f"there is no rule {self.rule!r} for a mixture. {nearest(self.rule, RULES)}")
        return RULES[self.rule](**(self.settings or {}))


class MixtureCache(Cache):
    """One cache a member; what is done to the mixture's cache is done to all of them."""

    layer_class_to_replicate = None
    offloading = False

    def __init__(self, members: dict[str, Any]) -> None:
        self.members = members

    @property
    def layers(self) -> list[Any]:  # type: ignore[override]
        """The layers of all members, one member after the other."""
        return [layer for cache in self._held for layer in cache.layers]

    @property
    def is_linear(self) -> list[bool]:
        """As the members' caches say."""
        return [linear for cache in self._held for linear in cache.is_linear]

    @property
    def is_croppable(self) -> bool:
        """Whether all of them are."""
        return all(cache.is_croppable for cache in self._held)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens are held; a member that is not needed holds none."""
        return max((cache.get_seq_length() for cache in self._held), default=0)

    def reorder_cache(self, beam_idx: Int[Tensor, " b"]) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        for cache in self._held:
            cache.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        for cache in self._held:
            cache.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        for cache in self._held:
            cache.batch_select_indices(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """The last tokens taken off, counted as the caches count them; refused where a member's memory is recurrent."""
        for cache in self._held:
            cache.crop(tokens_to_remove)

    def reset(self) -> None:
        """Nothing seen."""
        for cache in self._held:
            cache.reset()

    @property
    def _held(self) -> list[Any]:
        return [cache for cache in self.members.values() if cache is not None]


class MixtureForCausalLM(PreTrainedModel, GenerationMixin):
    """The members as children under their own names, and the rule that makes one distribution of theirs."""

    config: MixtureConfig
    config_class = MixtureConfig
    base_model_prefix = ""
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    recipe: Tensor

    def __init__(self, config: MixtureConfig, members: Mapping[str, Any] | None = None) -> None:
        attention = config._attn_implementation  # None, unless it was asked for
        super().__init__(config)
        self.rule = config.combination()
        if members is None:
            how: dict[str, Any] = {"dtype": torch.get_default_dtype(), "trust_remote_code": False}
            how |= {"attn_implementation": attention} if attention else {}
            members = {
                name: AutoModelForCausalLM.from_config(config_of(saved), **how)
                for name, saved in zip(config.names or (), config.members or (), strict=True)
            }
        for name, member in members.items():
            if name in dir(self) or not name.isidentifier():
                raise PalimpsestError(f"a member of a mixture cannot be called {name!r}.")
            self.add_module(name, member)
        self._tied_weights_keys = dict(config.shared or {})
        self.register_buffer("recipe", self._recipe())
        self.post_init()

    @classmethod
    def from_pretrained(cls, *arguments: Any, **keywords: Any) -> Any:
        """The saved mixture; raises where its rule or settings are not those that its weights were saved with."""
        found = super().from_pretrained(*arguments, **keywords)
        network = found[0] if isinstance(found, tuple) else found
        inside: list[Any] = [module for module in network.modules() if hasattr(module, "_recipe")]
        if not all(torch.equal(each.recipe.cpu(), each._recipe().cpu()) for each in inside):
            raise PalimpsestError(
                f"the config of {arguments[0]} does not have the rule and settings that this mixture was saved with: "
                "it was changed by other means. Change settings with `adjust` and save again."
            )
        return found

    def save_pretrained(self, *arguments: Any, **keywords: Any) -> None:
        """Saves the members as they are now, in one folder."""
        self._describe()
        super().save_pretrained(*arguments, **keywords)

    def _describe(self) -> None:
        members = [self.member(name) for name in self._names]
        for member in members:
            if isinstance(member, MixtureForCausalLM):
                member._describe()
        self.config.members = [member.config.to_dict() for member in members]

    def adjust(self, **changes: Any) -> MixtureForCausalLM:
        """Changes settings of the rule, for instance `alpha`, on this network; nothing is trained again."""
        self.rule = replace(self.rule, f"the rule {self.rule.name}", changes)
        self.config.settings = to_dict(self.rule)
        self.recipe = self._recipe().to(self.recipe.device)
        return self

    def member(self, name: str) -> Any:
        """The member of that name; an unknown name raises."""
        if name not in self._names:
            raise PalimpsestError(f"the mixture has no member {name!r}. {nearest(name, self._names)}")
        return self.get_submodule(name)

    @torch.no_grad()
    def scores(self, **inputs: Any) -> dict[str, Float[Tensor, "batch positions vocab"]]:
        """Log-probabilities of every member alone, and of all together as `mixture`, for the same tokens."""
        alone = {name: self.member(name)(**inputs).logits for name in self._names if self._reads(name) is None}
        return {name: x.float().log_softmax(-1) for name, x in {**alone, "mixture": self(**inputs).logits}.items()}

    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: MixtureCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        decoding: bool = False,
        return_dict: bool | None = None,
        **more: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Combined float32 logits; `decoding` excludes what the rule's filter drops. Hidden states: the first's."""
        if input_ids is None:
            raise PalimpsestError("a mixture takes input_ids: each of its members has embeddings of its own.")
        if cache is not None and not isinstance(cache, MixtureCache):
            raise PalimpsestError(
                f"cache is a {type(cache).__name__}; a mixture keeps one cache a member. Leave it out, or pass the one "
                "that the mixture returned."
            )
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache, **more}
        held = {} if cache is None else cache.members
        first, wanted = self.get_submodule(self._names[0]), self._needed()
        read = {name: path for name in wanted if (path := self._reads(name)) is not None}
        outputs: dict[str, Any] = {}
        watched = {path: first.get_submodule(path.removesuffix(INPUT)) for path in read.values()}
        with capture(watched) as states:
            for name in wanted:
                member = self.get_submodule(name)
                if name in read:
                    outputs[name] = member(_positions(states[read[name]], logits_to_keep))
                else:
                    nested = {"decoding": decoding} if member is first and isinstance(member, type(self)) else {}
                    outputs[name] = member(
                        input_ids=input_ids,
                        cache=held.get(name),
                        logits_to_keep=logits_to_keep,
                        **inputs,
                        **nested,
                    )
        caches = {name: getattr(output, "cache", None) for name, output in outputs.items()}
        if cache is not None:
            held.update(caches)
        elif any(own is not None for own in caches.values()):
            cache = MixtureCache(caches)
        logits = self._combined({name: output.logits for name, output in outputs.items()}, decoding)
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **more)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=cache,
            hidden_states=getattr(outputs[wanted[0]], "hidden_states", None),
            attentions=getattr(outputs[wanted[0]], "attentions", None),
        )
        return output if self.config.return_dict and return_dict is not False else output.to_tuple()

    def _combined(self, logits: Mapping[str, Tensor], decoding: bool) -> Tensor:
        if self.rule.alone is not None:
            return logits[self._names[self.rule.alone]]
        first, second = (logits[name].float() for name in self._names)
        return self.rule.combine(first, second, decoding)

    def _needed(self) -> list[str]:
        """The members to run, in order: where one alone counts that one, and the one that it reads from."""
        if self.rule.alone is None:
            return self._names
        name = self._names[self.rule.alone]
        return [name] if self._reads(name) is None else [self._names[0], name]

    def _reads(self, name: str) -> str | None:
        return getattr(self.get_submodule(name).config, "reads", None)

    @property
    def _names(self) -> list[str]:
        return list(self.config.names or ())

    def _recipe(self) -> Tensor:
        """SHA-256 of rule and settings, as bytes: a tensor among the weights, so that digests and ledger cover it."""
        told = json.dumps([self.rule.name, to_dict(self.rule)], sort_keys=True)
        return torch.tensor(list(hashlib.sha256(told.encode()).digest()), dtype=torch.uint8)

    # what transformers asks of a model

    def get_input_embeddings(self) -> nn.Module:
        """The first member's."""
        return self.member(self._names[0]).get_input_embeddings()

    def get_output_embeddings(self) -> None:
        """None: no layer of a mixture gives its logits."""

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Shared tensors of different members, whatever the members' own configs tie."""
        return (
            super().get_expanded_tied_weights_keys(all_submodels=True)
            if all_submodels
            else dict(self._tied_weights_keys)
        )

    def init_weights(self) -> None:
        """Shares what is shared; the members have made their own weights."""
        self.tie_weights(recompute_mapping=False)

    def _adjust_bias(self, output_embeddings: Any, input_embeddings: Any) -> None:
        """Nothing: transformers would cut the biases of Conv1D, whose weights lie the other way round."""

    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> dict[str, Any]:
        """The inputs of a step, which is a step of decoding. (`generate` looks for the name `kwargs`.)"""
        inputs = GenerationMixin.prepare_inputs_for_generation(self, input_ids, **kwargs)
        return {**inputs, "decoding": True}

    def new_cache(self) -> MixtureCache:
        """An empty cache for every member; one of a kind of its own is made by the member itself."""
        return MixtureCache({name: _new_cache(self.get_submodule(name), self._reads(name)) for name in self._names})

    def _supports_default_dynamic_cache(self) -> bool:  # type: ignore[override]
        members: list[Any] = [self.get_submodule(name) for name in self._names if self._reads(name) is None]
        return all(member._supports_default_dynamic_cache() for member in members)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *arguments: Any, **keywords: Any
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise PalimpsestError(
                f"cache_implementation is {generation_config.cache_implementation!r}; a mixture keeps one dynamic "
                "cache a member. Leave it out."
            )
        if model_kwargs.get("cache") is None and generation_config.use_cache is not False:
            model_kwargs["cache"] = self.new_cache()


def _new_cache(member: Any, reads: str | None) -> Any:
    if isinstance(member, MixtureForCausalLM):
        return member.new_cache()
    if reads is not None or not member._supports_default_dynamic_cache():
        return None
    return DynamicCache(config=member.config.get_text_config(decoder=True))


def _positions(states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    return states[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]


AutoConfig.register(MixtureConfig.model_type, MixtureConfig, exist_ok=True)
AutoModelForCausalLM.register(MixtureConfig, MixtureForCausalLM, exist_ok=True)

# --- making one ------------------------------------------------------------------------------------------------------


def mixture(rule: Rule, **members: Model) -> Model:
    """A model of two, with the tokenizer and the history of the first; the networks become part of it uncopied.

    Tensors of the second that equal the first's of the same name are shared with it and stored once. Raises where the
    members' tokenizers, devices or number types differ, or their vocabularies, unless the rule can do with logits that
    are filled up to different widths beyond the same words.
    """
    if len(members) != 2:
        raise PalimpsestError(f"a mixture has two members, {len(members)} were given. Mix a mixture for more.")
    (first_name, first), (second_name, second) = members.items()
    for name, model in members.items():
        _check_open(name, model.network)
    _check_alike(first_name, first, second_name, second, getattr(rule, "fits_widths", False))
    base, other = first.network, second.network
    own = dict(base.named_parameters())
    shared = {
        f"{second_name}.{name}": f"{first_name}.{name}"
        for name, weight in other.named_parameters()
        if name in own and own[name].shape == weight.shape and torch.equal(own[name], weight)
    }
    config = MixtureConfig(
        names=list(members),
        rule=rule.name,
        settings=to_dict(rule),
        shared=shared,
        **sizes_of([base.config.get_text_config(), other.config.get_text_config()]),
    )
    network = MixtureForCausalLM(config, {name: model.network for name, model in members.items()})
    network.generation_config = copy.deepcopy(base.generation_config)
    network.config._name_or_path = base.config._name_or_path
    return Model(network.train(base.training), first.processor, first.ledger)


def foundation(network: Any) -> Any:
    """The network that a mixture rests on: its first member's, down to one that is no mixture."""
    while isinstance(network, MixtureForCausalLM):
        network = network.get_submodule(network._names[0])
    _check_open("the model", network)
    return network


def _check_open(name: str, network: Any) -> None:
    if getattr(network, "reads_prompts", False):  # it cannot be asked for one token more
        raise PalimpsestError(
            f"{name} is guarded: what it says cannot be combined with another network's. Use the network inside it "
            "(`network.unguarded`), and guard the result."
        )


def _check_alike(first_name: str, first: Model, second_name: str, second: Model, fits_widths: bool) -> None:
    """Raises where two models cannot share tokens and logits."""
    sizes = [model.network.config.get_text_config().vocab_size for model in (first, second)]
    named = first.processor is not None and second.processor is not None
    filled = fits_widths and named and min(sizes) > max(max(m.tokenizer.get_vocab().values()) for m in (first, second))
    if sizes[0] != sizes[1] and not filled:
        raise PalimpsestError(
            f"{first_name} has a vocabulary of {sizes[0]} and {second_name} of {sizes[1]}; a mixture needs the same."
        )
    if named and first.processor is not second.processor:
        ids = [model.tokenizer.get_vocab() for model in (first, second)]
        differing = sorted(token for token in ids[0].keys() | ids[1].keys() if ids[0].get(token) != ids[1].get(token))
        if differing:
            raise PalimpsestError(
                f"the tokenizers of {first_name} and {second_name} differ in {len(differing)} tokens (first: "
                f"{differing[0]!r}); a mixture needs the same."
            )
    held = [list(itertools.chain(model.network.parameters(), model.network.buffers())) for model in (first, second)]
    floats = [[t for t in tensors if t.is_floating_point()] for tensors in held]  # a datastore has none
    for what, field, tensors in (("device", "device", held), ("number type", "dtype", floats)):
        found = [str(getattr(own[0], field)).removeprefix("torch.") for own in tensors if own]
        if len(set(found)) > 1:
            raise PalimpsestError(
                f"the {what} of {first_name} is {found[0]} and of {second_name} {found[1]}; a mixture needs the same."
            )
