"""Generation with a mixture against its members generating alone: the mixture should cost their sum and no more.

Each round generates the same number of tokens with the model, with the assistant (its first blocks), and with both as a
mixture under ULD's rule (filter included), in turn in one process. The figure is (model + assistant) / mixture, in
seconds: 1 is the physical limit without running the two at once, the target is 0.9.

    python benchmarks/mixture.py --tokens 48 --rounds 5
"""

import argparse
import statistics
import time

import torch

import palimpsest as pal
from palimpsest.erase.uld import first_blocks
from palimpsest.models.combination import Difference
from palimpsest.models.mixture import mixture


def seconds(model, ids, tokens):
    start = time.perf_counter()
    how = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
    assert made.shape[1] == ids.shape[1] + tokens
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    model = pal.load(arguments.model)
    assistant = first_blocks(model, arguments.layers)
    both = mixture(Difference(), target=model.copy(), assistant=first_blocks(model, arguments.layers))
    print(f"{model.parameters:,} parameters, with the assistant {both.parameters:,}")
    generator = torch.Generator().manual_seed(0)
    worst = float("inf")
    for batch in arguments.batch:
        ids = torch.randint(100, 10_000, (batch, arguments.prompt), generator=generator)
        for each in (model, assistant, both):
            seconds(each, ids, 4)
        times = []
        for _ in range(arguments.rounds):
            times.append([seconds(each, ids, arguments.tokens) for each in (model, assistant, both)])
            a, b, c = times[-1]
            print(f"batch {batch}: model {a:.2f} s, assistant {b:.2f} s, mixture {c:.2f} s", flush=True)
        shares = sorted((a + b) / c for a, b, c in times)
        fastest = min(c for _, _, c in times)
        ratio = statistics.median(shares)
        worst = min(worst, ratio)
        print(
            f"batch {batch}: {batch * arguments.tokens / fastest:.1f} tokens/s; (model + assistant) / mixture "
            f"{ratio:.3f} (median of {len(shares)}, from {shares[0]:.3f} to {shares[-1]:.3f})"
        )
    print(f"target 0.9: {'met' if worst >= 0.9 else 'missed'} ({worst:.3f})")


if __name__ == "__main__":
    main()
