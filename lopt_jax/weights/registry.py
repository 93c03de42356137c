"""Weights by name: those that ship with the library, those in the cache, those to be fetched."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lopt_jax.brief import brief
from lopt_jax.partition import say_once
from lopt_jax.weights.base import Weights, WeightsError, WeightsLike, weights_error
from lopt_jax.weights.catalogue import REGISTRY, Entry, Place
from lopt_jax.weights.convert import convert_bundle, convert_weights, reconfigured
from lopt_jax.weights.schema import SCHEMAS, check_structure, schema_of
from lopt_jax.weights.sources import GIN, JSON, local_folder, local_path, read_local
from lopt_jax.weights.store import (
    DESCRIPTION,
    is_checkpoint,
    load_checkpoint,
    save_weights,
)

EMBEDDED = ("embedded",)  # the source of weights that ship with the library


@dataclasses.dataclass(frozen=True)
class WeightsInfo:
    """What `list_weights` tells of one name.

    Attributes:
      name: what `load_weights` and the optimizers' `weights` take.
      architecture: the optimizer that it belongs to.
      source: where from: "embedded", or the addresses in the order they are tried, those of
        weights in two files joined by "with".
      offline: whether it can be loaded without a network.
      licence: as its authors state it.
      about: one line.
    """

    name: str
    architecture: str
    source: tuple[str, ...]
    offline: bool
    licence: str | None
    about: str


def embedded_folder() -> Path:
    """Returns the folder of the weights that ship with the library."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "checkpoints"  # in a wheel
    return inside if inside.is_dir() else package.parent / "checkpoints"


