"""Runs the kernels alone on odd shapes: a program for compute-sanitizer (docs/kernels.md)."""

import functools
import sys
import time

import jax
from test_pallas import ODD_SHAPES, SMALL_FC, SPLIT, VELO, on_kernels, random_arguments

RULES = {
    "velo": (VELO, 4),
    "small_fc_lopt_h4": (SMALL_FC, 4),
    "small_fc_lopt_h32": (SMALL_FC, 32),
    "matrix_units_h32": (SPLIT, 32),
}


def main() -> None:
    start = time.perf_counter()
    for name in sys.argv[1:] or RULES:
        rule, hidden = RULES[name]
        for shape in ODD_SHAPES:
            arguments = random_arguments(rule, shape, hidden=hidden)
            jax.block_until_ready(jax.jit(functools.partial(on_kernels, rule))(*arguments))
            print(f"{time.perf_counter() - start:.0f} s: {name} {shape}", flush=True)


if __name__ == "__main__":
    main()
