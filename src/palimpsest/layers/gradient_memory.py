"""A memory whose state is a small network, trained by one gradient step a token: token by token and in chunks.

    q, k, v           [n, t, d]    queries, keys, values; n rows, each with a memory of its own
    M = W^1 .. W^L    [n, d, d']   weights of an MLP without biases, M(k) = silu(.. silu(k W^1) ..) W^L
    S                 like M       momentum
    alpha, eta, theta [n, t]       forgetting, decay of the momentum, step size

    u_t = gradient of |M_g(k_t) - v_t|^2 in the weights         summed over features, no half; M_g see below
    u_t <- u_t min(1, clip / |u_t|)                             where there is a `clip`: the norm is over all layers
    S_t = eta_t S_{t-1} - theta_t u_t
    M_t = (1 - alpha_t) M_{t-1} + S_t                           y_t = M_t(q_t)

All gradients in a chunk of b tokens are taken at M_g, the memory at its start (b = 1 is the exact online rule). The
effective step of a chunk is therefore about b theta / (1 - eta): where that exceeds 1 / |k|^2, repeated keys diverge.
Forgetting draws the weights to 0, and 0 is a fixed point of two layers and more: there no layer sends an error to the
other. A deep memory that forgets faster than it learns dies, and does not come back.

In a chunk that is entered with M_0 and S_0, with A[t, s] and E[t, s] the products of 1 - alpha and of eta over
s < r <= t, and B, H those over r <= t,

    M_t = B_t M_0 + f_t S_0 - sum_{i <= t} G[t, i] u_i          G = A E diag(theta),   f = A H
    S_t = H_t S_0 - sum_{i <= t} E[t, i] theta_i u_i

Every u_i is of rank one in each layer, minus input x error. So a layer that reads inputs a, and wrote the inputs h with
the errors D, gives  B a W_0 + f a S_0 + ((a h^T) * G) D, and no weights of single tokens are ever made.

A token that is not real changes nothing: alpha = 0, eta = 1, theta = 0, and S is not added to M.

Source: Behrouz et al. 2024 (arXiv 2501.00663), eq. 8-18; the closed form for deep memories is worked out here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from palimpsest.errors import PalimpsestError
from palimpsest.finite import is_finite
from palimpsest.layers.gradient_memory_scan import Chunks, Scan, walk

Weights = Sequence[Float[Tensor, "n d e"]]


class Inputs(NamedTuple):
    """What a memory is given for each token; `forget` None forgets nothing, `momentum` None carries nothing over."""

    q: Float[Tensor, "n t d"]
    k: Float[Tensor, "n t d"]
    v: Float[Tensor, "n t e"]
    step: Float[Tensor, "n t"]
    forget: Float[Tensor, "n t"] | None = None
    momentum: Float[Tensor, "n t"] | None = None


class Memory(NamedTuple):
    """The state: weights, their momentum (none without it), weights at the start of the chunk, place in the chunk."""

    weights: Weights
    momentum: Weights
    anchor: Weights
    position: Int[Tensor, " n"]


def fresh(weights: Weights, momentum: bool = True) -> Memory:
    """The memory before its first token."""
    zeros = [torch.zeros_like(w) for w in weights] if momentum else []
    return Memory(weights, zeros, weights, torch.zeros(len(weights[0]), dtype=torch.long, device=weights[0].device))


def recall(weights: Weights, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t e"]:
    """M(x), nothing written."""
    for w in weights[:-1]:
        x = F.silu(x @ w)
    return x @ weights[-1]


def naive_memory(
    x: Inputs, memory: Memory, chunk: int, real: Bool[Tensor, "n t"] | None = None, clip: float | None = None
) -> tuple[Float[Tensor, "n t e"], Memory]:
    """The rule as it is written, one token after the other, gradients by autograd. The oracle of the chunk form."""
    check(x, memory, chunk, clip)

    def loss(weights: Weights, k: Tensor, v: Tensor) -> Tensor:
        return (recall([w[None] for w in weights], k[None, None])[0, 0] - v).square().sum()

    gradient = torch.func.vmap(torch.func.grad(loss))
    weights, anchor, position = list(memory.weights), list(memory.anchor), memory.position
    real = torch.ones_like(x.step, dtype=torch.bool) if real is None else real
    none = torch.zeros_like(x.step)
    forget, eta = (none if gate is None else gate for gate in (x.forget, x.momentum))
    carried = list(memory.momentum) or [torch.zeros_like(w) for w in weights]
    out = []
    for t in range(x.step.shape[1]):
        u = gradient(anchor, x.k[:, t], x.v[:, t])
        if clip is not None:
            squares = torch.stack([g.square().sum((1, 2)) for g in u]).sum(0)
            u = [g * (clip / squares.clamp(min=clip**2).sqrt())[:, None, None] for g in u]
        alpha, e, theta, written = (gate[:, t, None, None] for gate in (forget, eta, x.step, real))
        carried = [torch.where(written, e * s - theta * g, s) for s, g in zip(carried, u, strict=True)]
        weights = [torch.where(written, (1 - alpha) * w + s, w) for w, s in zip(weights, carried, strict=True)]
        position = (position + real[:, t]) % chunk
        begun = (position == 0)[:, None, None]
        anchor = [torch.where(begun, w, old) for w, old in zip(weights, anchor, strict=True)]
        out.append(recall(weights, x.q[:, t, None]))
    return torch.cat(out, 1), Memory(weights, carried if memory.momentum else [], anchor, position)


def chunk_memory(
    x: Inputs, memory: Memory, chunk: int, real: Bool[Tensor, "n t"] | None = None, clip: float | None = None
) -> tuple[Float[Tensor, "n t e"], Memory]:
    """The same, a chunk at a time, from any position in a chunk; all that does not need the memory comes first.

    Tokens that are not real stand after the real ones of their row; what is read there means nothing. Float32 or
    wider; automatic mixed precision is off inside. Raises where a gate is outside [0, 1], where shapes do not fit, and,
    with the number of the chunk, where the memory stops being finite. Gradients of first order only.
    """
    check(x, memory, chunk, clip)
    with torch.autocast(x.q.device.type, enabled=False):
        plan = _planned(x, memory, chunk, real)
        depth, tensors = len(memory.weights), (*plan.chunks, *_states(memory), *plan.begun)
        keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        y, *after = Scan.apply(keep, plan.until, depth, clip, *tensors)
        states, anchor = after[:depth], after[depth:]
        if not all(is_finite(state.detach()) for state in states):
            raise PalimpsestError(_broken(plan, memory, x, clip))
        parts = [state.split(w.shape[1], 1) for state, w in zip(states, anchor, strict=True)]
        weights, momentum = [part[0] for part in parts], [s for part in parts for s in part[1:]]
        return plan.back(y), Memory(weights, momentum, anchor, plan.position)


@torch.no_grad()
def surprises(
    x: Inputs, memory: Memory, chunk: int, real: Bool[Tensor, "n t"] | None = None, clip: float | None = None
) -> Float[Tensor, "n t"]:
    """|u_t|, the norm of each token's gradient over all layers, before it is clipped."""
    check(x, memory, chunk, clip)
    plan = _planned(x, memory, chunk, real)
    norms = []
    for _, _, layers in walk(plan.chunks, _states(memory), plan.begun, clip):
        squares = [layer.h.square().sum(-1) * layer.error.square().sum(-1) for layer in layers]
        norms.append(torch.stack(squares).sum(0).sqrt())
    return plan.back(torch.stack(norms)[..., None])[..., 0]