def cache_folder() -> Path:
    """Returns the folder of fetched weights: LOPT_JAX_CACHE, or the user's cache folder.

    Raises:
      WeightsError: LOPT_JAX_CACHE is an address, or names a user that is not there.
    """
    override = os.environ.get("LOPT_JAX_CACHE")
    if override:
        return local_folder(override).absolute()
    return local_folder(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lopt_jax"


def cached_path(name: str) -> Path:
    """Returns where the weights of a registered name lie once they have been fetched."""
    return cache_folder() / "weights" / name


def list_weights() -> list[WeightsInfo]:
    """Returns the registered names: those that ship with the library first."""
    found = []
    folder = embedded_folder()
    embedded = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in embedded:
        if is_checkpoint(path):
            description = json.loads((path / DESCRIPTION).read_bytes())
            metadata = description["metadata"]
            about = str(metadata.get("about", "ships with lopt_jax"))
            found.append(
                WeightsInfo(
                    path.name,
                    description["architecture"],
                    EMBEDDED,
                    True,
                    metadata.get("licence"),
                    about,
                )
            )
    names = {info.name for info in found}
    for entry in REGISTRY.values():
        if entry.name not in names:
            places = tuple(map(_addresses, entry.places))
            offline = is_checkpoint(cached_path(entry.name))
            found.append(
                WeightsInfo(
                    entry.name, entry.architecture, places, offline, entry.licence, entry.about
                )
            )
    return found


def _addresses(place: Place) -> str:
    """Returns the address of a place's weights, both of them of a pair."""
    return " with ".join(
        address for name, address in place.files.items() if name not in (GIN, JSON)
    )


def optimizer_of(architecture: str) -> str:
    """Returns the name of the optimizer that weights of an architecture are for."""
    return {"linear": "lopt"}.get(architecture, architecture)


def _unknown_name(name: str, architectures: Sequence[str]) -> WeightsError:
    """An error that names what is close, and first what an optimizer of these can take."""
    infos = sorted(list_weights(), key=lambda info: info.name)
    fitting = [info.name for info in infos if info.architecture in architectures]
    others = [info.name for info in infos if info.name not in fitting]
    close = difflib.get_close_matches(name.strip().lower(), fitting or others, n=1)
    known = ", ".join(fitting or others)
    return weights_error(
        repr(name),
        expected=f"a path, or a name out of {known}",
        found="neither",
        advice=f"Did you mean {close[0]!r}?" if close else "`lopt list` shows all names.",
    )


def load_weights(name_or_path: str | os.PathLike[str]) -> Weights:
    """Loads weights by name, path or address.

    Args:
      name_or_path: a registered name (see `list_weights`; fetched and converted at the first use,
        then read from the cache), the path of a checkpoint of ours, or an address such as
        hf://owner/repo, which is fetched every time.

    Returns:
      Validated weights.

    Raises:
      WeightsError: nothing of that name or at that path, weights that are not valid, or no place
        to fetch them from answered.
    """
    return _load(name_or_path, ())


def _load(name_or_path: str | os.PathLike[str], architectures: Sequence[str]) -> Weights:
    """As `load_weights`; an error about the name lists those of `architectures`."""
    path = local_path(name_or_path)
    if path is None:
        return convert_weights(name_or_path)
    if isinstance(name_or_path, str):
        embedded = embedded_folder() / name_or_path
        if _is_name(name_or_path) and is_checkpoint(embedded):
            return load_checkpoint(embedded)
        if name_or_path in REGISTRY:
            cached = cached_path(name_or_path)
            if is_checkpoint(cached):
                return _load_cached(cached)
            return _fetch_registered(REGISTRY[name_or_path])
        if _is_name(name_or_path) and not is_checkpoint(path) and not os.path.exists(path):
            raise _unknown_name(name_or_path, architectures)
    if os.path.isfile(path):
        raise weights_error(
            path,
            expected="the folder of a checkpoint of ours",
            found="a file",
            advice="Read other formats with lopt_jax.convert_weights.",
        )
    return load_checkpoint(path)


def find_weights(
    name_path_or_url: str,
    architecture: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Weights:
    """Reads weights of any kind: what `load_weights` and what `convert_weights` take.

    Args:
      name_path_or_url: a registered name, or a path or an address. As for the constructors, what
        lies in the working directory does not change what a name stands for: ./velo is that folder.
      architecture: as in `convert_weights`.
      config: as in `convert_weights`.

    Raises:
      WeightsError: as `load_weights` and `convert_weights`.
    """
    path = local_path(name_path_or_url)
    is_registered = name_path_or_url in {info.name for info in list_weights()}
    is_path = path is not None and os.path.lexists(path) and not is_registered
    if path is not None and not is_path and _is_name(name_path_or_url):
        if architecture is not None:
            schema_of(architecture, "architecture")
        weights = load_weights(name_path_or_url)
        return reconfigured(weights, architecture, config, name_path_or_url)
    return convert_weights(name_path_or_url, architecture, config)


def published(name: str) -> Entry | None:
    """Returns what the catalogue knows of weights that are not on this machine.

    Args:
      name: a registered name, or anything else.

    Returns:
      The entry; None where the weights are here, or the name is none of the catalogue.
    """
    entry = REGISTRY.get(name)
    if entry is None or is_checkpoint(embedded_folder() / name) or is_checkpoint(cached_path(name)):
        return None
    return entry


def _load_cached(folder: Path) -> Weights:
    try:
        return load_checkpoint(folder)
    except WeightsError as error:
        raise WeightsError(
            f"{error} This is the cached copy: delete the folder {folder} to fetch it again."
        ) from error


def _is_name(text: str) -> bool:
    return bool(text) and not any(c in text for c in "/\\:") and not text.startswith(".")


def _fetch_registered(entry: Entry) -> Weights:
    """Fetches, converts and caches registered weights; one process at a time."""
    schema_of(entry.architecture, f"the weights {entry.name!r}")  # before any download
    target = cached_path(entry.name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f".{entry.name}.lock")):
            if is_checkpoint(target):  # another process was faster
                return _load_cached(target)
            # Whoever made these is dead, as we hold the lock.
            for leftover in target.parent.glob(f".{entry.name}.tmp-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            failures = []
            for place in entry.places:
                try:
                    return _fetch_place(entry, place, target)
                except WeightsError as error:
                    failures.append(str(error))
    except OSError as error:
        raise weights_error(
            target,
            expected="a cache folder to write to",
            found=f"{type(error).__name__}: {error}"[:200],
            advice="Set LOPT_JAX_CACHE to a folder of yours.",
        ) from error
    raise _not_fetched(entry, failures)


def _fetch_place(entry: Entry, place: Place, target: Path) -> Weights:
    import tempfile

    # its network modules are slow to import
    from lopt_jax.weights.fetch import as_metadata, fetch_files

    with tempfile.TemporaryDirectory(prefix=f".{entry.name}.tmp-", dir=target.parent) as name:
        folder = Path(name)
        record = fetch_files(place.files, folder, place.sha256, place.git_blob)
        origin = next(iter(place.files.values()))
        weights = convert_bundle(
            read_local(folder, origin),
            entry.architecture,
            place.config,
            {
                "name": entry.name,
                "licence": entry.licence,
                "about": entry.about,
                **as_metadata(record),
            },
        )
    save_weights(target, weights)
    return weights


class NotFetchedError(WeightsError):
    """No place gave the weights of a registered name.

    Attributes:
      failures: one line for every place that was tried.
    """

    def __init__(self, message: str, failures: Sequence[str] = ()):
        super().__init__(message)
        self.failures = tuple(failures)


def _not_fetched(entry: Entry, failures: Sequence[str]) -> NotFetchedError:
    """Says on one line what to do, and what was tried."""
    here = shipped(entry.architecture)
    others = f"take {' or '.join(map(repr, here))} (no network needed), or " if here else ""
    return NotFetchedError(
        f"the weights {entry.name!r} are not in the cache: {others}run `lopt show {entry.name}`, "
        "which says how to put them in place by hand. No place to fetch them answered: "
        + " ".join(failures),
        failures,
    )


def by_hand(entry: Entry) -> list[str]:
    """Returns lines that say how to put weights in place without a network.

    Args:
      entry: of the catalogue.

    Returns:
      What to download, and the one command to run, which is the last line.
    """
    from lopt_jax.weights.fetch import http_address

    place = entry.places[0]
    names = list(place.files)
    together = all(Path(name).parent == Path() for name in names)
    downloaded = f"/path/to/{names[0]}" if together else "/path/to"
    command = ["lopt", "convert", downloaded, os.fspath(cached_path(entry.name))]
    command += ["--architecture", entry.architecture]
    if place.config:
        command += ["--config", json.dumps(dict(place.config))]
    files = [f"{http_address(url)} to /path/to/{name}" for name, url in place.files.items()]
    return [*(f"download {file}" for file in files), f"run {shlex.join(command)}"]


def shipped(architecture: str) -> list[str]:
    """Returns the names of the weights of an architecture that need no network."""
    infos = [info for info in list_weights() if info.source == EMBEDDED]
    return [info.name for info in infos if info.architecture == architecture]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock file; the system releases it when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows: renaming at the end keeps the cache whole without a lock
        yield
        return
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def resolve(weights: WeightsLike, architectures: Sequence[str], *, has_own: bool = True) -> Weights:
    """Returns the weights that an optimizer's constructor was given.

    Logs once where they are of another architecture than the optimizer's own.

    Args:
      weights: a registered name, a path, an address, or `Weights` (whose leaves may be traced).
      architectures: those that the optimizer can run; its own first.
      has_own: whether the first is the optimizer's own; otherwise it is made for all of them.

    Returns:
      Weights of one of `architectures`, with a complete config and the right shapes.

    Raises:
      WeightsError: they cannot be loaded, or are of another architecture.
      TypeError: `weights` is none of these.
    """
    if isinstance(weights, Weights):
        found, source = weights, "weights"
    elif isinstance(weights, str | os.PathLike):
        found, source = _load(weights, architectures), os.fspath(weights)
    else:
        is_number = hasattr(weights, "__float__")
        hint = ". A learning rate is given by name: learning_rate=..." if is_number else ""
        raise TypeError(
            f"weights must be a name, a path, or lopt_jax.Weights, found {type(weights).__name__}"
            + hint
        )
    if found.architecture not in architectures:
        name, advice = brief(found.architecture), ""
        if isinstance(found.architecture, str) and found.architecture in SCHEMAS:
            name = found.architecture
            advice = f"Take lopt_jax.{optimizer_of(name)}, or other weights."
        raise weights_error(
            source,
            expected=f"weights of {' or '.join(architectures)}",
            found=f"weights of {name}",
            advice=advice,
        )
    own = architectures[0]
    if has_own and found.architecture != own:
        name = "the weights" if source == "weights" else f"the weights {source!r}"
        say_once(
            f"{own}: {name} were meta-trained for {found.architecture}, whose arrays are alike: "
            f"lopt_jax.{found.architecture} is their optimizer."
        )
    return check_structure(found, source)


__all__ = [
    "WeightsInfo",
    "cache_folder",
    "cached_path",
    "convert_weights",
    "embedded_folder",
    "find_weights",
    "list_weights",
    "load_weights",
    "optimizer_of",
    "published",
    "resolve",
]
