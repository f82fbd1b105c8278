"""Linear recurrences over a matrix-valued memory: the update rules, token by token and chunk by chunk.

    q, k      [.., d]     query and key of a token (rows)       v       [.., e]   its value
    M         [d, e]      memory                                beta    [..]      writing strength, 0 to 1
    log_decay [..]        logarithm of alpha, the share of the memory that is kept, at most 0

    linear        M_t = M_{t-1} + k_t^T v_t                              y_t = q_t M_t
    gated-linear  M_t = alpha_t M_{t-1} + k_t^T v_t
    delta         M_t = M_{t-1} + beta_t k_t^T (v_t - k_t M_{t-1})
    gated-delta   M_t = alpha_t M_{t-1} + beta_t k_t^T (v_t - k_t alpha_t M_{t-1})

All are one rule, M_t = alpha_t M_{t-1} + k_t^T u_t: u_t is the value itself, or what the memory gets wrong of it.
In a chunk that begins with M_0, with g_t the product of alpha up to t and D[t, s] = g_t / g_s for s <= t,

    U = (I + L)^-1 (beta V - beta g K M_0),    L[t, s] = beta_t D[t, s] k_t . k_s   for s < t
    Y = g Q M_0 + (Q K^T * D) U,               M_end = g_end M_0 + (D[end] K)^T U

so everything but two products a chunk is done for all chunks at once. D is the exponential of a difference, never a
quotient. A token with k = v = 0, beta = 0 and log_decay = 0 changes nothing: that is what padding is.

Sources: linear attention, Katharopoulos et al. 2020 (arXiv 2006.16236); the scalar decay, Dao and Gu 2024 (arXiv
2405.21060); the delta rule in chunks, Yang et al. 2024 (arXiv 2406.06484); both gates, Yang et al. 2024 (arXiv
2412.06464).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Rule = Literal["linear", "gated-linear", "delta", "gated-delta"]


class Inputs(NamedTuple):
    """What a memory is given for each token; `beta` None writes values as they are, `log_decay` None keeps all."""

    q: Float[Tensor, "n h t d"]
    k: Float[Tensor, "n h t d"]
    v: Float[Tensor, "n h t e"]
    beta: Float[Tensor, "n h t"] | None = None
    log_decay: Float[Tensor, "n h t"] | None = None


def naive_recurrence(
    x: Inputs, memory: Float[Tensor, "n h d e"]
) -> tuple[Float[Tensor, "n h t e"], Float[Tensor, "n h d e"]]:
    """The rule as it is written, one token after the other. The oracle of the chunk form."""
    out = []
    for t in range(x.q.shape[2]):
        q, k, v = x.q[:, :, t], x.k[:, :, t], x.v[:, :, t]
        if x.log_decay is not None:
            memory = x.log_decay[:, :, t, None, None].exp() * memory
        u = v if x.beta is None else x.beta[:, :, t, None] * (v - torch.einsum("nhd,nhde->nhe", k, memory))
        memory = memory + torch.einsum("nhd,nhe->nhde", k, u)
        out.append(torch.einsum("nhd,nhde->nhe", q, memory))
    return torch.stack(out, 2), memory


def chunk_recurrence(
    x: Inputs, memory: Float[Tensor, "n h d e"], chunk: int = 64
) -> tuple[Float[Tensor, "n h t e"], Float[Tensor, "n h d e"]]:
    """The same for whole sequences, `chunk` tokens at a time; memories are float32 or wider."""
    time = x.q.shape[2]
    chunk = min(chunk, time)
    fill = -time % chunk

    def cut(tensor: Any) -> Any:
        if tensor is None:
            return None
        padded = F.pad(tensor, (0, 0) * (tensor.ndim - 3) + (0, fill))
        return padded.unflatten(2, (-1, chunk)).movedim(2, 0).flatten(0, 1)

    rows, chunks = len(memory), (time + fill) // chunk
    order = torch.arange(rows, device=memory.device).repeat(chunks)
    out, memory = run_chunks(Inputs(*map(cut, x)), memory, order, [rows] * chunks)
    return out.unflatten(0, (chunks, rows)).movedim(0, 2).flatten(2, 3)[:, :, :time], memory


def run_chunks(
    x: Inputs, memories: Float[Tensor, "rows h d e"], row: Int[Tensor, " n"], steps: list[int]
) -> tuple[Float[Tensor, "n h c e"], Float[Tensor, "rows h d e"]]:
    """Outputs of chunks, and the memories after them. Chunk i belongs to memory `row[i]`.

    The chunks come in the order of time: the first `steps[0]` of them begin their memories, the next `steps[1]` come
    after these, and so on, each memory at most once a step.
    """
    with torch.autocast(memories.device.type, enabled=False):  # mixed precision would round what memories hold
        dtype = memories.dtype
        q, k, v = x.q.to(dtype), x.k.to(dtype), x.v.to(dtype)
        g, decay = _decays(x, dtype)
        if x.beta is not None:
            beta = x.beta.to(dtype)[..., None]
            wrong = (beta * decay * (k @ k.mT)).tril(-1)  # the triangular solver takes the unit diagonal as given
            right = torch.cat([beta * v, beta * g[..., None] * k], -1)
            solved = torch.linalg.solve_triangular(wrong, right, upper=False, unitriangular=True)
            v, reads = solved.split([v.shape[-1], k.shape[-1]], -1)
        else:
            reads = torch.zeros_like(k)
        into, end = decay[..., -1, :, None] * k, g[..., -1, None, None]
        begun, written = [], []
        for at, u, read, key, kept in zip(*(x.split(steps) for x in (row, v, reads, into, end)), strict=True):
            memory = memories[at]
            u = u if x.beta is None else u - read @ memory
            begun.append(memory)
            written.append(u)
            memories = memories.index_copy(0, at, kept * memory + key.mT @ u)
        out = g[..., None] * (q @ torch.cat(begun)) + ((q @ k.mT) * decay) @ torch.cat(written)
        return out.to(x.q.dtype), memories


def _decays(x: Inputs, dtype: torch.dtype) -> tuple[Float[Tensor, "n h c"], Float[Tensor, "n h c c"]]:
    """g and D of each chunk; D is zero above the diagonal."""
    c = x.q.shape[2]
    if x.log_decay is None:
        ones = torch.ones(c, c, dtype=dtype, device=x.q.device).tril()
        return ones.new_ones(*x.q.shape[:3]), ones.expand(*x.q.shape[:2], c, c)
    total = x.log_decay.to(dtype).cumsum(-1)
    above = torch.ones(c, c, dtype=torch.bool, device=total.device).triu(1)
    return total.exp(), (total[..., :, None] - total[..., None, :]).masked_fill(above, -torch.inf).exp()
