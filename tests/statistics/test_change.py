from __future__ import annotations

import pytest
import torch

from conftest import build_model
from palimpsest.audit.session import changed
from palimpsest.statistics.change import weight_change

EDITED = {
    "llama": ("model.layers.1.mlp.down_proj.weight", ("1", "mlp"), "model.layers.1.mlp."),
    "gpt2": ("transformer.h.1.attn.c_attn.weight", ("1", "attention"), "transformer.h.1.attn."),
}


@pytest.mark.parametrize("name", EDITED)
def test_one_edited_parameter_is_counted_where_it_is(name):
    before, after = build_model(name), build_model(name)
    edited, place, prefix = EDITED[name]
    with torch.no_grad():
        weight = after.network.get_parameter(edited)
        weight[0, :3] += torch.tensor([1.0, -2.0, 2.0])  # norm 3
    change = weight_change(before.network, after.network)
    assert (change.changed, change.total) == (3, before.parameters)
    whole = torch.cat([w.detach().flatten() for n, w in before.network.named_parameters() if n.startswith(prefix)])
    assert change.relative[place] == pytest.approx(3 / float(whole.norm()), rel=1e-5)
    assert all(x == 0 for other, x in change.relative.items() if other != place)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen", "gemma", "moe"])
def test_every_layer_has_its_parts(name):
    model = build_model(name)
    change = weight_change(model.network, model.network)
    assert change.changed == 0
    assert {(layer, part) for layer in "01" for part in ("attention", "mlp", "norm")} <= set(change.relative)
    assert ("", "embedding") in change.relative


def test_doubled_weights_moved_by_their_own_norm(llama):
    after = llama.copy()
    with torch.no_grad():
        for weight in after.network.parameters():
            weight *= 2
    change = weight_change(llama.network, after.network)
    assert list(change.relative.values()) == pytest.approx([1] * len(change.relative))
    assert change.changed == sum(int(weight.count_nonzero()) for weight in llama.network.parameters())


def test_models_of_other_shapes_are_not_compared(llama, gpt2):
    assert changed(llama, gpt2) is None
    told = changed(llama, llama.copy())
    assert told is not None
    assert (told.changed, {norm.layer for norm in told.norms}) == (0, {"0", "1"})
