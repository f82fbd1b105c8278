from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from palimpsest.data.records import Roles
from palimpsest.errors import PalimpsestError
from palimpsest.system import (
    Method,
    catalogue,
    create,
    facts_of,
    setting,
    settings,
    slug_of,
    system,
    system_class,
    to_dict,
)

LISTING = """
import sys, time
start = time.perf_counter()
from palimpsest.system import catalogue
slugs = list(catalogue())
assert time.perf_counter() - start < 1, time.perf_counter() - start
assert "torch" not in sys.modules
assert {"npo", "finetune", "kl-minimisation", "membership"} <= set(slugs), slugs
"""


def test_listing_is_fast_and_imports_no_torch():
    subprocess.run([sys.executable, "-c", LISTING], check=True, timeout=30)


def test_the_catalogue_says_what_the_classes_say():
    for slug, facts in catalogue().items():
        cls = system_class(slug)
        declared = getattr(cls, "configurations", {}).get(slug, cls.facts)
        assert declared == facts
        assert declared.title
        assert cls.__doc__


def test_an_unknown_system_names_the_nearest():
    with pytest.raises(PalimpsestError, match=r"there is no system 'npoo'\. Did you mean .*\"npo\""):
        facts_of("npoo")


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(PalimpsestError, match=r"npo has no field 'bta'\. Did you mean \"beta\"\?"):
        create("npo", bta=1)
    with pytest.raises(PalimpsestError, match=r"npo\.training has no field 'epoch'\. Did you mean \"epochs\""):
        create("npo", **{"training.epoch": 1})


@pytest.mark.parametrize(
    ("slug", "fields", "message"),
    [
        ("npo", {"beta": 0}, "npo: beta is 0, expected above 0"),
        ("npo", {"beta": -1.0}, r"npo: beta is -1\.0, expected above 0"),
        ("npo", {"beta": float("nan")}, "npo: beta is nan, expected a finite number"),
        ("npo", {"beta": float("inf")}, "npo: beta is inf, expected a finite number"),
        ("npo", {"beta": "0.1"}, r"npo: beta is '0\.1', expected float"),
        ("npo", {"retain": "kll"}, r"npo: retain is 'kll'\. Did you mean \"kl\"\?"),
        ("npo", {"training.epochs": 0}, "Training: epochs is 0, expected at least 1"),
        ("npo", {"training.epochs": 1.5}, r"Training: epochs is 1\.5, expected int"),
        ("npo", {"training": 3}, "npo: training is 3, expected Training"),
        ("npo", {"beta.x": 3}, r"npo\.beta is a single value"),
        ("simnpo", {"delta": -0.5}, r"simnpo: delta is -0\.5, expected at least 0"),
        ("membership", {"k": 0.0}, r"membership: k is 0\.0, expected above 0"),
        ("membership", {"k": 1.5}, r"membership: k is 1\.5, expected at most 1"),
        ("membership", {"gradients": 2}, "membership: gradients is 2, expected bool"),
        ("rmu", {"layer": -1}, "rmu: layer is -1, expected at least 0"),
    ],
)
def test_a_setting_out_of_range_says_which_and_what_is_expected(slug, fields, message):
    with pytest.raises(PalimpsestError, match=message):
        create(slug, **fields)


def test_whole_numbers_are_fine_where_fractions_are_expected():
    assert create("npo", beta=1).beta == 1


@pytest.mark.parametrize(
    ("slug", "system_slug", "preset"),
    [
        ("kl-minimisation", "gradient-ascent", {"retain": "kl"}),
        ("gradient-difference", "gradient-ascent", {"retain": "cross-entropy"}),
        ("mismatch", "po", {"instead": "mismatch"}),
    ],
)
def test_a_configuration_is_its_system_with_some_fields_set(slug, system_slug, preset):
    made = create(slug)
    assert type(made) is system_class(system_slug)
    assert {name: getattr(made, name) for name in preset} == preset
    assert slug_of(made) == slug
    assert slug_of(create(system_slug)) == system_slug
    assert facts_of(slug).preset == preset
    assert facts_of(slug).needs == facts_of(system_slug).needs


