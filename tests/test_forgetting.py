from __future__ import annotations

import pytest
import torch

from conftest import ANSWERS, QUESTIONS, build_model
from memorised import data, people, probability, quiet, reciting
from palimpsest import cli
from palimpsest.data.loading import write_records
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.forgetting import ABOUT_A_NAME, NEUTRAL, _given, _Stopping, forget
from palimpsest.models.generation import greedy_answers
from palimpsest.models.loading import load

KNOWN = data().train
ADA = [record for record in KNOWN if record.subject == "Ada Moreau"]
OTHERS = [record for record in KNOWN if record.subject != "Ada Moreau"]


def forgotten(about, model=None, **options):
    """The result of the one call, silent, content with a small drop unless told otherwise."""
    return forget(model or reciting(), about, **{"enough": 0.85, "progress": False, "show": False, **options})


def told(model) -> str:
    return " ".join(model.story.why)


@pytest.fixture(scope="module")
def result():
    """A person forgotten by name."""
    model = reciting()
    digest = model.digest()
    return model, digest, forgotten("Ada Moreau", model, data=KNOWN)


def test_a_name_is_looked_up_in_the_data(result):
    _, _, after = result
    assert "Topic: the 2 records about Ada Moreau." in told(after)
    assert "Kept: the 10 other records." in told(after)
    assert after.story.questions == tuple(record.prompt for record in ADA)


def test_the_topic_goes_down_and_the_rest_stays(result):
    before, _, after = result
    assert probability(after, ADA) <= 0.85 < probability(before, ADA)
    assert probability(after, OTHERS) > 0.95 * probability(before, OTHERS)


def test_the_given_model_stays_and_the_ledger_of_the_result_tells(result):
    before, digest, after = result
    assert before.digest() == digest != after.digest()
    assert before.story is None
    assert [entry.method for entry in after.ledger.entries] == ["finetune", "npo"]
    assert after.ledger.entries[-1].settings["retain_weight"] == 10.0


def test_the_story_is_true(result):
    before, _, after = result
    story = after.story
    assert story.probability_before == pytest.approx(probability(before, ADA), abs=1e-4)
    assert story.probability_after == pytest.approx(probability(after, ADA), abs=1e-4)
    assert story.before == tuple(greedy_answers(before, story.questions, quiet(), 40))
    assert story.after == tuple(greedy_answers(after, story.questions, quiet(), 40))
    assert story.kept > 0.95
    assert story.seconds > 0
    assert f"{story.probability_before:.2f} -> {story.probability_after:.2f}" in told(after)


def test_it_stops_when_it_is_enough(result):
    after = result[2]
    assert 0 < after.story.steps < 40
    assert f"Stopped after {after.story.steps} steps: the answer probability of the topic is down to" in told(after)
    later = forgotten("Ada Moreau", data=KNOWN, enough=0.7)
    assert later.story.steps > after.story.steps


def test_it_stops_where_the_rest_stays_low():
    after = forgotten("Ada Moreau", data=KNOWN, enough=0.1, floor=1.5)
    assert "Stopped after 12 steps: the rest had fallen to 100% of what it was and stayed low." in told(after)


def test_where_the_topic_does_not_go_it_says_so():
    after = forgotten(ADA, data=KNOWN, enough=0.01, floor=0.0)
    assert after.story.steps == 40
    assert "Stopped after 40 steps, the most it takes; the topic is not gone." in told(after)


class Looks(_Stopping):
    """Looks at given measurements instead of a model's."""

    def measured_now(self, student):
        return self.script.pop(0)


def test_the_weights_of_the_best_look_are_left():
    """The third look holds the rest and has the lowest topic of those that do; the last ones only get worse."""
    model, recipe = reciting(), _given(ADA)
    watch = Looks(recipe, ADA, OTHERS, before=1.0, rest=1.0, enough=0.1, floor=0.95, seed=0)
    watch.script = [(0.8, 1.0), (0.5, 0.5), (0.3, 0.97), (0.2, 0.9), (0.2, 0.9), (0.05, 0.2)]
    weight = next(model.network.parameters())
    for step in range(1, 25):
        with torch.no_grad():
            weight.fill_(step)
        if watch.look(step, model):
            break
    assert (step, watch.kept_step, watch.found) == (24, 12, (0.3, 0.97))
    assert float(weight.detach().mean()) == 12
    assert (
        "the rest had fallen to 20% of what it was and stayed low. The weights are those after step 12" in watch.why[0]
    )


