"""Training throughput of `write finetune` against a bare PyTorch loop over the same token batches.

The bare loop does forward, backward, clipping and the AdamW step and nothing else. Both run in turn in one process, on
the same model, batches and precision; the ratio is what counts. A third line shows the usual way (one padded row a
record, logits at every position), which is what packing saves.

    python benchmarks/training.py --tofu FOLDER --records 48 --steps 6
"""

import argparse
import time

import torch

import palimpsest as pal
from palimpsest.data.encoding import Encoder
from palimpsest.data.packing import packer, pad, padding_waste
from palimpsest.train import Training, schedule, train


def bare(model, plan, rate, padded=False):
    network = model.copy().network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, fused=True)
    arrange = pad if padded else packer(network)
    start = time.perf_counter()
    for step in plan.steps:
        for micro in step:
            packed = arrange([plan.sequences["train"][i] for i in micro.rows["train"]])
            if padded:
                logits = network(**packed.inputs()).logits[packed.row, packed.at].float()
            else:
                logits = packed.target_logits(network)
            loss = torch.nn.functional.cross_entropy(logits, packed.targets) * micro.share
            loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - start


def ours(model, plan, training):
    start = time.perf_counter()
    train(model, plan, lambda batch: batch.train.cross_entropy, training, pal.Run(progress=False, precision="float32"))
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tofu", required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--records", type=int, default=48)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model = pal.load(arguments.model)
    records = pal.tofu("forget05", arguments.tofu)["train"][: arguments.records]
    training = Training(learning_rate=1e-5, epochs=100, max_steps=arguments.steps, batch_size=8, warmup_epochs=0)
    plan = schedule(model, training, pal.Run(progress=False), train=records)
    tokens = sum(len(plan.sequences["train"][i].tokens) for step in plan.steps for m in step for i in m.rows["train"])
    bare(model, plan, 1e-5)
    pairs = []
    for _ in range(arguments.rounds):
        pairs.append((ours(model, plan, training), bare(model, plan, 1e-5), bare(model, plan, 1e-5, padded=True)))
        a, b, c = pairs[-1]
        print(f"ours {a:.1f} s, bare {b:.1f} s, padded and all logits {c:.1f} s", flush=True)
    ratios = sorted(a / b for a, b, _ in pairs)
    gains = sorted(c / a for a, _, c in pairs)
    best = min(a for a, _, _ in pairs)
    print(f"overhead over the bare loop: {ratios[len(ratios) // 2] - 1:+.1%} (median of {len(ratios)})")
    print(f"speed against padded rows with all logits: {gains[len(gains) // 2]:.2f} x; {tokens / best:.0f} tokens/s")
    sequences = Encoder.of(model).records(pal.tofu("forget05", arguments.tofu)["train"])
    whole = schedule(model, Training(epochs=1), pal.Run(progress=False), train=sequences)
    groups = [[sequences[i] for i in micro.rows["train"]] for step in whole.steps for micro in step]
    print(f"padding waste on TOFU, were the same micro-batches padded: {padding_waste(groups):.1%}; packed: 0 %")


if __name__ == "__main__":
    main()
