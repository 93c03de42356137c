"""What `lopt check` found on this machine: which kernels agree with XLA on a GPU.

The kernels were made and measured on Hopper GPUs. On a newer GPU they are taken only after they
have been run there once, against XLA, with the same versions of all that compiles them.
"""

import dataclasses
import functools
import importlib.metadata
import json
import os
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

FILE = "kernels.json"  # in the library's cache folder
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Check:
    """The result of a check.

    Attributes:
      device_kind: the GPU, as jax names it.
      compute_capability: such as "10.0".
      versions: of jax, jaxlib, the CUDA plugin and this library: (name, version) pairs.
      kernels: names of `supports.KERNELS` that passed.
      date: of the check, in ISO 8601.
    """

    device_kind: str
    compute_capability: str
    versions: tuple[tuple[str, str], ...]
    kernels: tuple[str, ...]
    date: str = ""

    def is_of(self, device: jax.Device) -> bool:
        """Whether it was made on such a device, by what is installed now."""
        return (self.device_kind, self.compute_capability, self.versions) == (
            device.device_kind,
            str(getattr(device, "compute_capability", "")),
            versions(),
        )


@functools.cache
def versions() -> tuple[tuple[str, str], ...]:
    """The versions of what compiles the kernels, as far as they are installed."""
    names = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "lopt_jax")
    found = []
    for name in names:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(found)


def kernels_checked(device: jax.Device, file: Path | None = None) -> frozenset[str]:
    """The kernels that passed on such a device with the present versions."""
    try:
        checks = _checks_in(file or default_file())
    except ValueError:  # the user has no folder for it
        return frozenset()
    return frozenset(name for check in checks if check.is_of(device) for name in check.kernels)


def default_file() -> Path:
    """The file of this user."""
    from lopt_jax.weights.registry import cache_folder

    return cache_folder() / FILE


def keep(check: Check, file: Path | None = None) -> Path:
    """Writes a check beside those of other devices and versions; returns the file."""
    file = file or default_file()
    key = lambda x: (x.device_kind, x.compute_capability, x.versions)  # noqa: E731
    checks = [*(x for x in _checks_in(file) if key(x) != key(check)), check]
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    temporary.write_text(json.dumps([dataclasses.asdict(x) for x in checks], indent=1) + "\n")
    os.replace(temporary, file)
    return file


def _checks_in(file: Path) -> tuple[Check, ...]:
    """The checks in a file as it is now; none where there is no file."""
    try:
        status = os.stat(file)
    except OSError:
        return ()
    return _read(file, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _read(file: Path, size: int, time: int) -> tuple[Check, ...]:
    """The checks in a file; none where it is damaged: then nothing counts as checked."""
    del time  # part of the key
    if size > _MAX_BYTES:
        return ()
    try:
        return tuple(_checks(json.loads(file.read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ()


def _checks(entries: Any) -> Iterable[Check]:
    for entry in entries:
        yield Check(
            device_kind=str(entry["device_kind"]),
            compute_capability=str(entry["compute_capability"]),
            versions=tuple((str(name), str(version)) for name, version in entry["versions"]),
            kernels=tuple(map(str, entry["kernels"])),
            date=str(entry.get("date", "")),
        )
