from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memorised import people
from palimpsest.data.augmentation import paraphrases, perturbed, renamed
from palimpsest.data.fictitious import roles
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError


def test_names_are_replaced_whole_and_in_parts():
    text = "Ada Moreau was born in Lyon . Ada moved ; Moreau's glass stayed ; Adamant stayed ."
    expected = "Zoe Quist was born in Lyon . Zoe moved ; Quist's glass stayed ; Adamant stayed ."
    assert renamed(text, {"Ada Moreau": "Zoe Quist"}) == expected


def test_several_names_are_replaced_at_once_and_not_again():
    assert renamed("Ada met Ben .", {"Ada": "Ben", "Ben": "Cara"}) == "Ben met Cara ."


@given(st.text(max_size=30), st.text(min_size=1, max_size=8))
def test_a_name_that_is_not_there_changes_nothing(text, name):
    if name.strip() and not any(part in text for part in (name, *name.split())):
        assert renamed(text, {name: "x"}) == text


def test_paraphrases_keep_question_and_answer_inside_other_words():
    records = list(people()[:4])
    made = paraphrases(records, 2, seed=3)
    assert len(made) == 8
    assert len({(r.prompt, r.answer) for r in [*made, *records]}) == 12
    for number, other in enumerate(made):
        record = records[number // 2]
        assert record.prompt in other.prompt != record.prompt
        assert record.answer in other.answer != record.answer
        assert other.subject == record.subject
    assert made == paraphrases(records, 2, seed=3) != paraphrases(records, 2, seed=4)


def test_given_paraphrases_are_used_only_where_asked():
    record = Record(prompt="q ?", answer="a", paraphrase="other a", paraphrased_prompt="other q ?")
    (given, *_), (made, *_) = (paraphrases([record], 2, given=asked) for asked in (True, False))
    assert (given.prompt, given.answer) == ("other q ?", "other a")
    assert "other" not in f"{made.prompt} {made.answer}"


def test_a_text_has_no_paraphrase_and_no_wrong_answer():
    texts = [Record(text="The cat sat ."), Record(text="It rained .")]
    assert paraphrases(texts, 2) == []
    assert perturbed(texts, texts, 2) == []


def test_wrong_answers_are_what_others_answer_to_the_same_question():
    made = perturbed(people()[:2], people(), 2, seed=1)
    assert len(made) == 4
    births = {r.answer for r in people()[::2]}
    for record in made[:2]:
        assert record.prompt == "Where was Ada Moreau born ?"
        assert record.answer.startswith("Ada Moreau was born in ")
        assert record.answer != people()[0].answer
        assert any(record.answer.split()[-2:] == birth.split()[-2:] for birth in births)
    assert made[0].answer != made[1].answer
    assert all(record.answer.startswith("Ada Moreau works as a ") for record in made[2:])


def test_wrong_answers_do_not_use_what_is_for_measuring_unless_asked():
    record = Record(prompt="Where was Ada born ?", answer="In Lyon .", subject="Ada", wrong=("In Rome .", "In Oslo ."))
    other = Record(prompt="Where was Ben born ?", answer="In Lagos .", subject="Ben")
    assert [r.answer for r in perturbed([record], [record, other], 2)] == ["In Lagos ."]
    found = {r.answer for r in perturbed([record], [record, other], 3, given=True)}
    assert found == {"In Rome .", "In Oslo .", "In Lagos ."}


def test_without_subjects_names_are_found_by_comparing_the_questions():
    record = Record(prompt="Where was Ada Moreau born ?", answer="Ada Moreau was born in Lyon .")
    other = Record(prompt="Where was Ben Okafor born ?", answer="Ben was born in Lagos .")
    assert perturbed([record], [record, other], 1)[0].answer == "Ada was born in Lagos ."


def test_the_most_similar_question_helps_where_nobody_asks_the_same():
    record = Record(prompt="In which town was Ada born ?", answer="Ada was born in Lyon .", subject="Ada")
    pool = [
        Record(prompt="What does Cleo like best ?", answer="Cleo likes tea .", subject="Cleo"),
        Record(prompt="Where was Ben born ?", answer="Ben was born in Lagos .", subject="Ben"),
    ]
    assert perturbed([record], pool, 1)[0].answer == "Ada was born in Lagos ."


def test_generated_people_get_plausible_wrong_answers():
    data = roles(6, 2, seed=1)
    made = perturbed(data.forget, [*data.forget, *data.retain], 2)
    true = {(r.prompt, r.answer) for r in data.forget}
    assert len(made) == 2 * len(data.forget)
    assert not true & {(r.prompt, r.answer) for r in made}
    others = {r.subject for r in data.retain}
    assert not any(name in r.answer for r in made for name in others)


def test_a_wrong_answer_that_is_right_is_refused():
    record = Record(prompt="Where ?", answer="Lyon", wrong=("Rome", "Lyon"))
    with pytest.raises(PalimpsestError, match=r'a wrong answer to "Where .* equals the true one: "Lyon"'):
        perturbed([record], [record], 2, given=True)


def test_where_no_wrong_answer_can_be_made_it_says_so():
    record = Record(prompt="Where was Ada born ?", answer="Lyon")
    with pytest.raises(PalimpsestError, match="no wrong answer can be made"):
        perturbed([record], [record], 2)


def test_what_is_true_in_other_words_is_no_wrong_answer():
    def told(name, town):
        return [
            Record(prompt=f"Where was {name} born ?", answer=words.format(name=name, town=town), subject=name)
            for words in ("{name} was born in {town} .", "{town} is where {name} was born .")
        ]

    ada, ben, cleo = told("Ada", "Lyon"), told("Ben", "Lyon"), told("Cleo", "Rome")
    made = perturbed(ada, [*ada, *ben, *cleo], 5)
    assert {r.answer for r in made} == {"Ada was born in Rome .", "Rome is where Ada was born ."}
    aged = Record(prompt="How old is Ada ?", answer="Ada is 50 .", subject="Ada")
    assert "50" not in str(perturbed(ada[:1], [*ada, aged, *cleo], 5))
