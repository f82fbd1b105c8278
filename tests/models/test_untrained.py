from __future__ import annotations

import torch

from memorised import quiet
from palimpsest.models.untrained import untrained


def test_it_has_the_same_shape_and_other_weights(classifier):
    random = untrained(classifier, quiet())
    assert random.network.config.to_dict() == classifier.network.config.to_dict()
    assert {n: w.shape for n, w in random.network.named_parameters()} == {
        n: w.shape for n, w in classifier.network.named_parameters()
    }
    assert random.digest() != classifier.digest()
    assert not random.network.training


def test_it_depends_on_the_seed_only(convnet):
    expected = untrained(convnet, quiet()).digest()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert untrained(convnet, quiet()).digest() == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert untrained(convnet, quiet(seed=1)).digest() != expected


def test_it_is_not_what_a_training_from_the_same_seed_begins_with(convnet):
    torch.manual_seed(0)
    began = type(convnet.network)(convnet.network.config).state_dict()
    random = untrained(convnet, quiet(seed=0)).network.state_dict()
    name = "classifier.1.weight"
    assert not torch.equal(began[name], random[name])


def test_it_keeps_the_precision(vit):
    vit.network.bfloat16()
    assert untrained(vit, quiet()).network.dtype == torch.bfloat16
