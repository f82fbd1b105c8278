"""Many token sequences as one row without padding, and every shared beginning computed once.

The sequences are merged into a trie: a token that several of them have in common, after the same tokens, is one node. A
node attends to its ancestors only and has its depth as its position, so each sequence is computed exactly as if it
stood alone. A chat template in front of every question, and a question in front of its seven candidate answers, are
paid for once. The row goes to the model with a 4-D mask, and logits are asked for only where a target is scored.

    tokens     [nodes]         one token a node, parents before children
    positions  [nodes]         depth
    mask       [nodes, nodes]  0 where column is an ancestor of row (or itself), else the lowest float
    at         [targets]       the node that predicts each scored target
    here       [targets]       the node of the target itself
    targets    [targets]       the token it should predict
    owner      [targets]       which of the given sequences the target belongs to

Models whose layers carry a state along the row (recurrent mixers) cannot take a mask; for them `pad` gives one row a
sequence, padded on the right, with the same three target arrays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.data.encoding import Encoded

Pack = Callable[[Sequence[Encoded]], "Packed"]


@dataclasses.dataclass(frozen=True)
class Packed:
    """Model inputs for some sequences, and where their targets are predicted."""

    tokens: Int[Tensor, "rows width"]
    positions: Int[Tensor, "rows width"]
    mask: Tensor
    row: Int[Tensor, " targets"]
    at: Int[Tensor, " targets"]
    here: Int[Tensor, " targets"]
    targets: Int[Tensor, " targets"]
    owner: Int[Tensor, " targets"]
    sequences: int
    starts: Int[Tensor, " sequences"] | None = None

    def to(self, device: torch.device | str) -> Packed:
        """The same on a device."""
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments for a transformers model."""
        return {
            "input_ids": self.tokens,
            "attention_mask": self.mask,
            "position_ids": self.positions,
            "use_cache": False,
        }

    def target_logits(self, network: Any, **keywords: Any) -> Float[Tensor, "targets vocabulary"]:
        """One forward pass; the float32 logits that predict each target, computed nowhere else in the row."""
        keep, place = torch.unique(self.at, return_inverse=True)
        if getattr(network, "reads_prompts", False):
            keywords["prompt_lengths"] = self.starts
        logits = network(**self.inputs(), logits_to_keep=keep, **keywords).logits
        return logits[self.row, place].float()

    def counts(self) -> Float[Tensor, " sequences"]:
        """How many targets each sequence has."""
        return torch.bincount(self.owner, minlength=self.sequences).to(torch.float32)

    def per_sequence(self, values: Float[Tensor, " targets"]) -> Float[Tensor, " sequences"]:
        """Sums of a number per target over the targets of each sequence."""
        return values.new_zeros(self.sequences).index_add(0, self.owner, values)


@dataclasses.dataclass(frozen=True)
class _Trie:
    """Distinct prefixes of some sequences: token and depth of each node, and the nodes of each sequence."""

    tokens: list[int]
    depth: list[int]
    paths: list[np.ndarray]


def _trie(sequences: Sequence[Encoded]) -> _Trie:
    trie = _Trie([], [], [])
    child: dict[tuple[int, int], int] = {}
    for sequence in sequences:
        node, path = -1, np.empty(len(sequence.tokens), dtype=np.int64)
        for position, token in enumerate(sequence.tokens):
            key = (node, token)
            if key not in child:
                child[key] = len(trie.tokens)
                trie.tokens.append(token)
                trie.depth.append(position)
            node = path[position] = child[key]
        trie.paths.append(path)
    return trie


def pack(sequences: Sequence[Encoded]) -> Packed:
    """The trie of the sequences as one row."""
    return _row(sequences, _trie(sequences))


def _row(sequences: Sequence[Encoded], trie: _Trie) -> Packed:
    width, paths = len(trie.tokens), trie.paths
    visible = np.zeros((width, width), dtype=bool)
    for path in paths:
        visible[path[:, None], path[None, :]] |= np.tri(len(path), dtype=bool)
    mask = torch.full((width, width), torch.finfo(torch.float32).min)
    mask[torch.from_numpy(visible)] = 0.0
    at = np.concatenate([path[s.start - 1 : -1] for s, path in zip(sequences, paths, strict=True)])
    here = np.concatenate([path[s.start :] for s, path in zip(sequences, paths, strict=True)])
    targets, owner = _targets(sequences)
    return Packed(
        tokens=torch.tensor([trie.tokens]),
        positions=torch.tensor([trie.depth]),
        mask=mask[None, None],
        row=torch.zeros(len(at), dtype=torch.long),
        at=torch.from_numpy(at),
        here=torch.from_numpy(here),
        targets=targets,
        owner=owner,
        sequences=len(sequences),
    )


