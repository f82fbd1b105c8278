from __future__ import annotations

import pytest

from palimpsest.errors import PalimpsestError
from palimpsest.recall.filters import compiled

ABOUT = {"topic": "Travel", "year": 2021, "tags": ["sea", "Sun"], "home": {"city": "Porto"}, "done": True, "none": None}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({}, True),
        ({"topic": "Travel"}, True),
        ({"topic": "travel"}, False),
        ({"topic": {"eq": "Travel"}, "year": {"gte": 2021, "lt": 2022}}, True),
        ({"year": {"gt": 2021}}, False),
        ({"year": {"lte": "2021"}}, False),
        ({"done": {"gt": 0}}, False),
        ({"topic": {"ne": "Work"}}, True),
        ({"missing": {"ne": 1}}, True),
        ({"missing": 1}, False),
        ({"none": None}, True),
        ({"missing": None}, False),
        ({"year": {"in": [2020, 2021]}}, True),
        ({"year": {"nin": [2020, 2021]}}, False),
        ({"missing": {"nin": [1]}}, True),
        ({"topic": {"contains": "rav"}}, True),
        ({"topic": {"contains": "RAV"}}, False),
        ({"topic": {"icontains": "RAV"}}, True),
        ({"tags": {"contains": "sea"}}, True),
        ({"tags": {"contains": "se"}}, False),
        ({"tags": {"icontains": "sun"}}, True),
        ({"year": {"contains": "2"}}, False),
        ({"topic": {"wildcard": "T?av*"}}, True),
        ({"topic": {"wildcard": "T?v*"}}, False),
        ({"home.city": "Porto"}, True),
        ({"home.street": {"exists": False}}, True),
        ({"home": {"exists": True}}, True),
        ({"OR": [{"topic": "Work"}, {"year": 2021}]}, True),
        ({"AND": [{"topic": "Work"}, {"year": 2021}]}, False),
        ({"NOT": [{"topic": "Work"}, {"year": 2020}]}, True),
        ({"NOT": [{"topic": "Work"}, {"year": 2021}]}, False),
    ],
    ids=str,
)
def test_filters(where, expected):
    assert compiled(where)(ABOUT) is expected


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"year": {"gth": 3}}, "no operator 'gth'. Did you mean \"gt\""),
        ({"year": {"in": 3}}, "the filter year in is given 3, expected a list"),
        ({"topic": {"wildcard": 3}}, "expected a str"),
        ({"OR": {}}, "the filter's OR is {}, expected a list of filters"),
        ([1], r"the filter is \[1\], expected a dictionary"),
    ],
)
def test_a_wrong_filter_is_refused_before_the_search(where, message):
    with pytest.raises(PalimpsestError, match=message):
        compiled(where)
