"""The walk over chunks of `palimpsest.layers.gradient_memory`, with its gradient written out.

Weights and momentum of a layer are one state, X = [W; S], S below W; without momentum X = W. What a token reads and
writes of both, and how both go from chunk to chunk, are the module's coefficients (B, f, G, E, H; G[b], E[b] are the
rows of the chunk's last token),

    reads = [B, f]      writes = [G[b], E[b] theta]      turn = [[B_b, f_b], [0, H_b]]

and [a x reads] is a times each of `reads`, side by side. For each chunk and each layer (h, a: what the layer wrote and
reads; D: errors, 2 (v - M(k)) at the top, so that writing adds)

    h' = silu(h W),   D from the top down,   a' = silu([a x reads] X + ((a h^T) * G) D)
    X' = turn X + [h x writes]^T D

The gradient is written out because a chunk is some forty small operations, each of which would have its own record.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Weights = Sequence[Float[Tensor, "n d e"]]
States = Sequence[Float[Tensor, "n m*d e"]]


class Chunks(NamedTuple):
    """What the chunks (c of them, of b tokens) need besides the state; m is 2 with momentum, 1 without."""

    q: Float[Tensor, "c n b d"]
    k: Float[Tensor, "c n b d"]
    v: Float[Tensor, "c n b e"]
    mixing: Float[Tensor, "c n b b"]  # G
    reads: Float[Tensor, "c n b m"]
    writes: Float[Tensor, "c n b m"]
    turn: Float[Tensor, "c n m m"]

    def each(self) -> Iterator[Chunks]:
        """One chunk after the other."""
        return map(Chunks._make, zip(*(part.unbind() for part in self), strict=True))


class Layer(NamedTuple):
    """What the gradient needs of a layer in a chunk."""

    state: Tensor
    h: Tensor
    error: Tensor
    scale: Tensor | None  # what the errors are multiplied by, where any of the chunk is clipped
    a: Tensor
    raw: Tensor  # a h^T
    out: Tensor | None  # a' before silu; this and what follows the last layer does not have
    z: Tensor | None  # h W
    gate: Tensor | None  # sigmoid(z)
    slope: Tensor | None  # of silu at z
    back: Tensor | None  # the error before it is multiplied by the slope

    @property
    def written(self) -> Tensor:
        """The error as it is written."""
        return self.error if self.scale is None else self.error * self.scale


class Scan(torch.autograd.Function):
    """y [c n b e], states after the last chunk, and the weights with which chunk `until` of a row began.

    The arguments are `keep` (whether a gradient will be asked for), `until`, the depth, the norm at which gradients are
    clipped, the parts of `Chunks`, and of every layer the state, and the weights at which the first chunk's errors are
    taken.
    """

    @staticmethod
    def forward(
        ctx: Any, keep: bool, until: Int[Tensor, " n"], depth: int, clip: float | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Walks, and keeps what the way back needs."""
        parts = len(Chunks._fields)
        chunks, states, anchor = Chunks(*tensors[:parts]), tensors[parts : parts + depth], tensors[parts + depth :]
        last = set(until.tolist())
        ends: dict[int, Weights] = {0: anchor} if 0 in last else {}
        after: States = states
        kept: list[Tensor | None] = []
        out = []
        for y, after, layers in walk(chunks, states, anchor, clip):
            out.append(y)
            if len(out) in last:
                ends[len(out)] = _weights(after, anchor)
            if keep:
                kept += [tensor for layer in layers for tensor in layer]
        final = [w.clone() for w in _weights(after, anchor)]
        for i, old in ends.items():
            here = (until == i)[:, None, None]
            final = [torch.where(here, a, w) for a, w in zip(old, final, strict=True)]
        ctx.save_for_backward(until, *chunks, *anchor, *kept)
        ctx.depth, ctx.clip = depth, clip
        return torch.stack(out), *after, *final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Walks back."""
        with torch.autocast(dy.device.type, enabled=False):
            return None, None, None, None, *_gradient(ctx, dy, grads)


def walk(
    chunks: Chunks, states: States, anchor: Weights, clip: float | None = None
) -> Iterator[tuple[Tensor, States, list[Layer]]]:
    """Of each chunk what it reads, the states after it, and what its gradient needs."""
    for c in chunks.each():
        y, states, layers = _forward(c, states, anchor, clip)
        anchor = _weights(states, anchor)
        yield y, states, layers


def _weights(states: States, like: Weights) -> Weights:
    return [x[:, : w.shape[1]] for x, w in zip(states, like, strict=True)]


def _forward(
    c: Chunks, states: States, anchor: Weights, clip: float | None
) -> tuple[Tensor, list[Tensor], list[Layer]]:
    top = len(states) - 1
    z, gates, slopes, inputs = [], [], [], [c.k]
    for i, w in enumerate(anchor):
        z.append(torch.bmm(inputs[-1], w))
        if i < top:
            gates.append(z[-1].sigmoid())
            inputs.append(z[-1] * gates[-1])
            slopes.append(torch.addcmul(gates[-1], inputs[-1], 1 - gates[-1]))
    backs, errors = [], [(c.v - z[-1]).mul_(2)]
    for i in range(top, 0, -1):
        backs.append(torch.bmm(errors[-1], anchor[i].mT))
        errors.append(backs[-1] * slopes[i - 1])
    errors.reverse()
    backs.reverse()
    scale, written = None, errors
    if clip is not None:
        squares = _squares(inputs[0], errors[0])
        for h, error in zip(inputs[1:], errors[1:], strict=True):
            squares.add_(_squares(h, error))
        if float(squares.max()) > clip**2:
            scale = clip / squares.sqrt().clamp(min=clip)
            written = [error * scale for error in errors]
    a, after, layers = c.q, [], []
    for i, (x, h, d) in enumerate(zip(states, inputs, written, strict=True)):
        raw = torch.bmm(a, h.mT)
        scores = raw * c.mixing
        read, write = _times(a, c.reads), _times(h, c.writes)
        out = torch.bmm(read, x).baddbmm_(scores, d)
        after.append(_turned(c.turn, x).baddbmm_(write.mT, d))
        inner = (None,) * 5 if i == top else (out, z[i], gates[i], slopes[i], backs[i])
        layers.append(Layer(x, h, errors[i], scale, a, raw, *inner))
        a = out if i == top else F.silu(out)
    return a, after, layers


def _times(x: Float[Tensor, "n b d"], by: Float[Tensor, "n b m"]) -> Float[Tensor, "n b m*d"]:
    return (x[:, :, None] * by[..., None]).flatten(2)


def _turned(turn: Float[Tensor, "n m m"], x: Float[Tensor, "n m*d e"]) -> Float[Tensor, "n m*d e"]:
    return torch.bmm(turn, _flat(x, turn)).view_as(x)


def _flat(x: Float[Tensor, "n m*d e"], turn: Float[Tensor, "n m m"]) -> Float[Tensor, "n m d*e"]:
    return x.reshape(*turn.shape[:2], -1)


def _squares(h: Float[Tensor, "n b d"], error: Float[Tensor, "n b e"]) -> Float[Tensor, "n b 1"]:
    """Of each token, the square of the norm of h^T error."""
    return (_norm(h) * _norm(error)).square_()


def _norm(x: Float[Tensor, "n b d"]) -> Float[Tensor, "n b 1"]:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def _gradient(ctx: Any, dy: Tensor, grads: Sequence[Tensor]) -> list[Tensor]:
    until, *tensors = ctx.saved_tensors
    depth, parts, fields = ctx.depth, len(Chunks._fields), len(Layer._fields)
    chunks, anchor, kept = Chunks(*tensors[:parts]), tensors[parts : parts + depth], tensors[parts + depth :]
    d_states, d_final = [x.clone() for x in grads[:depth]], grads[depth:]
    d_anchor: list[Tensor] = []
    last, count = set(until.tolist()), len(dy)
    total = Chunks._make(torch.zeros_like(part, memory_format=torch.contiguous_format) for part in chunks)
    each = list(zip(chunks.each(), total.each(), dy, strict=True))
    for i in reversed(range(count)):
        if i + 1 == count or i + 1 in last:
            here = (until >= count if i + 1 == count else until == i + 1)[:, None, None].to(dy.dtype)
            for x, y in zip(_weights(d_states, anchor), d_final, strict=True):
                x.addcmul_(y, here)
        layers = [Layer(*kept[j : j + fields]) for j in range(fields * depth * i, fields * depth * (i + 1), fields)]
        begun = _weights([layer.state for layer in layers], anchor) if i else anchor
        c, d, d_out = each[i]
        d_states, d_anchor = _backward(c, layers, begun, d_out, d_states, d, ctx.clip)
        if i:
            for x, y in zip(_weights(d_states, anchor), d_anchor, strict=True):
                x.add_(y)
    if 0 in last:
        here = (until == 0)[:, None, None].to(dy.dtype)
        d_anchor = [x.addcmul(y, here) for x, y in zip(d_anchor, d_final, strict=True)]
    return [*total, *d_states, *d_anchor]


def _backward(
    c: Chunks, layers: list[Layer], anchor: Weights, dy: Tensor, d_after: list[Tensor], d: Chunks, clip: float | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the states before the chunk, and of the weights of its errors; those of the chunk go to `d`."""
    d_inputs, d_errors, d_states = [], [], []
    d_a = dy
    for at, grown in zip(reversed(layers), reversed(d_after), strict=True):
        d_out = d_a if at.out is None else torch.ops.aten.silu_backward(d_a, at.out)
        error = at.written
        d_scores = torch.bmm(d_out, error.mT)
        d_errors.append(torch.bmm((at.raw * c.mixing).mT, d_out).baddbmm_(_times(at.h, c.writes), grown))
        d_states.append(_turned(c.turn.mT, grown).baddbmm_(_times(at.a, c.reads).mT, d_out))
        d.turn.baddbmm_(_flat(grown, c.turn), _flat(at.state, c.turn).mT)
        d_a = _divided(torch.bmm(d_out, at.state.mT), at.a, c.reads, d.reads)
        d_h = _divided(torch.bmm(error, grown.mT), at.h, c.writes, d.writes)
        d.mixing.addcmul_(d_scores, at.raw)
        d_scores.mul_(c.mixing)
        d_a.baddbmm_(d_scores, at.h)
        d_inputs.append(d_h.baddbmm_(d_scores.mT, at.a))
    d.q.copy_(d_a)
    for found in (d_inputs, d_errors, d_states):
        found.reverse()
    if clip is not None and layers[0].scale is not None:
        _clipped(layers, layers[0].scale, d_inputs, d_errors, clip)
    return d_states, _errors(layers, anchor, d_inputs, d_errors, d)