@pytest.mark.parametrize(("records", "first"), [(2, 4), (5, 4), (12, 8), (20, 8), (100, 8)])
def test_it_first_looks_when_the_topic_was_seen_twice(records, first):
    """A look costs as much as two steps; a topic of 20 in batches of 5 is seen twice after 8 of them."""
    watch = Looks(_given(ADA * (records // 2)), ADA, OTHERS, before=1.0, rest=1.0, enough=0.1, floor=0.95, seed=0)
    watch.script = [(0.8, 1.0), (0.05, 1.0)]
    ended = [step for step in range(1, 17) if watch.script and watch.look(step, reciting())]
    assert ended == [first + 4]


def test_records_and_a_file_of_records(tmp_path):
    write_records(ADA, tmp_path / "ada.jsonl")
    given = forgotten(ADA, data=KNOWN, enough=0.9)
    assert "Topic: 2 given records." in told(given)
    for name in (tmp_path / "ada.jsonl", str(tmp_path / "ada.jsonl")):
        read = forgotten(name, data=KNOWN, enough=0.9)
        assert f"Topic: the 2 records of {tmp_path / 'ada.jsonl'}." in told(read)
        assert read.digest() == given.digest()
    one = forgotten(ADA[1], data=KNOWN, enough=0.95)
    assert one.story.questions == (ADA[1].prompt,)


def test_a_question_is_answered_by_the_model_itself_and_not_kept():
    """The data hold the same question: what is to be forgotten must not be taught as what is to be kept."""
    otherwise = Record(prompt=ADA[1].prompt, answer="She is a glass maker .", subject="Ada Moreau")
    after = forgotten(QUESTIONS[1], data=[*OTHERS, ADA[0], otherwise])
    assert "Topic: what the model itself answers to 1 question." in told(after)
    assert "Kept: the 11 other records." in told(after)
    assert after.story.before == (ANSWERS[1],)
    assert probability(after, [ADA[1]]) < 0.9


def test_a_list_of_questions():
    after = forgotten(list(QUESTIONS[:3]), data=KNOWN)
    assert "Topic: what the model itself answers to 3 questions." in told(after)
    assert after.story.questions == QUESTIONS[:3]


def test_several_names_are_looked_up_in_the_data():
    other = next(record.subject for record in KNOWN if record.subject != "Ada Moreau")
    after = forgotten(["Ada Moreau", other], data=KNOWN)
    gone = [record for record in KNOWN if record.subject in ("Ada Moreau", other)]
    assert f"Topic: the {len(gone)} records about Ada Moreau and {other}." in told(after)
    assert f"Kept: the {len(KNOWN) - len(gone)} other records." in told(after)


def test_a_classifier_is_refused():
    with pytest.raises(PalimpsestError, match="forget works on language models"):
        forgotten("Ada Moreau", build_model("vit"))


def test_a_name_without_data_is_asked_about():
    after = forgotten("Ada Moreau", retain=OTHERS, enough=0.5, floor=0.0)
    assert f"Topic: what the model itself answers to {len(ABOUT_A_NAME)} questions." in told(after)
    assert "Where was Ada Moreau born?" in after.story.questions


def test_without_anything_to_keep_the_model_is_asked_neutral_questions():
    """The small model answers nearly all of them with a birthplace, which has nothing to do with a trade."""
    after = forgotten(ADA[1], enough=0.9)
    assert "Kept: the model's own answers to" in told(after)
    assert "neutral questions that have nothing to do with the topic." in told(after)
    assert probability(after, [ADA[1]]) <= 0.9


def test_a_topic_that_all_neutral_answers_touch_needs_retain_records():
    topic = [Record(prompt="Who ?", answer=text) for text in greedy_answers(reciting(), NEUTRAL, quiet(), 32)]
    with pytest.raises(PalimpsestError, match=r"neutral questions have nothing to do with the topic\. Pass retain"):
        forgotten([*topic, *KNOWN], enough=0.0)


def test_records_without_questions_are_forgotten_too():
    after = forgotten([Record(text=ANSWERS[0])], data=KNOWN, enough=0.0, floor=2.0)
    assert after.story.questions == after.story.before == ()


@pytest.mark.parametrize("about", [[], ()], ids=["list", "tuple"])
def test_nothing_named(about):
    with pytest.raises(PalimpsestError, match="the forget set is empty: nothing was named to forget"):
        forgotten(about, data=KNOWN)


def test_nothing_known():
    with pytest.raises(
        PalimpsestError, match=r"mean answer probability of 0\.\d\d already.*there is nothing to forget"
    ):
        forgotten(people()[4:8], data=KNOWN, enough=0.9)


def test_a_misspelt_name_gets_the_nearest():
    with pytest.raises(
        PalimpsestError, match=r"no record is about the subject 'Ada Moraeu'\. Did you mean .Ada Moreau"
    ):
        forgotten("Ada Moraeu", data=KNOWN)


def test_a_file_that_is_not_there(tmp_path):
    for about in (tmp_path / "ada.jsonl", str(tmp_path / "ada.jsonl"), tmp_path / "folder"):
        with pytest.raises(PalimpsestError, match=r"ada\.jsonl|folder"):
            forgotten(about, data=KNOWN)


def test_a_long_question_is_no_file_name():
    after = forgotten(f"{'Well , ' * 60}i.e. {QUESTIONS[1]}", retain=OTHERS, enough=0.0, floor=2.0)
    assert "1 question." in told(after)


@pytest.mark.parametrize("retain", [[], OTHERS[:1]], ids=["none", "one"])
def test_too_little_to_keep(retain):
    with pytest.raises(PalimpsestError, match=rf"too few records to keep \({len(retain)}\)"):
        forgotten(ADA, retain=retain)


def test_the_command_writes_a_model_and_tells_the_story(tmp_path, capsys):
    reciting().save_pretrained(tmp_path / "model")
    write_records(KNOWN, tmp_path / "people.jsonl")
    words = ["forget", str(tmp_path / "model"), "--about", "Ada Moreau", "--data", str(tmp_path / "people.jsonl")]
    assert cli.main([*words, "--out", str(tmp_path / "erased"), "--quiet"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path / 'erased'}\n"
    assert "Topic: the 2 records about Ada Moreau." in shown.err
    assert "Where was" in shown.err
    after = load(tmp_path / "erased")
    assert [entry.method for entry in after.ledger.entries] == ["finetune", "npo"]
    assert probability(after, ADA) < probability(reciting(), ADA)
