"""How the tests run: on how many emulated devices, and with which compilation cache."""

import os
import signal
import tempfile

import jax
import pytest

# Whoever starts the tests may ignore the end of processes; those that tests start then have no exit
# status. (SIGINT, which is ignored in the background, is the business of its only test.)
signal.signal(signal.SIGCHLD, signal.SIG_DFL)

# Sharded computations need several devices, also where there are none: eight of the CPU. The other
# tests compile faster with one, which `make test` asks for.
jax.config.update("jax_num_cpu_devices", int(os.environ.get("LOPT_JAX_TEST_DEVICES", "8")))

# learnable_sgdm is learnable_adam without a second moment, and learnable_sgd has no averages.
# These two cover what it shares with others; what it has of its own is in its recorded run.
COVERED_BY_OTHERS = ("learnable_sgdm",)
OF_RECORDED_RUNS = ("test_trajectory", "test_theta_state")


def pytest_collection_modifyitems(items):
    """Leaves to the slow runs what other optimizers of the table cover."""
    for item in items:
        name = getattr(item, "callspec", None) and item.callspec.params.get("name")
        if name in COVERED_BY_OTHERS and item.originalname not in OF_RECORDED_RUNS:
            item.add_marker(pytest.mark.slow)


# The same small programs occur in many tests. Each process has a cache of its own: what one writes
# another could read half-written.
_cache = tempfile.TemporaryDirectory(prefix="lopt_jax_tests_", ignore_cleanup_errors=True)
jax.config.update("jax_compilation_cache_dir", _cache.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
