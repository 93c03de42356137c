"""The scale suite: python -m lopt_jax.meta.scale --help."""

import sys

from lopt_jax.meta.scale import suite

if __name__ == "__main__":
    sys.exit(suite.command())
