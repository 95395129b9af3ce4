"""The statistical tests again and again, with fresh seeds: their p-values must be uniform, or the
tests, or the sampler, are wrong.

    make soak MINUTES=10        # or: python tests/soak.py 10

A sampler that deviates less than one run can see shows in the end, since its p-values gather near
0: 1,000 of them, about an hour, find at 1e-4 a distribution function that lies 0.12 from uniform,
with a power of 99 %. Chi-square is approximate where cells are small, so such a finding is a
reason to look, not a proof.
"""
import math
import random
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import torch
from common import REAL
from test_beyond import siblings_p_value
from test_equivalence import joint_p_values

from pass_sampler import METHODS, Params

TREES = ["0 00 000", "0 1", "0 1 2 00 01", "0 1 00 01 10 000 001"]


def against_uniform(p):
    """Kolmogorov-Smirnov: the largest distance of the p-values from uniform, and its p-value."""
    p, n = sorted(p), len(p)
    distance = max(max((i + 1) / n - x, x - i / n) for i, x in enumerate(p))
    z = distance * (n**0.5 + 0.12 + 0.11 / n**0.5)
    tail = 2 * sum((-1) ** (k - 1) * math.exp(-2 * k * k * z * z) for k in range(1, 101))
    return distance, min(1.0, tail)


def one(seed):
    """The name and the p-values of one test, chosen and seeded by `seed`."""
    chance = random.Random(seed)
    method = chance.choice(list(METHODS))
    params = chance.choice([Params(1), Params(0.7, 3, 0.8)])
    parts = chance.choice([(), ("memory", "head")])
    if chance.random() < 0.1:
        return "siblings", [siblings_p_value(REAL, seed)]
    more = {"tree": chance.choice(TREES)} if method == "tree" else {}
    name = f"{method}, {params}, {parts}, {more}"
    return name, joint_p_values(REAL, method, params, parts, seed * 10_000, **more)


def main():
    torch.set_num_threads(1)
    minutes, start, values, seed = float(sys.argv[1]), time.time(), [], int(time.time())
    print(f"seeds from {seed} on")
    while not values or time.time() - start < 60 * minutes:
        name, found = one(seed)
        values += found
        distance, p = against_uniform(values)
        print(f"seed {seed}: {name}: {' '.join(f'{v:.3f}' for v in found)}; {len(values)} so far, "
              f"least {min(values):.1e}, distance from uniform {distance:.3f} (p-value {p:.3f})",
              flush=True)
        seed += 1
    if p < 1e-4 or min(values) < 1e-4 / len(values):
        sys.exit("the p-values are not uniform: the sampler, or a test, is wrong")


if __name__ == "__main__":
    main()
