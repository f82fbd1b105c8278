"""One forward and one backward pass a batch, out of which the gradients of its examples are read.

A layer's input, and the gradient of the summed loss at its output, are split by example (see `layers`). Weights that
meet the data by broadcasting have a copy for each example in the pass itself, and its gradient is theirs.

Before the first batch the result is compared with plain gradients of single examples, and it is tried which modules
take copies of their weights.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from palimpsest.errors import PalimpsestError
from palimpsest.models.hooks import Call, watch
from palimpsest.statistics.examples import Examples, Minibatch, frozen, squared_logits
from palimpsest.statistics.gradients import Dense, Gradient, Piece
from palimpsest.statistics.layers import copied, reader, recomputed, widened

Receive = Callable[[Minibatch, Gradient], None]
Losses = Callable[[Minibatch], Float[Tensor, " batch"]]
Backward = Callable[[Minibatch, Losses], Float[Tensor, " batch"]]


class Passes:
    """Forward and backward passes through one network, and whose weights are read off where.

    `copies` are the modules that run with a copy of their weights for each example, and the dimensions of what they put
    out.
    """

    def __init__(self, network: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
        self.network, self.weights = network, weights
        names = {id(weight): name for name, weight in weights.items()}
        self.owned: dict[str, list[tuple[str, str]]] = {}
        self.modules: dict[str, nn.Module] = {}
        for key, module in network.named_modules():
            mine = [(n, names[id(w)]) for n, w in module.named_parameters(recurse=False) if id(w) in names]
            if mine:
                self.owned[key], self.modules[key] = mine, module
        self.readers = {key: reader(module) for key, module in self.modules.items()}
        self.copies: dict[str, int] = {}

    @contextmanager
    def together(self, receive: Receive) -> Iterator[Backward]:
        """One forward and backward pass a batch; every weight is handed on as soon as its last use is known."""
        uses: dict[str, int] = defaultdict(int)
        pieces: dict[str, list[Piece]] = defaultdict(list)
        batch: Minibatch

        def entered(call: Call, output: Any) -> Any:
            for _, name in self.owned[call.key]:
                uses[name] += 1
            # what all examples share (positions, say) is handed out to each, or their gradients would come back as one
            if isinstance(output, Tensor) and output.shape[0] == 1 and len(batch) > 1:
                return output.expand(len(batch), *output.shape[1:])
            return None

        def finish(name: str) -> None:
            receive(batch, Gradient(name, self.weights[name].shape, len(batch), pieces.pop(name)))

        def found(name: str, piece: Piece) -> None:
            pieces[name].append(piece)
            uses[name] -= 1
            if not uses[name]:
                finish(name)

        def returned(call: Call) -> None:
            made = self.readers[call.key](call, len(batch))
            for own, name in self.owned[call.key]:
                found(name, made[own])

        def arrived(name: str, copy: Tensor) -> None:
            assert copy.grad is not None
            found(name, Dense(widened(copy.grad).reshape(len(batch), *self.weights[name].shape)))
            copy.grad = None

        def copies() -> dict[str, Tensor]:
            made = {}
            for key, dimensions in self.copies.items():
                for own, name in self.owned[key]:
                    copy = copied(self.weights[name], len(batch), dimensions)
                    copy.register_post_accumulate_grad_hook(partial(arrived, name))
                    uses[name] += 1
                    made[".".join(filter(None, ("network", key, own)))] = copy
            return made

        def backward(given: Minibatch, of: Losses) -> Float[Tensor, " batch"]:
            nonlocal batch
            batch = given
            uses.clear()
            losses = _finite(functional_call(whole, copies(), (of, batch), tie_weights=False), batch)
            losses.sum().backward()
            for name in list(pieces):
                finish(name)
            return losses.detach()

        whole = _Whole(self.network)
        watched = {key: module for key, module in self.modules.items() if key not in self.copies}
        with frozen(self.network), watch(watched, forward=entered, backward=returned):
            yield backward

    @contextmanager
    def alone(self, receive: Receive) -> Iterator[Backward]:
        """The same for batches of one, by plain automatic differentiation."""

        def backward(batch: Minibatch, of: Losses) -> Float[Tensor, " batch"]:
            losses = _finite(of(batch), batch)
            found = torch.autograd.grad(losses.sum(), list(self.weights.values()), allow_unused=True)
            for (name, weight), gradient in zip(self.weights.items(), found, strict=True):
                if gradient is not None:
                    receive(batch, Gradient(name, weight.shape, 1, [Dense(widened(gradient)[None])]))
            return losses.detach()

        yield backward


class _Whole(nn.Module):
    """A network together with what is made of it, so that both run on other weights."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, of: Losses, batch: Minibatch) -> Float[Tensor, " batch"]:
        return of(batch)


