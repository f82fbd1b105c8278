"""GaLore against AdamW on one model and the same batch: bytes of the optimizers' states, and seconds a step.

Every state is the live one, counted tensor by tensor after the first step. Steps of the two run in turn; GaLore's time
is averaged over a whole period, of which one step finds the projectors.

    python benchmarks/galore.py [--gap 50]
"""

import argparse
import time

import torch

import palimpsest as pal
from palimpsest.data.encoding import Encoder
from palimpsest.data.packing import packer
from palimpsest.training.low_rank import GaLoreAdamW, galore_groups, state_bytes


def step(network, packed, optimizer):
    loss = torch.nn.functional.cross_entropy(packed.target_logits(network), packed.targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    start = time.perf_counter()
    optimizer.step()
    seconds = time.perf_counter() - start
    optimizer.zero_grad()
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--gap", type=int, default=200)
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    model = pal.load(arguments.model)
    texts = [f"Question {i}: what is {i} and {i}? Answer: {2 * i}." for i in range(24)]
    packed = packer(model.network)([Encoder.of(model).text(text) for text in texts])
    targets = {"attention and MLPs": None, "embedding as well": ("attention", "mlp", "embedding")}
    plain = model.copy().network.train()
    adam = torch.optim.AdamW(plain.parameters(), lr=1e-5)
    step(plain, packed, adam)
    start = time.perf_counter()
    usual = [step(plain, packed, adam) for _ in range(arguments.steps)]
    each = (time.perf_counter() - start) / arguments.steps
    size = state_bytes(adam)
    print(f"AdamW: state {size / 1e6:.0f} MB, step {each:.2f} s, of it the optimizer {sum(usual) / len(usual):.2f} s")
    del plain, adam
    for name, roles in targets.items():
        for bits in (32, 8):
            network = model.copy().network.train()
            optimizer = GaLoreAdamW(galore_groups(network, 0, roles), lr=1e-5, gap=arguments.gap, state_bits=bits)
            first = step(network, packed, optimizer)
            later = [step(network, packed, optimizer) for _ in range(arguments.steps)]
            own = sum(later) / len(later)
            period = each + own - sum(usual) / len(usual) + (first - own) / arguments.gap
            print(
                f"GaLore, {name}, {bits} bits: state {state_bytes(optimizer) / size:.2f} x, step {period / each:.2f} x "
                f"(projectors {first - own:.1f} s every {arguments.gap} steps)",
                flush=True,
            )


if __name__ == "__main__":
    main()
