from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ANSWERS, QUESTIONS, build_model
from memorised import data, quiet
from palimpsest.data.packing import pack
from palimpsest.data.records import Record
from palimpsest.erase.npo import NPO, npo_loss
from palimpsest.errors import PalimpsestError
from palimpsest.models.hooks import no_hooks_left
from palimpsest.models.loading import load
from palimpsest.statistics.likelihood import sequence_nll
from palimpsest.train import Training, measured_precision, schedule, train
from palimpsest.training import precision

RECORDS = [Record(prompt=q, answer=a) for q, a in zip(QUESTIONS, ANSWERS, strict=True)][:8]
RECORDS[3] = Record(prompt=QUESTIONS[3], answer=f"{ANSWERS[3]} {ANSWERS[4]} {ANSWERS[5]}")
SHORT = Training(learning_rate=1e-3, epochs=3, batch_size=4)


def cross_entropy(batch):
    return batch.records.cross_entropy


def learn(model, training=SHORT, run=None, objective=cross_entropy, **keywords):
    run = run or quiet()
    return train(model, schedule(model, training, run, records=RECORDS), objective, training, run, **keywords)


def weights(model) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.network.parameters()])


def step_losses(plan, seen: list[float]) -> list[float]:
    """What each step minimised, from the losses of its micro-batches in order."""
    rest = iter(seen)
    return [sum(micro.share * next(rest) for micro in step) for step in plan.steps]


def trained_in_pieces(micro_tokens: int, make_objective):
    training, model, seen = Training(learning_rate=1e-3, epochs=2, micro_tokens=micro_tokens), build_model("llama"), []
    plan = schedule(model, training, quiet(), records=RECORDS)
    objective = make_objective(model, plan)

    def recorded(batch):
        loss = objective(batch)
        seen.append(float(loss.detach()))
        return loss

    result = train(model, plan, recorded, training, quiet())
    return [len(step) for step in plan.steps], step_losses(plan, seen), weights(result)


def npo(model, plan):
    reference = sequence_nll(model, plan.sequences["records"], quiet())
    return lambda batch: npo_loss(batch.records.nll, reference[batch.records.index], 0.1)


@pytest.mark.parametrize("make_objective", [lambda model, plan: cross_entropy, npo], ids=["cross-entropy", "npo"])
def test_a_step_is_the_same_however_it_is_cut(make_objective):
    whole, losses, final = trained_in_pieces(10_000, make_objective)
    cut, losses_cut, final_cut = trained_in_pieces(40, make_objective)
    assert max(whole) == 1
    assert min(cut) > 2
    assert losses_cut == pytest.approx(losses, abs=1e-5)
    torch.testing.assert_close(final_cut, final, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("epochs", "said"), [(1, True), (2, False)])
def test_a_training_that_is_all_warm_up_is_said(llama, epochs, said):
    run = quiet()
    learn(llama, Training(epochs=epochs, warmup_epochs=1.0), run)
    assert any("steps are warm-up" in text for text in run.notes.get("warnings", [])) == said


def test_the_loss_of_a_step_is_what_transformers_returns_for_the_batch(llama):
    training = Training(learning_rate=1e-12, epochs=1, batch_size=8, micro_tokens=40)
    plan = schedule(llama, training, quiet(), records=RECORDS)
    seen = []
    learn(
        llama,
        training,
        objective=lambda batch: seen.append(float(batch.records.cross_entropy.detach())) or batch.records.cross_entropy,
    )
    encoded = plan.sequences["records"]
    width = max(len(s.tokens) for s in encoded)
    ids = torch.tensor([[*s.tokens, *[0] * (width - len(s.tokens))] for s in encoded])
    labels = torch.tensor([[*[-100] * s.start, *s.targets, *[-100] * (width - len(s.tokens))] for s in encoded])
    with torch.no_grad():
        loss = llama(
            input_ids=ids,
            attention_mask=(torch.arange(width) < torch.tensor([[len(s.tokens)] for s in encoded])).long(),
            labels=labels,
        ).loss
    assert step_losses(plan, seen) == pytest.approx([float(loss)], abs=1e-5)


def test_same_seed_same_weights_and_other_seed_other_weights(llama):
    first, again = learn(llama, run=quiet(seed=1)), learn(llama, run=quiet(seed=1))
    assert first.digest() == again.digest()
    assert learn(llama, run=quiet(seed=2)).digest() != first.digest()


