"""Peak memory of NPO against plain fine-tuning, each in a process of its own (resident set, bytes).

python benchmarks/memory.py --tofu FOLDER
"""

import argparse
import subprocess
import sys

CHILD = """
import sys
import palimpsest as pal
from palimpsest.run import stopwatch
from palimpsest.train import Training
what, folder, name = sys.argv[1:]
data = pal.tofu("forget05", folder, authors=2, forget_authors=1)
training = Training(epochs=1, batch_size=8)
model = pal.load(name)
with stopwatch() as cost:
    if what == "finetune":
        pal.create("finetune", training=training).apply(model, data, pal.Run(progress=False))
    else:
        pal.create(what, training=training).apply(model, data, pal.Run(progress=False))
print(cost["peak_bytes"])
"""


def peak(what, folder, name):
    output = subprocess.run(
        [sys.executable, "-c", CHILD, what, folder, name], check=True, capture_output=True, text=True
    )
    return float(output.stdout.split()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tofu", required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--methods", nargs="+", default=["npo"])
    arguments = parser.parse_args()
    plain = peak("finetune", arguments.tofu, arguments.model)
    print(f"finetune {plain / 1e9:.2f} GB")
    for method in arguments.methods:
        own = peak(method, arguments.tofu, arguments.model)
        print(f"{method} {own / 1e9:.2f} GB, {own / plain:.2f} x plain fine-tuning")


if __name__ == "__main__":
    main()
