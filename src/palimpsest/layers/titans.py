"""Titans: a neural memory, alone or beside attention over a short span, as token mixers.

    memory-only (LMM)   y = Memory(x)
    mag                 y = (RMSNorm(SWA(x)) * sigmoid(RMSNorm(M(x)))) W_O        memory as a gate
    mal                 y = SWA(Memory(x))                                        memory as a layer
    mac                 memory as context, for segments S of C tokens one after the other, M as the last one left it:
        h = M(q(S))                        read only
        z = Attention([P | h | S])         causal, the rows of S only
        M <- M after writing z             token by token, as in any other sequence
        y = (RMSNorm(z) * sigmoid(RMSNorm(M_t(z)))) W_O

P are learned vectors before the sequence, the same for every input (persistent memory): attention sees them from
everywhere, and the memory reads and writes them before the first token. In `mac` only attention sees them.

Source: Behrouz et al. 2024 (arXiv 2501.00663), section 4, eq. 21-31; there is no official code. Differs where the
equations of `mac` would let a token see later ones: it sees h_j only for j up to its own place (the paper shows all of
h to all of S, though h_j is computed from token j), and M_t(z) is read after token t instead of after the segment.
Decided here: the gating with norms and a last projection, rotary positions in attention, and in `mal` vectors P of
attention's own.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from palimpsest.errors import PalimpsestError, nearest
from palimpsest.layers import State
from palimpsest.layers.attention import Attention, rotate
from palimpsest.layers.neural_memory import NeuralMemory

Variant = Literal["memory-only", "mac", "mag", "mal"]


def titans_mixer(width: int, heads: int = 4, *, variant: Variant = "mag", **settings: Any) -> nn.Module:
    """The token mixer of that variant; `settings` are those of its class."""
    known = {"memory-only": MemoryOnly, "mac": MemoryAsContext, "mag": MemoryAsGate, "mal": MemoryAsLayer}
    if variant not in get_args(Variant):
        raise PalimpsestError(f"variant is {variant!r}. {nearest(str(variant), known)}")
    return known[variant](width, heads, **settings)


def split(state: State, part: str) -> State:
    """The part of a state under a prefix."""
    found = {name.removeprefix(f"{part}."): x for name, x in state.items() if name.startswith(f"{part}.")}
    if not found:
        raise PalimpsestError(f"the state has no {part}: it is of another layer.")
    return found


def joined(**parts: State) -> State:
    """States under their prefixes."""
    return {f"{part}.{name}": x for part, state in parts.items() for name, x in state.items()}


def primed(memory: NeuralMemory, persistent: Tensor | None, batch: int) -> State:
    """The memory's state after the persistent vectors."""
    state = memory.start(batch)
    if persistent is None:
        return state
    return memory(persistent.expand(batch, *persistent.shape), state)[1]


def _persistent(count: int, width: int) -> nn.Parameter | None:
    if count < 0:
        raise PalimpsestError(f"persistent is {count}, expected at least 0.")
    return nn.Parameter(torch.randn(count, width) * 0.02) if count else None


class Gating(nn.Module):
    """(RMSNorm(y) * sigmoid(RMSNorm(m))) W_O."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.output_norm = nn.RMSNorm(width, eps=1e-6)
        self.memory_norm = nn.RMSNorm(width, eps=1e-6)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, y: Float[Tensor, "b t w"], m: Float[Tensor, "b t w"]) -> Float[Tensor, "b t w"]:
        """What attention gave, gated by what the memory recalled."""
        return self.output(self.output_norm(y) * self.memory_norm(m).sigmoid())


class _Mixer(nn.Module):
    """What all variants have: the signature of a token mixer, in which one token is a sequence of one."""

    penalty: Tensor | None = None
    memory: NeuralMemory

    @property
    def trace(self) -> dict[str, Tensor] | None:
        """Gates (and surprise) of the memory's last forward pass."""
        return self.memory.trace

    def step(self, hidden: Float[Tensor, "b w"], state: State) -> tuple[Float[Tensor, "b w"], State]:
        """One token after the state."""
        out, state = self(hidden[:, None], state)
        return out[:, 0], state


