"""Milliseconds a step of optax.adamw and of each learned optimizer; see `--help`.

python benchmarks/step_time.py --models gpt2_355m --json docs/benchmarks/step_time.json
"""

import argparse

from lopt_jax import benchmark

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    benchmark.add_arguments(parser)
    benchmark.run(parser.parse_args())
