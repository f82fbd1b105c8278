"""Mixture of memories: several matrix memories, of which a router writes and reads a few for every token.

A linear recurrence keeps all of the past in one matrix, and unrelated things overwrite each other there. Here a token
goes to the top k of M memories; only these are written, the others stay bit for bit as they were; what is read is mixed
with the router's weights. A shared memory, where there is one, sees every token. Any rule of `recurrences` writes.

    x [D] token, d e key and value width of a head; per head, all memories share q, the convolution, A and dt
    p = softmax(x W_g)  [M]      g = p over the top k, made to sum to 1
    q = x W_Q, k^m = x W_K^m, v^m = x W_V^m; causal convolution and SiLU along the tokens of memory m; q, k of length 1
    beta^m = sigmoid(x W_b^m), log alpha^m = -exp(A) softplus(x W_a^m + dt)
    M^m <- rule(M^m; k^m, v^m, beta^m, alpha^m)   for the chosen m
    o = sum_m g_m q M^m / sqrt(d) (+ the shared memory's);  y = (RMSNorm(o) * SiLU(x W_G)) W_O
    penalty = M sum_m f_m P_m      f_m: share of tokens sent to m (they add up to k), P_m: mean of p_m

Tokens are copied for each of their memories, sorted stably by memory, and run through the recurrence in chunks: work
grows with k and not with M. With one memory this is the plain recurrent layer (linear attention, gated DeltaNet, ...).

Source: Du et al. 2025, "MoM: Linear Sequence Modeling with Mixture-of-Memories" (arXiv 2502.13685v4), section 3 and
appendix; initial values as in the authors' code. Unlike theirs, the convolution never crosses from one memory's tokens
to another's, in training neither; sorting is stable; the balance loss leaves padding out.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from palimpsest.errors import PalimpsestError, nearest
from palimpsest.layers import State
from palimpsest.layers.recurrences import Inputs, Rule, naive_recurrence, run_chunks


def balance(p: Float[Tensor, "n m"], chosen: Int[Tensor, "n k"]) -> Float[Tensor, ""]:
    """M sum_m f_m P_m: k where every memory is used alike, more where the router prefers some."""
    share = F.one_hot(chosen, p.shape[-1]).sum(1).to(p.dtype).mean(0)
    return p.shape[-1] * (share * p.mean(0)).sum()


def wide(tensor: Tensor) -> torch.dtype:
    """The precision of sums: float32, or wider where the tensor is."""
    return torch.promote_types(tensor.dtype, torch.float32)


class Routes(NamedTuple):
    """Which token goes where: each pair of a token and one of its memories is a row, sorted by memory, row, time.

    A segment is one memory of one sequence. `token` is the place of the pair's token in [batch * time].
    """

    token: Int[Tensor, " n"]
    weight: Float[Tensor, " n"]
    segment: Int[Tensor, " n"]
    rank: Int[Tensor, " n"]
    lengths: Int[Tensor, " segments"]


def routes(
    chosen: Int[Tensor, "b t k"], weight: Float[Tensor, "b t k"], memories: int, mask: Bool[Tensor, "b t"] | None = None
) -> Routes:
    """The pairs of tokens and memories in the order in which they are computed."""
    batch, time, k = chosen.shape
    row = torch.arange(batch, device=chosen.device)[:, None, None]
    segment = (chosen * batch + row).flatten()
    token = torch.arange(batch * time, device=chosen.device).repeat_interleave(k)
    if mask is not None:
        real = mask.flatten()[token]
        segment, token, weight = segment[real], token[real], weight.flatten()[real]
    order = torch.sort(segment, stable=True).indices
    segment, lengths = segment[order], torch.bincount(segment, minlength=memories * batch)
    rank = torch.arange(len(segment), device=chosen.device) - (lengths.cumsum(0) - lengths)[segment]
    return Routes(token[order], weight.flatten()[order], segment, rank, lengths)


class MixtureOfMemories(nn.Module):
    """The mixture as a token mixer; `memories=1` is the plain recurrent layer.

    The state holds the memories, [batch, M (+1), heads, d, e] in float32 or wider, and of each memory the last tokens
    that it was given, [batch, M (+1), convolution - 1, width], for its convolution. After a forward pass `penalty` is
    the balance loss, and `trace` the router's probabilities [batch, time, M].
    """

    penalty: Tensor | None = None
    trace: Tensor | None = None

    def __init__(
        self,
        width: int,
        heads: int = 4,
        *,
        memories: int = 4,
        top_k: int = 2,
        shared: bool = True,
        rule: Rule = "gated-delta",
        key_width: int | None = None,
        value_width: int | None = None,
        convolution: int = 4,
        single_kv: bool = False,
        learned_router: bool = True,
        chunk: int = 64,
    ) -> None:
        super().__init__()
        if rule not in get_args(Rule):
            raise PalimpsestError(f"rule is {rule!r}. {nearest(str(rule), get_args(Rule))}")
        if memories < 1 or not 1 <= top_k <= memories:
            raise PalimpsestError(f"top_k is {top_k} of {memories} memories, expected 1 to the number of memories.")
        for name, value in (("heads", heads), ("convolution", convolution), ("chunk", chunk)):
            if value < 1:
                raise PalimpsestError(f"{name} is {value}, expected at least 1.")
        if width % heads:
            raise PalimpsestError(f"width {width} does not give {heads} heads.")
        self.heads, self.memories, self.top_k, self.shared = heads, memories, top_k, shared
        self.rule, self.chunk, self.convolution = rule, chunk, convolution
        self.key_width, self.value_width = key_width or width // heads, value_width or width // heads
        self.width, self.sets = width, 1 if single_kv else memories + shared
        keys, values = heads * self.key_width, heads * self.value_width
        self.router = nn.Linear(width, memories, bias=False).requires_grad_(learned_router) if memories > 1 else None
        self.query = nn.Linear(width, keys, bias=False)
        gates = heads * (("delta" in rule) + ("gated" in rule))
        self.into = nn.Parameter(torch.empty(self.sets, width, keys + values + gates))
        self.filters = nn.Parameter(torch.empty(2 * keys + values, 1, convolution))
        self.gate = nn.Linear(width, values, bias=False)
        self.norm = nn.RMSNorm(self.value_width, eps=1e-6)
        self.output = nn.Linear(values, width, bias=False)
        if "gated" in rule:
            self.log_rate = nn.Parameter(torch.empty(heads))
            self.step_bias = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Starting values of the authors' code: Xavier with gain 2^-2.5, decay rates 0 to 16, steps .001 to .1."""
        linear = [self.query.weight, self.gate.weight, self.output.weight]
        for weight in (*linear, *self.into, *([self.router.weight] if self.router is not None else [])):
            nn.init.xavier_uniform_(weight, gain=2**-2.5)
        bound = self.convolution**-0.5
        self.filters.uniform_(-bound, bound)
        nn.init.ones_(self.norm.weight)
        if "gated" in self.rule:
            self.log_rate.uniform_(1e-3, 16).log_()
            step = (torch.empty_like(self.step_bias).uniform_(math.log(1e-3), math.log(1e-1))).exp().clamp(min=1e-4)
            self.step_bias.copy_(step + (-torch.expm1(-step)).log())  # softplus of it is the step

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what the last forward pass left, which is part of its graph and cannot be copied."""
        return {name: value for name, value in self.__dict__.items() if name not in ("penalty", "trace")}

    def start(self, batch: int) -> State:
        """Empty memories."""
        total = self.memories + self.shared
        weight = self.query.weight
        return {
            "memories": weight.new_zeros(
                batch, total, self.heads, self.key_width, self.value_width, dtype=wide(weight)
            ),
            "tails": weight.new_zeros(batch, total, self.convolution - 1, self.width),
        }

    def step(self, hidden: Float[Tensor, "b w"], state: State) -> tuple[Float[Tensor, "b w"], State]:
        """One token: the recurrence itself, a chunk of one."""
        out, state = self(hidden[:, None], state)
        return out[:, 0], state

    def forward(
        self, hidden: Float[Tensor, "b t w"], state: State | None = None, mask: Bool[Tensor, "b t"] | None = None
    ) -> tuple[Float[Tensor, "b t w"], State]:
        """All tokens, in chunks."""
        batch, total = len(hidden), self.memories + self.shared
        state = self._checked(self.start(batch) if state is None else state, batch, mask, hidden)
        chosen, weight = self.route(hidden, mask)
        plan = routes(chosen, weight, total, mask)
        x, tails = self._inputs(hidden, state["tails"].transpose(0, 1).flatten(0, 1), plan)
        read, memories = self._recur(x, state["memories"].transpose(0, 1).flatten(0, 1), plan)
        weighted = read * plan.weight[:, None, None]
        mixed = weighted.new_zeros(hidden[..., 0].numel(), *read.shape[1:]).index_add(0, plan.token, weighted)
        return self._out(mixed.unflatten(0, hidden.shape[:2]), hidden), {
            "memories": memories.unflatten(0, (total, batch)).transpose(0, 1),
            "tails": tails.unflatten(0, (total, batch)).transpose(0, 1),
        }

    def route(self, hidden: Tensor, mask: Tensor | None = None) -> tuple[Int[Tensor, "b t k"], Float[Tensor, "b t k"]]:
        """The memories of each token and their weights; the shared one last, with weight 1."""
        batch, time, _ = hidden.shape
        chosen = torch.zeros(batch, time, 1, dtype=torch.long, device=hidden.device)
        weight = hidden.new_ones(batch, time, 1)
        if self.router is not None:
            p = self.router(hidden).to(wide(hidden)).softmax(-1)
            if not torch.isfinite(p).all():
                raise PalimpsestError("the router's logits are not numbers; training diverged.")
            top = p.topk(self.top_k)
            chosen, weight = top.indices, (top.values / top.values.sum(-1, keepdim=True)).to(hidden.dtype)
            real = slice(None) if mask is None else mask
            self.trace, self.penalty = p.detach(), balance(p[real].flatten(0, -2), chosen[real].flatten(0, -2))
        if self.shared:
            chosen = F.pad(chosen, (0, 1), value=self.memories)
            weight = F.pad(weight, (0, 1), value=1.0)
        return chosen, weight

    def _inputs(self, hidden: Tensor, tails: Float[Tensor, "s c w"], plan: Routes) -> tuple[Inputs, Tensor]:
        """What each pair gives its memory. Every segment stands behind the last tokens of its past."""
        back, batch = self.convolution - 1, len(hidden)
        segments = torch.arange(len(tails), device=hidden.device)
        ends = plan.lengths.cumsum(0) + (segments + 1) * back
        place = (ends - plan.lengths)[plan.segment] + plan.rank
        before = (ends - plan.lengths - back)[:, None] + torch.arange(back, device=hidden.device)
        line = hidden.new_zeros(len(place) + tails.shape[0] * back, self.width)
        line = line.index_copy(0, place, hidden.flatten(0, 1)[plan.token])
        line = line.index_copy(0, before.flatten(), tails.flatten(0, 1).to(hidden.dtype))
        keys, values = self.heads * self.key_width, self.heads * self.value_width
        cuts = [int(end) for end in ends[batch - 1 :: batch]] if self.sets > 1 else [len(line)]
        own = [part @ self.into[i] for i, part in enumerate(line.tensor_split(cuts[:-1]))]
        projected = torch.cat([self.query(line), torch.cat(own)], 1)
        convolved = F.conv1d(
            F.pad(projected[:, : 2 * keys + values].T, (back, 0)), self.filters, groups=2 * keys + values
        )
        q, k, v = F.silu(convolved.T[place]).split([keys, keys, values], -1)
        q, k = (F.normalize(y.unflatten(-1, (self.heads, -1)), dim=-1) for y in (q, k))
        beta, log_decay = self._gates(projected[place, 2 * keys + values :])
        after = (ends[:, None] - back) + torch.arange(back, device=hidden.device)
        return Inputs(q * self.key_width**-0.5, k, v.unflatten(-1, (self.heads, -1)), beta, log_decay), line[after]

    def _gates(self, raw: Float[Tensor, "n g"]) -> tuple[Tensor | None, Tensor | None]:
        beta = raw[:, : self.heads].sigmoid() if "delta" in self.rule else None
        if "gated" not in self.rule:
            return beta, None
        rate = -self.log_rate.to(wide(raw)).exp()
        return beta, rate * F.softplus(raw[:, -self.heads :].to(wide(raw)) + self.step_bias)

    def _recur(self, x: Inputs, memories: Tensor, plan: Routes) -> tuple[Float[Tensor, "n h e"], Tensor]:
        """The recurrence of every segment, the i-th chunks of all segments together."""
        if not len(plan.token):
            return x.v, memories
        chunk = max(1, min(self.chunk, int(plan.lengths.max())))
        many = (plan.lengths + chunk - 1) // chunk
        active = many > torch.arange(int(many.max()), device=many.device)[:, None]
        place = (active.flatten().cumsum(0) - 1).view_as(active)[plan.rank // chunk, plan.segment] * chunk
        place = place + plan.rank % chunk

        def cut(tensor: Any) -> Any:
            if tensor is None:
                return None
            room = tensor.new_zeros(int(active.sum()) * chunk, *tensor.shape[1:]).index_copy(0, place, tensor)
            return room.unflatten(0, (-1, chunk)).transpose(1, 2)

        row = active.nonzero()[:, 1]
        out, memories = run_chunks(Inputs(*map(cut, x)), memories, row, active.sum(1).tolist())
        return out.transpose(1, 2).flatten(0, 1)[place], memories

    def _out(self, mixed: Float[Tensor, "b t h e"], hidden: Tensor) -> Tensor:
        return self.output(self.norm(mixed).flatten(-2) * F.silu(self.gate(hidden)))

    def _checked(self, state: State, batch: int, mask: Tensor | None, hidden: Tensor) -> State:
        found, expected = tuple(state["memories"].shape[:2]), (batch, self.memories + self.shared)
        if found != expected:
            raise PalimpsestError(f"the state is of {found} (batch, memories), expected {expected}.")
        if mask is not None and mask.shape != hidden.shape[:2]:
            raise PalimpsestError(f"mask has shape {list(mask.shape)}, expected {list(hidden.shape[:2])}.")
        return state


def naive_mixture(layer: MixtureOfMemories, hidden: Float[Tensor, "b t w"]) -> Float[Tensor, "b t w"]:
    """The layer one sequence, one token and one memory at a time, with its own list of tokens for each memory."""
    rows = []
    for sequence in hidden:
        chosen, weight = (each[0] for each in layer.route(sequence[None]))
        given: dict[int, list[Tensor]] = {}
        memories = layer.start(1)["memories"][0].to(hidden.dtype)
        out = []
        for x, where, weights in zip(sequence, chosen, weight, strict=True):
            mixed: Any = 0
            for m, g in zip(where.tolist(), weights, strict=True):
                own = layer.into[m if layer.sets > 1 else 0]
                given.setdefault(m, []).append(torch.cat([layer.query(x), x @ own]))
                one, memory = naive_recurrence(_one_pair(layer, given[m]), memories[m : m + 1])
                memories = torch.cat([memories[:m], memory, memories[m + 1 :]])
                mixed = mixed + g * one[0, :, 0]
            out.append(layer._out(mixed, x))
        rows.append(torch.stack(out))
    return torch.stack(rows)


def _one_pair(layer: MixtureOfMemories, given: list[Tensor]) -> Inputs:
    """The last of a memory's tokens, convolved with those before it."""
    keys, values, heads = layer.heads * layer.key_width, layer.heads * layer.value_width, layer.heads
    recent = torch.stack(given[-layer.convolution :])[:, : 2 * keys + values]
    y = F.silu((recent * layer.filters[:, 0, -len(recent) :].T).sum(0))
    q, k = (F.normalize(each.view(1, heads, 1, -1), dim=-1) for each in y[: 2 * keys].split(keys))
    beta, log_decay = layer._gates(given[-1][None, 2 * keys + values :])
    gates = [None if each is None else each.view(1, heads, 1) for each in (beta, log_decay)]
    return Inputs(q * layer.key_width**-0.5, k, y[2 * keys :].view(1, heads, 1, -1), *gates)