class MemoryOnly(_Mixer):
    """LMM: a neural memory behind persistent vectors. The state is that of the memory."""

    def __init__(self, width: int, heads: int = 4, *, persistent: int = 4, **memory: Any) -> None:
        super().__init__()
        self.memory = NeuralMemory(width, heads, **memory)
        self.persistent = _persistent(persistent, width)

    def start(self, batch: int) -> State:
        """The memory after the persistent vectors."""
        return primed(self.memory, self.persistent, batch)

    def forward(
        self, hidden: Float[Tensor, "b t w"], state: State | None = None, mask: Bool[Tensor, "b t"] | None = None
    ) -> tuple[Float[Tensor, "b t w"], State]:
        """All tokens, in chunks."""
        return self.memory(hidden, self.start(len(hidden)) if state is None else state, mask)


class MemoryAsGate(_Mixer):
    """MAG: sliding-window attention, gated by a memory of the whole past; both begin with the same vectors."""

    def __init__(self, width: int, heads: int = 4, *, window: int = 64, persistent: int = 4, **memory: Any) -> None:
        super().__init__()
        self.attention = Attention(width, heads, window=window, persistent=persistent)
        self.memory = NeuralMemory(width, heads, readout=False, **memory)
        self.gating = Gating(width)

    def start(self, batch: int) -> State:
        """An empty window, and the memory after the persistent vectors."""
        memory = primed(self.memory, self.attention.persistent, batch)
        return joined(attention=self.attention.start(batch), memory=memory)

    def forward(
        self, hidden: Float[Tensor, "b t w"], state: State | None = None, mask: Bool[Tensor, "b t"] | None = None
    ) -> tuple[Float[Tensor, "b t w"], State]:
        """Both branches on all tokens."""
        state = self.start(len(hidden)) if state is None else state
        m, memory = self.memory(hidden, split(state, "memory"), mask)
        y, attention = self.attention(hidden, split(state, "attention"), mask)
        return self.gating(y, m), joined(attention=attention, memory=memory)


class MemoryAsLayer(_Mixer):
    """MAL: a memory layer, and sliding-window attention over what it gives."""

    def __init__(self, width: int, heads: int = 4, *, window: int = 64, persistent: int = 4, **memory: Any) -> None:
        super().__init__()
        self.memory = NeuralMemory(width, heads, **memory)
        self.persistent = _persistent(persistent, width)
        self.attention = Attention(width, heads, window=window, persistent=persistent)

    def start(self, batch: int) -> State:
        """The memory after the persistent vectors, and an empty window."""
        memory = primed(self.memory, self.persistent, batch)
        return joined(attention=self.attention.start(batch), memory=memory)

    def forward(
        self, hidden: Float[Tensor, "b t w"], state: State | None = None, mask: Bool[Tensor, "b t"] | None = None
    ) -> tuple[Float[Tensor, "b t w"], State]:
        """One after the other on all tokens."""
        state = self.start(len(hidden)) if state is None else state
        m, memory = self.memory(hidden, split(state, "memory"), mask)
        y, attention = self.attention(m, split(state, "attention"), mask)
        return y, joined(attention=attention, memory=memory)


