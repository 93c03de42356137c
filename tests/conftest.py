"""How the tests run: which of them, on how many emulated devices, and how programs are compiled."""

import importlib.util
import os
import re
import signal
import tempfile
from pathlib import Path

import jax
import pytest

# Whoever starts the tests may ignore the end of processes; those that tests start then have no exit
# status. (SIGINT, which is ignored in the background, is the business of its only test.)
signal.signal(signal.SIGCHLD, signal.SIG_DFL)

# Many small programs run once each, and nearly all of the time is spent compiling. Updates that are
# held against the references are compiled as users compile them: `reference.AS_USERS`.
_QUICKLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_SHARDED = "test_sharding"  # how the names of files begin whose tests need several devices
_DEVICES = 8


def pytest_addoption(parser):
    parser.addoption(
        "--optimizer",
        metavar="NAME",
        help="the tests of one optimizer alone, with the nightly ones",
    )


def pytest_configure(config):
    """Sets what has to be known before JAX starts."""
    if config.option.optimizer:
        config.option.markexpr = "not slow"
    gpu = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    if not gpu and _QUICKLY not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{_QUICKLY} {os.environ.get('XLA_FLAGS', '')}".strip()
    if _forced_devices() is None:
        jax.config.update("jax_num_cpu_devices", _devices(config))


def _forced_devices():
    """As many as XLA_FLAGS asks for; None: it does not."""
    flag = re.search(r"host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return flag and int(flag[1])


def _devices(config):
    """As many as are asked for, as sharded tests need where they are named, and one otherwise."""
    if (forced := _forced_devices()) is not None:
        return forced
    named = [Path(argument.split("::")[0]).name for argument in config.args]
    needed = _DEVICES if any(name.startswith(_SHARDED) for name in named) else 1
    return int(os.environ.get("LOPT_JAX_TEST_DEVICES", needed))


def pytest_report_header(config):
    devices = _devices(config)
    return None if devices > 1 else f"devices: 1; {_SHARDED}*.py run where they are named"


def pytest_ignore_collect(collection_path, config):
    return (_devices(config) == 1 and collection_path.name.startswith(_SHARDED)) or None


def pytest_collection_modifyitems(config, items):
    """Keeps the tests of `--optimizer`; those of one optimizer or file share a process."""
    chosen = config.option.optimizer
    if chosen:
        from optimizers import OPTIMIZERS

        if chosen not in OPTIMIZERS:
            raise pytest.UsageError(
                f"--optimizer: expected one of {', '.join(OPTIMIZERS)}; found {chosen!r}"
            )
        left_out = [item for item in items if _optimizer(item) != chosen]
        items[:] = [item for item in items if _optimizer(item) == chosen]
        config.hook.pytest_deselected(items=left_out)
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))


def _optimizer(item):
    """The optimizer of a test that has one: its own, or that of its recorded run."""
    from optimizers import OPTIMIZERS

    name = item.callspec.params.get("name") if hasattr(item, "callspec") else None
    known = [x for x in OPTIMIZERS if name == x or str(name).startswith(f"{x}_")]
    return max(known, key=len, default=None)


def _group(item):
    """Tests that compile the same programs."""
    file = item.path.stem
    return f"{file} {_optimizer(item)}" if file == "test_optax_conventions" else file


# The same small programs occur in many tests. Each process has a cache of its own: what one writes
# another could read half-written.
_cache = tempfile.TemporaryDirectory(prefix="lopt_jax_tests_", ignore_cleanup_errors=True)
jax.config.update("jax_compilation_cache_dir", _cache.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_unconfigure():
    _cache.cleanup()
