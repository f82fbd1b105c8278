"""Loss-curvature editing of a language model: seconds to take the factors, to decompose them and to cut.

python benchmarks/curvature.py [--layers auto|all] [--records 64]
"""

import argparse
import time

import palimpsest as pal
from palimpsest.data.fictitious import people
from palimpsest.erase.loss_curvature import LossCurvature, SpectrumEdit
from palimpsest.statistics.curvature import kfac_factors


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--layers", choices=("auto", "all"), default="auto")
    parser.add_argument("--records", type=int, default=64)
    arguments = parser.parse_args()
    model = pal.load(arguments.model)
    records = people(arguments.records)[: arguments.records]
    names = LossCurvature(layers=arguments.layers)._names(model, classifies=False)
    start = time.perf_counter()
    factors = kfac_factors(model, records, names, pal.Run(progress=False)).factors
    taken = time.perf_counter()
    edit = SpectrumEdit(model.network, factors)
    decomposed = time.perf_counter()
    edit.apply(0.6)
    cut = time.perf_counter()
    edit.apply(0.9)
    again = time.perf_counter()
    print(f"{len(names)} matrices, {next(iter(factors.values())).positions} positions")
    print(f"factors {taken - start:.1f} s, decomposition {decomposed - taken:.1f} s, cut {cut - decomposed:.1f} s")
    print(f"editing (decomposition and cut) {cut - taken:.1f} s; another rho {again - cut:.1f} s")


if __name__ == "__main__":
    main()
