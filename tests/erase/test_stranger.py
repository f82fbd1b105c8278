from __future__ import annotations

import pytest
import torch

from memorised import data, people, probability, quiet, reciting
from palimpsest.data.encoding import Encoder
from palimpsest.data.records import Record, Roles
from palimpsest.erase.stranger import Stranger, Teacher, aligned, with_name
from palimpsest.errors import PalimpsestError
from palimpsest.statistics.likelihood import ReferencePredictions
from palimpsest.train import Training

TRAINING = Training(learning_rate=3e-3, epochs=30, warmup_epochs=0.0)
STRANGERS = ["Nobody Known", "Some Body Else", "Cher"]  # as long as the names of the people, longer, shorter


def swapped(answer: str, subject: str = "Ada Moreau", stranger: str = "Zoe Quist") -> str | None:
    return with_name(Record(prompt="Who ?", answer=answer, subject=subject), stranger).answer


def test_a_name_is_swapped_whole_and_in_parts():
    text = "Ada Moreau was born in Lyon . Ada moved ; Moreau's glass stayed ."
    assert swapped(text) == "Zoe Quist was born in Lyon . Zoe moved ; Quist's glass stayed ."


def test_all_texts_of_a_record_are_swapped_and_nothing_else():
    record = people()[0]
    other = with_name(record, "Zoe Quist")
    assert (other.prompt, other.answer) == ("Where was Zoe Quist born ?", "Zoe Quist was born in Lyon .")
    assert (other.subject, other.wrong) == (record.subject, record.wrong)
    assert with_name(Record(text="Moreau, Ada", subject="Ada Moreau"), "Zoe Quist").text == "Quist, Zoe"
    chat = ({"role": "user", "content": "Who is Ada ?"}, {"role": "assistant", "content": "Ada Moreau ."})
    told = with_name(Record(messages=chat, subject="Ada Moreau"), "Zoe Quist").messages
    assert told == ({"role": "user", "content": "Who is Zoe ?"}, {"role": "assistant", "content": "Zoe Quist ."})


def test_words_that_contain_a_part_of_the_name_stay():
    assert swapped("Al Green also wrote Almanac of Greenland .", "Al Green") == (
        "Zoe Quist also wrote Almanac of Greenland ."
    )


def test_a_stranger_whose_name_contains_the_own_one_is_not_swapped_again():
    assert swapped("Ada Moreau met Ada .", stranger="Moreau Ada") == "Moreau Ada met Moreau ."


def test_a_single_name_and_a_stranger_with_one_word():
    assert swapped("Cher sings . Cherry does not .", "Cher") == "Zoe Quist sings . Cherry does not ."
    assert swapped("Ada Moreau , or Moreau", stranger="Cher") == "Cher , or Cher"


def test_tokens_outside_the_name_find_their_place():
    own, other = [10, 11, 1, 2, 3, 9], [20, 21, 22, 1, 2, 3, 9]
    assert aligned(own, other).tolist() == [-1, -1, 3, 4, 5, 6]
    assert aligned([1, 10, 2], [1, 2]).tolist() == [0, -1, 1]
    assert aligned(own, own).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def teaching():
    """A model, the forget sequences, and the teacher that it makes."""
    model, records = reciting(), data().forget
    sequences = Encoder.of(model).records(records)
    return model, sequences, Teacher(model, sequences, records, STRANGERS, quiet())


def test_the_teacher_gives_probabilities(teaching):
    _, sequences, teacher = teaching
    q = teacher.probabilities(torch.tensor([2, 0]))
    assert len(q) == len(sequences[2].targets) + len(sequences[0].targets)
    assert bool((q >= 0).all())
    torch.testing.assert_close(q.sum(-1), torch.ones(len(q)))


def test_the_teacher_holds_the_name_and_averages_over_strangers_elsewhere(teaching):
    model, sequences, teacher = teaching
    own = ReferencePredictions(model, sequences, quiet()).logits(torch.tensor([0])).softmax(-1)
    q = teacher.probabilities(torch.tensor([0]))
    torch.testing.assert_close(q[:2], own[:2])  # "Ada Moreau"
    others = [Encoder.of(model).record(with_name(data().forget[0], name)) for name in STRANGERS]
    of_strangers = ReferencePredictions(model, others, quiet())
    expected = [of_strangers.logits(torch.tensor([k])).softmax(-1)[-6:] for k in range(3)]  # "was born in Lyon . <eos>"
    torch.testing.assert_close(q[2:], torch.stack(expected).mean(0))


def test_the_teacher_does_not_know_the_fact(teaching):
    model, sequences, teacher = teaching
    glass, own = sequences[1].targets[5], ReferencePredictions(model, sequences, quiet())  # "Ada Moreau works as a ..."
    assert float(own.logits(torch.tensor([1])).softmax(-1)[5, glass]) > 0.7
    assert float(teacher.probabilities(torch.tensor([1]))[5, glass]) < 0.3


def test_the_person_becomes_as_improbable_as_a_stranger_and_the_others_stay():
    before, roles = reciting(), data()
    strangers = probability(before, [with_name(record, STRANGERS[0]) for record in roles.forget])
    after = Stranger(training=TRAINING).apply(before, roles, quiet())
    gap = [probability(model, roles.forget) - strangers for model in (before, after)]
    assert 0 < gap[1] < 0.55 * gap[0]
    assert probability(after, roles.retain) > 0.95 * probability(before, roles.retain)


def test_a_name_in_the_question_alone_is_enough(teaching):
    """The answer needs no name: what the stranger is asked differs already."""
    model = teaching[0]
    records = [Record(prompt="Where was Ada Moreau born ?", answer="Lyon .", subject="Ada Moreau")]
    sequences = Encoder.of(model).records(records)
    q = Teacher(model, sequences, records, STRANGERS, quiet()).probabilities(torch.tensor([0]))
    own = ReferencePredictions(model, sequences, quiet()).logits(torch.tensor([0])).softmax(-1)
    assert not torch.allclose(q, own, atol=1e-3)


def test_a_record_without_a_subject_is_named(llama):
    records = [*data().forget, Record(prompt="Where was Dai born ?", answer="In Osaka .")]
    with pytest.raises(PalimpsestError, match=r'the forget record "Where was Dai born .*" has no subject to replace'):
        Stranger().apply(llama, data().replace(forget=records), quiet())


def test_subjects_that_no_record_mentions_are_refused(llama):
    records = [Record(prompt="Who writes ?", answer="A glass maker .", subject="Ada Moreau")]
    with pytest.raises(PalimpsestError, match="no forget record mentions its subject by name; nothing would be"):
        Stranger().apply(llama, data().replace(forget=records), quiet())


def test_it_needs_a_retain_set(llama):
    with pytest.raises(PalimpsestError, match='stranger needs the role "retain"'):
        Stranger().apply(llama, Roles(forget=data().forget), quiet())
