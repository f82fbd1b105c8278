"""Causal softmax attention with rotary positions: over everything before, or over a sliding window of it.

The mixer that remembers every token, and pays for it: without a window its state grows with time. With a window of w
tokens, token t sees t-w+1..t; the parallel form cuts time into blocks of w, each of which looks at itself and at the
block before it, so that the cost is linear in time. Persistent tokens are learned vectors in front of the sequence that
every token sees, whatever its distance (Titans, arXiv 2501.00663, section 3.3); they have no position.

    b, t, h, d    batch, time, heads, width of a head        x  [b, t, h d]   input
    q, k, v       [b, h, t, d]   projections of x            p  [P, h d]      persistent tokens
    y_t = sum_s softmax_s(q_t . k_s / sqrt d) v_s            over s in the window, and over p

Sources: Vaswani et al. 2017 (arXiv 1706.03762); rotary positions, Su et al. 2021 (arXiv 2104.09864), base 10,000.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from palimpsest.errors import PalimpsestError
from palimpsest.layers import State

BASE = 10_000.0


def rotate(x: Float[Tensor, "b h t d"], positions: Int[Tensor, "b t"]) -> Float[Tensor, "b h t d"]:
    """Turns each pair (x_i, x_{i + d/2}) by the angle position * BASE^(-2 i / d)."""
    half = x.shape[-1] // 2
    rates = BASE ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angles = positions[:, None, :, None] * rates
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1)


def naive_attention(
    q: Float[Tensor, "b h t d"], k: Float[Tensor, "b h t d"], v: Float[Tensor, "b h t d"], window: int | None = None
) -> Float[Tensor, "b h t d"]:
    """Token by token: each looks at its window with rotated queries and keys. The oracle of the block form."""
    batch, _, time, width = q.shape
    positions = torch.arange(time, device=q.device).expand(batch, time)
    q, k = rotate(q, positions), rotate(k, positions)
    out = []
    for t in range(time):
        seen = slice(0 if window is None else max(0, t - window + 1), t + 1)
        weights = (torch.einsum("bhd,bhsd->bhs", q[:, :, t], k[:, :, seen]) / width**0.5).softmax(-1)
        out.append(torch.einsum("bhs,bhsd->bhd", weights, v[:, :, seen]))
    return torch.stack(out, 2)


class Attention(nn.Module):
    """Multi-head causal attention as a token mixer; `window` None sees everything before.

    The state holds the rotated keys and the values of the tokens that can still be seen, each row's last one at the end
    (`keys`, `values` [b, h, n, d]), and how many tokens each row has had (`count` [b]).
    """

    def __init__(self, width: int, heads: int = 4, *, window: int | None = None, persistent: int = 0) -> None:
        super().__init__()
        if width % heads or (width // heads) % 2:
            raise PalimpsestError(f"width {width} does not give {heads} heads of even width.")
        if window is not None and window < 1:
            raise PalimpsestError(f"window is {window}, expected at least 1.")
        if persistent < 0:
            raise PalimpsestError(f"persistent is {persistent}, expected at least 0.")
        self.heads, self.window = heads, window
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.persistent = nn.Parameter(torch.randn(persistent, width) * 0.02) if persistent else None

    def start(self, batch: int) -> State:
        """No token seen; with a window, room for its keys and values."""
        weight = self.output.weight
        empty = weight.new_zeros(batch, self.heads, self.window or 0, weight.shape[0] // self.heads)
        return {"keys": empty, "values": empty.clone(), "count": torch.zeros(batch, dtype=torch.long).to(weight.device)}

    def step(self, hidden: Float[Tensor, "b w"], state: State) -> tuple[Float[Tensor, "b w"], State]:
        """One token after the state."""
        out, state = self(hidden[:, None], state)
        return out[:, 0], state

    def forward(
        self, hidden: Float[Tensor, "b t w"], state: State | None = None, mask: Bool[Tensor, "b t"] | None = None
    ) -> tuple[Float[Tensor, "b t w"], State]:
        """All tokens at once, after those of the state."""
        state = self.start(len(hidden)) if state is None else state
        q, k, v = self.projected(hidden)
        count, time = state["count"], hidden.shape[1]
        positions = count[:, None] + torch.arange(time, device=hidden.device)
        rotated, k = rotate(q, positions), rotate(k, positions)
        keys, values = torch.cat([state["keys"], k], 2), torch.cat([state["values"], v], 2)
        held = state["keys"].shape[2]
        real = torch.arange(held, device=hidden.device) >= held - count[:, None]
        if self.window is None or time == 1:
            seen = self._seen(held, time, real)
            out = self.attend(q, rotated, keys, values, seen)
        else:
            out = self._blocks(q, rotated, keys, values, real)
        length = torch.full_like(count, time) if mask is None else mask.sum(1)
        return self.output(out.transpose(1, 2).flatten(2)), self._after(keys, values, count + length, held + length)

    def projected(self, hidden: Float[Tensor, "b t w"]) -> tuple[Float[Tensor, "b h t d"], ...]:
        """Queries, keys and values of tokens, not rotated."""
        parts = self.query_key_value(hidden).unflatten(-1, (3, self.heads, -1))
        return tuple(parts.permute(2, 0, 3, 1, 4).unbind(0))

    def _seen(self, held: int, time: int, real: Bool[Tensor, "b held"]) -> Bool[Tensor, "b 1 t s"]:
        back = held + torch.arange(time, device=real.device)[:, None] - torch.arange(held + time, device=real.device)
        inside = (back >= 0) & (back < (self.window or back.numel() + 1))
        return (inside & F.pad(real, (0, time), value=True)[:, None])[:, None]

    def _blocks(self, q: Tensor, rotated: Tensor, keys: Tensor, values: Tensor, real: Tensor) -> Tensor:
        """Queries in blocks of the window; keys of a block: those of the block before, then its own."""
        assert self.window is not None
        window, time, batch = self.window, q.shape[2], q.shape[0]
        fill = -time % window
        q, rotated = (F.pad(x, (0, 0, 0, fill)).unflatten(2, (-1, window)) for x in (q, rotated))
        keys, values = (
            F.pad(x, (0, 0, 0, fill)).unfold(2, 2 * window, window).transpose(-1, -2) for x in (keys, values)
        )
        back = window + torch.arange(window, device=q.device)[:, None] - torch.arange(2 * window, device=q.device)
        inside = ((back >= 0) & (back < window)).expand(batch, 1, q.shape[2], window, 2 * window)
        first = inside[:, :, :1] & F.pad(real, (0, window), value=True)[:, None, None, None]
        seen = torch.cat([first, inside[:, :, 1:]], 2)
        return self.attend(q, rotated, keys, values, seen).flatten(2, 3)[:, :, :time]

    def attend(self, q: Tensor, rotated: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        """Softmax attention over what is seen and the persistent tokens, whose keys meet the unrotated queries."""
        scale = q.shape[-1] ** -0.5
        if self.persistent is None:
            return F.scaled_dot_product_attention(rotated, keys, values, attn_mask=seen, scale=scale)
        _, fixed, values_fixed = self.projected(self.persistent[None])
        blocks = (1,) * (q.ndim - 4)
        fixed, values_fixed = (
            x.reshape(1, self.heads, *blocks, *x.shape[2:]).expand(*q.shape[:-2], *x.shape[2:])
            for x in (fixed, values_fixed)
        )
        keys = torch.cat([F.pad(fixed, (q.shape[-1], 0)), F.pad(keys, (0, q.shape[-1]))], -2)
        values = torch.cat([values_fixed, values], -2)
        seen = F.pad(seen, (self.persistent.shape[0], 0), value=True)
        return F.scaled_dot_product_attention(torch.cat([rotated, q], -1), keys, values, attn_mask=seen, scale=scale)

    def _after(self, keys: Tensor, values: Tensor, count: Int[Tensor, " b"], ends: Int[Tensor, " b"]) -> State:
        """The last keys and values of each row, ending with its last real token."""
        size = int(count.max()) if self.window is None else self.window
        at = (ends[:, None] - size + torch.arange(size, device=count.device)).clamp(min=0)
        at = at[:, None, :, None].expand(-1, self.heads, -1, keys.shape[-1])
        return {"keys": keys.gather(2, at), "values": values.gather(2, at), "count": count}
