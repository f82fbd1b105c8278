"""Mixture of memories: the chunk form against one token after the other, and how time grows with length.

Forward and backward of one layer, batch 1; the forms run in turn. The token-by-token form is `naive_recurrence` on the
inputs that the layer makes, all heads at once: the loop that the chunk form replaces, and nothing slower.

    python benchmarks/mom.py [--width 256] [--length 2048]
"""

import argparse
import time

import torch

from palimpsest.layers import mom
from palimpsest.layers.mom import MixtureOfMemories
from palimpsest.layers.recurrences import Inputs, naive_recurrence


def seconds(work, repeats):
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def one_by_one(x, memories, row, steps):
    """What `run_chunks` does, a token at a time, for every segment by itself."""
    out = torch.zeros(*x.v.shape[:3], x.v.shape[-1])
    final = list(memories)
    for i, at in enumerate(row.tolist()):
        piece = Inputs(*(None if t is None else t[i : i + 1] for t in x))
        read, memory = naive_recurrence(piece, final[at][None])
        out = out.index_copy(0, torch.tensor([i]), read)
        final[at] = memory[0]
    return out, torch.stack(final)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    layer = MixtureOfMemories(arguments.width, 4)

    def passes(length):
        hidden = torch.randn(1, length, arguments.width, requires_grad=True)
        return lambda: layer(hidden)[0].square().mean().backward()

    fast = seconds(passes(arguments.length), arguments.repeats)
    chunked, mom.run_chunks = mom.run_chunks, one_by_one
    slow = seconds(passes(arguments.length), 1)
    mom.run_chunks = chunked
    print(
        f"{arguments.length} tokens: chunks {fast:.3f} s, token by token {slow:.2f} s: {slow / fast:.1f} x", flush=True
    )
    times = {length: seconds(passes(length), arguments.repeats) for length in (1024, 2048, 4096, 8192)}
    growth = times[8192] / times[1024] / 8
    shown = ", ".join(f"{length}: {each:.3f} s" for length, each in times.items())
    print(f"{shown}; 1,024 to 8,192: {growth:.2f} x linear")


if __name__ == "__main__":
    main()