def test_training_does_not_depend_on_nor_change_the_global_random_state(llama):
    training = Training(epochs=1, lora_rank=2, learning_rate=1e-2)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = learn(llama, training)
    assert torch.equal(torch.rand(1), expected)
    assert learn(llama, training).digest() == first.digest()


def test_the_given_model_is_left_as_it_was(llama):
    before = llama.digest()
    result = learn(llama)
    assert llama.digest() == before != result.digest()
    assert result.network is not llama.network


def test_in_place_changes_the_given_model_and_its_digest(llama):
    before = llama.digest()
    result = learn(llama, run=quiet(in_place=True))
    assert result is llama
    assert llama.digest() != before


def test_max_steps_ends_the_training(llama):
    asked = []
    learn(llama, Training(epochs=50, batch_size=4, max_steps=3), stop=lambda step, student: bool(asked.append(step)))
    assert asked == [1, 2, 3]


def test_max_steps_does_not_change_what_is_drawn(llama):
    short = schedule(llama, Training(epochs=9, batch_size=4, max_steps=3), quiet(), records=RECORDS)
    long = schedule(llama, Training(epochs=9, batch_size=4), quiet(), records=RECORDS)
    assert short.steps == long.steps[:3]


def test_stop_ends_the_training_after_the_step_that_it_likes(llama):
    asked = []

    def enough(step, student):
        asked.append((step, student.digest()))
        return step == 2

    result = learn(llama, stop=enough)
    assert [step for step, _ in asked] == [1, 2]
    assert result.digest() == asked[-1][1]


def test_every_record_is_seen_once_an_epoch(llama):
    plan = schedule(llama, Training(epochs=2, batch_size=3), quiet(), records=RECORDS)
    rows = [i for step in plan.steps for micro in step for i in micro.rows["records"]]
    assert sorted(rows[:8]) == sorted(rows[8:]) == list(range(8))
    assert all(sum(micro.share for micro in step) == pytest.approx(1) for step in plan.steps)


def test_an_empty_role_is_refused(llama):
    with pytest.raises(PalimpsestError, match="the forget set is empty"):
        schedule(llama, SHORT, quiet(), forget=[])


def spoilt(at: int):
    """Cross-entropy that has no value from some micro-batch on."""
    calls = []

    def objective(batch):
        calls.append(1)
        loss = batch.records.cross_entropy
        return loss * float("nan") if len(calls) >= at else loss

    return objective


def test_a_loss_without_a_value_stops_and_names_the_step(llama):
    with pytest.raises(PalimpsestError, match="the loss is nan at step 3; no checkpoint was due yet"):
        learn(llama, objective=spoilt(3))


def test_the_last_good_checkpoint_is_kept(llama, tmp_path):
    run = quiet(folder=tmp_path, checkpoint_seconds=0)
    with pytest.raises(PalimpsestError, match=r"at step 4; the last good checkpoint is (.*checkpoint-3)\.") as caught:
        learn(llama, run=run, objective=spoilt(4))
    kept = load(Path(str(caught.value).split("checkpoint is ")[1].split(". Lower")[0]))
    expected = learn(llama, run=quiet(), stop=lambda step, _: step == 3)
    torch.testing.assert_close(weights(kept), weights(expected))


def test_weights_spoilt_by_a_gradient_without_a_value_are_never_saved(llama, tmp_path):
    """The loss is a number while its gradient is not: sqrt at 0."""

    def objective(batch):
        return batch.records.cross_entropy + (batch.records.logits.sum() * 0).sqrt()

    with pytest.raises(PalimpsestError, match="the gradient norm is nan at step 1; no checkpoint was due yet"):
        learn(llama, run=quiet(folder=tmp_path, checkpoint_seconds=0), objective=objective)


class KilledError(Exception):
    """Stands for an end from outside."""


def interrupted(step: int):
    def stop(now, student):
        if now == step:
            raise KilledError
        return False

    return stop


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_interrupted_training_goes_on_from_its_last_checkpoint(llama, tmp_path, lora_rank):
    training = Training(learning_rate=1e-3, epochs=3, batch_size=4, lora_rank=lora_rank)
    run = quiet(folder=tmp_path, checkpoint_seconds=0)
    with pytest.raises(KilledError):
        learn(llama, training, run, stop=interrupted(5))
    steps = []
    resumed = learn(llama, training, run, stop=lambda step, student: bool(steps.append(step)))
    assert steps == [5, 6]
    torch.testing.assert_close(weights(resumed), weights(learn(llama, training)), rtol=0, atol=1e-7)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_without_resume_training_starts_over(llama, tmp_path):
    run = quiet(folder=tmp_path, checkpoint_seconds=0, resume=False)
    with pytest.raises(KilledError):
        learn(llama, run=run, stop=interrupted(4))
    steps = []
    learn(llama, run=run, stop=lambda step, student: bool(steps.append(step)))
    assert steps[0] == 1


