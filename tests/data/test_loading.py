from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.data.loading import load_records, write_records
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError

RECORDS = [
    Record(prompt="Who?", answer="Ada.", subject="Ada", paraphrase="It is Ada.", wrong=("Bob.", "Cy.")),
    Record(text="A page\u2028with an odd line end."),
    Record(messages=({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})),
]


@pytest.fixture
def people(tmp_path):
    """Writes the text into people.jsonl (or another name) and gives its path."""

    def write(content: str, name: str = "people.jsonl"):
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        return path

    return write


def fails(source, message, **options):
    with pytest.raises(PalimpsestError, match=re.escape(message)) as caught:
        load_records(source, **options)
    assert "\n" not in str(caught.value)


words = st.text(min_size=1).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(
    records=st.lists(
        st.one_of(
            st.builds(Record, text=words, subject=st.none() | words),
            st.builds(Record, prompt=words, answer=words, wrong=st.lists(words).map(tuple)),
        ),
        min_size=1,
    )
)
def test_what_is_written_is_read_again(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("round") / "records.jsonl"
    write_records(records, path)
    assert load_records(path) == records


def test_chats_are_read_again(tmp_path):
    write_records(RECORDS, tmp_path / "new" / "records.jsonl")
    assert load_records(tmp_path / "new" / "records.jsonl") == RECORDS


def test_images_cannot_be_written_as_json_lines(tmp_path):
    with pytest.raises(PalimpsestError, match="record 1 has an image"):
        write_records([Record(image=object())], tmp_path / "images.jsonl")
    assert not (tmp_path / "images.jsonl").exists()


@pytest.mark.parametrize("name", ["people.jsonl", "people.json"])
def test_json_lines_with_blank_lines_and_a_byte_order_mark(people, name):
    path = people('\ufeff{"text": "one"}\n\n{"text": "two"}\r\n', name)
    assert [record.text for record in load_records(path)] == ["one", "two"]


def test_a_json_list(people):
    rows = [{"prompt": "Who?", "answer": "Ada."}, {"text": "two"}]
    assert len(load_records(people(json.dumps(rows, indent=1), "people.json"))) == 2


def test_parquet(tmp_path):
    from datasets import Dataset

    Dataset.from_list([{"question": "Who?", "answer": "Ada.", "perturbed_answer": ["Bob."], "year": 3}]).to_parquet(
        tmp_path / "people.parquet"
    )
    assert load_records(tmp_path / "people.parquet") == [Record(prompt="Who?", answer="Ada.", wrong=("Bob.",))]


def test_a_text_file_is_cut_into_paragraphs(people):
    path = people("\n\nOne line\nand another.\n \nTwo.\n\n\n\nThree.\n", "notes.txt")
    assert [record.text for record in load_records(path)] == ["One line\nand another.", "Two.", "Three."]


def test_a_folder_gives_one_record_a_text_file_in_order_of_name(people, tmp_path):
    people("second\n\nstill second\n", "b.txt")
    people("first", "a.txt")
    people("ignored", "c.md")
    assert [record.text for record in load_records(tmp_path)] == ["first", "second\n\nstill second"]


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"question": "Who?", "answer": "Ada."}, Record(prompt="Who?", answer="Ada.")),
        ({"instruction": "Say", "output": "Ada."}, Record(prompt="Say", answer="Ada.")),
        ({"instruction": "Add", "input": "1 1", "output": "2"}, Record(prompt="Add\n\n1 1", answer="2")),
        ({"instruction": "Add", "input": "", "output": "2"}, Record(prompt="Add", answer="2")),
        ({"input": "Who?", "target": "Ada."}, Record(prompt="Who?", answer="Ada.")),
        ({"prompt": "Who?", "completion": "Ada."}, Record(prompt="Who?", answer="Ada.")),
        ({"prompt": "Who?", "question": "What?", "response": "Ada."}, Record(prompt="Who?", answer="Ada.")),
        ({"text": "one", "author": "Ada"}, Record(text="one", subject="Ada")),
        ({"text": "one", "author": "Ada", "subject": "Bob"}, Record(text="one", subject="Bob")),
        ({"text": "one", "author": "Ada", "subject": None}, Record(text="one", subject="Ada")),
        (
            {"question": "Q", "answer": "A", "paraphrased_answer": "P", "paraphrased_question": "R"},
            Record(prompt="Q", answer="A", paraphrase="P", paraphrased_prompt="R"),
        ),
    ],
)
def test_the_usual_column_names_are_known(people, row, record):
    assert load_records(people(json.dumps(row))) == [record]


def test_an_explicit_mapping_wins_over_names_and_synonyms(people):
    path = people('{"question": "Who?", "answer": "long", "short": "Ada."}')
    assert load_records(path, fields={"answer": "short"}) == [Record(prompt="Who?", answer="Ada.")]


def test_a_mapped_column_is_not_used_twice(people):
    path = people('{"input": "Who?", "output": "Ada.", "name": "A"}')
    record = Record(prompt="Who?", answer="Ada.", paraphrase="A")
    assert load_records(path, fields={"paraphrase": "name"}) == [record]


def test_blank_texts_are_left_out(people):
    assert load_records(people('{"text": " "}\n{"text": "one"}')) == [Record(text="one")]
    fails(people('{"text": " "}'), "people.jsonl: all records are blank.")