@pytest.mark.parametrize("slug", list(catalogue()))
def test_every_system_comes_back_from_its_settings(slug):
    made = create(slug)
    assert create(slug, **json.loads(json.dumps(to_dict(made)))) == made


def test_settings_are_frozen_and_take_keywords_only():
    made = create("npo")
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.beta = 1
    with pytest.raises(TypeError):
        system_class("npo")(0.1)


def test_nested_settings_are_changed_alone():
    made = create("npo", **{"training.epochs": 3, "training.batch_size": 4})
    assert (made.training.epochs, made.training.batch_size) == (3, 4)
    assert dataclasses.replace(made.training, epochs=10, batch_size=32) == create("npo").training


def test_nested_settings_that_are_not_given_start_from_their_defaults():
    assert create("retrain").training is None
    assert create("retrain", **{"training.epochs": 3}).training.epochs == 3


def test_an_own_check_runs_after_the_ranges():
    @settings
    class Span:
        low: int = setting(default=0, at_least=0, origin="test", help="start")
        high: int = setting(default=1, origin="test", help="end")

        def __post_init__(self) -> None:
            if self.low > self.high:
                raise PalimpsestError("low is above high")

    with pytest.raises(PalimpsestError, match="low is above high"):
        Span(low=2)
    with pytest.raises(PalimpsestError, match="low is -1, expected at least 0"):
        Span(low=-1, high=-2)


def test_a_system_states_known_facts_and_verbs_only():
    with pytest.raises(PalimpsestError, match=r"system x: verb is 'remove'\. Known: write, keep, erase"):
        system("x", verb="remove", title="X", paper="", fidelity="exact")(type("X", (Method,), {}))
    with pytest.raises(PalimpsestError, match="system x: unknown fact 'colour'"):
        system("x", verb="erase", title="X", paper="", fidelity="exact", colour="red")(type("X", (Method,), {}))
    with pytest.raises(PalimpsestError, match="system x: fidelity is not stated"):
        system("x", verb="erase", title="X", paper="")(type("X", (Method,), {}))


THIRD_PARTY = '''
import torch
from palimpsest.system import Method, setting, system

@system("scrape", verb="erase", title="Scraping", paper="none", takes="causal-lm", needs={"forget"}, fidelity="exact")
class Scrape(Method):
    """Scrapes the page."""

    depth: float = setting(default=0.5, above=0, origin="ours", help="how deep")

    def apply(self, model, data, run):
        return model.copy()
'''


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    """Installs a distribution that announces one system, in a folder on the path."""

    def install(source: str = THIRD_PARTY, module: str = "scraping") -> None:
        (tmp_path / "scraping.py").write_text(source)
        info = tmp_path / "scraping-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scraping\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[palimpsest.systems]\nscrape = {module}:Scrape\n")
        monkeypatch.syspath_prepend(tmp_path)
        catalogue.cache_clear()

    yield install
    sys.modules.pop("scraping", None)
    catalogue.cache_clear()


def test_a_third_party_announces_a_system_by_its_entry_point(third_party, llama, run):
    third_party()
    assert facts_of("scrape").module == "scraping"
    assert "scraping" not in sys.modules
    made = create("scrape", depth=0.7)
    result = made.apply(llama, Roles(forget=[{"text": "a b"}]), run)
    assert result.ledger.entries[-1].settings == {"depth": 0.7}


def test_a_third_party_system_may_not_take_a_name_in_use(third_party):
    third_party(THIRD_PARTY.replace('"scrape"', '"npo"'))
    with pytest.raises(PalimpsestError, match=r"two systems are called 'npo': palimpsest\.erase\.npo and scraping"):
        catalogue()


@pytest.mark.parametrize("module", ["not_there", "not_there.inside"])
def test_an_entry_point_without_its_module_is_named(third_party, module):
    third_party(module=module)
    with pytest.raises(
        PalimpsestError, match=f"the entry point 'scrape' of the package scraping names the module '{module}'"
    ):
        catalogue()
