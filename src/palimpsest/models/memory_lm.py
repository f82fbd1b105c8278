"""A decoder-only language model whose memory is a choice: its token mixer and channel mixer are named in its config.

    x = embed(tokens)
    for every block:   x = x + mixer(norm(x));   x = x + channel(norm(x))
    logits = norm(x) embed^T

Token mixers are the layers of `palimpsest.layers` (`MIXERS` names them); a list in the config gives a mixer a block.
The model is a transformers model: `AutoModelForCausalLM` once this module is imported, `generate`, `save_pretrained`.
Its cache holds the mixers' states, of constant size for every mixer but attention without a window. Padding may stand
anywhere in a row: its real tokens are moved to the front before the blocks, and back after them, so that padding never
enters a memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg

from palimpsest.errors import PalimpsestError, nearest
from palimpsest.layers import State
from palimpsest.layers.attention import Attention
from palimpsest.layers.mom import MixtureOfMemories
from palimpsest.layers.titans import titans_mixer


def _recurrent(rule: Any) -> Callable[..., nn.Module]:
    return lambda width, heads, **more: MixtureOfMemories(
        width, heads, memories=1, top_k=1, shared=False, rule=rule, **more
    )


MIXERS: dict[str, Callable[..., Any]] = {
    "attention": Attention,
    "linear-attention": _recurrent("linear"),
    "gated-linear-attention": _recurrent("gated-linear"),
    "delta": _recurrent("delta"),
    "gated-delta": _recurrent("gated-delta"),
    "mom": MixtureOfMemories,
    "titans": titans_mixer,
}
"""Token mixers by name: each is made as `mixer(width, heads, **settings)`."""


class MemoryLMConfig(PreTrainedConfig):
    """Sizes, the token mixer with its settings, and the channel mixer of a `MemoryForCausalLM`.

    `mixer` is one name, or one a block; `mixer_settings` are its settings, or by name those of several. What the mixers
    add to the loss (`penalty`) is weighed by `penalty_weight`.
    """

    model_type = "palimpsest_memory_lm"

    vocab_size: int = 256
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int | None = None
    mixer: str | list[str] = "attention"
    mixer_settings: dict[str, Any] | None = None
    penalty_weight: float = 0.0
    channel: str = "swiglu"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    max_position_embeddings: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @property
    def mixers(self) -> list[str]:
        """The token mixer of each block; raises where the names are unknown or too few."""
        names = [self.mixer] * self.num_hidden_layers if isinstance(self.mixer, str) else list(self.mixer)
        if len(names) != self.num_hidden_layers:
            raise PalimpsestError(f"mixer names {len(names)} blocks, but there are {self.num_hidden_layers}.")
        for name in names:
            if name not in MIXERS:
                raise PalimpsestError(f"there is no token mixer {name!r}. {nearest(name, MIXERS)}")
        return names

    def settings_of(self, mixer: str) -> dict[str, Any]:
        """The settings of one mixer."""
        given = self.mixer_settings or {}
        return dict(given if isinstance(self.mixer, str) else given.get(mixer, {}))


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x); Shazeer 2020 (arXiv 2002.05202)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Float[Tensor, "*n w"]) -> Float[Tensor, "*n w"]:
        """Each token by itself."""
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


CHANNELS: Mapping[str, Callable[[int, int], Any] | None] = {"swiglu": SwiGLU, "none": None}
"""Channel mixers by name: each is made as `channel(width, inner)`; `none` leaves it out."""


class Block(nn.Module):
    """Pre-norm residual block: a token mixer, then a channel mixer."""

    def __init__(self, config: MemoryLMConfig, mixer: str) -> None:
        super().__init__()
        width = config.hidden_size
        try:
            self.mixer = MIXERS[mixer](width, config.num_attention_heads, **config.settings_of(mixer))
        except TypeError as error:
            raise PalimpsestError(f"the mixer {mixer} does not take these settings: {error}.") from error
        if config.channel not in CHANNELS:
            raise PalimpsestError(f"there is no channel mixer {config.channel!r}. {nearest(config.channel, CHANNELS)}")
        self.mixer_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.mlp_norm: Any = None
        self.mlp: Any = None
        if (channel := CHANNELS[config.channel]) is not None:
            self.mlp_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
            self.mlp = channel(width, config.intermediate_size or 8 * width // 3)

    def forward(
        self, hidden: Float[Tensor, "b t w"], state: State | None, mask: Bool[Tensor, "b t"] | None
    ) -> tuple[Float[Tensor, "b t w"], State]:
        """The block on all tokens after those of the state; one token takes the mixer's recurrent step."""
        normed = self.mixer_norm(hidden)
        if state is not None and hidden.shape[1] == 1 and mask is None:
            mixed, state = self.mixer.step(normed[:, 0], state)
            mixed = mixed[:, None]
        else:
            mixed, state = self.mixer(normed, state, mask)
        hidden = hidden + mixed
        return (hidden if self.mlp is None else hidden + self.mlp(self.mlp_norm(hidden))), state