class MemoryAsContext(_Mixer):
    """MAC: attention over segments of `window` tokens, before which stand what the memory recalls for them.

    The state holds the memory, its weights at the start of the segment (`begun_l`), the past of the convolution of the
    queries that recall (`tail`), rotated keys and values of the segment so far (`keys`, `values` [b, h, 2 C, d]: what
    was recalled, then the tokens), and each row's `place` in its segment. `recall` False leaves h out.
    """

    def __init__(
        self, width: int, heads: int = 4, *, window: int = 64, persistent: int = 4, recall: bool = True, **memory: Any
    ) -> None:
        super().__init__()
        if window < 1:
            raise PalimpsestError(f"window is {window}, expected at least 1.")
        self.window, self.heads, self.recall = window, heads, recall
        self.attention = Attention(width, heads, persistent=persistent)
        self.memory = NeuralMemory(width, heads, readout=False, **memory)
        self.gating = Gating(width)

    def start(self, batch: int) -> State:
        """The learned starting weights, and an empty segment."""
        memory = self.memory.start(batch)
        width, head = self.memory.width, self.memory.width // self.heads
        empty = self.attention.output.weight.new_zeros(batch, self.heads, 2 * self.window, head)
        state = {"keys": empty, "values": empty, "place": torch.zeros_like(memory["position"])}
        state["tail"] = memory["tail"][..., :width]
        return state | self._begun(memory) | joined(memory=memory)

    def forward(
        self, hidden: Float[Tensor, "b t w"], state: State | None = None, mask: Bool[Tensor, "b t"] | None = None
    ) -> tuple[Float[Tensor, "b t w"], State]:
        """Segment after segment; all that does not need the memory is computed for all of them at once."""
        state = self.start(len(hidden)) if state is None else state
        memory = split(state, "memory")
        self.memory.check(hidden, memory, mask)
        if state["keys"].shape[2] != 2 * self.window:
            raise PalimpsestError(
                f"the state has segments of {state['keys'].shape[2] // 2} tokens, but this layer of {self.window}."
            )
        place, time = state["place"], hidden.shape[1]
        real = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device) if mask is None else mask
        lengths = real.sum(1)
        asked, tail = self.memory.queries(hidden, state["tail"], lengths)
        begun = {name: x for name, x in state.items() if name.startswith("begun_")}
        keys, values = state["keys"], state["values"]
        out, first = [], 0
        while first < time:
            # no row may pass the end of its segment within a piece; rows that have no more tokens do not count
            left = real[:, first:].any(1)
            room = self.window - int((place * left).max())
            here = slice(first, first + room)
            piece = hidden[:, here], asked[:, here], None if mask is None else real[:, here]
            y, place, keys, values, begun, memory = self._piece(*piece, place, keys, values, begun, memory)
            out.append(y)
            first += room
        after = {"keys": keys, "values": values, "place": place, "tail": tail}
        return torch.cat(out, 1), after | begun | joined(memory=memory)

    def _piece(
        self,
        hidden: Float[Tensor, "b m w"],
        asked: Float[Tensor, "b m h d"],
        real: Bool[Tensor, "b m"] | None,
        place: Int[Tensor, " b"],
        keys: Float[Tensor, "b h n d"],
        values: Float[Tensor, "b h n d"],
        begun: State,
        memory: State,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, State, State]:
        """Tokens of which none but the last ends a segment."""
        weights = [begun[f"begun_{layer}"] for layer in range(len(self.memory.memory))]
        recalled = self.memory.recalled(asked, weights).flatten(2)
        slots = (place[:, None] + torch.arange(hidden.shape[1], device=hidden.device)).clamp(max=self.window - 1)
        q, k, v = self.attention.projected(hidden)
        rotated = rotate(q, self.window + slots)
        _, k_recalled, v_recalled = self.attention.projected(recalled)
        new_keys = torch.cat([rotate(k_recalled, slots), rotate(k, self.window + slots)], 2)
        at = torch.cat([slots, self.window + slots], 1)
        written = None if real is None else torch.cat([real, real], 1)
        keys = _placed(keys, new_keys, at, written)
        values = _placed(values, torch.cat([v_recalled, v], 2), at, written)
        before = torch.arange(self.window, device=hidden.device) <= slots[..., None]
        seen = torch.cat([before & self.recall, before], -1)[:, None]
        z = self.attention.attend(q, rotated, keys, values, seen)
        z = self.attention.output(z.transpose(1, 2).flatten(2))
        m, memory = self.memory(z, memory, real)
        more = hidden.shape[1] if real is None else real.sum(1)
        ended = (place + more) % self.window == 0
        if real is not None:
            ended &= real.any(1)
        if bool(ended.any()):
            fresh = self._begun(memory)
            begun = {name: torch.where(ended[:, None, None, None], fresh[name], old) for name, old in begun.items()}
        place = (place + more) % self.window
        return self.gating(z, m), place, keys, values, begun, memory

    def _begun(self, memory: State) -> State:
        return {f"begun_{layer}": memory[f"weights_{layer}"] for layer in range(len(self.memory.memory))}


def _placed(
    cache: Float[Tensor, "b h n d"],
    new: Float[Tensor, "b h m d"],
    at: Int[Tensor, "b m"],
    real: Bool[Tensor, "b m"] | None,
) -> Float[Tensor, "b h n d"]:
    """The cache with the new rows in their places, where they are real."""
    cache, at = cache.to(new.dtype), at[:, None, :, None].expand_as(new)
    if real is not None:
        new = torch.where(real[:, None, :, None], new, cache.gather(2, at))
    return cache.scatter(2, at, new)
