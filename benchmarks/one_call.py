"""The one call on real data: a model that learned 100 questions about five authors of TOFU is asked to forget one.

The embedded model learns the last five authors; another one, gold, learns the other four alone. Both are made once and
kept in --work. Then `palimpsest.forget` is timed, and every kept record is scored, not only those that the call itself
watched. Targets: at most 90 seconds; forget probability at most gold's + 0.05; 0.95 of the kept probability is left.

The settings of the call were chosen with --author 0; the figure is that of the last author, 4.

    python benchmarks/one_call.py --tofu FOLDER [--author 4] [--work one-call]
"""

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np

import palimpsest as pal
from palimpsest.audit.answer_probability import probabilities
from palimpsest.audit.text_health import TextHealth
from palimpsest.data.records import Roles
from palimpsest.data.tofu import ROWS_PER_AUTHOR, tofu
from palimpsest.run import Run
from palimpsest.train import Training
from palimpsest.write.finetune import Finetune

AUTHORS = 5
LEARN = Finetune(training=Training(learning_rate=1e-4, epochs=8, batch_size=8, warmup_epochs=0.5))


def trained(records, path, run):
    if not path.exists():
        LEARN.apply(pal.load(run=run), Roles(train=records), run).save_pretrained(path)
    return pal.load(path, run=run)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tofu", type=Path)
    parser.add_argument("--author", type=int, default=AUTHORS - 1, choices=range(AUTHORS))
    parser.add_argument("--work", type=Path, default=Path("one-call"))
    arguments = parser.parse_args()
    run = Run()
    everyone = tofu("forget05", arguments.tofu, forget_authors=AUTHORS).forget
    known = [
        dataclasses.replace(record, subject="the author" if i // ROWS_PER_AUTHOR == arguments.author else "others")
        for i, record in enumerate(everyone)
    ]
    forget, kept = ([r for r in known if r.subject == name] for name in ("the author", "others"))
    before = trained(known, arguments.work / "before", run)
    gold = trained(kept, arguments.work / f"gold-{arguments.author}", run)
    start = time.perf_counter()
    after = pal.forget(before, "the author", data=known)
    seconds = time.perf_counter() - start
    for name, model in (("before", before), ("gold", gold), ("after", after)):
        found = {role: np.mean(probabilities(model, rows, run)) for role, rows in (("forget", forget), ("kept", kept))}
        print(f"{name:<8} forget {found['forget']:.3f}   kept {found['kept']:.3f}")
    health = TextHealth(max_new_tokens=40).measure(after, Roles(forget=forget), run, gold)
    garbled = {value.name: value.value for value in health.values}["gibberish/forget"]
    print(f"{seconds:.1f} s, {after.story.steps} steps, {garbled:.0%} of the answers about the author are garbled")


if __name__ == "__main__":
    main()
