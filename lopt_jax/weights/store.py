"""Our own checkpoints: an Orbax checkpoint of the arrays, and one JSON file beside it.

    <path>/weights.json   format, version, architecture, config, metadata, sha256 of the files
    <path>/params/        Orbax PyTree checkpoint of the meta-parameters

Orbax writes it; TensorStore alone reads it. Both are imported inside the functions: `import
lopt_jax` does not need them.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lopt_jax.brief import brief
from lopt_jax.weights.arrays import MAX_RANK
from lopt_jax.weights.base import Weights, WeightsError, thaw, weights_error
from lopt_jax.weights.files import read_regular, read_tree
from lopt_jax.weights.schema import (
    MAX_BYTES,
    MAX_LEAVES,
    check_shapes,
    checked_params,
    complete_config,
    validate,
)
from lopt_jax.weights.sources import local_folder

DESCRIPTION = "weights.json"
PARAMS = "params"
_MANIFEST = "manifest.ocdbt"
FORMAT = "lopt_jax weights"
VERSION = 1
_MAX_DESCRIPTION = 1 << 20
_ASIDE = "-old"  # ends the name of weights that move aside
_ATTEMPTS = 100  # to save where other processes save too
_PATIENCE = 2.0  # seconds that a reader waits for a writer to leave the folder as it is


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Tells whether `path` is a folder that holds weights in our format."""
    folder = Path(path)
    return _unless_replaced(folder, lambda: os.path.isfile(folder / DESCRIPTION))


