from __future__ import annotations

import pytest
import torch
from torch import nn

from palimpsest.models.hooks import capture, no_hooks_left


def test_capture_holds_the_first_output_of_every_module(llama, tokens):
    layers = llama.network.model.layers
    modules = {"block": layers[0], "attention": layers[0].self_attn, "mlp": layers[1].mlp, "all": llama.network}
    with capture(modules) as outputs, torch.no_grad():
        assert outputs == {}
        logits = llama(input_ids=tokens).logits
    assert torch.equal(outputs["all"], logits)
    assert {outputs[key].shape for key in ("block", "attention", "mlp")} == {(*tokens.shape, 32)}
    assert no_hooks_left(llama.network)


def test_capture_keeps_the_last_forward_and_its_graph():
    layer = nn.Linear(2, 2)
    with capture({"x": layer}) as outputs:
        layer(torch.zeros(1, 2))
        last = layer(torch.ones(1, 2))
    assert outputs["x"] is last
    assert outputs["x"].requires_grad


def test_an_error_inside_leaves_no_hook():
    layer = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="cannot be multiplied"), capture({"x": layer}):
        layer(torch.zeros(1, 3))
    assert no_hooks_left(layer)


@pytest.mark.parametrize(
    "leave",
    [
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: layer.register_forward_pre_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
        lambda layer: layer.weight.register_hook(lambda gradient: None),
        lambda layer: layer.weight.register_post_accumulate_grad_hook(lambda parameter: None),
    ],
)
def test_any_hook_is_found_and_its_removal_too(leave):
    network = nn.Sequential(nn.Linear(2, 2))
    handle = leave(network[0])
    assert not no_hooks_left(network)
    handle.remove()
    assert no_hooks_left(network)


def test_recording_hooks_of_transformers_do_not_count(llama, tokens):
    llama(input_ids=tokens, output_hidden_states=True)
    assert any(module._forward_hooks for module in llama.network.modules())
    assert no_hooks_left(llama.network)
