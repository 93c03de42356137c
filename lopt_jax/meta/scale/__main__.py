"""The scale suite: python -m lopt_jax.meta.scale --help."""

import argparse
import sys

from lopt_jax.meta.scale import suite

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m lopt_jax.meta.scale", description=__doc__)
    suite.add_arguments(parser)
    sys.exit(suite.main(parser.parse_args()))