def save_weights(path: str | os.PathLike[str], weights: Weights) -> None:
    """Writes weights as an Orbax checkpoint, whole or not at all.

    Everything is written under a temporary name beside `path`, read back, and renamed at the end.
    Weights that are at `path` already are replaced.

    Args:
      path: the folder to create; ~ is expanded.
      weights: the weights.

    Raises:
      WeightsError: the weights are not valid, `path` is an address, or the installed Orbax writes
        what cannot be read back.
      FileExistsError: there is something else than weights at `path`.
    """
    target = Path(os.path.realpath(local_folder(path)))  # of a link, where it points to
    weights = validate(weights, f"weights to save in {target}")
    if not _is_unicode(target):
        raise weights_error(
            target, expected="a path in UTF-8, as TensorStore needs it", found="other bytes"
        )
    if os.path.lexists(target) and not is_checkpoint(target) and not _is_empty_folder(target):
        raise FileExistsError(f"{target} exists and holds no weights: remove it, or take another")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir()
        _checkpointer().save(temporary / PARAMS, args=_orbax().args.PyTreeSave(weights.params))
        description = {
            "format": FORMAT,
            "version": VERSION,
            "architecture": weights.architecture,
            "config": thaw(weights.config),
            "metadata": thaw(weights.metadata),
            "files": _digests(temporary),
        }
        text = json.dumps(description, indent=1, sort_keys=True, allow_nan=False)
        if len(text) >= _MAX_DESCRIPTION:
            raise ValueError(f"{len(text)} bytes, more than {_MAX_DESCRIPTION}")
        (temporary / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
        _check_written(temporary, target, weights)
        _replace_folder(temporary, target)
    except ValueError as error:
        if isinstance(error, WeightsError):
            raise
        raise weights_error(
            target, expected="metadata that JSON can hold", found=str(error)[:120]
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_checkpoint(path: str | os.PathLike[str]) -> Weights:
    """Reads weights in our format, on any number of devices.

    All files are read into memory at one moment, and everything that they declare is checked
    there before TensorStore sees it.

    Args:
      path: the folder that `save_weights` made.

    Returns:
      Validated weights; the leaves are float32 `jax.Array`s on the default device.

    Raises:
      WeightsError: something about the folder is not what it has to be.
    """
    return on_device(_read_weights(Path(os.path.abspath(os.fspath(path)))))


def _read_weights(folder: Path) -> Weights:
    """As `load_checkpoint`, with numpy arrays as leaves."""
    description, files = _unless_replaced(folder, lambda: _read_checkpoint(folder))
    try:
        architecture = description["architecture"]
        config = complete_config(architecture, description["config"], folder)
        _check_digests(folder, files, description.get("files", {}))
        params = checked_params(
            architecture, config, _restore(files, architecture, config, folder / PARAMS), folder
        )
        return Weights(architecture, config, params, description["metadata"])
    except WeightsError:
        raise
    except (Exception, RecursionError) as error:
        # TensorStore has many ways to say that a file is damaged.
        raise weights_error(
            folder,
            expected=f"the Orbax checkpoint of {brief(description['architecture'])} weights",
            found=f"{type(error).__name__}: {str(error)[:160]}",
            advice="The checkpoint is damaged: fetch or convert it again.",
        ) from error


def _check_written(folder: Path, target: Path, weights: Weights) -> None:
    """Reads what was just written, before it takes the place of what may be at `target`.

    Raises:
      WeightsError: it cannot be read, or is not `weights`.
    """
    try:
        found = "" if _read_weights(folder) == weights else "other weights"
    except WeightsError as error:
        found = str(error).replace(os.fspath(folder), folder.name)
    if found:
        version = importlib.metadata.version("orbax-checkpoint")
        raise weights_error(
            target,
            expected="to read back what was written",
            found=found.rstrip("."),
            advice=f"orbax-checkpoint {version} wrote it: install another release.",
        )


def on_device(weights: Weights) -> Weights:
    """Returns the weights with `jax.Array`s as leaves, concrete even while tracing."""
    with jax.ensure_compile_time_eval():
        params = jax.tree.map(jnp.asarray, weights.params)
    return Weights(weights.architecture, weights.config, params, weights.metadata)


def _unless_replaced[T](folder: Path, read: Callable[[], T]) -> T:
    """Returns what `read` returns; it reads again where the folder was replaced meanwhile.

    A writer moves the old folder aside before it renames the new one. A reader between the two
    sees no folder. So a missing folder has to be missing at two moments.
    """
    deadline = time.monotonic() + _PATIENCE
    missing = 0
    while True:
        before = _identity(folder)
        result: T | WeightsError
        try:
            result = read()
        except WeightsError as error:
            result = error
        being_replaced = _is_being_replaced(folder)
        after = _identity(folder)
        missing = missing + 1 if before is after is None and not being_replaced else 0
        settled = missing == 2 if before is None else before == after
        if settled or time.monotonic() > deadline:
            if isinstance(result, WeightsError):
                raise result
            return result
        time.sleep(0.005)


def _identity(folder: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Returns the description and the files of the arrays, by names such as params/_METADATA."""
    description = _read_description(folder)
    try:
        files = read_tree(folder / PARAMS, MAX_BYTES, MAX_LEAVES)
    except OSError as error:
        raise weights_error(
            error.filename or folder,
            expected=f"the {PARAMS} folder of an Orbax PyTree checkpoint",
            found=error.strerror or type(error).__name__,
            advice="The checkpoint is damaged or not yours to read: fetch or convert it again.",
        ) from error
    return description, {f"{PARAMS}/{name}": data for name, data in files.items()}


def _read_description(folder: Path) -> dict[str, Any]:
    source = folder / DESCRIPTION
    advice = "Point to a folder that save_weights or `lopt convert` made."
    try:
        data = read_regular(source, _MAX_DESCRIPTION, source)
    except OSError as error:
        found = error.strerror or type(error).__name__
        if isinstance(error, FileNotFoundError):
            found = "no such file" if os.path.isdir(folder) else "no such folder"
        raise weights_error(source, expected="weights", found=found, advice=advice) from error
    try:
        description = json.loads(data, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise weights_error(
            source, expected="a JSON file", found=str(error)[:120], advice=advice
        ) from error
    wanted = {"architecture": str, "config": dict, "metadata": dict}
    if (
        not isinstance(description, dict)
        or description.get("format") != FORMAT
        or not all(isinstance(description.get(key), kind) for key, kind in wanted.items())
    ):
        raise weights_error(
            source, expected=f"format, {', '.join(wanted)}", found="others", advice=advice
        )
    if description.get("version") != VERSION:
        raise weights_error(
            source,
            expected=f"version {VERSION}",
            found=brief(description.get("version")),
            advice="A newer lopt_jax wrote it: upgrade.",
        )
    return description


def _reject_constant(name: str) -> None:
    raise ValueError(f"the number {name}")


def _digests(folder: Path) -> dict[str, str]:
    files = read_tree(folder / PARAMS, MAX_BYTES, MAX_LEAVES)
    return {f"{PARAMS}/{name}": _digest(files[name]) for name in sorted(files)}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _check_digests(folder: Path, files: Mapping[str, bytes], digests: Any) -> None:
    """Finds damaged files by their digests: a clear message, and no work for TensorStore.

    This is no protection against somebody who changes the digests too; the checks of shapes,
    sizes and values do not rely on it.
    """
    if not isinstance(digests, dict) or len(digests) > MAX_LEAVES:
        raise weights_error(folder, expected="digests of files", found=brief(digests))
    for name, digest in digests.items():
        if name not in files or _digest(files[name]) != digest:
            raise weights_error(
                folder / name,
                expected=f"sha256 {brief(digest)}",
                found="another content" if name in files else "no such file",
                advice="The checkpoint is damaged: fetch or convert it again.",
            )


def _restore(
    files: Mapping[str, bytes], architecture: str, config: Mapping[str, Any], source: Path
) -> dict[str, Any]:
    """Reads the arrays from memory, after their declared types and shapes passed the schema.

    Orbax itself would open the arrays first, and TensorStore reserves what they declare then.
    """
    import tensorstore as ts

    context = ts.Context()
    memory = ts.KvStore.open({"driver": "memory"}, context=context).result()
    for name, data in files.items():
        memory[name] = data
    database = {"driver": "ocdbt", "base": f"memory://{PARAMS}/"}
    values = ts.KvStore.open(database, context=context).result()
    shapes = {}
    for path in _declared_paths(files, source):
        header = values.read(f"{'.'.join(path)}/.zarray").result()
        if header.state == "value":
            shapes[path] = _declared_shape(header.value, "/".join(path), source)
    check_shapes(architecture, config, shapes, source)
    tree: dict[str, Any] = {}
    for path in shapes:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        spec = {
            "driver": "zarr",
            "kvstore": {**database, "path": f"{'.'.join(path)}/"},
            "fill_missing_data_reads": False,
        }
        node[path[-1]] = (
            ts.open(spec, open=True, read=True, context=context).result().read().result()
        )
    return tree


def _declared_paths(files: Mapping[str, bytes], source: Path) -> list[tuple[str, ...]]:
    """Returns the paths of the arrays that Orbax's description of the tree names."""
    wanted = "the description of an Orbax PyTree checkpoint"
    data = files.get(f"{PARAMS}/_METADATA")
    if data is None:
        raise weights_error(source / "_METADATA", expected=wanted, found="no such file")
    try:
        document = json.loads(data)
        entries = list(document["tree_metadata"].values())
        paths = [tuple(str(key["key"]) for key in entry["key_metadata"]) for entry in entries]
        # Orbax before 0.11.31 says no word about OCDBT: its manifest is there, or is not.
        has_manifest = f"{PARAMS}/{_MANIFEST}" in files
        stored = document.get("use_ocdbt", has_manifest), document.get("use_zarr3", False)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise weights_error(
            source / "_METADATA", expected=wanted, found=f"{type(error).__name__}: {error}"[:120]
        ) from error
    if stored != (True, False) or len(paths) > MAX_LEAVES:
        raise weights_error(
            source / "_METADATA",
            expected=f"at most {MAX_LEAVES} arrays of zarr 2 in OCDBT",
            found=f"{len(paths)} arrays, (use_ocdbt, use_zarr3) = {brief(stored)}",
            advice="Write it with lopt_jax.save_weights.",
        )
    return paths


# What Orbax writes; another compressor could unpack to anything.
_ZARR = {"zarr_format": 2, "filters": None, "order": "C", "fill_value": None}


def _declared_shape(header: bytes, name: str, source: Path) -> tuple[int, ...]:
    """Returns the shape in a .zarray, after checking that it declares a plain float32 array.

    Raises:
      WeightsError: another type, or chunks, filters or a compressor that Orbax does not write.
    """
    try:
        declared = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise weights_error(
            source, expected=f"a JSON header of {name}", found=str(error)[:120]
        ) from error
    if not isinstance(declared, dict) or declared.get("dtype") != "<f4":
        found = declared.get("dtype") if isinstance(declared, dict) else declared
        raise weights_error(source, expected=f"{name} to be a float32 array", found=brief(found))
    shape, compressor = declared.get("shape"), declared.get("compressor")
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_RANK
        or not all(type(size) is int and 0 <= size <= MAX_BYTES for size in shape)
    ):
        raise weights_error(
            source, expected=f"{name} of at most {MAX_RANK} dimensions", found=brief(shape)
        )
    if declared.get("chunks") != [max(size, 1) for size in shape]:
        # Reading reserves whole chunks: a chunk larger than its array is refused.
        raise weights_error(
            source,
            expected=f"{name} in one chunk of shape {tuple(shape)}",
            found=f"chunks of shape {brief(declared.get('chunks'))}",
        )
    packed_by = compressor.get("id") if isinstance(compressor, dict) else compressor
    if packed_by not in (None, "zstd") or any(declared.get(key) != _ZARR[key] for key in _ZARR):
        raise weights_error(
            source,
            expected=f"{name} with zstd and {_ZARR}",
            found=brief(declared),
            advice="Write it with lopt_jax.save_weights.",
        )
    return tuple(shape)


def _orbax() -> Any:
    import orbax.checkpoint as ocp

    return ocp


def _checkpointer() -> Any:
    """Returns a checkpointer that acts for this process alone."""
    ocp = _orbax()
    options: dict[str, Any] = {}
    if jax.process_count() > 1:
        # Weights are read and written by every process for itself: no barrier with the others.
        index = jax.process_index()
        options["multiprocessing_options"] = ocp.options.MultiprocessingOptions(
            primary_host=index,
            active_processes={index},
            barrier_sync_key_prefix=f"lopt_jax_weights_{index}",
        )
    # What `_restore` reads, whatever the defaults of another version of Orbax.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False, **options)
    return ocp.Checkpointer(handler, **options)


def _is_unicode(path: Path) -> bool:
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:  # a byte that is none, as Python keeps it in a text
        return False
    return True


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _is_being_replaced(folder: Path) -> bool:
    """Tells whether weights are moved aside at this moment, for new ones."""
    return not os.path.lexists(folder) and any(
        folder.parent.glob(f".{glob.escape(folder.name)}.tmp-*{_ASIDE}")
    )


def _replace_folder(temporary: Path, target: Path) -> None:
    """Renames `temporary` to `target`; weights that are there move aside first."""
    aside = temporary.with_name(temporary.name + _ASIDE)
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(OSError):  # not empty
            os.rename(temporary, target)
            return
        try:
            os.rename(target, aside)
        except FileNotFoundError:
            continue  # another process has moved it aside, to save there too
        try:
            os.rename(temporary, target)
        except OSError:
            if not is_checkpoint(target):  # it is not that another process just saved there
                os.rename(aside, target)
                raise
            shutil.rmtree(aside, ignore_errors=True)
            continue
        shutil.rmtree(aside, ignore_errors=True)
        return
    os.rename(temporary, target)