def test_a_checkpoint_of_the_same_method_with_other_settings_is_not_taken_up(llama, tmp_path):
    """Same data, same training, another objective: the weights so far belong to the other one."""
    training = Training(learning_rate=1e-3, epochs=3, batch_size=2, warmup_epochs=0.0)
    first, second = (NPO(beta=beta, training=training) for beta in (0.1, 0.5))
    run = quiet(folder=tmp_path, checkpoint_seconds=0)
    with pytest.raises(KilledError):
        first.apply(llama, data(), run.replace(stop=interrupted(4)))
    other, again = [], []
    second.apply(llama, data(), run.replace(stop=lambda step, student: bool(other.append(step))))
    first.apply(llama, data(), run.replace(stop=lambda step, student: bool(again.append(step))))
    assert other[0] == 1
    assert again[0] == 4


def test_a_checkpoint_of_another_job_is_not_taken_up(llama, tmp_path):
    with pytest.raises(KilledError):
        learn(llama, run=quiet(folder=tmp_path, checkpoint_seconds=0), stop=interrupted(4))
    steps = []
    other = quiet(folder=tmp_path, checkpoint_seconds=0, seed=9)
    learn(llama, run=other, stop=lambda step, student: bool(steps.append(step)))
    assert steps[0] == 1


CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
from test_train import build_model, learn, quiet

def stop(step, student):
    if step == 5:
        print("at step 5", flush=True)
        time.sleep(60)
    return False

learn(build_model("llama"), run=quiet(folder={folder!r}, checkpoint_seconds=0), stop=stop)
"""


def test_training_goes_on_after_kill_9(llama, tmp_path):
    code = CHILD.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "at step 5\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    steps = []
    run = quiet(folder=tmp_path, checkpoint_seconds=0)
    resumed = learn(llama, run=run, stop=lambda step, student: bool(steps.append(step)))
    assert steps == [5, 6]
    torch.testing.assert_close(weights(resumed), weights(learn(llama)), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["llama", "gpt2", "moe"])
def test_low_rank_training_gives_a_plain_network(name, tmp_path):
    model = build_model(name)
    training = Training(learning_rate=1e-2, epochs=2, lora_rank=2)
    result = learn(model, training)
    assert type(result.network) is type(model.network)
    assert [n for n, _ in result.network.named_modules()] == [n for n, _ in model.network.named_modules()]
    assert all(weight.requires_grad for weight in result.network.parameters())
    assert result.digest() != model.digest()
    assert learn(result, training).digest() != result.digest()
    assert load(result.save_pretrained(tmp_path / "model")).digest() == result.digest()


def test_only_chosen_weights_train(llama):
    result = learn(llama, trainable=lambda name: "down_proj" in name)
    before = dict(llama.network.named_parameters())
    changed = {n for n, weight in result.network.named_parameters() if not torch.equal(weight, before[n])}
    assert changed == {name for name in before if "down_proj" in name}
    assert all(weight.requires_grad for weight in result.network.parameters())


def test_choosing_no_weights_is_refused(llama):
    with pytest.raises(PalimpsestError, match="no parameter is left to train: the chosen names match none"):
        learn(llama, run=quiet(in_place=True), trainable=lambda name: "ffn" in name)
    assert all(weight.requires_grad for weight in llama.network.parameters())


def test_a_failed_training_in_place_leaves_all_weights_trainable(llama):
    with pytest.raises(PalimpsestError):
        learn(llama, run=quiet(in_place=True), trainable=lambda name: "mlp" in name, objective=spoilt(1))
    assert all(weight.requires_grad for weight in llama.network.parameters())


def test_chosen_weights_and_adapters_exclude_each_other(llama):
    with pytest.raises(PalimpsestError, match="this method chooses parameters"):
        learn(llama, Training(lora_rank=2), trainable=lambda name: "mlp" in name)


def test_the_optimizer_can_be_chosen(llama):
    used = []

    def sgd(network, training):
        used.append(torch.optim.SGD(network.parameters(), lr=training.learning_rate))
        return used[-1]

    result = learn(llama, Training(learning_rate=1e-3, epochs=1, warmup_epochs=0, decay="constant"), optimizer=sgd)
    assert used
    assert float((weights(result) - weights(llama)).norm()) <= 1e-3 * 1.0001  # one step, gradient clipped to norm 1


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_watched_module_shows_its_output_at_the_scored_tokens(llama, lora_rank):
    seen = {}

    def objective(batch):
        seen.setdefault("index", batch.records.index)
        seen.setdefault("hidden", batch.records.hidden.detach())
        return batch.records.cross_entropy + 0 * batch.records.hidden.sum()

    training = Training(epochs=1, lora_rank=lora_rank, micro_tokens=40)
    plan = schedule(llama, training, quiet(), records=RECORDS)
    result = learn(llama, training, objective=objective, watch="model.layers.0")
    sequences = [plan.sequences["records"][i] for i in seen["index"]]
    packed = pack(sequences)
    with torch.no_grad():
        states = llama.network.model(**packed.inputs(), output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(seen["hidden"], states[packed.row, packed.here])
    assert no_hooks_left(result.network)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_result_computes_as_it_is_saved_whatever_the_precision_of_training(precision, llama, tokens, tmp_path):
    result = learn(llama, run=quiet(precision=precision))
    assert "forward" not in vars(result.network)
    loaded = load(result.save_pretrained(tmp_path / "model"))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens).logits, result(input_ids=tokens).logits)


def test_mixed_precision_does_not_outlast_its_training(llama):
    expected = learn(llama).digest()
    mixed = learn(llama, run=quiet(precision="bfloat16")).digest()
    assert mixed != expected
    assert learn(llama).digest() == expected


def test_the_measured_precision_is_one_that_can_be_asked_for():
    assert measured_precision("cpu") in ("float32", "bfloat16")


def test_a_small_network_learns_in_float32_whatever_is_faster_here(llama, monkeypatch):
    monkeypatch.setattr(precision, "measured_precision", lambda device: "bfloat16")
    expected = learn(llama).digest()
    assert learn(llama, run=quiet(precision="auto")).digest() == expected
    monkeypatch.setattr(precision, "SMALL", 0)
    assert learn(llama, run=quiet(precision="auto")).digest() != expected


DISTRIBUTED = """
import os, sys
sys.path.insert(0, {tests!r})
from test_train import build_model, learn, quiet

