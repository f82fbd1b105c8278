from __future__ import annotations

import pytest

from palimpsest.report import plots
from palimpsest.report.notes import _drawing


def test_arrays_against_each_other_are_a_drawing_with_its_extremes_in_words():
    drawn = plots.against({"weight of the memory": [0.0, 0.5, 1.0], "perplexity": [30.0, 12.0, 20.0]}, "validation")
    assert "validation, against weight of the memory" in drawn
    assert "perplexity: lowest 12 at 0.5, highest 30 at 0" in drawn
    assert ">perplexity<" in drawn.replace("</text>", "<") or "perplexity" in drawn


@pytest.mark.parametrize(
    ("value", "is_one"),
    [
        ({"x": [0.0, 1.0], "y": [1.0, 2.0]}, True),
        ({"x": [0.0, 1.0], "y": [1.0, 2.0], "z": [3, 4]}, True),
        ({"x": [0.0, 1.0]}, False),
        ({"x": [0.0], "y": [1.0]}, False),
        ({"x": [0.0, 1.0], "y": [1.0]}, False),
        ({"x": [0.0, 1.0], "y": [1.0, float("inf")]}, False),
        ({"attention": 0.1, "mlp": 0.2}, False),
        ([1.0, 2.0], False),
    ],
)
def test_only_equally_long_arrays_of_numbers_are_drawn_against_each_other(value, is_one):
    assert _drawing(value) is is_one