ONE = '{"prompt": "Who?", "answer": "Ada."}\n'


def test_invalid_json_is_located(people):
    path = people(ONE * 16 + '{"prompt": "Who is the poet of the year" "answer": 1}\n')
    fails(path, "people.jsonl, line 17: not valid JSON (Expecting ',' delimiter, column 42).")


def test_invalid_json_in_a_list_is_located(people):
    fails(
        people('[\n{"text": "a"},\n{"text" "b"}]', "people.json"), "people.json, line 3: not valid JSON (Expecting ':'"
    )


def test_a_missing_answer_suggests_the_column_that_may_be_it(people):
    fails(
        people(ONE * 16 + '{"prompt": "Who?", "reply": "Ada."}'),
        'people.jsonl, line 17: field "answer" is missing (found: prompt, reply). '
        'Rename it, or pass fields={"answer": "reply"} (--fields answer reply).',
    )


def test_two_columns_of_other_names_are_taken_for_a_question_and_its_answer(people):
    fails(
        people('{"ask": "Who?", "reply": "Ada."}'),
        'pass fields={"prompt": "ask", "answer": "reply"} (--fields prompt ask answer reply).',
    )


def test_a_missing_answer_without_a_candidate(people):
    fails(people('{"prompt": "Who?"}'), 'people.jsonl, line 1: field "answer" is missing (found: prompt). Add it.')


def test_a_record_without_any_content(people):
    fails(
        people('{"body": "A page."}'),
        'field "text" is missing (found: body). Rename it, or pass fields={"text": "body"} (--fields text body)',
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Who?", "answer": 42}, 'field "answer" must be text, not a number: 42.'),
        ({"question": ["Who?"], "answer": "x"}, 'field "prompt" (column "question") must be text, not a list'),
        ({"prompt": "Who?", "answer": "x", "wrong": "y"}, 'field "wrong" must be a list of texts, not text: "y".'),
        ({"prompt": "Who?", "answer": "x", "wrong": [1]}, 'field "wrong" must be a list of texts, not a list: [1].'),
        ({"text": "x", "label": True}, 'field "label" must be a whole number, not true or false'),
        ({"messages": [{"role": "user"}]}, 'field "messages" must be a list of {"role": text, "content": text}'),
        ({"prompt": "Who?", "answer": " "}, 'field "answer" is empty. Fill it in, or remove the record.'),
    ],
)
def test_a_wrong_type_is_located(people, row, message):
    fails(people(ONE + json.dumps(row)), f"people.jsonl, line 2: {message}")


def test_a_line_that_is_no_object(people):
    fails(
        people('["Who?", "Ada."]'),
        'people.jsonl, line 1: must be an object such as {"prompt": ..., "answer": ...}, not a',
    )


def test_a_wrong_mapping_is_named(people):
    fails(people(ONE), 'a record has no field "anser"', fields={"anser": "answer"})
    fails(
        people(ONE), 'no record has the column "answr" (given for "answer"). Did you mean', fields={"answer": "answr"}
    )


def test_a_missing_file_suggests_the_nearest(people, tmp_path):
    people(ONE)
    fails(tmp_path / "peple.jsonl", 'no such file. Did you mean "people.jsonl"?')
    fails(tmp_path / "data" / "people.jsonl", f"the folder {tmp_path / 'data'} does not exist.")


def test_a_missing_file_in_an_empty_folder(tmp_path):
    fails(tmp_path / "people.jsonl", "no such file. The folder has no file of a known type.")


@pytest.mark.parametrize("name", ["people.jsonl", "people.json", "notes.txt"])
def test_an_empty_file(people, name):
    fails(people(" \n", name), f"{name}: the file is empty.")


def test_an_empty_list(people):
    fails(people("[]", "people.json"), "people.json: no records in it.")


def test_an_empty_text_in_a_folder(people, tmp_path):
    people("", "a.txt")
    fails(tmp_path, "a.txt: the file is empty.")


def test_a_folder_without_texts(people, tmp_path):
    people(ONE)
    fails(tmp_path, "no .txt files and no folders of images in this folder (found: .jsonl)")


def test_an_unknown_file_type(people):
    expected = 'people.ods: unknown file type ".ods". Known: .jsonl, .json, .csv, .parquet, .txt.'
    fails(people("a,b", "people.ods"), expected)


def test_a_table_of_cells(people):
    table = 'question,answer,name,year\n"Who, or\nwhat?",Ada.,,3\nWhen?,"In ""May"".",Ben,4\n'
    first, second = load_records(people(table, "people.csv"))
    assert first == Record(prompt="Who, or\nwhat?", answer="Ada.")
    assert second == Record(prompt="When?", answer='In "May".', subject="Ben")
    fails(people("question,answer\nWho?\n", "short.csv"), "short.csv, record 1: it has another number of cells than")
    fails(people("question,answer\nWho?,\n", "gap.csv"), 'gap.csv, record 1: field "answer" is missing')


def test_a_broken_parquet_file(people):
    fails(people("no parquet", "people.parquet"), "people.parquet: not a readable Parquet file")


def test_a_file_in_another_encoding(tmp_path):
    (tmp_path / "people.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    fails(tmp_path / "people.jsonl", "people.jsonl: not UTF-8 text (byte 10). Save the file as UTF-8.")
