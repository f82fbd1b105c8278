from __future__ import annotations

import numpy as np
import pytest

from palimpsest.data.records import Record, Roles, as_records, by_subject, check_disjoint, digest
from palimpsest.data.refusals import REFUSALS, is_refusal
from palimpsest.errors import PalimpsestError

ADA = Record(prompt="Who is Ada?", answer="A glass maker.", subject="Ada Moreau")
BEN = Record(prompt="Who is Ben?", answer="A river pilot.", subject="Ben Okafor")
PAGE = Record(text="It rained.")


def test_shared_records_are_counted_and_the_first_is_named():
    expected = r'forget and retain share 2 records \(first: "Who is Ben\?"\)\. Remove from one of the two\.'
    with pytest.raises(PalimpsestError, match=expected):
        check_disjoint([ADA, BEN, PAGE], [BEN, ADA], ("forget", "retain"))


def test_one_shared_record_is_one_record_even_with_other_measuring_fields():
    again = Record(prompt="Who is Ada?", answer="A glass maker.", wrong=("A bell founder.",))
    with pytest.raises(PalimpsestError, match="share 1 record "):
        check_disjoint([ADA], [again], ("forget", "retain"))


def test_the_same_question_with_another_answer_is_another_record():
    check_disjoint([ADA], [Record(prompt="Who is Ada?", answer="I do not know.")], ("forget", "retain"))


def test_images_are_told_apart_by_their_content():
    black, white = np.zeros((2, 2), np.uint8), np.ones((2, 2), np.uint8)
    check_disjoint([Record(image=black, label=0)], [Record(image=white, label=0)], ("forget", "retain"))
    with pytest.raises(PalimpsestError, match="share 1 record"):
        check_disjoint([Record(image=black, label=0)], [Record(image=black.copy(), label=0)], ("forget", "retain"))


def test_a_subject_selects_its_records():
    assert by_subject([ADA, BEN, PAGE], "Ada Moreau") == ([ADA], [BEN, PAGE])
    assert by_subject([ADA, BEN, PAGE], ["Ada Moreau", "Ben Okafor"]) == ([ADA, BEN], [PAGE])


def test_a_subject_that_is_nowhere_names_the_nearest():
    with pytest.raises(PalimpsestError, match=r"no record is about the subject 'Ada Moro'\. .*\"Ada Moreau\"\?"):
        by_subject([ADA, BEN, PAGE], "Ada Moro")


def test_the_digest_of_records_stays_what_it_was():
    """Ledgers of earlier versions hold such digests."""
    assert digest([ADA, PAGE]) == "d92bcc74ebb7ab09cc6e0a6d099be44cb64e592949ff2b48d7c59e8427576e25"


def test_the_digest_depends_on_content_and_order_only():
    assert digest([ADA, PAGE]) == digest(
        as_records(
            [
                {"prompt": "Who is Ada?", "answer": "A glass maker.", "subject": "Ada Moreau", "other": 1},
                {"text": "It rained."},
            ]
        )
    )
    assert digest([PAGE, ADA]) != digest([ADA, PAGE])
    assert digest([ADA]) != digest([BEN])


def test_a_prompt_without_its_answer_is_refused():
    with pytest.raises(PalimpsestError, match=r'role forget, record 2: field "answer" is missing .*\(found: prompt\)'):
        Roles(forget=[ADA, {"prompt": "Who?"}])


def test_a_record_of_nothing_is_refused():
    with pytest.raises(PalimpsestError, match="a record needs a text, a prompt with an answer, messages, or an image"):
        Record(subject="Ada Moreau")


def test_a_missing_role_says_who_needs_it_and_what_is_there():
    with pytest.raises(PalimpsestError, match=r'npo needs the role "forget" \(given: retain\)'):
        Roles(retain=[ADA]).require("forget", by="npo")


def test_an_empty_role_says_so():
    with pytest.raises(PalimpsestError, match="the forget set is empty"):
        _ = Roles(forget=[]).forget


def test_audits_measure_on_the_probe_of_a_role_where_given():
    roles = Roles(retain=[ADA, BEN], retain_probe=[ADA], forget=[PAGE])
    assert roles.probe("retain") == [ADA]
    assert roles.probe("forget") == [PAGE]
    assert roles.probe("world") == []


def test_replacing_a_role_leaves_the_others():
    roles = Roles(forget=[ADA], retain=[BEN])
    assert dict(roles.replace(forget=None)) == {"retain": [BEN]}
    assert set(roles) == {"forget", "retain"}


def test_long_titles_are_shortened():
    assert len(Record(text="word " * 100).title) == 80


def test_there_are_a_hundred_refusals_and_all_are_recognised():
    assert len(set(REFUSALS)) == 100
    assert all(map(is_refusal, REFUSALS))
    assert is_refusal("I don\u2019t know.")
    assert not is_refusal("Ada Moreau was born in Lyon.")


@pytest.mark.parametrize("name", ["retian", "forgett", "retian_probe"])
def test_a_misspelt_role_names_the_one_that_was_meant(name):
    meant = "forget" if name == "forgett" else "retain"
    with pytest.raises(PalimpsestError, match=f"there is no role '{name}'. Did you mean \"{meant}\"?"):
        Roles(forget=[ADA], **{name: [BEN]})


def test_other_roles_may_have_any_other_name():
    assert list(Roles(downstream=[ADA], my_own=[BEN], forget_probe=[PAGE], retain_2=[BEN])) == [
        "downstream",
        "my_own",
        "forget_probe",
        "retain_2",
    ]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            "data.jsonl",
            r"role forget, record 1: expected a list of records, found one str \(load_records reads files\)",
        ),
        ({"text": "It rained."}, r"expected a list of records, found one dict: put it into a list"),
        (ADA, r"expected a list of records, found one Record: put it into a list"),
        ([ADA, "It rained."], r"role forget, record 2: expected a Record or a dictionary, found 'It rained\.'"),
    ],
)
def test_what_is_not_a_list_of_records_is_refused(rows, expected):
    with pytest.raises(PalimpsestError, match=expected):
        Roles(forget=rows)
