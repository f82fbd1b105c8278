from __future__ import annotations

import pytest
import torch
from torch import nn

from palimpsest.errors import PalimpsestError
from palimpsest.models.hooks import Call, capture, no_hooks_left, watch


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


# --- what goes in and comes back -------------------------------------------------------------------------------------


def test_watch_hands_on_inputs_and_output_gradients():
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    seen, outputs = {}, {}

    def forward(call, output):
        outputs[call.key] = output

    def backward(call):
        seen[call.key] = (call.input.detach(), call.gradient)

    watched = {"first": network[0], "last": network[2]}
    with watch(watched, forward=forward, backward=backward):
        network(x).square().sum().backward()
    assert list(seen) == ["last", "first"]
    for key, module in watched.items():
        a, g = seen[key]
        torch.testing.assert_close(g.T @ a, module.weight.grad)
    assert torch.equal(seen["first"][0], x)
    assert outputs["last"].shape == (5, 2)
    assert no_hooks_left(network)


def test_a_frozen_network_is_followed_down_to_the_lowest_watched_module():
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)).requires_grad_(False)
    seen = []
    with watch({"middle": network[1]}, backward=lambda call: seen.append(call.gradient)):
        output = network(torch.randn(5, 3))
        output.sum().backward()
    torch.testing.assert_close(seen[0], network[2].weight.sum(0).expand(5, 4))


def test_what_forward_returns_takes_the_place_of_the_output():
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    seen = []
    with watch({"x": network[0]}, forward=lambda call, y: 2 * y, backward=lambda call: seen.append(call.gradient)):
        found = network(torch.ones(1, 3))
        found.sum().backward()
    torch.testing.assert_close(found, network[1](2 * network[0](torch.ones(1, 3))))
    torch.testing.assert_close(seen[0], network[1].weight.sum(0)[None])


class _Several(nn.Module):
    """Gives two outputs of which one is made from the other."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, x):
        first = self.weight * x
        return first, first.square(), torch.tensor([1, 2])


def test_the_gradient_of_an_output_is_only_what_comes_from_outside():
    module, seen = _Several(), []
    with watch({"x": module}, backward=lambda call: seen.append(call.gradients)):
        first, second, _ = module(torch.ones(2))
        (3 * first + 5 * second).sum().backward()
    (gradients,) = seen
    assert [g.tolist() for g in gradients] == [[3, 3], [5, 5]]  # not 3 + 5 * 2 * first
    assert module.weight.grad.tolist() == [3 + 10, 3 + 20]


def test_an_output_that_is_not_used_has_no_gradient():
    module, seen = _Several(), []
    with watch({"x": module}, backward=lambda call: seen.append(call.gradients)):
        module(torch.ones(2))[1].sum().backward()
    assert seen[0][0] is None
    assert seen[0][1].tolist() == [1, 1]


def test_a_call_is_emptied_and_modules_that_a_callback_runs_are_not_handed_on():
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    calls = []

    def backward(call):
        calls.append(call)
        with torch.enable_grad():
            call.module(call.input.detach()).sum()

    with watch({"a": network[0], "b": network[1]}, backward=backward):
        network(torch.ones(2, 3)).sum().backward()
    assert [call.key for call in calls] == ["b", "a"]
    assert all((call.args, call.gradients) == ((), ()) for call in calls)


def test_an_input_that_was_overwritten_is_noticed():
    layer = nn.Linear(2, 2).requires_grad_(False)
    x = torch.ones(1, 2)
    with watch({"layer": layer}, backward=lambda call: None):
        loss = layer(x).sum()
        x.add_(1)
        with pytest.raises(PalimpsestError, match="layer: the network overwrites what it gave to this module"):
            loss.backward()
    assert no_hooks_left(layer)


def test_without_gradients_only_forward_is_called():
    layer, seen = nn.Linear(2, 2), []
    with watch({"x": layer}, forward=lambda call, y: seen.append(call.key), backward=seen.append), torch.no_grad():
        assert not layer(torch.ones(1, 2)).requires_grad
    assert seen == ["x"]


def test_the_input_is_the_first_tensor_wherever_it_stands():
    a, b, c = (torch.full((2,), float(i)) for i in range(3))
    call = Call("layer", torch.nn.Identity(), (None, {"deep": [a, 3]}, b), {"mask": c, "flag": True})
    assert [id(x) for x in call.tensors] == [id(a), id(b), id(c)]
    assert call.input is a
