"""Neural memory: a recurrent layer whose state is a small network that learns while it reads (Titans).

For every token it takes one gradient step on |M(k) - v|^2, with momentum and forgetting, all step sizes computed from
the token; it reads with M(q). Since M may be deep, the state holds maps that no matrix of its width could hold. The
rule itself, token by token and in chunks, is in `palimpsest.layers.gradient_memory`; here it gets its inputs.

    x                [b, t, w]      input; h heads of width d = w / h, each with a memory of its own
    q, k, v          [b, h, t, d]   SiLU(convolution(x W_QKV)); q, k then of length 1, v divided by sqrt(d)
    alpha            [b, h, t]      sigmoid(x w_alpha + b_alpha), forgetting
    eta              [b, h, t]      sigmoid(x w_eta + b_eta), decay of the momentum
    theta            [b, h, t]      theta_max (1 - eta) sigmoid(x w_theta + b_theta), step size
    M                               MLP of `depth` layers, hidden width `expansion` d, SiLU between them, no biases

    m_t = M_t(q_t)     y_t = (RMSNorm(m_t) * SiLU(x_t W_G)) W_O

Gradients are taken at the start of each chunk, in training and in decoding alike, so `chunk` belongs to the model.
With one gradient point for b tokens the effective step is about b theta / (1 - eta); with theta_max = 1 / chunk, the
default, a matrix stays bounded under constant gates even where all keys are equal. The curvature of a deep memory has
no such bound, so each token's gradient is clipped at the norm `clip` (over all its layers; None: not at all): that
keeps the state finite. Where it stops being finite all the same, an error names the chunk.

Source: Behrouz et al. 2024 (arXiv 2501.00663), sections 3.1, 3.2, 4.4; there is no official code. Decided here, where
the paper says nothing: heads, convolution of width 4, sigmoid gates, theta_max and its factor 1 - eta, `clip`, values
divided by sqrt(d) (a scale that W_QKV can undo), two layers with SiLU and expansion 2, learned starting weights
(Xavier; zeros for one layer), RMSNorm of each head, SiLU for the output gate, and a start that forgets little: with
alpha 0.007 two layers were drawn to zero within 2,000 random tokens, with 0.001 they live.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from palimpsest.errors import PalimpsestError
from palimpsest.layers import State
from palimpsest.layers.convolution import short_convolution
from palimpsest.layers.gradient_memory import Inputs, Memory, chunk_memory, recall, surprises

PARTS = ("weights", "momentum", "anchor")


class NeuralMemory(nn.Module):
    """The layer as a token mixer; `momentum` and `decay` False are the ablations without eta and without alpha.

    The state holds, for each layer l of the memory, `weights_l`, `momentum_l` and `anchor_l` (the weights at the start
    of the chunk) [b, h, d, e] in float32 or wider, the `position` of the next token in its chunk [b], the `chunk` [b],
    and the last inputs of the convolution, `tail` [b, convolution - 1, 3 w]. After a forward pass `trace` has the gates
    and, where `tracing` is set, the `surprise` |u_t| of every token, [b, h, t]. With `readout` False the output is m_t.
    """

    penalty: Tensor | None = None
    trace: dict[str, Tensor] | None = None
    tracing = False

    def __init__(
        self,
        width: int,
        heads: int = 4,
        *,
        depth: int = 2,
        expansion: float = 2.0,
        chunk: int = 16,
        theta_max: float | None = None,
        clip: float | None = 10.0,
        convolution: int = 4,
        momentum: bool = True,
        decay: bool = True,
        readout: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("heads", heads), ("depth", depth), ("chunk", chunk), ("convolution", convolution)):
            if value < 1:
                raise PalimpsestError(f"{name} is {value}, expected at least 1.")
        if width % heads:
            raise PalimpsestError(f"width {width} does not give {heads} heads.")
        if theta_max is not None and not theta_max > 0:
            raise PalimpsestError(f"theta_max is {theta_max}, expected above 0.")
        if clip is not None and not clip > 0:
            raise PalimpsestError(f"clip is {clip}, expected above 0.")
        inner = int(expansion * width / heads)
        if inner < 1:
            raise PalimpsestError(f"expansion {expansion} gives a hidden width of {inner}, expected at least 1.")
        self.width, self.heads, self.chunk, self.convolution = width, heads, chunk, convolution
        self.theta_max = 1 / chunk if theta_max is None else theta_max
        self.clip, self.momentum, self.decay, self.readout = clip, momentum, decay, readout
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.filters = nn.Parameter(torch.empty(3 * width, 1, convolution))
        self.gates = nn.Linear(width, heads * (1 + decay + momentum), bias=False)
        self.gate_bias = nn.Parameter(torch.empty(1 + decay + momentum, heads))
        head = width // heads
        sizes = [head] + [inner] * (depth - 1) + [head]
        self.memory = nn.ParameterList(torch.empty(heads, *size) for size in itertools.pairwise(sizes))
        if readout:
            self.norm = nn.RMSNorm(head, eps=1e-6)
            self.gate = nn.Linear(width, width, bias=False)
            self.output = nn.Linear(width, width, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Starting values: little is forgotten (alpha about 0.001), eta 1/2, theta half of its greatest."""
        bound = self.convolution**-0.5
        self.filters.uniform_(-bound, bound)
        self.gate_bias.zero_()
        if self.decay:
            self.gate_bias[1].fill_(-7.0)
        for w in self.memory:
            nn.init.zeros_(w) if len(self.memory) == 1 else [nn.init.xavier_uniform_(head) for head in w]
        if self.readout:
            nn.init.ones_(self.norm.weight)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what the last forward pass left."""
        return {name: value for name, value in self.__dict__.items() if name != "trace"}

    def start(self, batch: int) -> State:
        """The learned starting weights, and no momentum."""
        weights = [w.to(_wide(w)).expand(batch, *w.shape) for w in self.memory]
        state = {"position": torch.zeros(batch, dtype=torch.long, device=weights[0].device)}
        state["chunk"] = torch.full_like(state["position"], self.chunk)
        state["tail"] = self.filters.new_zeros(batch, self.convolution - 1, 3 * self.width)
        for layer, w in enumerate(weights):
            state |= {f"weights_{layer}": w, f"anchor_{layer}": w}
            if self.momentum:
                state[f"momentum_{layer}"] = torch.zeros_like(w)
        return state

    def step(self, hidden: Float[Tensor, "b w"], state: State) -> tuple[Float[Tensor, "b w"], State]:
        """One token; gradients stay at the weights with which its chunk began, as in `forward`."""
        out, state = self(hidden[:, None], state)
        return out[:, 0], state

    def forward(
        self, hidden: Float[Tensor, "b t w"], state: State | None = None, mask: Bool[Tensor, "b t"] | None = None
    ) -> tuple[Float[Tensor, "b t w"], State]:
        """All tokens, in chunks. Raises, naming the chunk, where the memory stops being finite."""
        state = self.start(len(hidden)) if state is None else state
        self.check(hidden, state, mask)
        x, tail = self._inputs(hidden, state["tail"], mask)
        real = None if mask is None else mask.repeat_interleave(self.heads, 0)
        before = self._memory(state)
        read, after = chunk_memory(x, before, self.chunk, real, self.clip)
        self._show(x, before, real)
        m = read.unflatten(0, (-1, self.heads)).transpose(1, 2)
        return self._out(m, hidden), self._state(after, tail)

    def read(
        self, hidden: Float[Tensor, "b t w"], state: State, tail: Float[Tensor, "b c w"], lengths: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b t h d"], Float[Tensor, "b c w"]]:
        """What the memory recalls at queries of the input, nothing written; `tail` is the convolution's own past."""
        q, tail = self.queries(hidden, tail, lengths)
        return self.recalled(q, [state[f"weights_{layer}"] for layer in range(len(self.memory))]), tail

    def queries(
        self, hidden: Float[Tensor, "b t w"], tail: Float[Tensor, "b c w"], lengths: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b t h d"], Float[Tensor, "b c w"]]:
        """The queries of the input, and the convolution's past after it."""
        w = self.width
        projected = self.query_key_value(hidden)[..., :w]  # the module itself, which may carry an adapter
        q, tail = self._convolved(projected, self.filters[:w], tail, lengths)
        return F.normalize(q.unflatten(-1, (self.heads, -1)), dim=-1), tail

    def recalled(self, q: Float[Tensor, "b t h d"], weights: list[Tensor]) -> Float[Tensor, "b t h d"]:
        """M(q) with these weights [b, h, d, e] of each layer."""
        flat = [w.flatten(0, 1) for w in weights]
        rows = q.transpose(1, 2).flatten(0, 1).to(flat[0].dtype)
        return recall(flat, rows).unflatten(0, (-1, self.heads)).transpose(1, 2).to(q.dtype)

    def check(self, hidden: Tensor, state: State, mask: Tensor | None) -> None:
        """Raises where the input, the state and the mask do not belong to this layer or to each other."""
        batch, time, width = hidden.shape
        if width != self.width:
            raise PalimpsestError(f"the input has width {width}, expected {self.width}.")
        if mask is not None and mask.shape != (batch, time):
            raise PalimpsestError(f"mask has shape {list(mask.shape)}, expected {[batch, time]}.")
        if mask is not None and bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise PalimpsestError("mask has padding before real tokens; padding must stand after them.")
        names = ("position", "chunk", "tail", *self._names())
        if missing := [name for name in names if name not in state]:
            raise PalimpsestError(f"the state has no {missing[0]}: it is of another layer.")
        if len(state["position"]) != batch:
            raise PalimpsestError(f"the state is of a batch of {len(state['position'])}, but the input of {batch}.")
        other = state["chunk"][state["position"] > 0]
        if bool((other != self.chunk).any()):
            raise PalimpsestError(
                f"the state stands inside a chunk of {int(other[0])} tokens, but this layer has chunks of {self.chunk}."
                " They can change only where a chunk ends."
            )

    def _names(self) -> list[str]:
        parts = [part for part in PARTS if part != "momentum" or self.momentum]
        return [f"{part}_{layer}" for part in parts for layer in range(len(self.memory))]

    def _memory(self, state: State) -> Memory:
        """The state with a row for each head."""
        found = {name: state[name].flatten(0, 1) for name in self._names()}
        weights, momentum, anchor = ([found[name] for name in found if name.startswith(part)] for part in PARTS)
        return Memory(weights, momentum, anchor, state["position"].repeat_interleave(self.heads))

    def _state(self, memory: Memory, tail: Tensor) -> State:
        position = memory.position[:: self.heads]
        state = {"position": position, "chunk": torch.full_like(position, self.chunk), "tail": tail}
        for part in PARTS:
            for layer, w in enumerate(getattr(memory, part)):
                state[f"{part}_{layer}"] = w.unflatten(0, (-1, self.heads))
        return state

    def _inputs(self, hidden: Tensor, tail: Tensor, mask: Tensor | None) -> tuple[Inputs, Tensor]:
        """What the rule is given, a row for each sequence and head, and the convolution's past after the input."""
        dtype = _wide(hidden)
        lengths = torch.full(hidden.shape[:1], hidden.shape[1], device=hidden.device) if mask is None else mask.sum(1)
        y, tail = self._convolved(self.query_key_value(hidden), self.filters, tail, lengths)
        q, k, v = y.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).to(dtype).flatten(1, 2).unbind(0)
        raw = self.gates(hidden).unflatten(-1, (-1, self.heads)).to(dtype) + self.gate_bias.to(dtype)
        step, *others = raw.sigmoid().permute(2, 0, 3, 1).flatten(1, 2).unbind(0)
        forget = others.pop(0) if self.decay else None
        eta = others.pop(0) if self.momentum else None
        step = self.theta_max * (step if eta is None else step * (1 - eta))
        v = v * v.shape[-1] ** -0.5
        return Inputs(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, step, forget, eta), tail

    def _convolved(
        self, x: Float[Tensor, "b t c"], filters: Tensor, tail: Float[Tensor, "b s c"], lengths: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "b s c"]]:
        """SiLU of the causal convolution of each channel, and the last inputs of each row."""
        line = torch.cat([tail.to(x.dtype), x], 1)
        y = short_convolution(line, filters)
        if bool((lengths == x.shape[1]).all()):
            return y, line[:, x.shape[1] :]
        at = lengths[:, None] + torch.arange(tail.shape[1], device=x.device)
        return y, line.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))

    def _out(self, m: Float[Tensor, "b t h d"], hidden: Tensor) -> Float[Tensor, "b t w"]:
        if not self.readout:
            return m.flatten(2).to(hidden.dtype)
        return self.output(self.norm(m.to(hidden.dtype)).flatten(2) * F.silu(self.gate(hidden)))

    def _show(self, x: Inputs, memory: Memory, real: Tensor | None) -> None:
        found = {"forget": x.forget, "momentum": x.momentum, "step": x.step}
        if self.tracing:
            found["surprise"] = surprises(x, memory, self.chunk, real, self.clip)
        self.trace = {
            name: gate.detach().unflatten(0, (-1, self.heads)) for name, gate in found.items() if gate is not None
        }


def _wide(tensor: Tensor) -> torch.dtype:
    """The precision of the memory: float32, or wider where the tensor is."""
    return torch.promote_types(tensor.dtype, torch.float32)
