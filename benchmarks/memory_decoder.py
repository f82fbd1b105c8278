"""Memory Decoder and kNN-LM: cost of a memory beside a model, speed of the search, memory of the sparse loss.

Overhead: seconds a generated token of the mixture over those of the base, against 1 + seconds of the memory alone over
those of the base alone, all in turn in one process. 1 is the limit without running the two at once, the target 1.1.

Search: keys as they are stored, queries all together against a loop over queries with numpy. The target is 20 x.

Loss: peak of the resident memory beyond logits and their gradient, forward and backward, for vocabularies of other
sizes and the same targets; beside it the same with dense targets. Each is measured in a process of its own.

    python benchmarks/memory_decoder.py overhead search loss
"""

import argparse
import multiprocessing
import statistics
import time

import numpy as np
import torch

import palimpsest as pal
from palimpsest.erase.uld import first_blocks
from palimpsest.models.neighbours import Neighbours
from palimpsest.run import stopwatch
from palimpsest.statistics.targets import Soft
from palimpsest.write.memory_decoder import attach, hybrid_loss


def generating(model, ids, tokens):
    start = time.perf_counter()
    how = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
    return time.perf_counter() - start


def overhead(arguments):
    base = pal.load(arguments.model)
    memory = first_blocks(base, arguments.layers)
    both = attach(base.copy(), first_blocks(base, arguments.layers), 0.6)
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch in arguments.batch:
        ids = torch.randint(100, 10_000, (batch, 32), generator=generator)
        for each in (base, memory, both):
            generating(each, ids, 4)
        times = [[generating(m, ids, arguments.tokens) for m in (base, memory, both)] for _ in range(arguments.rounds)]
        ratios = [(c / a) / (1 + b / a) for a, b, c in times]
        a, b, c = (statistics.median(x) for x in zip(*times, strict=True))
        worst = max(worst, statistics.median(ratios))
        print(
            f"batch {batch}: base {a:.2f} s, memory of {arguments.layers} blocks {b:.2f} s, both {c:.2f} s; "
            f"both / base {c / a:.2f}, 1 + memory / base {1 + b / a:.2f}, ratio {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f})",
            flush=True,
        )
    print(f"overhead: ratio {worst:.3f}, target 1.1: {'met' if worst <= 1.1 else 'missed'}")


def looped(keys, queries, k):
    """What everybody writes."""
    for query in queries:
        distances = ((keys - query) ** 2).sum(1)
        nearest = np.argpartition(distances, k)[:k]
        nearest[np.argsort(distances[nearest])]


def search(arguments):
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(arguments.keys, arguments.width)).astype(np.float16)
    queries = torch.from_numpy(keys[:: max(1, arguments.keys // 1024)][:1024]).float() + 0.01
    store = Neighbours(keys, np.zeros(arguments.keys, dtype=np.int32))
    floats, few = keys.astype(np.float32), queries[:16].numpy()
    store.search(queries[:64], arguments.k)
    found = []
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        store.search(queries, arguments.k)
        ours = (time.perf_counter() - start) / len(queries)
        start = time.perf_counter()
        store.search(queries[:1], arguments.k)
        single = time.perf_counter() - start
        start = time.perf_counter()
        looped(floats, few, arguments.k)
        found.append((ours, single, (time.perf_counter() - start) / len(few)))
    ours, single, loop = (statistics.median(x) for x in zip(*found, strict=True))
    times = statistics.median(loop / ours for ours, _, loop in found)
    print(
        f"search of {arguments.keys:,} keys of width {arguments.width}, k {arguments.k}: {ours * 1e3:.2f} ms a query "
        f"in batches of {len(queries)}, {single * 1e3:.2f} ms alone, {loop * 1e3:.2f} ms in a loop: {times:.1f} x, "
        f"target 20: {'met' if times >= 20 else 'missed'}"
    )


def beyond(kind, vocabulary, targets, entries, answer):
    """Peak bytes of forward and backward beyond the logits and their gradient."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(targets, vocabulary, generator=generator).requires_grad_()
    labels = torch.randint(0, vocabulary, (targets,), generator=generator)
    row = torch.arange(targets).repeat_interleave(entries)
    token = torch.randint(0, vocabulary, (targets * entries,), generator=generator)
    soft = Soft(row, token, torch.full((targets * entries,), 1 / entries))
    hybrid_loss(logits[:2], labels[:2], Soft(row[: 2 * entries], token[: 2 * entries], soft.share[: 2 * entries]), 0.5)
    with stopwatch() as before:
        pass
    with stopwatch() as cost:
        if kind == "sparse":
            loss = hybrid_loss(logits, labels, soft, 0.5).mean()
        elif kind == "cross-entropy":
            loss = torch.nn.functional.cross_entropy(logits, labels)
        else:
            dense = torch.zeros(targets, vocabulary).index_put((row, token), soft.share, accumulate=True)
            log_p = logits.log_softmax(-1)
            kl = torch.nn.functional.kl_div(log_p, dense, reduction="batchmean")
            loss = 0.5 * kl + 0.5 * torch.nn.functional.nll_loss(log_p, labels)
        loss.backward()
    answer.put(cost["peak_bytes"] - before["peak_bytes"] - logits.nbytes)


def loss(arguments):
    context = multiprocessing.get_context("spawn")
    found = {}
    for kind in ("sparse", "cross-entropy", "dense"):
        for vocabulary in arguments.vocabularies:
            answer = context.Queue()
            job = (kind, vocabulary, arguments.targets, arguments.entries, answer)
            process = context.Process(target=beyond, args=job)
            process.start()
            found[kind, vocabulary] = answer.get() / 1e6
            process.join()
            size = arguments.targets * vocabulary * 4 / 1e6
            print(
                f"{kind}, {vocabulary:,} tokens: {found[kind, vocabulary]:.0f} MB beyond logits and their gradient, "
                f"{size:.0f} MB each",
                flush=True,
            )
    own = [found["sparse", v] for v in arguments.vocabularies]
    growth = max(own) - min(own)
    step = arguments.targets * (max(arguments.vocabularies) - min(arguments.vocabularies)) * 4 / 1e6
    print(f"loss: grows by {growth:.0f} MB where the logits grow by {step:.0f} MB ({growth / step:.3f} of it)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["overhead", "search", "loss"])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--targets", type=int, default=1024)
    parser.add_argument("--entries", type=int, default=64)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[5_000, 50_000, 150_000])
    arguments = parser.parse_args()
    for what in arguments.what:
        {"overhead": overhead, "search": search, "loss": loss}[what](arguments)


if __name__ == "__main__":
    main()
