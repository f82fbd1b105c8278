"""Statistics passes against one plain forward-backward over the same examples, and against one example at a time.

All run in turn in one process, on the same model and batches. A ratio is taken in each round, and the median is what
counts: a machine that others use too may change its speed between rounds. `one by one` is the loop that everybody
writes: a backward pass an example, squares added up.

    python benchmarks/passes.py vit narrow-vit small-vit convnet lm short-lm
"""

import argparse
import statistics
import time

import torch

import palimpsest as pal
from palimpsest.data.digits import digits
from palimpsest.data.fictitious import people
from palimpsest.data.records import Record
from palimpsest.models.model import Model
from palimpsest.reproduce.classifier import new_classifier
from palimpsest.reproduce.loss_curvature import new_classifier as digits_vit
from palimpsest.run import Run
from palimpsest.statistics.curvature import input_grams, kfac_factors
from palimpsest.statistics.examples import Examples
from palimpsest.statistics.fisher import diagonal_fisher
from palimpsest.statistics.per_example import gradient_norms
from palimpsest.statistics.projection import KroneckerProjection, projected_gradients

RUN = Run(progress=False)


def random_images(side, patch, sizes, count=64):
    """A ViT with first weights, and random images for it."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    network = ViTForImageClassification(ViTConfig(**sizes, image_size=side, patch_size=patch, num_labels=10))
    records = [Record(image=torch.randn(3, side, side), label=i % 10) for i in range(count)]
    return Model(network.eval()), records


def vit():
    """A ViT of width 192 and 6 layers on 32 x 32 images in patches of 4: 2.7 M weights, 65 positions."""
    sizes = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
    layers = {"layers": [0, 5], "wanted": ["mlp_up", "mlp_down"], "positions": "first"}
    return *random_images(32, 4, sizes), layers


def narrow_vit():
    """A ViT of width 64 and 3 layers on 24 x 24 images in patches of 4: 156,000 weights, 37 positions."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
    return *random_images(24, 4, sizes, 256), None


def small_vit():
    """The ViT of the loss-curvature reproduction on 8 x 8 digits: 151,000 weights, 5 positions."""
    return digits_vit(0), digits(0)["train"][:512], None


def convnet():
    """The convnet of the reproductions on 8 x 8 digits: 35,000 weights, up to 64 positions."""
    return new_classifier(0), digits(0)["train"][:512], None


def lm():
    """The embedded language model on facts about people; K-FAC at three layers of thirty, as in its paper."""
    records = people(8, seed=0, facts_per_person=4)[:32]
    return pal.load(), records, {"layers": [21, 22, 23], "wanted": ["mlp_gate", "mlp_up"]}


def short_lm():
    """The embedded language model on the first three words of 32 questions: 3 to 6 tokens."""
    records = people(8, seed=0, facts_per_person=4)[:32]
    return pal.load(), [Record(text=" ".join(record.prompt.split()[:3])) for record in records], None


def plain(model, examples, size):
    for group in examples.groups(size):
        examples.batch(group).losses(model.network).sum().backward()
        model.network.zero_grad(set_to_none=True)


def one_by_one(model, examples):
    squares = {name: torch.zeros_like(weight) for name, weight in model.network.named_parameters()}
    for place in range(len(examples)):
        examples.batch([place]).losses(model.network).sum().backward()
        for name, weight in model.network.named_parameters():
            squares[name].addcmul_(weight.grad, weight.grad)
            weight.grad = None


def compare(name, make, size, rounds, most):
    model, records, kfac = make()
    records = records[:most]
    examples = Examples(model, records)
    projection = KroneckerProjection(32, 32)
    runs = {
        "forward-backward": lambda: plain(model, examples, size),
        "Fisher per example": lambda: diagonal_fisher(model, records, RUN, batch_size=size),
        "Fisher by batch": lambda: diagonal_fisher(model, records, RUN, "batch", batch_size=size),
        "gradient norms": lambda: gradient_norms(model, records, RUN, batch_size=size),
        "projections, 1024": lambda: projected_gradients(model, records, RUN, projection, batch_size=size),
        "one by one": lambda: one_by_one(model, examples),
    }
    if kfac is not None:
        wanted, given = kfac["wanted"], {key: value for key, value in kfac.items() if key != "wanted"}
        everywhere = {key: value for key, value in given.items() if key != "layers"}
        runs["K-FAC, the paper's layers"] = lambda: kfac_factors(model, records, wanted, RUN, batch_size=size, **given)
        runs["input Gram, the same"] = lambda: input_grams(model, records, wanted, RUN, batch_size=size, **given)
        runs["K-FAC, every layer"] = lambda: kfac_factors(
            model, records, wanted, RUN, batch_size=size, **everywhere, labels="gold"
        )
    taken = {what: [] for what in runs}
    for number in range(rounds + 1):
        for what, act in runs.items():
            start = time.perf_counter()
            act()
            if number:  # the first round warms up
                taken[what].append(time.perf_counter() - start)

    def ratio(what, to):
        return statistics.median(a / b for a, b in zip(taken[what], taken[to], strict=True))

    print(f"{name}: {model.parameters:,} weights, {len(records)} examples, batch {size}, {rounds} rounds")
    print(f"  forward-backward {statistics.median(taken['forward-backward']) / len(records) * 1e3:.2f} ms an example")
    for what in runs:
        if what != "forward-backward":
            print(f"  {what}: {ratio(what, 'forward-backward'):.2f} x", flush=True)
    print(f"  Fisher per example is {ratio('one by one', 'Fisher per example'):.1f} x as fast as one by one")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["vit", "narrow-vit", "small-vit", "convnet", "lm", "short-lm"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--examples", type=int, default=512)
    arguments = parser.parse_args()
    makers = {
        "vit": vit,
        "narrow-vit": narrow_vit,
        "small-vit": small_vit,
        "convnet": convnet,
        "lm": lm,
        "short-lm": short_lm,
    }
    for name in arguments.models:
        compare(name, makers[name], arguments.batch, arguments.rounds, arguments.examples)


if __name__ == "__main__":
    main()
