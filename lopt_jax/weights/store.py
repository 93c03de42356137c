"""Our own checkpoints: an Orbax checkpoint of the arrays, and one JSON file beside it.

    <path>/weights.json   format, version, architecture, config, metadata, sha256 of the files
    <path>/params/        Orbax PyTree checkpoint of the meta-parameters

Orbax is imported inside the functions: `import lopt_jax` does not need it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lopt_jax.weights.base import Weights, WeightsError, brief, thaw, weights_error
from lopt_jax.weights.schema import (
    MAX_BYTES,
    MAX_LEAVES,
    check_shapes,
    checked_params,
    complete_config,
    validate,
    walk,
)

DESCRIPTION = "weights.json"
PARAMS = "params"
FORMAT = "lopt_jax weights"
VERSION = 1
_MAX_DESCRIPTION = 1 << 20


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Tells whether `path` is a folder that holds weights in our format."""
    return (Path(path) / DESCRIPTION).is_file()


def save_weights(path: str | os.PathLike[str], weights: Weights) -> None:
    """Writes weights as an Orbax checkpoint, whole or not at all.

    Everything is written under a temporary name beside `path` and renamed at the end. Weights
    that are at `path` already are replaced.

    Args:
      path: the folder to create.
      weights: the weights.

    Raises:
      WeightsError: the weights are not valid.
      FileExistsError: there is something else than weights at `path`.
    """
    target = Path(os.path.abspath(os.fspath(path)))
    weights = validate(weights, f"weights to save in {target}")
    if target.exists() and not is_checkpoint(target) and not _is_empty_folder(target):
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
        (temporary / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
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

    Shapes are checked before anything is restored, and values afterwards.

    Args:
      path: the folder that `save_weights` made.

    Returns:
      Validated weights; the leaves are float32 `jax.Array`s on the default device.

    Raises:
      WeightsError: something about the folder is not what it has to be.
    """
    folder = Path(os.path.abspath(os.fspath(path)))
    description = _read_description(folder)
    try:
        architecture = description["architecture"]
        config = complete_config(architecture, description["config"], folder)
        _check_size(folder)
        _check_digests(folder, description.get("files", {}))
        params = checked_params(
            architecture, config, _restore(folder / PARAMS, architecture, config), folder
        )
        return on_device(Weights(architecture, config, params, description["metadata"]))
    except WeightsError:
        raise
    except (Exception, RecursionError) as error:
        # Orbax and TensorStore have many ways to say that a file is damaged.
        raise weights_error(
            folder,
            expected=f"the Orbax checkpoint of {brief(description['architecture'])} weights",
            found=f"{type(error).__name__}: {str(error)[:160]}",
            advice="The checkpoint is damaged: fetch or convert it again.",
        ) from error


def on_device(weights: Weights) -> Weights:
    """Returns the weights with `jax.Array`s as leaves, concrete even while tracing."""
    with jax.ensure_compile_time_eval():
        params = jax.tree.map(jnp.asarray, weights.params)
    return Weights(weights.architecture, weights.config, params, weights.metadata)


def _read_description(folder: Path) -> dict[str, Any]:
    source = folder / DESCRIPTION
    advice = "Point to a folder that save_weights or `lopt convert` made."
    if not source.is_file():
        found = "no such file" if folder.is_dir() else "no such folder"
        raise weights_error(source, expected="weights", found=found, advice=advice)
    try:
        if source.stat().st_size > _MAX_DESCRIPTION:
            raise ValueError(f"{source.stat().st_size} bytes")
        description = json.loads(source.read_bytes(), parse_constant=_reject_constant)
    except (ValueError, RecursionError, OSError) as error:
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


def _check_size(folder: Path) -> None:
    """Bounds the bytes and the files that restoring can read."""
    total = count = 0
    for root, _, files in os.walk(folder):
        for name in files:
            count += 1
            total += os.path.getsize(os.path.join(root, name))
            if total > MAX_BYTES or count > MAX_LEAVES:
                raise weights_error(
                    folder,
                    expected=f"at most {MAX_BYTES} bytes in at most {MAX_LEAVES} files",
                    found="more",
                )


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in (folder / PARAMS).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _digest(path) for path in files}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_digests(folder: Path, digests: Any) -> None:
    """Finds damaged files by their digests: a clear message, and no work for Orbax.

    This is no protection against somebody who changes the digests too; the checks of shapes,
    sizes and values do not rely on it.
    """
    if not isinstance(digests, dict) or len(digests) > MAX_LEAVES:
        raise weights_error(folder, expected="digests of files", found=brief(digests))
    for name, digest in digests.items():
        path = folder / name
        inside = PurePosixPath(name).parts[:1] == (PARAMS,) and ".." not in name
        if not inside or not path.is_file() or _digest(path) != digest:
            raise weights_error(
                path,
                expected=f"sha256 {brief(digest)}",
                found="another content" if inside and path.is_file() else "no such file",
                advice="The checkpoint is damaged: fetch or convert it again.",
            )


def _restore(folder: Path, architecture: str, config: Mapping[str, Any]) -> Any:
    """Restores the arrays to host memory, after their declared shapes passed the schema."""
    ocp = _orbax()
    checkpointer = _checkpointer()
    step = checkpointer.metadata(folder)
    declared = dict(walk(_metadata_tree(step, folder), folder))
    for path, array in declared.items():
        storage = getattr(array, "storage", None)
        chunk = getattr(storage, "chunk_shape", None)
        if not hasattr(array, "shape") or str(array.dtype) != "float32":
            found = f"{getattr(array, 'dtype', type(array).__name__)}"
            raise weights_error(
                folder, expected=f"{'/'.join(path)} to be a float32 array", found=found[:80]
            )
        if chunk is not None and tuple(chunk) != tuple(array.shape):
            # Reading reserves whole chunks: a chunk larger than its array is refused.
            raise weights_error(
                folder,
                expected=f"{'/'.join(path)} in one chunk of shape {tuple(array.shape)}",
                found=f"chunks of shape {tuple(chunk)}"[:120],
            )
    check_shapes(architecture, config, {p: a.shape for p, a in declared.items()}, folder)
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), _nested(declared, folder)
    )
    return checkpointer.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def _metadata_tree(step: Any, folder: Path) -> Any:
    tree = getattr(getattr(step, "item_metadata", None), "tree", None)
    if not isinstance(tree, Mapping):
        raise weights_error(
            folder, expected="an Orbax PyTree checkpoint", found="no metadata of one"
        )
    return tree


def _nested(leaves: Mapping[tuple[str, ...], Any], folder: Path) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path in leaves:
        if not path:
            raise weights_error(folder, expected="a dict of arrays", found="a single array")
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = 0
    return tree


def _orbax() -> Any:
    import orbax.checkpoint as ocp

    return ocp


def _checkpointer() -> Any:
    """Returns a checkpointer that acts for this process alone."""
    ocp = _orbax()
    options = {}
    if jax.process_count() > 1:
        # Weights are read and written by every process for itself: no barrier with the others.
        index = jax.process_index()
        options["multiprocessing_options"] = ocp.options.MultiprocessingOptions(
            primary_host=index,
            active_processes={index},
            barrier_sync_key_prefix=f"lopt_jax_weights_{index}",
        )
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options), **options)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _replace_folder(temporary: Path, target: Path) -> None:
    """Renames `temporary` to `target`; weights that are there move aside first."""
    with contextlib.suppress(OSError):  # not empty: another process may just have saved there
        os.rename(temporary, target)
        return
    aside = temporary.with_name(temporary.name + "-old")
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