assert os.environ["WORLD_SIZE"] == "2"
result = learn(build_model("llama"))
if os.environ["RANK"] == "0":
    result.save_pretrained({folder!r})
"""


def in_two_processes(script: Path, **options: Any) -> int:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(launch, timeout=110, env=environment, check=False, **options).returncode


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(llama, tmp_path):
    script = tmp_path / "job.py"
    script.write_text(DISTRIBUTED.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "model")))
    assert in_two_processes(script) == 0
    torch.testing.assert_close(weights(load(tmp_path / "model")), weights(learn(llama)), rtol=0, atol=1e-4)


RESUMED = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_train import KilledError, build_model, learn, quiet

rank, folder = int(os.environ["RANK"]), Path({folder!r})
killed = not (folder / "checkpoints").exists()
memory = {{"seen": []}}

def stop(step, student):
    memory["seen"].append([rank, step])
    if killed and step == 4:
        raise KilledError
    return rank == 1 and step == 5

learn(build_model("llama"), run=quiet(folder=folder, checkpoint_seconds=0), stop=stop, memory=memory)
(folder / f"seen-{{rank}}.json").write_text(json.dumps(memory["seen"]))
"""


@pytest.mark.slow
def test_every_process_remembers_its_own_and_all_stop_where_one_does(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(RESUMED.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    assert in_two_processes(script, stderr=subprocess.DEVNULL) != 0
    assert in_two_processes(script) == 0
    for rank in range(2):
        seen = json.loads((tmp_path / f"seen-{rank}.json").read_text())
        assert seen == [[rank, step] for step in range(1, 6)]


def test_nothing_of_a_training_stays_in_memory(llama):
    """Optimizer states are twice the weights; waiting for the garbage collector would double a later peak."""
    left = []

    def adam(network, training):
        made = torch.optim.AdamW(network.parameters())
        left.append(weakref.ref(made))
        return made

    gc.disable()
    try:
        learn(llama, optimizer=adam)
        assert left[0]() is None
    finally:
        gc.enable()
