"""The probes on a model that recites the forget people, on gold, and on models that say nothing of use."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import zlib
from functools import cache

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from conftest import build_model, build_tokenizer
from memorised import data, gold, people, quiet, reciting
from palimpsest.audit import answers as answers_module
from palimpsest.audit import muse_memory
from palimpsest.audit.answer_probability import probabilities
from palimpsest.audit.answers import answers, generated, scored
from palimpsest.audit.battery import Audit, audit, probes
from palimpsest.data.encoding import Encoder
from palimpsest.data.records import Record, Roles
from palimpsest.errors import PalimpsestError
from palimpsest.models.hooks import no_hooks_left
from palimpsest.models.model import Model
from palimpsest.statistics import likelihood
from palimpsest.system import Probe, catalogue, create
from palimpsest.train import Training

FAST = 12  # tokens an answer
WORLD = people()[4:6]


def battery() -> list[Probe]:
    relearning = create("relearning", share=0.25, training=Training(learning_rate=3e-3, epochs=4, warmup_epochs=0.0))
    own = ("relearning", "verbatim-memory", "knowledge-memory", "recitation")
    every = [slug for slug, facts in catalogue().items() if facts.verb == "audit" and facts.takes != "classifier"]
    suited = [slug for slug in every if slug != "member-gains"]  # which is for mixtures
    rest = probes([probe for probe in suited if probe not in own], FAST)
    recitation = create("recitation", prefix=2, suffix=3)
    memory = [create("verbatim-memory", max_new_tokens=FAST), create("knowledge-memory", shots=0)]
    return [*rest, relearning, recitation, *memory]


def roles() -> Roles:
    return data().replace(world=WORLD, train=None)


@cache
def audits() -> dict[str, Audit]:
    run, reference = quiet(), gold()
    models = {"reciting": reciting(), "gold": reference, "fresh": build_model("llama")}
    return {name: audit(model, roles(), battery(), run, gold=reference) for name, model in models.items()}


def test_no_probe_fails():
    assert {name: found.failures for name, found in audits().items()} == {"reciting": (), "gold": (), "fresh": ()}


@pytest.mark.parametrize(
    "name",
    [
        "probability/forget",
        "rouge/forget",
        "extraction_strength/forget",
        "exact_memorisation/forget",
        "verbatim_memory/forget",
        "auc/loss",
        "auc/zlib",
        "auc/min-k",
        "auc/min-k++",
        "auc/reference",
        "ks_distance",
    ],
)
def test_what_is_memorised_shows(name):
    found = audits()
    against = "fresh" if name == "auc/reference" else "gold"  # gold has no reference but itself
    assert found["reciting"][name].value > found[against][name].value + 0.1


def test_gold_cannot_be_told_from_itself():
    assert audits()["gold"]["forget_quality"].value == pytest.approx(1)
    assert audits()["reciting"]["forget_quality"].value < 1
    assert audits()["gold"]["privleak"].value == pytest.approx(0)
    assert audits()["reciting"]["privleak"].value < -20


def test_a_model_that_learned_is_of_more_use_than_a_fresh_one():
    for name in ("probability/retain", "rouge/retain", "exact_memorisation/retain"):
        assert audits()["gold"][name].value > audits()["fresh"][name].value
    assert audits()["fresh"]["gibberish/forget"].value > audits()["gold"]["gibberish/retain"].value


def test_every_interval_holds_its_value():
    for found in audits().values():
        for reading in found.readings:
            for value in reading.values:
                if value.low is not None:
                    assert value.low - 1e-12 <= value.value <= value.high + 1e-12, value


def test_every_n_is_the_number_of_records():
    given, found = roles(), audits()["reciting"]
    for role in ("forget", "retain", "world"):
        for name in ("probability", "rouge", "truth_ratio", "gibberish"):
            assert found[f"{name}/{role}"].n == len(given[role])
    assert found["auc/min-k"].n == 4
    assert found["forget_quality"].n == 4
    assert found["perplexity/general"].n == len(given["general"])
    assert audits()["gold"]["robustness"].n == 3


def test_the_means_are_those_of_the_arrays():
    for reading in audits()["reciting"].readings:
        for value in reading.values:
            if value.name in reading.arrays and reading.probe not in ("truth-ratio",):
                assert value.value == pytest.approx(np.mean(reading.arrays[value.name]))


def test_small_samples_and_missing_sets_are_said():
    caveats = [caveat for reading in audits()["reciting"].readings for caveat in reading.caveats]
    assert "forget quality rests on 4 examples: the test has little power" in caveats
    assert "model utility is the harmonic mean of 6 measures instead of 9" in caveats


def test_an_audit_is_plain_json():
    saved = json.loads(json.dumps(audits()["reciting"].to_dict()))
    assert len(saved["readings"]) == len(battery())


def test_the_perplexity_is_that_of_the_texts(llama, run):
    texts = data().general
    found = create("perplexity").measure(llama, Roles(general=texts), run)
    total, count = 0.0, 0
    for record in texts:
        ids = llama.tokenizer(record.text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            total += float(llama(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert found["perplexity/general"].value == pytest.approx(math.exp(total / count), rel=1e-5)


# --- failures --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_measured_is_said_once(llama, capsys):
    run = quiet(progress=True)
    for model in (llama, llama.copy()):
        audit(model, data().replace(holdout=None), probes(["membership", "answer-probability"]), run)
    told = " ".join(capsys.readouterr().err.split())
    assert told.count('membership was not measured: membership needs the role "holdout"') == 1
    assert "answer-probability" not in told
    audit(llama, data().replace(holdout=None), probes(["membership"]), quiet())
    assert not capsys.readouterr().err


def test_a_probe_that_fails_does_not_lose_the_others(llama):
    given = roles().replace(holdout=None)
    found = audit(llama, given, probes(["membership", "forget-quality", "answer-probability", "privleak"]), quiet())
    assert [reading.probe for reading in found.readings] == ["answer-probability"]
    reasons = {failure["probe"]: failure["error"] for failure in found.failures}
    assert reasons["membership"] == 'membership needs the role "holdout" (given: forget, retain, general, world).'
    assert "pass gold" in reasons["forget-quality"]
    assert set(reasons) == {"membership", "forget-quality", "privleak"}


def test_a_role_that_cannot_be_scored_does_not_lose_the_others(llama):
    given = roles().replace(general=[Record(text="")])
    found = audit(llama, given, probes(["perplexity", "answer-probability"]), quiet())
    assert [reading.probe for reading in found.readings] == ["answer-probability"]
    assert "no token to score" in found.failures[0]["error"]


def test_an_empty_holdout_is_refused(llama):
    with pytest.raises(PalimpsestError, match="the holdout set is empty"):
        create("membership").measure(llama, roles().replace(holdout=[]), quiet())


def test_relearning_needs_records_to_measure_on(llama):
    with pytest.raises(PalimpsestError, match="needs at least 2 forget records"):
        create("relearning").measure(llama, Roles(forget=people()[:1]), quiet(), gold=llama)


def test_an_unknown_probe_is_refused():
    with pytest.raises(PalimpsestError, match=r"is not a probe\. Probes: answer-probability"):
        probes(["npo"])
    with pytest.raises(PalimpsestError, match=r"there is no system 'rouge-recal'\. Did you mean"):
        probes(["rouge-recal"])


# --- scores computed once, never stale -------------------------------------------------------------------------------


def counted(model):
    """The number of forward passes of a model, as a list that grows."""
    passes = []
    model.network.register_forward_pre_hook(lambda *_: passes.append(1))
    return passes


def test_the_same_sequences_are_scored_once(llama):
    run, passes = quiet(), counted(llama)
    first = answers(llama, data().forget, run)
    done = len(passes)
    assert done > 0
    again = answers(llama, data().forget, run)
    assert len(passes) == done
    for one, other in zip(first, again, strict=True):
        assert one is other


def test_the_same_questions_are_answered_once(llama):
    run, passes = quiet(), counted(llama)
    first = generated(llama, data().forget, run, 4)
    done = len(passes)
    assert generated(llama, data().forget, run, 4) == first
    assert len(passes) == done


@pytest.mark.parametrize("fused", [True, False])
def test_a_changed_model_is_never_served_old_scores(llama, fused):
    run, records = quiet(), data().forget
    before = answers(llama, records, run)
    optimizer = torch.optim.AdamW(llama.network.parameters(), lr=1e-4, fused=fused)
    sequence = torch.tensor([[5, 6, 7, 8]])
    llama(input_ids=sequence, labels=sequence).loss.backward()
    optimizer.step()
    fresh = answers(llama.copy(), records, quiet())
    for old, new, expected in zip(before, answers(llama, records, run), fresh, strict=True):
        assert not np.array_equal(new.log_prob, old.log_prob)
        assert np.array_equal(new.log_prob, expected.log_prob)


@pytest.mark.parametrize("name", ["llama", "gpt2", "moe"])
@pytest.mark.parametrize("budget", [1, 60, 4096])
def test_scores_do_not_depend_on_what_is_scored_together(name, budget, monkeypatch):
    model = build_model(name)
    sequences = Encoder.of(model).records([*data().train, *data().general])
    expected = scored(model, sequences, quiet())
    monkeypatch.setattr(likelihood, "ROW_TOKENS", budget)
    for one, other in zip(scored(model, sequences[::-1], quiet())[::-1], expected, strict=True):
        for field in ("log_prob", "mean", "deviation"):
            np.testing.assert_allclose(getattr(one, field), getattr(other, field), atol=1e-5)
        assert one.end == other.end


def test_answers_do_not_depend_on_what_is_asked_together():
    model, records = reciting(), data().train
    together = generated(model, records, quiet(), FAST)
    alone = [generated(model, [record], quiet(), FAST)[0] for record in records]
    assert together == alone == [record.answer for record in records]


# --- text health -----------------------------------------------------------------------------------------------------


@pytest.fixture
def speaking(monkeypatch):
    """What a model is taken to have answered."""

    def say(*texts: str):
        monkeypatch.setattr(answers_module, "greedy_answers", lambda *_: list(texts))
        given = Roles(forget=data().forget[: len(texts)])
        reading = create("text-health", limit=3.0).measure(build_model("llama"), given, quiet(), gold=reciting())
        return {name.split("/")[0]: values for name, values in reading.arrays.items()}

    return say


def test_text_health_sees_through_gibberish_refusals_and_silence(speaking):
    found = speaking("Ada Moreau was born in Lyon .", "mat mat mat mat mat mat", "", "I don't know .")
    assert found["gibberish"][:3] == [0, 1, 1]
    assert found["refusals"] == [0, 0, 0, 1]
    assert found["repetition"] == pytest.approx([0, 2 / 3, 0, 0])


def test_text_health_sees_words_that_make_no_sense(speaking):
    assert speaking("bread kite the of silk sea")["gibberish"] == [1]


def test_without_gold_text_health_says_who_judges(llama):
    reading = create("text-health", max_new_tokens=4).measure(llama, Roles(forget=data().forget), quiet())
    assert reading.caveats == ("gibberish is judged by the model itself, since no gold model was given",)


# --- relearning ------------------------------------------------------------------------------------------------------


ATTACK = Training(learning_rate=5e-3, epochs=4, batch_size=4, warmup_epochs=0.0, decay="constant")


def relearning(model, reference, given=None, run=None):
    probe = create("relearning", share=0.5, training=ATTACK)
    return probe.measure(model, given or roles(), run or quiet(), gold=reference)


def test_relearning_leaves_both_models_as_they_were():
    model, reference = reciting(), gold()
    before = model.digest(), reference.digest()
    relearning(model, reference)
    assert (model.digest(), reference.digest()) == before
    assert no_hooks_left(model.network)


def test_gold_is_as_robust_as_gold():
    reference = gold()
    assert relearning(reference, reference)["robustness"].value == 1
    assert relearning(reference.copy(), reference)["robustness"].value == 1


def test_a_model_that_has_not_forgotten_has_nothing_to_relearn_and_is_not_called_robust():
    reading = relearning(reciting(), gold())
    assert [value.name for value in reading.values] == ["relearned/forget"]
    assert "nothing to relearn" in reading.caveats[0]


def test_the_curve_starts_before_the_attack_and_is_measured_at_its_end():
    reading = relearning(reciting(), gold())
    assert reading.arrays["steps"] == [0, 1, 2, 3, 4]
    assert len(reading.arrays["probability"]) == len(reading.arrays["probability_gold"]) == 5
    assert reading["relearned/forget"].value == reading.arrays["probability"][-1]


def test_another_forget_set_has_another_curve_in_the_same_run():
    model, reference, run = reciting(), gold(), quiet()
    first = relearning(model, reference, run=run)
    other = Roles(forget=roles().retain[:4])
    again = relearning(model, reference, other, run)
    assert again.arrays["probability"] != first.arrays["probability"]
    assert again.arrays == relearning(model, reference, other).arrays


# --- the single probes -----------------------------------------------------------------------------------------------


def test_gradient_norms_are_taken_in_eval_mode_and_leave_no_gradient(gpt2):
    from palimpsest.audit.membership import gradient_norms

    gpt2.network.train()
    norms = gradient_norms(gpt2, data().forget, quiet())
    assert norms.shape == (4,)
    assert (norms > 0).all()
    assert all(weight.grad is None for weight in gpt2.network.parameters())


def test_the_gradient_norm_is_the_mean_over_weight_tensors(llama):
    from palimpsest.audit.membership import gradient_norms

    (norm,) = gradient_norms(llama, data().forget[:1], quiet())
    network = copy.deepcopy(llama.network)
    (sequence,) = Encoder.of(llama).records(data().forget[:1])
    labels = torch.tensor([[*[-100] * sequence.start, *sequence.targets]])
    network(input_ids=torch.tensor([sequence.tokens]), labels=labels).loss.backward()
    expected = np.mean([float(weight.grad.norm()) for weight in network.parameters()])
    assert norm == pytest.approx(expected, rel=1e-4)


def test_gradient_norms_are_those_of_one_record_at_a_time(causal_lm):
    from palimpsest.audit.membership import gradient_norms
    from palimpsest.data.packing import pad

    records, weights = [*data().forget, *roles().general], list(causal_lm.network.parameters())
    expected = []
    for sequence in Encoder.of(causal_lm).records(records):
        packed = pad([sequence])
        loss = torch.nn.functional.cross_entropy(packed.target_logits(causal_lm.network), packed.targets)
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        expected.append(float(torch.stack([g.norm() for g in gradients if g is not None]).mean()))
    np.testing.assert_allclose(gradient_norms(causal_lm, records, quiet()), expected, rtol=1e-5)


def test_multiple_choice_answers_compete(llama):
    choices = [Record(prompt=r.prompt, answer=r.answer, wrong=r.wrong) for r in data().forget]
    plain = create("answer-probability").measure(llama, Roles(forget=data().forget), quiet())
    chosen = create("answer-probability").measure(llama, Roles(forget=choices), quiet())
    assert chosen["probability/forget"].value == pytest.approx(1 / 6, abs=0.05)  # six options, nothing known
    assert plain["probability/forget"].value < 0.05


def test_the_truth_ratio_needs_wrong_answers(llama):
    given = Roles(forget=[Record(prompt="Who ?", answer="Ada Moreau .")])
    assert create("truth-ratio").measure(llama, given, quiet()).values == ()
    with pytest.raises(PalimpsestError, match='forget quality needs the field "wrong"'):
        create("forget-quality").measure(llama, given, quiet(), gold=llama)


def test_privleak_without_gold_says_what_it_takes_instead(llama):
    reading = create("privleak").measure(llama, roles(), quiet())
    assert reading.caveats == ("PrivLeak takes 0.5 as the gold AUC, since no gold model was given",)


def test_each_record_is_measured_by_what_it_has_itself():
    """A record without options next to multiple choice does not change how the others are measured."""
    model, choice = reciting(), [dataclasses.replace(record, paraphrase=None) for record in people()[:4]]
    plain = dataclasses.replace(choice[0], wrong=())
    together = probabilities(model, [*choice, plain], quiet())
    assert together[:4] == pytest.approx(probabilities(model, choice, quiet()))
    assert together[4] == pytest.approx(float(probabilities(model, [plain], quiet())[0]))


def test_zlib_of_a_chat_is_that_of_its_last_turn():
    model = reciting()
    model = Model(model.network, build_tokenizer(chat=True))
    turns = [({"role": "user", "content": r.prompt}, {"role": "assistant", "content": r.answer}) for r in people()]
    chats = [Record(messages=turn) for turn in turns]
    found = create("membership", gradients=False).measure(model, Roles(forget=chats[:8], holdout=chats[8:]), quiet())
    sizes = [len(zlib.compress((r.answer or "").encode())) for r in people()[:8]]
    assert np.array(found.arrays["loss/forget"]) / found.arrays["zlib/forget"] == pytest.approx(sizes)


def test_a_question_is_asked_without_an_end_mark(monkeypatch):
    model = Model(reciting().network, build_tokenizer())
    model.tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", pair="<bos> $A <eos> $B <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    asked = []
    monkeypatch.setattr(muse_memory, "continue_tokens", lambda model, ids, *_, **__: asked.extend(ids) or ids)
    create("knowledge-memory", shots=0).measure(model, Roles(forget=people()[:3]), quiet())
    assert len(asked) == 3
    assert all(ids[0] == 1 and ids[-1] != 2 for ids in asked)
