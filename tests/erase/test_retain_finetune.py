from __future__ import annotations

from memorised import data, gold, people, probability, quiet
from palimpsest.erase.retain_finetune import RetainFinetune
from palimpsest.train import Training
from pictured import accuracy, never_saw, pictures

SHORT = Training(learning_rate=3e-3, epochs=20, warmup_epochs=0.0)


def test_the_forget_set_has_no_influence(llama):
    roles, method = data(), RetainFinetune(training=SHORT)
    after = method.apply(llama, roles, quiet())
    assert after.digest() == method.apply(llama, roles.replace(forget=None), quiet()).digest()
    assert after.digest() == method.apply(llama, roles.replace(forget=people()[4:8]), quiet()).digest()
    assert set(after.ledger.entries[-1].data) == {"retain"}


def test_the_retained_answers_come_up():
    roles = data().replace(retain=people()[4:8])
    before = gold()
    after = RetainFinetune(training=SHORT).apply(before, roles, quiet())
    assert probability(after, roles.retain) > 3 * probability(before, roles.retain)


def test_a_classifier_learns_its_retained_labels():
    roles = pictures()
    before = never_saw("vit")
    kept = roles.replace(retain=[*roles.retain, *roles.forget], forget=None)
    after = RetainFinetune(training=SHORT).apply(before, kept, quiet())
    assert accuracy(before, roles.forget) == 0
    assert accuracy(after, roles.forget) == accuracy(after, roles.retain) == 1
