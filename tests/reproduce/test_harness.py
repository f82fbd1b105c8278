from __future__ import annotations

import pytest

from palimpsest.data.encoding import Encoder
from palimpsest.reproduce.harness import ATTRIBUTES, CAPITALS, FORGET, HOLDOUT, PEOPLE, biographies, lands, new_model


@pytest.fixture(scope="module")
def model():
    return new_model()


@pytest.fixture(scope="module")
def data():
    return biographies(0)


def people(records) -> set[str]:
    return {record.subject for record in records}


@pytest.mark.parametrize("seed", [0, 1, 1000])
def test_every_word_is_in_the_vocabulary(model, seed):
    encoder, unknown = Encoder.of(model), model.tokenizer.unk_token_id
    for records in biographies(seed).values():
        assert all(unknown not in encoder.record(record).tokens for record in records)
        for record in records:
            for text in (record.paraphrase, *record.wrong):
                assert text is None or unknown not in encoder.pair(record.prompt, text).tokens
            if record.paraphrased_prompt is not None:
                assert unknown not in encoder.prompt(record.paraphrased_prompt)


def test_the_model_and_the_data_have_the_stated_sizes(model, data):
    assert model.parameters == pytest.approx(0.23e6, rel=0.02)
    assert (PEOPLE, FORGET, HOLDOUT, CAPITALS) == (48, 8, 8, 40)
    assert (len(people(data.forget)), len(people(data.retain)), len(people(data.holdout))) == (8, 40, 8)
    per_person = 4 * len(ATTRIBUTES)
    assert (len(data.forget), len(data.retain)) == (8 * per_person, 40 * per_person)
    assert len(data.train) == 48 * per_person + 40
    assert (len(data.forget_probe), len(data.retain_probe), len(data.world)) == (40, 60, 40)


def test_the_groups_are_apart(data):
    assert not people(data.forget) & people(data.retain)
    assert not people(data.holdout) & people(data.train)
    assert {r.key for r in data.train} == {r.key for role in ("forget", "retain", "world") for r in data[role]}
    assert len({r.key for r in data.train}) == len(data.train)


def test_no_method_ever_touches_a_capital(data):
    countries = {country for country, _ in lands()}
    towns = {town for _, town in lands()}
    assert people(data.world) == countries
    assert len(countries) == len(towns) == 40
    for role in ("forget", "retain"):
        words = {word for record in data[role] for word in f"{record.prompt} {record.answer}".split()}
        assert not words & (countries | towns | {"capital"})


def test_what_is_measured_was_learned_and_the_wrong_answers_are_wrong(data):
    learned = {record.key for record in data.train}
    truths = {record.answer for record in data.train}
    for record in (*data.forget_probe, *data.retain_probe):
        assert record.key in learned
        assert record.paraphrase in truths
        assert len(set(record.wrong)) == 5
        assert not set(record.wrong) & truths
    for record in data.holdout:
        assert record.key not in learned
        assert not {record.answer, record.paraphrase} & set(record.wrong)


def test_the_seed_decides_everything(data):
    assert biographies(0).digest() == data.digest()
    other = biographies(1)
    assert other.digest()["forget"] != data.digest()["forget"]
    assert other.digest()["world"] == data.digest()["world"]
    assert people(other.forget) != people(data.forget)
    assert new_model(3).digest() == new_model(3).digest() != new_model(4).digest()


def test_the_longest_record_fits_the_model(model, data):
    encoder = Encoder.of(model)
    assert not any(encoder.record(record).cut for records in data.values() for record in records)