class MemoryCache(Cache):
    """The states of the mixers, a block each; what `generate` does to a cache it does to their first dimension."""

    layer_class_to_replicate = None
    offloading = False
    layers: list[Any] = []  # noqa: RUF012  there are no key-value layers
    is_croppable = False
    is_linear = (False,)  # type: ignore[assignment]  # so that `generate` cuts the tokens that it has seen off a prompt

    def __init__(self, states: list[State] | None = None, tokens: int = 0) -> None:
        self.states = states
        self.tokens = tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens the longest row has had."""
        return self.tokens

    @property
    def floats(self) -> int:
        """How many numbers are kept."""
        return sum(tensor.numel() for state in self.states or () for tensor in state.values())

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.states is not None:
            self.states = [{name: change(x) for name, x in state.items()} for state in self.states]

    def reorder_cache(self, beam_idx: Int[Tensor, " b"]) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self._map(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        self._map(lambda x: x[indices])

    def reset(self) -> None:
        """Nothing seen."""
        self.states, self.tokens = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a recurrent memory cannot forget its last tokens."""
        raise PalimpsestError("a recurrent memory cannot be cut back to fewer tokens.")


class MemoryForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model; see the module."""

    config: MemoryLMConfig
    config_class = MemoryLMConfig
    base_model_prefix = ""
    _tied_weights_keys = {"unembed.weight": "embed.weight"}  # noqa: RUF012  the name and form that transformers reads
    _no_split_modules = ["Block"]  # noqa: RUF012
    _is_stateful = True
    keeps_own_cache = True

    def __init__(self, config: MemoryLMConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, mixer) for mixer in config.mixers)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.unembed = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    def forward(
        self,
        input_ids: Int[Tensor, "b t"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: MemoryCache | None = None,
        labels: Int[Tensor, "b t"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        **more: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [b, t, vocabulary]; the loss is the cross-entropy of `labels` and the mixers' penalties.

        Positions are those of the tokens in their rows: `position_ids` are not looked at. A mask of another form than
        [b, past + t] is refused.
        """
        if input_ids is None:
            raise PalimpsestError("a memory language model takes input_ids.")
        if cache is not None and not isinstance(cache, MemoryCache):
            raise PalimpsestError(
                f"cache is a {type(cache).__name__}, expected a MemoryCache. Leave it out, or pass "
                "the one that the model returned."
            )
        mask = _real(attention_mask, input_ids)
        order = None if mask is None else _aligned(mask)
        real = None if mask is None or order is None else mask.gather(1, order)
        hidden = self.embed(input_ids)
        hidden = hidden if order is None else _moved(hidden, order)
        seen = [hidden] if output_hidden_states else []
        before = cache.states if cache is not None else None
        states: list[Any] = before or [None] * len(self.layers)
        after: list[State] = []
        for block, state in zip(self.layers, states, strict=True):
            hidden, state = block(hidden, state, real)
            after.append(state)
            seen += [hidden] if output_hidden_states else []
        back = None if order is None else order.argsort(1)
        hidden = self.norm(hidden if back is None else _moved(hidden, back))
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.unembed(hidden[:, keep])
        kept = None
        if use_cache or (use_cache is None and cache is not None):
            kept = MemoryCache() if cache is None else cache
            kept.states, kept.tokens = after, kept.tokens + input_ids.shape[1]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **more) + self.penalty()
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=kept,
            hidden_states=tuple(x if back is None else _moved(x, back) for x in seen) or None,
        )

    def penalty(self) -> Tensor | float:
        """What the mixers add to the loss, from the last forward pass; 0 where they add nothing."""
        weight = self.config.penalty_weight
        parts = [x for block in self.layers if (x := getattr(block.mixer, "penalty", None)) is not None]
        return weight * sum(parts) if parts and weight else 0.0

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of the tokens."""
        return self.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces it."""
        self.embed = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        """The layer that gives the logits."""
        return self.unembed

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces it."""
        self.unembed = new_embeddings  # type: ignore[assignment]

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        """Normal weights where a layer has no starting values of its own."""
        if hasattr(module, "reset_parameters") and not isinstance(module, nn.Linear | nn.Embedding):
            module.reset_parameters()
        elif isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)

    def _supports_default_dynamic_cache(self) -> bool:  # type: ignore[override]
        return False  # its own cache is made by the first forward pass


def _real(attention_mask: Tensor | None, input_ids: Tensor) -> Bool[Tensor, "b t"] | None:
    """Which of the new tokens are real; None where all are."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[0] != len(input_ids):
        raise PalimpsestError(
            f"attention_mask has shape {list(attention_mask.shape)}, expected [{len(input_ids)}, tokens]: a memory "
            "goes through the tokens of a row one after the other."
        )
    mask = attention_mask[:, -input_ids.shape[1] :].bool()
    return None if bool(mask.all()) else mask


def _aligned(mask: Bool[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """The order in which each row has its real tokens first."""
    return torch.sort(~mask, dim=1, stable=True).indices


def _moved(hidden: Float[Tensor, "b t w"], order: Int[Tensor, "b t"]) -> Float[Tensor, "b t w"]:
    return hidden.gather(1, order[..., None].expand_as(hidden))


AutoConfig.register(MemoryLMConfig.model_type, MemoryLMConfig, exist_ok=True)
AutoModelForCausalLM.register(MemoryLMConfig, MemoryForCausalLM, exist_ok=True)
