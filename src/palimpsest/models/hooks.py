"""Looking into a network: its modules under their own names, and what goes in, out and back while it runs.

Forward hooks are sure to be removed; the wrappers of peft do not show in the names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils import _pytree as pytree
from transformers.pytorch_utils import Conv1D

from palimpsest.errors import PalimpsestError

# transformers 5 leaves its own recording hooks on the modules for good once hidden states were asked for.
_NOT_OURS = ("transformers.", "accelerate.", "peft.", "torch.")
_MODULE_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
)
INPUT = ":input"
"""At the end of a key of `capture`: the first input of the module is meant, not its output."""
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


@contextmanager
def capture(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """A dictionary that holds, after every forward inside, each module's last output under the module's key.

    Of a tuple or a transformers output it is the first element; under a key that ends with `:input` it is the first
    tensor that the module was given. Tensors are not detached. The hooks are removed at the end of the block, also
    after an error; the dictionary stays.
    """
    outputs: dict[str, Tensor] = {}

    def recorder(key: str) -> Any:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if key.endswith(INPUT):
                outputs[key] = Call(key, module, args, kwargs).input
            else:
                outputs[key] = output if isinstance(output, Tensor) else output[0]

        return record

    with ExitStack() as stack:
        for key, module in modules.items():
            stack.enter_context(module.register_forward_hook(recorder(key), with_kwargs=True))
        yield outputs


@dataclass(eq=False)
class Call:
    """One run of a watched module: what it was given and, once they are known, the gradients of its outputs.

    `gradients` follow the order of the floating-point tensors in the output; None where one was not used.
    """

    key: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    gradients: tuple[Tensor | None, ...] = ()
    versions: tuple[tuple[Tensor, int], ...] = field(default=(), repr=False)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that the module was given."""
        given = (*self.args, *self.kwargs.values())
        # most are tensors as they stand, and walking through a tree takes as long as a small layer
        leaves = (x for value in given for x in ((value,) if isinstance(value, Tensor) else pytree.tree_leaves(value)))
        return [x for x in leaves if isinstance(x, Tensor)]

    @property
    def input(self) -> Tensor:
        """The first tensor that the module was given."""
        return self.tensors[0]

    @property
    def gradient(self) -> Tensor:
        """The gradient of the first output that was used."""
        return next(gradient for gradient in self.gradients if gradient is not None)


Forward = Callable[[Call, Any], Any]
Backward = Callable[[Call], None]


@contextmanager
def watch(
    modules: Mapping[str, nn.Module], *, forward: Forward | None = None, backward: Backward | None = None
) -> Iterator[None]:
    """Hands every run of the modules to `forward(call, output)` as it ends, and to `backward(call)` on the way back.

    What `forward` returns, unless None, takes the output's place. `backward` comes as soon as the gradients of the
    outputs are known, and the call is emptied after it: nothing is held longer than the backward pass needs it. Where
    no gradient would reach a module, the graph begins at its outputs, so frozen networks can be watched, and nothing is
    computed below the lowest watched module. Modules that a callback runs are not handed on. The hooks are removed at
    the end of the block, also after an error.
    """
    busy = False

    def alone(act: Callable[..., Any], *given: Any) -> Any:
        nonlocal busy
        busy = True
        try:
            return act(*given)
        finally:
            busy = False

    def recorder(key: str) -> Any:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if busy:
                return None
            call = Call(key, module, args, kwargs)
            changed = alone(forward, call, output) if forward is not None else None
            output = output if changed is None else changed
            if backward is not None and torch.is_grad_enabled():
                return _follow(call, output, lambda call: alone(backward, call))
            return changed

        return record

    with ExitStack() as stack:
        for key, module in modules.items():
            stack.enter_context(module.register_forward_hook(recorder(key), with_kwargs=True))
        yield


