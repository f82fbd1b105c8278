"""The conversation memory at size: seconds to open, milliseconds to add, search, prune and forget, and its bytes.

Vectors are random and given, so that no encoder is measured. `add` and `search` are what a user calls: with durable
commits, with the history, and (in the third line) with the note that a chunk was retrieved. Random vectors have no
clusters, so the share of true neighbours that search by cells finds is a lower bound; `--encoded` takes real sentences.

    OMP_NUM_THREADS=1 python benchmarks/recall.py [--turns 100000] [--store postgresql://...] [--encoded]
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from palimpsest.data.records import Record
from palimpsest.recall.hema import ConversationMemory

WIDTH = 384


class Given:
    """An encoder that is never asked: vectors are given."""

    name, width = "given", WIDTH

    def encode(self, texts):
        return np.ones((len(texts), WIDTH), np.float32)

    def lengths(self, texts):
        return [len(text.split()) for text in texts]


def unit(count, seed):
    vectors = np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def sentences(count, seed):
    """Made-up sentences and their vectors by the embedded encoder."""
    from palimpsest.models.encoder import sentence_encoder

    draw = np.random.default_rng(seed)
    who = "Ada Ben Clara Dai Elif Finn Gita Hugo Iris Jack".split()
    did = "painted repaired visited sold measured forgot admired photographed described borrowed".split()
    what = "bridge garden boat violin letter clock oven map ladder telescope novel carpet lantern kettle".split()
    where = "Lyon Lagos Brno Osaka Izmir Bergen Mysore Porto Riga Ghent Turin Split".split()
    picked = [(draw.choice(who), draw.choice(did), draw.choice(what), draw.choice(where)) for _ in range(count)]
    texts = [f"{a} {b} the {c} in {d}." for a, b, c, d in picked]
    known = list(dict.fromkeys(texts))
    vectors = dict(zip(known, sentence_encoder().encode(known).numpy(), strict=True))
    return np.stack([vectors[text] for text in texts]) + 0.02 * unit(count, seed)


def timed(label, calls):
    took = []
    for call in calls:
        start = time.perf_counter()
        call()
        took.append(1000 * (time.perf_counter() - start))
    print(f"{label:<44} median {np.median(took):8.2f} ms   p95 {np.percentile(took, 95):8.2f} ms", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=100_000)
    parser.add_argument("--store")
    parser.add_argument("--encoded", action="store_true")
    arguments = parser.parse_args()
    vectors = sentences(arguments.turns, 0) if arguments.encoded else unit(arguments.turns, 0)
    fresh, queries = unit(300, 1), vectors[:: max(1, arguments.turns // 200)] + 0.3 * unit(1, 2)
    with tempfile.TemporaryDirectory() as folder:
        store = arguments.store or str(Path(folder) / "memory.db")

        def opened():
            return ConversationMemory.open(store, encoder=Given())

        def ready():
            with opened() as memory:
                memory.items.opened.engine.ages(memory.items.sight())

        memory = opened()
        draw = np.random.default_rng(3)
        words = np.array([f"word{i}" for i in range(20_000)])
        start = time.perf_counter()
        for first in range(0, arguments.turns, 5000):
            part = vectors[first : first + 5000]
            texts = [" ".join(words[draw.zipf(1.3, 25) % 20_000]) + f" {first + i}" for i in range(len(part))]
            memory.items.add([Record(text=text) for text in texts], vectors=part)
        print(f"{arguments.turns:,} turns stored in {time.perf_counter() - start:.1f} s")
        memory.close()
        timed("open", [lambda: opened().close()] * 5)
        timed("open, and be ready to search", [ready] * 5)
        memory = opened()
        texts = iter(" ".join(words[draw.zipf(1.3, 25) % 20_000]) + f" x{i}" for i in range(300))
        timed("add", [lambda v=v: memory.add(Record(text=next(texts)), vector=v) for v in fresh])
        asked = [lambda q=q: memory.search("", 8, vector=q, touch=False) for q in queries]
        timed("search, exact", asked)
        timed("search, exact, and note the use", [lambda q=q: memory.search("", 8, vector=q) for q in queries])
        texts = [f"word{i} word{7 * i} word{91 * i}" for i in range(1, 100)]
        by_words = [lambda t=t: memory.search(t, 8, vector=fresh[0], ranking="words", touch=False) for t in texts]
        timed("search by words", by_words)
        truth = [{hit.number for hit in call()} for call in asked]
        start = time.perf_counter()
        memory.items.opened.engine.accelerate(0)
        print(f"cells found in {time.perf_counter() - start:.1f} s")
        timed("search by cells", asked)
        shared = [len(true & {hit.number for hit in call()}) for true, call in zip(truth, asked, strict=True)]
        print(f"of the true 8 nearest, cells find {np.mean(shared) / 8:.2f}")
        timed("open, and be ready to search by cells", [ready] * 5)
        timed("what would fade", [lambda: memory.prune(dry_run=True)] * 5)
        identities = [memory.items.all()[i].identity for i in (5, 500, 5000)] if arguments.turns > 5000 else []
        timed("forget, and leave no bytes", [lambda i=i: memory.forget(i) for i in identities] or [lambda: None])
        print(f"{memory.items.opened.engine.bytes() / 1e6:.0f} MB")
        memory.close()


if __name__ == "__main__":
    main()
