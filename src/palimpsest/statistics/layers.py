"""How the gradients of single examples are read off each kind of layer, from what went in and what came back.

Linear layers, embeddings, convolutions and fused experts give the factors of their gradients; normalisations give the
gradients themselves. Whatever else holds weights runs with a copy of them for each example where they meet the data by
broadcasting (RMS norms, class tokens, tables of positions); else (routers) it is run again, vectorised over examples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils import _pytree as pytree
from transformers.pytorch_utils import Conv1D

from palimpsest.errors import PalimpsestError
from palimpsest.models.hooks import Call
from palimpsest.statistics.gradients import Dense, Outer, Piece, Routed, Rows


def _positions(x: Tensor, call: Call, examples: int) -> Float[Tensor, "batch positions features"]:
    """A layer's input or output gradient with the example first; rows of one example lie side by side."""
    if x.shape[0] == 1 and examples > 1:
        x = x.expand(examples, *x.shape[1:])
    if x.ndim < 2 or x.shape[0] % examples:
        raise PalimpsestError(
            f"{call.key} works on {x.shape[0]} rows for {examples} examples: it cannot be told which example each "
            "belongs to."
        )
    return widened(x).reshape(examples, -1, x.shape[-1])


def widened(x: Tensor) -> Tensor:
    """Float32 at least."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _linear(call: Call, examples: int) -> dict[str, Piece]:
    g, a = _positions(call.gradient, call, examples), _positions(call.input, call, examples)
    left, right = (a, g) if isinstance(call.module, Conv1D) else (g, a)
    return {"weight": Outer(left.unsqueeze(1), right.unsqueeze(1))} | _bias(call, g)


def _bias(call: Call, g: Float[Tensor, "batch positions features"]) -> dict[str, Piece]:
    return {} if call.module.bias is None else {"bias": Dense(g.sum(1))}


def _embedding(call: Call, examples: int) -> dict[str, Piece]:
    module: Any = call.module
    g = _positions(call.gradient, call, examples)
    if type(module).forward is not nn.Embedding.forward:
        g = g * module.embed_scale
    tokens = call.input.expand(call.gradient.shape[:-1]).reshape(examples, -1)
    if module.padding_idx is not None:
        g = g * (tokens != module.padding_idx)[..., None]
    return {"weight": Rows(tokens, g)}


def _convolution(call: Call, examples: int) -> dict[str, Piece]:
    module: Any = call.module
    x, g = widened(call.input), widened(call.gradient)
    kernel, stride, padding, dilation = (module.kernel_size, module.stride, module.padding, module.dilation)
    if g.ndim == 3:  # one dimension is two of which the first has length 1
        x, g = x[:, :, None], g[:, :, None]
        kernel, stride, padding, dilation = (1, *kernel), (1, *stride), (0, *padding), (1, *dilation)
    if len(g) % examples:
        raise PalimpsestError(f"{call.key} works on {len(g)} images for {examples} examples.")
    groups, (height, width) = module.groups, g.shape[2:]
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0])).unflatten(1, (groups, -1))
    image, group, channel, row, column = x.stride()
    patches = x.as_strided(  # the same numbers seen once for every place of the kernel; copied only once, below
        (len(x), groups, height, width, x.shape[2], *kernel),
        (image, group, row * stride[0], column * stride[1], channel, row * dilation[0], column * dilation[1]),
    )
    right = patches.reshape(examples, -1, groups, height * width, x.shape[2] * kernel[0] * kernel[1])
    left = g.reshape(examples, -1, groups, g.shape[1] // groups, height * width).mT
    left, right = (t[:, 0] if t.shape[1] == 1 else t.transpose(1, 2).flatten(2, 3) for t in (left, right))
    return {"weight": Outer(left, right)} | _bias(call, left.transpose(1, 2).flatten(2))


def _normalisation(call: Call, examples: int) -> dict[str, Piece]:
    """Layer normalisation over the last dimension, and batch normalisation with its running moments."""
    module: Any = call.module
    x, g = widened(call.input), widened(call.gradient)
    if isinstance(module, nn.LayerNorm):
        size = module.normalized_shape  # with weights, even of one and zero, torch takes half the time
        product = F.layer_norm(x, size, x.new_ones(size), x.new_zeros(size), module.eps).mul_(g)
        product, g = _positions(product, call, examples), _positions(g, call, examples)
        return {"weight": Dense(product.sum(1)), "bias": Dense(g.sum(1))}
    product = g * F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
    if len(g) % examples:
        raise PalimpsestError(f"{call.key} works on {len(g)} images for {examples} examples.")
    sums = [t.reshape(examples, -1, t.shape[1], t[0, 0].numel()).sum((1, 3)) for t in (product, g)]
    return {"weight": Dense(sums[0]), "bias": Dense(sums[1])}


def _experts(call: Call, examples: int) -> dict[str, Piece]:
    """Fused experts: what happens inside them is run again, each token in front of each of its experts."""
    module: Any = call.module
    given = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), call.args, strict=False)) | call.kwargs
    x, chosen, weights = (given[name] for name in ("hidden_states", "top_k_index", "top_k_weights"))
    expert, order = torch.sort(chosen.reshape(-1), stable=True)
    token = order // chosen.shape[-1]
    example = token // (len(x) // examples)
    count = torch.bincount(expert, minlength=module.num_experts).tolist()

    def product(rows: Tensor, name: str) -> Tensor:
        weight = getattr(module, name)
        weight = weight if module.is_transposed else weight.mT
        parts = rows.split(count)
        made = torch.cat([part @ weight[i] for i, part in enumerate(parts) if len(part)])
        return made + getattr(module, f"{name}_bias")[expert] if module.has_bias else made

    name = "gate_up_proj" if module.has_gate else "up_proj"
    with torch.enable_grad():
        inside = x.detach()[token]
        first = product(inside, name).detach().requires_grad_()
        middle = module._apply_gate(first) if module.has_gate else module.act_fn(first)
        last = product(middle, "down_proj")
        out = last * weights.detach().reshape(-1)[order, None]
        gradients = torch.autograd.grad(out, (first, last), call.gradient.reshape(x.shape)[token])
    pieces: dict[str, Piece] = {}
    for weight, a, g in ((name, inside, gradients[0]), ("down_proj", middle.detach(), gradients[1])):
        a, g = widened(a), widened(g)
        left, right = (a, g) if module.is_transposed else (g, a)
        pieces[weight] = Routed(left, right, example, expert)
        sums = g.new_zeros(examples * module.num_experts, g.shape[1])
        sums.index_add_(0, example * module.num_experts + expert, g)
        pieces[f"{weight}_bias"] = Dense(sums.view(examples, module.num_experts, -1))
    return pieces


def copied(weight: Float[Tensor, "*weight"], examples: int, dimensions: int) -> Float[Tensor, "batch ..."]:
    """A copy of the weight for each example, in front of data of so many dimensions; they share its memory."""
    shape = weight.shape[1:] if weight.shape[:1] == (1,) else weight.shape
    ones = [1] * (dimensions - 1 - len(shape))
    return weight.detach().view(1, *ones, *shape).expand(examples, *ones, *shape).requires_grad_()


def recomputed(call: Call, examples: int) -> dict[str, Piece]:
    """Any module: run again by itself with the examples as a vectorised dimension."""
    module = call.module
    weights = {name: weight.detach() for name, weight in module.named_parameters(recurse=False)}

    def shared(x: Any) -> bool:
        return not isinstance(x, Tensor) or x.ndim == 0 or x.shape[0] % examples > 0

    def apart(x: Tensor) -> Tensor:
        """The examples first, and what is left of each as a batch of one."""
        x = x.detach()
        return x[:, None] if x.shape[0] == examples else x.unflatten(0, (examples, -1))

    leaves, form = pytree.tree_flatten((call.args, call.kwargs))
    used = [place for place, gradient in enumerate(call.gradients) if gradient is not None]
    incoming = [gradient for gradient in call.gradients if gradient is not None]

    def one(given: list[Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
        def run(weights: dict[str, Tensor]) -> list[Tensor]:
            rest = iter(given)
            filled = [leaf if shared(leaf) else next(rest) for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(filled, form)
            made = pytree.tree_leaves(functional_call(module, weights, args, kwargs))
            floating = [x for x in made if isinstance(x, Tensor) and x.is_floating_point()]
            return [floating[place] for place in used]

        pull: Any = vjp(run, weights)[1]
        return pull(gradients)[0]

    if any(map(shared, incoming)):
        raise _unknown(call, "its outputs have no dimension of examples")
    try:
        found = vmap(one)([apart(leaf) for leaf in leaves if not shared(leaf)], [apart(g) for g in incoming])
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise _unknown(call, str(error).strip().splitlines()[0][:160]) from error
    return {name: Dense(widened(g)) for name, g in found.items()}


def _unknown(call: Call, why: str) -> PalimpsestError:
    return PalimpsestError(
        f"{call.key} ({type(call.module).__name__}) holds weights whose gradient cannot be told apart by example: "
        f"{why}."
    )


def reader(module: nn.Module) -> Callable[[Call, int], dict[str, Piece]]:
    """How the gradients of this module's own weights are read off."""
    forward = type(module).forward
    known: Any = module
    if isinstance(module, Conv1D) or (isinstance(module, nn.Linear) and forward is nn.Linear.forward):
        return _linear
    plain = forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    if isinstance(module, nn.Embedding) and plain and known.max_norm is None and not known.scale_grad_by_freq:
        return _embedding
    plain = isinstance(module, nn.Conv1d | nn.Conv2d) and known.padding_mode == "zeros"
    if plain and not isinstance(known.padding, str):
        return _convolution
    if forward is nn.LayerNorm.forward and len(known.normalized_shape) == 1:
        return _normalisation
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and known.track_running_stats:
        return _normalisation
    if hasattr(module, "_apply_gate") and hasattr(module, "is_transposed") and not known.has_post_expert_norm:
        return _experts
    return recomputed