def pad(sequences: Sequence[Encoded]) -> Packed:
    """One row a sequence, padded on the right with its own last token, which the mask hides."""
    width = max(len(sequence.tokens) for sequence in sequences)
    tokens = torch.tensor([[*s.tokens, *[s.tokens[-1]] * (width - len(s.tokens))] for s in sequences])
    lengths = torch.tensor([len(sequence.tokens) for sequence in sequences])
    targets, owner = _targets(sequences)
    at = np.concatenate([np.arange(s.start - 1, len(s.tokens) - 1) for s in sequences])
    return Packed(
        tokens=tokens,
        positions=torch.arange(width).expand(len(sequences), width),
        mask=(torch.arange(width) < lengths[:, None]).long(),
        row=owner,
        at=torch.from_numpy(at),
        here=torch.from_numpy(at + 1),
        targets=targets,
        owner=owner,
        sequences=len(sequences),
        starts=torch.tensor([sequence.start for sequence in sequences]),
    )


def _targets(sequences: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    targets = torch.tensor([token for sequence in sequences for token in sequence.targets])
    counts = torch.tensor([len(sequence.targets) for sequence in sequences])
    return targets, torch.arange(len(sequences)).repeat_interleave(counts)


def packer(network: Any) -> Pack:
    """`pack` or `pad`, whichever is cheaper, where the network computes packed sequences exactly as single ones.

    That is tried on two short ones; other networks always get `pad`, as do those that look at each prompt by itself.

    Layers that attend to a window only have it in a mask of their own, which ours would replace: sequences longer than
    the window are padded.
    """
    if getattr(network, "reads_prompts", False):
        return pad
    known = getattr(network, "_palimpsest_packs", None)
    if known is None:
        known = _packs_exactly(network)
        network._palimpsest_packs = known
    if not known:
        return pad
    window = window_of(network)
    linear, quadratic = _costs(network)

    def arrange(sequences: Sequence[Encoded]) -> Packed:
        longest = max(len(sequence.tokens) for sequence in sequences)
        if longest > window:
            return pad(sequences)
        trie = _trie(sequences)
        nodes, cells = len(trie.tokens), len(sequences) * longest
        # attention over one long row can cost more than the repeated and padded tokens, in small models above all
        if linear * nodes + quadratic * nodes**2 > linear * cells + quadratic * cells * longest:
            return pad(sequences)
        return _row(sequences, trie)

    return arrange


def _costs(network: Any) -> tuple[int, int]:
    """Multiply-adds a token outside attention, and a pair of tokens in attention at half the speed of a product."""
    config = network.config.get_text_config()
    inside = sum(p.numel() for p in network.parameters()) - network.get_input_embeddings().weight.numel()
    return inside, 4 * config.hidden_size * config.num_hidden_layers


def window_of(network: Any) -> float:
    """How far back, in tokens, the most short-sighted layer looks."""
    config = network.config.get_text_config()
    stated = (getattr(config, field, None) for field in ("sliding_window", "attention_chunk_size", "window_size"))
    return min((window for window in stated if window), default=math.inf)


@torch.no_grad()
def _packs_exactly(network: Any) -> bool:
    if any(b.ndim == 4 and b.dtype == torch.bool for b in network.buffers()):
        return False  # a mask of its own, by places in the row (GPT-Neo): short rows would agree, longer ones not
    size = network.config.get_text_config().vocab_size
    first = Encoded(tuple((7 * i + 1) % size for i in range(6)), 1)
    second = Encoded((*first.tokens[:3], *((5 * i + 2) % size for i in range(4))), 1)
    device = next(network.parameters()).device
    training = network.training
    network.eval()
    try:
        together = pack([first, second]).to(device).target_logits(network)
        apart = torch.cat([pad([s]).to(device).target_logits(network) for s in (first, second)])
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    finally:
        network.train(training)
    return bool(torch.allclose(together, apart, rtol=1e-3, atol=1e-3 * float(apart.abs().max().nan_to_num())))


def rows(sequences: Sequence[Encoded], budget: int) -> Iterator[list[int]]:
    """Positions of the sequences in groups of about `budget` distinct tokens, similar beginnings and lengths together.

    Sorting brings sequences with a common beginning side by side; a shared beginning is counted once.
    """
    order = sorted(
        range(len(sequences)), key=lambda i: (sequences[i].tokens[: sequences[i].start], len(sequences[i].tokens))
    )
    group: list[int] = []
    spent = 0
    previous: tuple[int, ...] = ()
    for i in order:
        tokens = sequences[i].tokens
        new = len(tokens) - _common(previous, tokens)
        if group and spent + new > budget:
            yield group
            group, spent, new = [], 0, len(tokens)
        group.append(i)
        spent += new
        previous = tokens
    if group:
        yield group


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def padding_waste(groups: Sequence[Sequence[Encoded]]) -> float:
    """Share of positions that hold padding when each group is padded to its longest sequence."""
    used = sum(len(s.tokens) for group in groups for s in group)
    held = sum(len(group) * max(len(s.tokens) for s in group) for group in groups)
    return 1 - used / held
