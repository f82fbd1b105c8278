"""The TOFU battery against its unavoidable cost: one forward pass over every scored sequence plus the generation steps.

The unavoidable part is measured in the same run: sequences in length-sorted padded batches through the bare network,
prompts through the bare `generate`, with nothing computed from either.

    python benchmarks/battery.py --tofu FOLDER [--authors 4 --forget-authors 2]
"""

import argparse
import time

import torch

import palimpsest as pal
from palimpsest.audit import audit
from palimpsest.audit.answers import ROLES
from palimpsest.audit.battery import TOFU_BATTERY
from palimpsest.data.encoding import Encoder
from palimpsest.data.packing import pad


def every_sequence(model, data):
    encoder = Encoder.of(model)
    found = {}
    for role in ROLES:
        for record in data.probe(role):
            texts = [record.answer, *([record.paraphrase or record.answer, *record.wrong] if record.wrong else [])]
            for sequence in (encoder.pair(record.prompt, text) for text in texts):
                found[sequence.tokens] = sequence
    return sorted(found.values(), key=lambda sequence: len(sequence.tokens))


@torch.no_grad()
def forward_only(model, sequences, batch=16):
    start = time.perf_counter()
    for i in range(0, len(sequences), batch):
        packed = pad(sequences[i : i + batch])
        model.network(**packed.inputs(), logits_to_keep=torch.unique(packed.at))
    return time.perf_counter() - start


@torch.no_grad()
def generate_only(model, data, most, batch=64):
    encoder = Encoder.of(model)
    prompts = sorted({encoder.prompt(r.prompt) for role in ROLES for r in data.probe(role)}, key=len)
    fill = model.tokenizer.pad_token_id
    start = time.perf_counter()
    for i in range(0, len(prompts), batch):
        group = prompts[i : i + batch]
        width = max(map(len, group))
        ids = torch.tensor([[fill] * (width - len(p)) + list(p) for p in group])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in group])
        model.network.generate(input_ids=ids, attention_mask=mask, max_new_tokens=most, do_sample=False)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tofu", required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--authors", type=int)
    parser.add_argument("--forget-authors", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    arguments = parser.parse_args()
    model = pal.load(arguments.model)
    data = pal.tofu("forget05", arguments.tofu, authors=arguments.authors, forget_authors=arguments.forget_authors)
    chosen = pal.probes([p for p in TOFU_BATTERY if p != "forget-quality"], max_new_tokens=arguments.max_new_tokens)
    sequences = every_sequence(model, data)
    forward_only(model, sequences[:16])
    passes = forward_only(model, sequences)
    steps = generate_only(model, data, arguments.max_new_tokens)
    start = time.perf_counter()
    audit(model, data, chosen, pal.Run(progress=False))
    whole = time.perf_counter() - start
    print(f"{len(sequences)} sequences, {sum(len(s.tokens) for s in sequences)} tokens")
    print(f"forward passes {passes:.0f} s, generation {steps:.0f} s, battery {whole:.0f} s")
    print(f"battery / unavoidable: {whole / (passes + steps):.2f}")


if __name__ == "__main__":
    main()