def _divided(
    d: Float[Tensor, "n b m*d"], x: Float[Tensor, "n b d"], by: Float[Tensor, "n b m"], d_by: Float[Tensor, "n b m"]
) -> Float[Tensor, "n b d"]:
    """From the gradient of [x by] to that of x; that of `by` is added to `d_by`."""
    parts = d.unflatten(-1, (by.shape[-1], -1))
    d_by.add_((parts * x[:, :, None]).sum(-1))
    d_x = parts[:, :, 0] * by[..., :1]
    for i in range(1, by.shape[-1]):
        d_x.addcmul_(parts[:, :, i], by[..., i, None])
    return d_x


def _clipped(layers: list[Layer], scale: Tensor, d_inputs: list[Tensor], d_errors: list[Tensor], clip: float) -> None:
    """From the gradient of the clipped errors to that of the errors, in place."""
    d_scale = sum((d * layer.error).sum(-1, keepdim=True) for d, layer in zip(d_errors, layers, strict=True))
    shrink = torch.where(scale < 1, -d_scale * scale**3 / clip**2, 0)
    for layer, d_input, d_error in zip(layers, d_inputs, d_errors, strict=True):
        d_error.mul_(scale).addcmul_(layer.error, shrink * _norm(layer.h).square())
        d_input.addcmul_(layer.h, shrink * _norm(layer.error).square())


