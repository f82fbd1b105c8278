import json
import math

import numpy as np
import pytest
from report_example import full, small

from palimpsest.audit.reading import Reading, Value
from palimpsest.errors import PalimpsestError
from palimpsest.report.evidence import Evidence, ModelEvidence, load, save


def test_what_is_saved_is_loaded(tmp_path):
    path = save(full(), tmp_path / "deep" / "evidence.json")
    assert load(path).to_dict() == full().to_dict()
    assert isinstance(load(path).models[1].readings[0], Reading)
    assert [file.name for file in path.parent.iterdir()] == ["evidence.json"]


def test_the_file_is_strict_json_even_where_numbers_are_not_finite(tmp_path):
    reading = Reading(
        probe="p", values=(Value(name="perplexity/general", value=math.inf, n=3),), arrays={"x": np.array([1, np.nan])}
    )
    path = save(
        Evidence(title="t", models=(ModelEvidence(name="a", part="erased", title="A", readings=(reading,)),)),
        tmp_path / "e",
    )
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert math.isnan(load(path).models[0].readings[0].values[0].value)


def test_the_minimal_file_of_another_writer_is_read(tmp_path):
    path = tmp_path / "e.json"
    path.write_text('{"format": 1, "title": "t", "models": [{"name": "before", "part": "before", "title": "B"}]}')
    assert load(path).models[0].cost.seconds == 0


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "title": "t", "models": [{"x": 1}]}', "\x00"]
)
def test_a_damaged_file_is_one_clear_error(tmp_path, text):
    path = tmp_path / "e.json"
    path.write_text(text)
    with pytest.raises(PalimpsestError, match=r"e\.json is damaged and cannot be read as evidence"):
        load(path)


def test_a_newer_file_says_upgrade(tmp_path):
    path = tmp_path / "e.json"
    path.write_text(json.dumps({**small().to_dict(), "format": 2, "later": 1}))
    with pytest.raises(PalimpsestError, match=r"has format 2; this version of palimpsest reads up to 1"):
        load(path)


def test_a_missing_file_and_an_unknown_part_say_what_to_do(tmp_path):
    with pytest.raises(PalimpsestError, match="there is no evidence file"):
        load(tmp_path / "none.json")
    with pytest.raises(PalimpsestError, match='Did you mean "erased"'):
        ModelEvidence(name="x", part="erase", title="X")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = save(small(), tmp_path / "e.json")
    old = path.read_bytes()

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(PalimpsestError, match="could not be written"):
        save(full(), path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
