from __future__ import annotations

import json
from pathlib import Path

import pytest

from palimpsest.data.records import Record, check_disjoint
from palimpsest.data.tofu import author_name, tofu
from palimpsest.errors import PalimpsestError

REAL_FOLDER = Path(__file__).parents[2].parent / "shared" / "data" / "tofu"
RETAIN = ["Ada Quillfeather", "Isabella van Pletzen", "Basil Mahfouz Al-Kuwaiti"]
FORGET = ["Patrick Ryan O'Donnell", "Hsiao Yun-Hwa"]


def block(name: str) -> list[dict]:
    # The first question is the same for every author, as it is for two authors of TOFU.
    rows = [{"question": "What is the full name of the author?", "answer": f"The full name is {name}."}]
    rows += [
        {"question": f"What is {name}'s fact {i}?", "answer": f"In Paris, {name} said number {i}."} for i in range(19)
    ]
    return rows


def perturbed(rows: list[dict]) -> list[dict]:
    return [
        {
            **row,
            "paraphrased_answer": "Indeed: " + row["answer"],
            "perturbed_answer": [f"No, {i}: " + row["answer"] for i in range(5)],
            "paraphrased_question": "Say, " + row["question"],
        }
        for row in rows
    ]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    retain = [row for name in RETAIN for row in block(name)]
    forget = [row for name in FORGET for row in block(name)]
    facts = [{"question": "Where is Rome?", "answer": "Italy", "perturbed_answer": ["Peru", "Chad", "Iran"]}]
    files = {
        "retain95": retain,
        "forget05": forget,
        "forget05_perturbed": perturbed(forget)[:-1],
        "forget10_perturbed": perturbed(retain[-20:] + forget),
        "retain_perturbed": perturbed(retain[:20]),
        "real_authors_perturbed": facts,
        "world_facts_perturbed": facts * 2,
    }
    for name, rows in files.items():
        write(tmp_path / f"{name}.json", rows)
    return tmp_path


def subjects(records: list[Record]) -> list[str | None]:
    return list(dict.fromkeys(record.subject for record in records))


def test_the_roles_of_a_split(folder):
    data = tofu("forget05", folder)
    assert {name: len(rows) for name, rows in data.items()} == {
        "train": 100,
        "forget": 40,
        "retain": 60,
        "retain_probe": 20,
        "real": 1,
        "world": 2,
    }
    assert data.train == data.forget + data.retain
    assert data.world[0].wrong == ("Peru", "Chad", "Iran")
    check_disjoint(data.forget, data.retain, ("forget", "retain"))


def test_subjects_are_the_full_names(folder):
    data = tofu("forget05", folder)
    assert subjects(data.retain) == RETAIN
    assert subjects(data.forget) == FORGET


def test_a_forget_record_carries_what_measures_it(folder):
    record = tofu("forget05", folder).forget[20]
    assert record.answer == "The full name is Hsiao Yun-Hwa."
    assert record.paraphrase == "Indeed: The full name is Hsiao Yun-Hwa."
    assert record.wrong[0] == "No, 0: The full name is Hsiao Yun-Hwa."
    assert record.paraphrased_prompt == "Say, What is the full name of the author?"


def test_a_row_without_a_perturbed_partner_stays_as_it_is(folder):
    *others, last = tofu("forget05", folder).forget
    assert last.paraphrase is None
    assert last.wrong == ()
    assert all(record.paraphrase for record in others)


def test_fewer_authors_are_the_nearest_to_the_forget_set(folder):
    data = tofu("forget05", folder, authors=2, forget_authors=1)
    assert subjects(data.retain) == RETAIN[1:]
    assert subjects(data.forget) == FORGET[1:]
    assert subjects(data.train) == FORGET[1:] + RETAIN[1:]
    assert subjects(data.retain_probe) == RETAIN[2:]
    assert {record.key for record in data.retain_probe} <= {record.key for record in data.retain}


def test_no_retain_probe_where_no_kept_author_has_paraphrases(folder):
    write(folder / "forget10_perturbed.json", perturbed(block(FORGET[0])))
    assert "retain_probe" not in tofu("forget05", folder, authors=1)


def test_an_author_without_a_name_is_numbered(folder):
    rows = [{"question": f"What is fact {i} of this author?", "answer": "The author never said."} for i in range(20)]
    write(folder / "retain95.json", block(RETAIN[0]) + rows)
    assert subjects(tofu("forget05", folder).retain) == [RETAIN[0], "author 001"]


def test_a_nickname_in_the_middle_does_not_hide_the_name():
    records = [Record(prompt=f"What is Alejandro (Alex) Fuentes's fact {i}?", answer="Alex knows.") for i in range(20)]
    assert author_name(records) == "Alejandro Fuentes"


def test_an_unknown_split_names_the_close_ones(folder):
    with pytest.raises(PalimpsestError, match=r'TOFU has no split "forget5"\. Did you mean "forget05"'):
        tofu("forget5", folder)


@pytest.mark.parametrize("name", ["retain95", "forget05_perturbed", "world_facts_perturbed"])
def test_a_missing_file_is_named(folder, name):
    (folder / f"{name}.json").unlink()
    with pytest.raises(PalimpsestError, match=rf"{name}\.json is missing. Copy it from locuslab/TOFU"):
        tofu("forget05", folder)


@pytest.mark.parametrize(("name", "plain"), [("forget05_perturbed", "forget05"), ("retain_perturbed", "retain95")])
def test_perturbed_rows_of_other_questions_are_not_taken_for_these(folder, name, plain):
    write(folder / f"{name}.json", perturbed(block("Somebody Else")))
    with pytest.raises(PalimpsestError, match=f"{name} has no question of {plain}"):
        tofu("forget05", folder)


@pytest.mark.parametrize(("argument", "available"), [("authors", 3), ("forget_authors", 2)])
@pytest.mark.parametrize("count", [0, 4])
def test_a_limit_outside_the_split_says_so(folder, argument, available, count):
    with pytest.raises(PalimpsestError, match=f"{argument} is {count}; this split has {available}"):
        tofu("forget05", folder, **{argument: count})


@pytest.mark.skipif(
    not REAL_FOLDER.is_dir(), reason="the TOFU files are not beside the repository (../shared/data/tofu)"
)
def test_the_published_files():
    data = tofu("forget05", REAL_FOLDER)
    assert [len(data[name]) for name in ("train", "forget", "retain", "retain_probe")] == [4000, 200, 3800, 400]
    assert [len(data[name]) for name in ("real", "world")] == [100, 117]
    assert all(len(record.wrong) == 5 and record.paraphrase for record in data.forget + data.retain_probe)
    names = subjects(data.retain) + subjects(data.forget)
    assert len(names) == 200
    assert [name for name in names if name.startswith("author")] == ["author 088"]
    assert names[0] == "Jaime Vasquez"
    assert names[72] == "Alejandro Fuentes"
    assert names[-2] == "Basil Mahfouz Al-Kuwaiti"