def _states(memory: Memory) -> Weights:
    """Of every layer the weights, and their momentum below them."""
    if not memory.momentum:
        return memory.weights
    return [torch.cat(pair, 1) for pair in zip(memory.weights, memory.momentum, strict=True)]


class _Plan(NamedTuple):
    """A call cut into chunks."""

    chunks: Chunks
    begun: Weights  # what the first chunk's gradients are taken at
    until: Int[Tensor, " n"]  # chunk in which the next token of each row will stand
    position: Int[Tensor, " n"]  # and its place there
    shift: Int[Tensor, " n"] | None  # places by which rows were moved
    time: int

    def back(self, y: Float[Tensor, "c n b e"]) -> Float[Tensor, "n t e"]:
        """The chunks as rows, each token where it came from."""
        y = y.transpose(0, 1).flatten(1, 2)
        if self.shift is None:
            return y[:, : self.time]
        at = torch.arange(self.time, device=y.device) + self.shift[:, None]
        return y.gather(1, at[..., None].expand(-1, -1, y.shape[-1]))


def _planned(x: Inputs, memory: Memory, chunk: int, real: Bool[Tensor, "n t"] | None) -> _Plan:
    time, position = x.step.shape[1], memory.position
    lengths = torch.full_like(position, time) if real is None else real.sum(1)
    latest, shift = int(position.max()), None
    if latest + time <= chunk:  # all in the chunk that earlier calls may have begun
        size = time
    else:
        size, fill = chunk, -(latest + time) % chunk
        shift = position if latest else None
        x = Inputs(*(None if part is None else _aligned(part, shift, latest, fill) for part in x))  # type: ignore[arg-type]
        if real is not None or fill or latest:
            place = torch.arange(latest + time + fill, device=position.device)
            real = (place >= position[:, None]) & (place < (position + lengths)[:, None])
    begun = memory.anchor if latest else memory.weights
    total = position + lengths
    return _Plan(chunks_of(x, size, real), begun, total // chunk, total % chunk, shift, time)


def _aligned(part: Tensor, shift: Int[Tensor, " n"] | None, latest: int, fill: int) -> Tensor:
    """The tensor with each row moved to its place in its chunk, and filled up to whole chunks."""
    widths = (0, 0) * (part.ndim - 2)
    if shift is None:
        return F.pad(part, (*widths, 0, fill))
    if bool((shift == latest).all()):
        return F.pad(part, (*widths, latest, fill))
    at = (torch.arange(latest + part.shape[1] + fill, device=part.device) - shift[:, None]).clamp(0, part.shape[1] - 1)
    return part.gather(1, at if part.ndim == 2 else at[..., None].expand(-1, -1, part.shape[-1]))


def chunks_of(x: Inputs, size: int, real: Bool[Tensor, "n t"] | None) -> Chunks:
    """The inputs cut into chunks, and every coefficient, for all of them at once."""

    def cut(part: Tensor) -> Tensor:
        return part.unflatten(1, (-1, size)).transpose(0, 1)

    theta, keep, eta = x.step, torch.ones_like(x.step) if x.forget is None else 1 - x.forget, x.momentum
    if real is not None:
        theta = theta * real
        keep = torch.where(real, keep, 1)
        eta = None if eta is None else torch.where(real, eta, 1)
    q, k, v, theta, keep = map(cut, (x.q, x.k, x.v, theta, keep))
    later = products(keep)
    kept = later[..., 0] * keep[..., :1]
    if real is not None:
        later = later * cut(real)[..., None, :]
    if eta is None:
        mixing = later * theta[..., None, :]
        return Chunks(q, k, v, mixing, kept[..., None], mixing[..., -1, :, None], kept[..., -1, None, None])
    eta = cut(eta)
    decayed = products(eta)
    left = decayed[..., 0] * eta[..., :1]
    mixing = (later @ decayed) * theta[..., None, :]
    carried = (later @ left[..., None])[..., 0]
    reads = torch.stack([kept, carried], -1)
    writes = torch.stack([mixing[..., -1, :], decayed[..., -1, :] * theta], -1)
    below = torch.stack([torch.zeros_like(left[..., -1]), left[..., -1]], -1)
    return Chunks(q, k, v, mixing, reads, writes, torch.stack([reads[..., -1, :], below], -2))


def products(x: Float[Tensor, "*n t"]) -> Float[Tensor, "*n t t"]:
    """The product of x, from 0 to 1, over s < r <= t at [t, s], zero above the diagonal; exact where some x are 0.

    What is far below the resolution of numbers around 1 is 0 as well: denormal numbers are slow.
    """
    return _Products.apply(x)


class _Products(torch.autograd.Function):
    """With P[t, s] = P[t, r] x_r P[r - 1, s] the gradient needs no quotients, which a factor of 0 would not have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        time = x.shape[-1]
        below = torch.ones(time, time, dtype=torch.bool, device=x.device).tril(-1)
        found = F.threshold(torch.where(below, x[..., None], 1).cumprod(-2).tril_(), torch.finfo(x.dtype).eps ** 2, 0)
        ctx.save_for_backward(found)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (found,) = ctx.saved_tensors
        before = grad @ found.mT  # at [t, r - 1], what all s < r bring
        return F.pad((found[..., 1:] * before[..., :-1]).sum(-2), (1, 0))


def check(x: Inputs, memory: Memory, chunk: int, clip: float | None = None) -> None:
    """Raises where the inputs, the memory and the chunk do not fit together."""
    if chunk < 1:
        raise PalimpsestError(f"chunk is {chunk}, expected at least 1.")
    if clip is not None and not clip > 0:
        raise PalimpsestError(f"clip is {clip}, expected above 0.")
    rows, time, width = x.k.shape
    if not time:
        raise PalimpsestError("there are no tokens to read.")
    if len(memory.position) != rows:
        raise PalimpsestError(f"the memory has {len(memory.position)} rows, but the tokens have {rows}.")
    for layer, w in enumerate(memory.weights):
        if w.shape[1] != width:
            raise PalimpsestError(f"layer {layer} of the memory takes width {w.shape[1]}, but is given {width}.")
        width = w.shape[2]
    if width != x.v.shape[-1]:
        raise PalimpsestError(f"the memory's output has width {width}, but the values have {x.v.shape[-1]}.")
    if (x.momentum is None) != (not memory.momentum):
        raise PalimpsestError("a memory with momentum needs momentum gates, and one without takes none.")
    for name, gate, most in (("forget", x.forget, 1.0), ("momentum", x.momentum, 1.0), ("step", x.step, float("inf"))):
        if gate is None:
            continue
        low, high = map(float, gate.detach().aminmax())
        if math.isnan(low):
            raise PalimpsestError(f"the gate {name} is not a number: the input or the layer's weights are not finite.")
        if not 0 <= low <= high <= most:
            raise PalimpsestError(f"the gate {name} is {low:g} to {high:g}, expected 0 to {most:g}.")


@torch.no_grad()
def _broken(plan: _Plan, memory: Memory, x: Inputs, clip: float | None) -> str:
    """Says in which chunk the memory stopped being finite."""
    steps = walk(plan.chunks, _states(memory), plan.begun, clip)
    finite = [all(is_finite(state) for state in states) for _, states, _ in steps]
    bad = finite.index(False)
    size = plan.chunks.k.shape[2]
    return (
        f"the memory is not finite after chunk {bad} (of {len(plan.chunks.k)}, {size} tokens each). A step of a chunk "
        f"is about chunk * theta / (1 - eta) = {size * float(x.step.max()):.3g} / (1 - eta): lower theta_max or chunk."
    )
