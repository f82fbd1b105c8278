"""Attention over all of the past and over a window of it: the fast forms equal the slow ones."""

from __future__ import annotations

import pytest
import torch

from palimpsest.errors import PalimpsestError
from palimpsest.layers.attention import Attention, naive_attention, rotate

WINDOWS = (None, 1, 4, 7, 40)


def layer(**settings) -> Attention:
    torch.manual_seed(0)
    return Attention(16, 2, **settings).double()


@pytest.fixture
def hidden():
    return torch.randn(2, 21, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("window", WINDOWS)
def test_the_parallel_form_is_the_naive_one(window, hidden):
    attention = layer(window=window)
    q, k, v = attention.projected(hidden)
    expected = attention.output(naive_attention(q, k, v, window).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(hidden)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("persistent", [0, 3])
@pytest.mark.parametrize("window", WINDOWS)
def test_token_by_token_and_in_two_parts_it_gives_the_same(window, persistent, hidden):
    attention = layer(window=window, persistent=persistent)
    whole, end = attention(hidden)
    state, outputs = attention.start(2), []
    for x in hidden.unbind(1):
        out, state = attention.step(x, state)
        outputs.append(out)
    torch.testing.assert_close(torch.stack(outputs, 1), whole, rtol=0, atol=1e-12)
    first, middle = attention(hidden[:, :9])
    second, _ = attention(hidden[:, 9:], middle)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(state["keys"], end["keys"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", WINDOWS)
def test_padding_after_a_row_changes_neither_it_nor_what_follows(window, hidden):
    attention = layer(window=window, persistent=2)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False
    spoilt = torch.where(mask[..., None], hidden[:, :9], 99.0)
    padded, state = attention(spoilt, None, mask)
    alone, own = attention(hidden[1:, :5])
    torch.testing.assert_close(padded[1:, :5], alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        attention.step(hidden[:, 9], state)[0][1:], attention.step(hidden[1:, 9], own)[0], rtol=0, atol=1e-12
    )


def test_a_later_token_never_changes_an_earlier_output(hidden):
    attention = layer(window=5, persistent=2)
    changed = hidden.clone()
    changed[:, 12] += 1
    before, after = attention(hidden)[0], attention(changed)[0]
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 12:], after[:, 12:])


def test_what_left_the_window_is_forgotten_but_persistent_tokens_are_not(hidden):
    attention = layer(window=3, persistent=1)
    changed = hidden.clone()
    changed[:, 0] += 1
    out, other = attention(hidden)[0], attention(changed)[0]
    torch.testing.assert_close(out[:, 3:], other[:, 3:], rtol=0, atol=1e-12)
    with torch.no_grad():
        attention.persistent += 1
    assert not torch.allclose(attention(hidden)[0][:, -1], out[:, -1])


def test_rotated_products_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def product(at: int, to: int) -> torch.Tensor:
        return (rotate(q, torch.tensor([[at]])) * rotate(k, torch.tensor([[to]]))).sum()

    torch.testing.assert_close(product(9, 4), product(105, 100), rtol=0, atol=1e-12)
    assert not torch.allclose(product(9, 4), product(9, 5))


def test_only_without_a_window_the_state_grows(hidden):
    assert layer(window=4)(hidden)[1]["keys"].shape[2] == 4
    assert layer()(hidden)[1]["keys"].shape[2] == hidden.shape[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"heads": 3}, "width 16 does not give 3 heads"), ({"heads": 16}, "even width"), ({"window": 0}, "window is 0")],
)
def test_bad_sizes_are_named(settings, words):
    with pytest.raises(PalimpsestError, match=words):
        Attention(16, **{"heads": 2, **settings})