def _finite(losses: Float[Tensor, " batch"], batch: Minibatch) -> Float[Tensor, " batch"]:
    bad = (~torch.isfinite(losses)).nonzero()[:, 0].tolist()
    if bad:
        raise PalimpsestError(f"the loss of record {int(batch.index[bad[0]]) + 1} is {float(losses[bad[0]].detach())}.")
    return losses


def obstacle(passes: Passes, examples: Examples) -> str:
    """Why gradients cannot be told apart by example here; empty where they can, and then `passes` knows its copies.

    The norms of up to three examples in one batch are compared with those of each alone. The loss is the squared
    logits, whose gradients do not vanish however well the model has learned.
    """
    network: Any = passes.network
    known = hashlib.sha256("|".join(passes.weights).encode()).hexdigest()
    if getattr(network, "_palimpsest_per_example", ("",))[0] == known:
        _, found, passes.copies = network._palimpsest_per_example
        return found
    places = [place for (place,) in examples.groups(1)]
    group = list(dict.fromkeys((places[0], places[len(places) // 2], places[-1])))
    # first, so that errors of the input itself are raised as such
    alone = [_norms(passes.alone, passes, examples.batch([place])) for place in group]
    batch = examples.batch(group)
    try:
        together = _norms(passes.together, passes, batch)
        found = _difference(passes.weights, together, {name: torch.cat([n[name] for n in alone]) for name in together})
    except (PalimpsestError, RuntimeError) as error:
        found = str(error).strip().splitlines()[0].rstrip(".") + "."
    else:
        if not found and len(group) > 1:
            passes.copies = _copies(passes, batch, together)
    if found or len(group) > 1:  # a single record cannot show that records meet
        network._palimpsest_per_example = (known, found, passes.copies)
    return found


def _norms(
    way: Callable[[Receive], AbstractContextManager[Backward]], passes: Passes, batch: Minibatch
) -> dict[str, Float[Tensor, " batch"]]:
    found = {name: torch.zeros(len(batch)) for name in passes.weights}

    def note(batch: Minibatch, gradient: Gradient) -> None:
        found[gradient.name] = gradient.squared_norms().clamp_min(0).sqrt().float().cpu()

    with way(note) as backward:
        backward(batch, lambda batch: batch.losses(passes.network, "mean", squared_logits))
    return found


def _difference(
    weights: Mapping[str, nn.Parameter],
    found: Mapping[str, Float[Tensor, " batch"]],
    expected: Mapping[str, Float[Tensor, " batch"]],
) -> str:
    floor = 1e-2 * torch.stack(list(expected.values())).norm(dim=0)
    for name, weight in weights.items():
        right = expected[name]
        wrong = int(((found[name] - right).abs() > _slack(weight) * torch.maximum(right, floor)).sum())
        if wrong >= min(2, len(right)):  # once may be a router that rounding has tipped over
            return f"the gradient of {name} in a batch is not that of single records."
    return ""


def _slack(weight: Tensor) -> float:
    """Loose, relative: bfloat16 rounds, and what is wrong here is wrong by far."""
    return 1e-1 if weight.dtype == torch.bfloat16 else 1e-2


def _copies(passes: Passes, batch: Minibatch, right: Mapping[str, Float[Tensor, " batch"]]) -> dict[str, int]:
    """The modules whose gradients are the same with copies, tried one class at a time. Zeros would tell nothing."""
    others = {key: module for key, module in passes.modules.items() if passes.readers[key] is recomputed}
    dimensions: dict[str, int] = {}

    def measure(call: Call, output: Any) -> None:
        if isinstance(output, Tensor):
            dimensions[call.key] = output.ndim

    with torch.no_grad(), watch(others, forward=measure):
        batch.visit(passes.network)
    kept: dict[str, int] = {}
    for kind in {type(module): None for module in others.values()}:
        passes.copies = {key: n for key, n in dimensions.items() if type(others[key]) is kind}
        try:
            found = _norms(passes.together, passes, batch)
        except (PalimpsestError, RuntimeError, ValueError, TypeError, IndexError, AssertionError):
            continue
        for key, n in passes.copies.items():
            names = [name for _, name in passes.owned[key]]
            same = all(torch.allclose(found[x], right[x], rtol=_slack(passes.weights[x]), atol=0) for x in names)
            if same and any(right[x].any() for x in names):
                kept[key] = n
    return kept
