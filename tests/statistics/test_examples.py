from __future__ import annotations

import pytest
import torch

from memorised import people, quiet
from one_by_one import EVERY, loss_of, roughened, some_records
from palimpsest.data.encoding import Encoder
from palimpsest.data.labelled import labelled
from palimpsest.errors import PalimpsestError
from palimpsest.statistics.examples import Examples, evaluating, frozen, squared_logits


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_losses_of_a_batch_are_those_of_single_records(name, reduction):
    model, records = roughened(name), some_records(name)
    batch = Examples(model, records).batch(range(7))
    with torch.no_grad():
        expected = torch.stack([loss_of(model, record, reduction) for record in records])
        torch.testing.assert_close(batch.losses(model.network, reduction), expected, rtol=1e-5, atol=1e-6)


def test_every_example_is_in_one_batch_and_lengths_go_together(llama):
    records = some_records("llama")
    examples = Examples(llama, records)
    groups = examples.groups(3)
    assert sorted(place for group in groups for place in group) == list(range(7))
    lengths = [[examples.items[place].size for place in group] for group in groups]
    assert [x for group in lengths for x in group] == sorted(x for group in lengths for x in group)
    assert max(map(len, groups)) <= 3


def test_batches_hold_as_many_positions_as_were_asked_for(llama):
    examples = Examples(llama, people())
    for positions in (1, 20, 50, 1000):
        for group in examples.groups(100, positions=positions):
            longest = max(examples.items[place].size for place in group)
            assert len(group) == 1 or len(group) * longest <= positions


def test_the_given_order_has_batches_of_exactly_that_size(llama):
    examples = Examples(llama, people()[:7])
    assert examples.groups(3, order="given") == [[0, 1, 2], [3, 4, 5], [6]]
    parts = examples.groups(3, among=[4, 5, 6], positions=1)
    assert sorted(part[0] for part in parts) == [4, 5, 6]


def test_padding_is_known(llama):
    examples = Examples(llama, some_records("llama"))
    batch = examples.batch(range(7))
    assert batch.real.sum(1).tolist() == [item.size for item in examples.items]
    assert batch.width == max(item.size for item in examples.items)
    assert batch.count.tolist() == [len(item.targets) for item in examples.items]
    images = Examples(roughened("vit"), some_records("vit")).batch([0, 1])
    assert images.real is None
    assert images.width is None


def test_encoded_records_and_labelled_examples_are_taken_as_they_are(llama, vit):
    encoded = Encoder.of(llama).records(people()[:3])
    assert Examples(llama, encoded).items == encoded
    ready = labelled(vit, some_records("vit"))
    assert Examples(vit, ready).items == ready


def test_records_that_had_to_be_cut_are_said(llama):
    run = quiet()
    Examples(llama, people(), 12, warn=run.warn)
    assert "tokens were cut" in run.notes["warnings"][0]


def test_squared_logits_do_not_look_at_the_label(vit):
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    assert squared_logits(logits, torch.tensor([0, 1])).tolist() == [5, 9]


def test_empty_sets_and_labels_out_of_range_are_named(vit):
    with pytest.raises(PalimpsestError, match="the forget set is empty"):
        Examples(vit, [], role="forget")
    ready = labelled(vit, some_records("vit")[:2])
    for wrong in (4, -1):
        object.__setattr__(ready[1], "label", wrong)
        with pytest.raises(PalimpsestError, match=f"label {wrong} is outside the 4 classes of ViTFor"):
            Examples(vit, ready).batch([0, 1]).losses(vit.network)


def test_modes_and_flags_come_back_also_after_an_error(llama):
    network = llama.network.train()
    network.model.norm.eval()
    network.model.norm.weight.requires_grad_(False)
    seen = []

    def fail():
        with evaluating(network), frozen(network):
            seen.append((network.training, any(w.requires_grad for w in network.parameters())))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [(False, False)]
    assert network.training
    assert not network.model.norm.training
    assert [name for name, w in network.named_parameters() if not w.requires_grad] == ["model.norm.weight"]
