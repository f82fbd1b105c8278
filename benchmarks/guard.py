"""Generation with a guard against the bare model, on prompts that raise no alarm: the guard should cost nothing.

The embedded model, guarded against a few made-up records with their detector on hidden states. Both answer the same
questions in turn in one process, greedily and with the same number of tokens; the answers must be equal, token by
token. The figure is bare time / guarded time, in each round and their median; the target is 0.95.

    python benchmarks/guard.py --tokens 32 --rounds 3
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import palimpsest as pal
from palimpsest.data.encoding import Encoder
from palimpsest.data.fictitious import roles
from palimpsest.erase.guard import Guard
from palimpsest.models.guarding import Prompts
from palimpsest.run import Run

QUESTIONS = (
    "What is the boiling point of water?",
    "Name three primary colours.",
    "Which mountain is the highest on Earth?",
    "Write a sentence about the sea.",
)


@torch.no_grad()
def seconds(model, ids, tokens):
    start = time.perf_counter()
    how = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
    return time.perf_counter() - start, made


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--features", choices=["hidden", "encoder"], default="hidden")
    arguments = parser.parse_args()
    model = pal.load(arguments.model)
    data = roles(4, 1, facts_per_person=2)
    method = Guard(features=arguments.features, prompts=Prompts(paraphrases=1, negatives=40))
    guarded = method.apply(model, data, Run(progress=False))
    encoder = Encoder.of(model)
    prompts = [torch.tensor([encoder.prompt(question)]) for question in QUESTIONS]
    for each in (model, guarded):
        seconds(each, prompts[0], 4)
    shares = []
    for number in range(arguments.rounds):
        for ids in prompts:
            order = (model, guarded) if number % 2 == 0 else (guarded, model)
            (first, one), (second, other) = (seconds(each, ids, arguments.tokens) for each in order)
            assert torch.equal(one, other), "the guarded model gave another answer"
            assert not guarded.network.decisions[0].guarded, "a harmless prompt raised an alarm"
            bare, with_guard = (first, second) if order[0] is model else (second, first)
            shares.append(bare / with_guard)
            print(f"bare {bare:.2f} s, guarded {with_guard:.2f} s, ratio {shares[-1]:.3f}", flush=True)
    ratio = statistics.median(shares)
    print(
        f"bare / guarded {ratio:.3f} (median of {len(shares)}, from {min(shares):.3f} to {max(shares):.3f}); "
        f"target 0.95: {'met' if ratio >= 0.95 else 'missed'}"
    )


if __name__ == "__main__":
    main()
