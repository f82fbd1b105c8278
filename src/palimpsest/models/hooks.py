"""Looking into a network: its modules under their own names, and their outputs while it runs.

Forward hooks are sure to be removed; the wrappers of peft do not show in the names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

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
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


@contextmanager
def capture(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """A dictionary that holds, after every forward inside, each module's last output under the module's key.

    Of a tuple or a transformers output it is the first element; tensors are not detached. The hooks are removed at
    the end of the block, also after an error; the dictionary stays.
    """
    outputs: dict[str, Tensor] = {}

    def recorder(key: str) -> Any:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[key] = output if isinstance(output, Tensor) else output[0]

        return record

    with ExitStack() as stack:
        for key, module in modules.items():
            stack.enter_context(module.register_forward_hook(recorder(key)))
        yield outputs


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
        yield from _walk(inner, f"{name}.{child}".lstrip("."), f"{core_path}.{child}".lstrip("."))
