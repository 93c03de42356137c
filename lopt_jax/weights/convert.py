"""`convert_weights`: a foreign weights file to a validated `Weights`."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lopt_jax.brief import brief
from lopt_jax.weights.arguments import gin_config
from lopt_jax.weights.base import StaticMapping, Weights, weights_error
from lopt_jax.weights.gin import parse_gin
from lopt_jax.weights.haiku_pickle import is_pickle, read_pickle
from lopt_jax.weights.msgpack_tree import read_msgpack
from lopt_jax.weights.original import (
    Converted,
    convert_original,
    undecided_error,
)
from lopt_jax.weights.pylo import convert_pylo, is_safetensors, read_safetensors
from lopt_jax.weights.schema import (
    SCHEMAS,
    checked_params,
    complete_config,
    inferred_sizes,
    schema_of,
)
from lopt_jax.weights.sources import Bundle, local_path, read_local
from lopt_jax.weights.store import is_checkpoint, load_checkpoint, on_device

_logger = logging.getLogger(__name__)
_CONFIG_KEYS = frozenset(key for schema in SCHEMAS.values() for key in schema.defaults)


def convert_weights(
    path_or_url: str | os.PathLike[str],
    architecture: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Weights:
    """Reads weights that another code wrote.

    Formats: flax msgpack of the original code (theta; `{params, gen_id, step}` with `config.gin`
    beside it; the tuple `(theta, "", 0)`), PyLO's safetensors, and the pickles of
    mu_learned_optimization, none of which can execute anything here. Formats are recognised by
    content. A folder stands for the weights file in it; our own checkpoints are read too.

    Args:
      path_or_url: a path, or an address of scheme file, https, gs, hf
        (`hf://owner/repo[@revision][/file]`) or github (`github://owner/repo@revision/file`).
      architecture: the optimizer; where None, what the file and its neighbours tell. They do not
        tell where the same arrays serve several optimizers: it has to be given then.
      config: values that win over what the file and its neighbours say. Sizes come from the
        arrays; giving them checks them.

    Returns:
      Validated weights, whose metadata hold source, sha256, and format.

    Raises:
      TypeError: an argument is of another type; the message names it.
      WeightsError: the file cannot be fetched, is damaged or malicious, is of another
        architecture, or does not tell which it is.
    """
    if architecture is not None:
        schema_of(architecture, "architecture")
    if not isinstance(config, Mapping | None):
        raise TypeError(f"config: expected a mapping of names to values, found {brief(config)}.")
    path = local_path(path_or_url)
    if path is not None:
        return _convert_path(path, None, architecture, config, {})
    import tempfile

    # its network modules are slow to import
    from lopt_jax.weights.fetch import as_metadata, fetch_folder

    address = os.fspath(path_or_url)
    with tempfile.TemporaryDirectory(prefix="lopt_jax-") as folder:
        record = as_metadata(fetch_folder(address, Path(folder)))
        return _convert_path(Path(folder), address, architecture, config, record)


def _convert_path(
    path: Path,
    origin: str | None,
    architecture: str | None,
    config: Mapping[str, Any] | None,
    metadata: Mapping[str, Any],
) -> Weights:
    if is_checkpoint(path):  # its own metadata stay as they are
        return reconfigured(load_checkpoint(path), architecture, config, origin or path)
    weights, untold = _converted(read_local(path, origin), architecture, config, metadata)
    if untold:
        values = ", ".join(f"{key}={brief(weights.config[key])}" for key in untold)
        _logger.warning(
            "%s does not tell %s: these are the original's defaults. If the weights were trained "
            "with others, give them as config.",
            origin or path,
            values,
        )
    return weights


def convert_bundle(
    bundle: Bundle,
    architecture: str | None = None,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Weights:
    """Converts files that are in memory already; see `convert_weights`.

    Args:
      bundle: the weights file and its neighbours.
      architecture: as in `convert_weights`.
      config: as in `convert_weights`.
      metadata: added to the metadata.
    """
    return _converted(bundle, architecture, config, metadata)[0]


def _converted(
    bundle: Bundle,
    architecture: str | None,
    config: Mapping[str, Any] | None,
    metadata: Mapping[str, Any] | None,
) -> tuple[Weights, list[str]]:
    """The weights, and the names of settings that neither the files nor the caller tell."""
    source = bundle.origin
    given = dict(config or {})
    kind, converted = _parse(bundle, given, architecture)
    from_gin: dict[str, Any] = {}
    if bundle.gin is not None:
        named, from_gin = gin_config(
            parse_gin(bundle.gin, f"config.gin of {source}"), _CONFIG_KEYS, source
        )
        if architecture is None and named in (converted.architecture, *converted.alternatives):
            architecture = named
    if architecture is None and converted.undecided:
        raise undecided_error(source, (converted.architecture, *converted.alternatives))
    chosen = architecture or converted.architecture
    if chosen not in (converted.architecture, *converted.alternatives):
        raise weights_error(
            source,
            expected=f"weights of {chosen}",
            found=f"weights of {converted.architecture}",
            advice="Leave architecture out, or take the optimizer of that name.",
        )
    given = {key: value for key, value in given.items() if key not in converted.consumed}
    stated = {**converted.config, **from_gin, **given}
    sizes = inferred_sizes(chosen, converted.params, source)
    for key, size in sizes.items():
        if key in stated and stated[key] != size:
            raise weights_error(
                source,
                expected=f"{key} = {brief(stated[key])}, as config says",
                found=f"arrays of {key} = {size}",
            )
    if not set(stated) <= set(given):  # a neighbour may speak of more than this architecture has
        known = SCHEMAS[chosen].defaults
        stated = {k: v for k, v in stated.items() if k in known or k in given}
    complete = complete_config(chosen, {**stated, **sizes}, source)
    untold = [key for key in complete if key not in stated and key not in sizes]
    params = checked_params(chosen, complete, converted.params, source)
    record = {
        "source": source,
        "sha256": _sha256(bundle.data),
        **({} if bundle.second is None else {"sha256_second": _sha256(bundle.second)}),
        "format": kind,
        **converted.notes,
        **(metadata or {}),
    }
    try:
        frozen = StaticMapping(record)
    except (TypeError, ValueError) as error:
        raise weights_error(
            source, expected="metadata of JSON's types", found=str(error)[:120]
        ) from error
    return on_device(Weights(chosen, complete, params, frozen)), untold


def _parse(
    bundle: Bundle, given: Mapping[str, Any], architecture: str | None
) -> tuple[str, Converted]:
    """Recognises the format by content and converts to the canonical layout."""
    data, source = bundle.data, bundle.origin
    if data[:2] == b"PK":
        raise weights_error(
            source,
            expected="msgpack, safetensors or a pickle of numpy arrays",
            found="a zip archive (torch.save?)",
            advice="Save the state dict with safetensors and convert that.",
        )
    if is_pickle(data):
        # mu_learned_optimization pickles every optimizer; theta.state files of small_fc_lopt and
        # celo2 come from codes that have no other optimizer with such arrays.
        converted = convert_original(read_pickle(data, source), source)
        undecided = bool(converted.alternatives)
        return "haiku pickle", dataclasses.replace(converted, undecided=undecided)
    if is_safetensors(data):
        second = None if bundle.second is None else read_safetensors(bundle.second, source)
        return "PyLO safetensors", convert_pylo(
            read_safetensors(data, source), second, bundle.json, given, architecture, source
        )
    return "flax msgpack", convert_original(read_msgpack(data, source), source)


def reconfigured(
    weights: Weights,
    architecture: str | None,
    config: Mapping[str, Any] | None,
    source: object,
) -> Weights:
    """Returns weights with another config, or of an architecture with the same arrays.

    Args:
      weights: the weights.
      architecture: as in `convert_weights`; None: as it is.
      config: values that win over those of `weights`.
      source: the file or the name, for the message.

    Raises:
      WeightsError: they are of another architecture, or the config is not valid.
    """
    chosen = architecture or weights.architecture
    if set(SCHEMAS[chosen].defaults) != set(SCHEMAS[weights.architecture].defaults):
        raise weights_error(
            source, expected=f"weights of {chosen}", found=f"weights of {weights.architecture}"
        )
    complete = complete_config(chosen, {**weights.config, **(config or {})}, source)
    params = checked_params(chosen, complete, weights.params, source)
    return on_device(Weights(chosen, complete, params, weights.metadata))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
