"""Looking into a network while it runs: module outputs through forward hooks that are sure to be removed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

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
    places = [(module, name) for module in network.modules() for name in _MODULE_HOOKS]
    places += [(parameter, name) for parameter in network.parameters() for name in _TENSOR_HOOKS]
    hooks = [hook for place, name in places for hook in (getattr(place, name, None) or {}).values()]
    return all(_origin(hook).startswith(_NOT_OURS) for hook in hooks)


def _origin(hook: Any) -> str:
    hook = getattr(hook, "func", hook)
    return getattr(hook, "__module__", None) or type(hook).__module__
