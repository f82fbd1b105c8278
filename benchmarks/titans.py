"""Neural memory (titans): the chunk form against the token-by-token form, growth with length, and a package.

python benchmarks/titans.py [--chunk 16] [--rounds 7] [--threads 2]

Forward and backward of one layer on one sequence. The forms take turns; a ratio is taken in each round, and the median
is what counts: a machine that others use too may change its speed between rounds. The package is titans-pytorch. With
`batch_size` equal to its chunk it takes gradients where this layer takes them, at the start of each chunk; by default
it takes all of them at the start of the sequence, which is less work and another model. Its gates are one a chunk, here
they are one a token.
"""

import argparse
import statistics
import time

import torch

from palimpsest.layers import neural_memory
from palimpsest.layers.gradient_memory import naive_memory
from palimpsest.layers.neural_memory import NeuralMemory
from palimpsest.run import stopwatch


def forward_backward(layer, x):
    y, _ = layer(x)
    y.square().mean().backward()


def stepped(layer, x):
    state, out = layer.start(len(x)), []
    for token in x.unbind(1):
        y, state = layer.step(token, state)
        out.append(y)
    torch.stack(out, 1).square().mean().backward()


def naive(layer, x):
    fast = neural_memory.chunk_memory
    neural_memory.chunk_memory = naive_memory
    try:
        forward_backward(layer, x)
    finally:
        neural_memory.chunk_memory = fast


def seconds(what, rounds):
    """The times of some rounds of each, taking turns; where there are several, one more warms up."""
    taken = {name: [] for name in what}
    for i in range(rounds + (rounds > 1)):
        for name, (work, layer, x) in what.items():
            layer.zero_grad()
            start = time.perf_counter()
            work(layer, x)
            if i or rounds == 1:
                taken[name].append(time.perf_counter() - start)
    return taken


def ratio(times, others):
    """Of each round, and the median."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def peer(chunk, width, heads, exact):
    from titans_pytorch import MemoryMLP
    from titans_pytorch import NeuralMemory as Package

    model = MemoryMLP(width // heads, depth=2, expansion_factor=2.0)
    return Package(
        width, chunk_size=chunk, dim_head=width // heads, heads=heads, model=model, batch_size=chunk if exact else None
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--chunks", type=int, nargs="*", default=[16, 32, 64], help="for the package")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("tokens", "growth", "package", "memory"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    width, heads, chunk = arguments.width, arguments.heads, arguments.chunk
    lengths = (1024, 2048, 4096, 8192)
    inputs = {n: torch.randn(1, n, width) for n in {*lengths, arguments.length}}
    layer, x = NeuralMemory(width, heads, chunk=chunk), inputs[arguments.length]

    def wanted(part):
        return arguments.only in (None, part)

    print(f"width {width}, {heads} heads, depth 2, expansion 2, chunk {chunk}, {arguments.threads} threads", flush=True)
    if wanted("memory"):  # first, since a peak is that of the process so far
        for n in lengths:
            with stopwatch() as cost:
                forward_backward(layer, inputs[n])
            print(f"{n} tokens: peak {cost['peak_bytes'] / 1e6:.0f} MB", flush=True)
    if wanted("tokens"):
        before = seconds({"chunks": (forward_backward, layer, x)}, arguments.rounds)["chunks"]
        slow = {
            name: seconds({name: (work, layer, x)}, 1)[name][0] for name, work in (("step", stepped), ("naive", naive))
        }
        fast = statistics.median(before + seconds({"chunks": (forward_backward, layer, x)}, arguments.rounds)["chunks"])
        print(f"{arguments.length} tokens: chunks {fast:.3f} s", flush=True)
        for name, spent in slow.items():
            print(f"  {name}, token by token: {spent:.2f} s, {spent / fast:.1f} x", flush=True)
    if wanted("growth"):
        taken = seconds({n: (forward_backward, layer, inputs[n]) for n in lengths}, arguments.rounds)
        for n in lengths:
            growth = ratio(taken[n], taken[lengths[0]]) / (n / lengths[0])
            print(f"{n} tokens {statistics.median(taken[n]):.3f} s, {growth:.2f} x linear", flush=True)
    if wanted("package"):
        for size in arguments.chunks:
            what = {
                "ours": (forward_backward, NeuralMemory(width, heads, chunk=size), x),
                "package, gradients at each chunk": (forward_backward, peer(size, width, heads, True), x),
                "package, gradients at the first token": (forward_backward, peer(size, width, heads, False), x),
            }
            taken = seconds(what, arguments.rounds)
            for name, spent in taken.items():
                rate = arguments.length / statistics.median(spent)
                print(
                    f"chunk {size}, {name}: {rate:,.0f} tokens/s; ours {ratio(spent, taken['ours']):.2f} x", flush=True
                )


if __name__ == "__main__":
    main()