def _errors(
    layers: list[Layer], anchor: Weights, d_inputs: list[Tensor], d_errors: list[Tensor], d: Chunks
) -> list[Tensor]:
    """Through the errors, up, and through what the layers were given, down, to the weights they were taken at."""
    top = len(layers) - 1
    bends, d_anchor = [], [torch.empty(0)]
    for i, at in enumerate(layers[:top]):
        assert at.z is not None
        assert at.gate is not None
        assert at.slope is not None
        assert at.back is not None
        # silu'' = gate (1 - gate) (2 + z - 2 z gate)
        bend = torch.addcmul(at.gate, at.gate, at.gate, value=-1).mul_(torch.addcmul(2 + at.z, at.z, at.gate, value=-2))
        bends.append(bend.mul_(d_errors[i]).mul_(at.back))
        through = d_errors[i].mul_(at.slope)
        d_errors[i + 1].baddbmm_(through, anchor[i + 1])
        d_anchor.append(torch.bmm(through.mT, layers[i + 1].error))
    torch.mul(d_errors[top], 2, out=d.v)
    d_z = -d.v
    for i in range(top, 0, -1):
        d_anchor[i].baddbmm_(layers[i].h.mT, d_z)
        slope = layers[i - 1].slope
        assert slope is not None
        d_z = bends[i - 1].addcmul_(d_inputs[i].baddbmm_(d_z, anchor[i].mT), slope)
    d_anchor[0] = torch.bmm(layers[0].h.mT, d_z)
    torch.baddbmm(d_inputs[0], d_z, anchor[0].mT, out=d.k)
    return d_anchor