def _follow(call: Call, output: Any, receive: Backward) -> Any:
    """The output, whose gradients will have the call handed on."""
    if isinstance(output, Tensor):
        results = [output] if output.is_floating_point() else []
    else:
        leaves, form = pytree.tree_flatten(output)
        if sum(map(_floating, leaves)) > 1:
            # one of them may be made from another: what comes back at a view is from outside the module alone
            leaves = [x.view_as(x) if _floating(x) else x for x in leaves]
            output = pytree.tree_unflatten(leaves, form)
        results = [x for x in leaves if _floating(x)]
    for result in results:
        if not result.requires_grad:
            result.requires_grad_()
    call.versions = tuple((x, x._version) for x in call.tensors if not x.is_inference())

    def arrived(gradients: Any) -> None:
        if any(x._version != version for x, version in call.versions):
            raise PalimpsestError(
                f"{call.key}: the network overwrites what it gave to this module, so its gradient cannot be formed."
            )
        call.gradients = tuple(gradients)
        try:
            receive(call)
        finally:
            call.args, call.kwargs, call.gradients, call.versions = (), {}, (), ()

    if len(results) == 1:  # lighter than the hook for several, and without its reference cycle
        results[0].register_hook(lambda gradient: arrived((gradient,)))
    elif results:
        register_multi_grad_hook(results, arrived)
    return output


def _floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def no_hooks_left(network: nn.Module) -> bool:
    """Whether no module and no parameter carries a hook, apart from those of transformers, accelerate and peft."""
    places: list[tuple[Any, str]] = [(module, name) for module in network.modules() for name in _MODULE_HOOKS]
    places += [(parameter, name) for parameter in network.parameters() for name in _TENSOR_HOOKS]
    hooks = [hook for place, name in places for hook in (getattr(place, name, None) or {}).values()]
    return all(_origin(hook).startswith(_NOT_OURS) for hook in hooks)


def _origin(hook: Any) -> str:
    hook = getattr(hook, "func", hook)
    return getattr(hook, "__module__", None) or type(hook).__module__


@dataclass(frozen=True)
class Place:
    """A module under its bare name. `core` is the module itself, or the original inside a wrapper of peft."""

    name: str
    path: str
    module: nn.Module
    core: nn.Module
    core_path: str

    @property
    def kinds(self) -> list[str]:
        """Which of linear, convolution and norm the module is, if any."""
        classes = {"linear": (nn.Linear, Conv1D), "convolution": (nn.Conv1d, nn.Conv2d, nn.Conv3d)}
        found = [kind for kind, known in classes.items() if isinstance(self.core, known)]
        is_norm = "norm" in type(self.core).__name__.lower() and not list(self.core.children())
        return [*found, "norm"] if is_norm else found

    @property
    def features(self) -> tuple[int, int]:
        """Sizes in and out of a linear module; Conv1D of transformers keeps its weight the other way round."""
        rows, columns = self.core.get_parameter("weight").shape
        return (rows, columns) if isinstance(self.core, Conv1D) else (columns, rows)


def places(network: Any) -> dict[str, Place]:
    """The modules of a network by bare name, in order; the network itself has the empty name."""
    bare, prefix = network, ""
    if type(network).__module__.startswith("peft."):
        bare = network.get_base_model()
        prefix = next(name for name, module in network.named_modules() if module is bare)
    return {place.name: place for place in _walk(bare, "", prefix)}


def _walk(module: Any, name: str, path: str) -> Iterator[Place]:
    core, core_path = module, path
    if isinstance(getattr(module, "base_layer", None), nn.Module):
        core, core_path = module.base_layer, f"{path}.base_layer"
    elif isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict):
        key, core = next(iter(module.modules_to_save.items()))
        core_path = f"{path}.modules_to_save.{key}"
    yield Place(name, path, module, core, core_path)
    for child, inner in core.named_children():
        if child == "parametrizations":  # how torch makes a weight out of others; no place in the network
            continue
        yield from _walk(inner, f"{name}.{child}".lstrip("."), f"{core_path}.{child}".lstrip("."))
