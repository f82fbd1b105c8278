"""Networks of another depth: a deeper one that computes exactly what it did, a shallower one of the first blocks.

To go deeper, blocks are copied. A copy stands directly after its block, with what its attention and its MLP give out
set to zero, so that a residual block adds nothing and its output is its input, bit for bit. Training then uses the room
without having lost anything.

Sources: function-preserving expansion of depth, Wu et al. 2024 (LLaMA-Pro, arXiv 2401.02415), Zhang et al. 2025 (ADEPT,
arXiv 2510.10071).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from palimpsest.errors import PalimpsestError
from palimpsest.models.anatomy import Part, anatomy
from palimpsest.models.mixture import foundation
from palimpsest.models.model import Model
from palimpsest.statistics.examples import evaluating

NO_BLOCKS = ("token_id", "token_ids", "architectures", "mlp_only_layers")
"""How fields of a config end whose lists do not have an entry a block, though they may be as long."""


@torch.no_grad()
def expand(network: Any, layers: Sequence[int]) -> list[str]:
    """Puts a copy that does nothing after each of these blocks, in place; the names of the copies, in order.

    Raises where a block is named twice or is not there, where a block does not have one attention output and MLP
    outputs to silence, and where the deeper network does not compute the same (its blocks are not plain residuals).
    """
    blocks = anatomy(network).blocks()
    chosen = [layer + len(blocks) if layer < 0 else layer for layer in layers]
    if len(set(chosen)) < len(chosen):
        raise PalimpsestError(f"a block is named twice in {list(layers)}.")
    if outside := [layer for layer in chosen if not 0 <= layer < len(blocks)]:
        raise PalimpsestError(f"there is no block {outside[0]}: {type(network).__name__} has {len(blocks)}.")
    if not chosen:
        return []
    parent = blocks[0].path.rpartition(".")[0]
    container = network.get_submodule(parent)
    if not isinstance(container, nn.ModuleList) or len(container) != len(blocks):
        raise PalimpsestError(f"the blocks of {type(network).__name__} are not in one list: they cannot be copied.")
    expected = _logits(network)
    deeper = [(block, i) for i, given in enumerate(container) for block in _with_copy(given, i in chosen)]
    copies = [place for place, (_, i) in enumerate(deeper) if place and deeper[place - 1][1] == i]
    _restack(network, parent, deeper)
    _silence(network, copies)
    if not torch.equal(_logits(network), expected):
        raise PalimpsestError(
            f"copies that begin as nothing change what {type(network).__name__} computes: its blocks are not plain "
            "residual blocks."
        )
    return [f"{parent}.{place}" for place in copies]


def _logits(network: Any) -> torch.Tensor:
    """What the network says to a few tokens."""
    size = network.config.get_text_config().vocab_size
    tokens = torch.arange(1, 9, device=next(network.parameters()).device)[None] % size
    with evaluating(network):
        return network(input_ids=tokens, use_cache=False).logits


def first_blocks(model: Model, layers: int) -> Model:
    """A model of its own: embedding, the first blocks, final norm and head of the given one, and its tokenizer."""
    network = foundation(model.network)
    blocks = anatomy(network).blocks()
    if not 1 <= layers <= len(blocks):
        raise PalimpsestError(f"layers is {layers}, but {type(network).__name__} has {len(blocks)} blocks.")
    dropped = [block.module for block in blocks[layers:]]
    short = copy.deepcopy(network, {id(block): block for block in dropped})  # these are cut off, so never copied
    stack = blocks[0].path.rpartition(".")[0]
    _restack(short, stack, [(block, i) for i, block in enumerate(short.get_submodule(stack)) if i < layers])
    return Model(short, model.processor)


def _with_copy(block: nn.Module, copied: bool) -> list[nn.Module]:
    return [block, copy.deepcopy(block)] if copied else [block]


def _restack(network: Any, stack: str, blocks: Sequence[tuple[nn.Module, int]]) -> None:
    """Puts these blocks into the stack, each with the number of the old block that it was or is a copy of.

    Config and blocks learn how many there are; of lists with an entry a block, a copy has the entry of its block.
    """
    holder, _, name = stack.rpartition(".")
    before = len(network.get_submodule(stack))
    setattr(network.get_submodule(holder), name, nn.ModuleList(block for block, _ in blocks))
    config = network.config.get_text_config()
    for field, value in vars(config).copy().items():
        if isinstance(value, list) and len(value) == before and not field.endswith(NO_BLOCKS):
            setattr(config, field, [value[i] for _, i in blocks])
    config.num_hidden_layers = len(blocks)
    for place, (block, _) in enumerate(blocks):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = place  # type: ignore[assignment]
    _check_config(network)


def _check_config(network: Any) -> None:
    """Raises where the config does not describe the network: saved, it could not be loaded again."""
    with torch.device("meta"):
        described = type(network)(copy.deepcopy(network.config)).state_dict()
    shapes = {name: weight.shape for name, weight in network.state_dict().items()}
    if shapes != {name: weight.shape for name, weight in described.items()}:
        raise PalimpsestError(
            f"the blocks of {type(network).__name__} differ in kind by their number, which its config cannot say of "
            "another depth."
        )


def _silence(network: Any, copies: Sequence[int]) -> None:
    """Sets what the copies' attention and MLP give out to zero."""
    parts = anatomy(network)
    for place in copies:
        for role, most in (("attention_output", 1), ("mlp_down", None)):
            found = [part for part in parts.find(role) if part.layer == place]
            if not found or (most is not None and len(found) > most):
                raise PalimpsestError(
                    f"block {place} of {type(network).__name__} has {len(found)} parts of the role {role}, expected "
                    f"{'one' if most else 'at least one'}."
                )
            for part in found:
                for tensor in _outputs(part):
                    tensor.zero_()


def _outputs(part: Part) -> list[torch.Tensor]:
    """The weights of a part, and its bias, which would come out of a silenced layer, too."""
    bias = getattr(part.module, "bias", None) if part.expert is None else None
    extra = [bias] if isinstance(bias, torch.Tensor) else []
    return [*part.tensors().values(), *extra]
