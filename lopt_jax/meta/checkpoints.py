"""What a meta-training goes on from: whole states, its inner trainings on their way among them.

`campaign` keeps small files instead, for runs whose inner trainings are dealt anew.
"""

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lopt_jax.meta.config import MetaTrainConfig, from_json, to_json
from lopt_jax.meta.locks import lock

# These say when to stop and report, not what is computed.
_FREE = ("checkpoint_seconds", "notes")


def check_same(
    folder: Path, record: Mapping[str, Any], config: MetaTrainConfig, data: Mapping[str, str]
) -> None:
    """Checks that a run can go on from what a folder holds.

    Args:
      folder: for messages.
      record: with "config", and where they are known "data" and "python".
      config: of the run.
      data: sha256 by name of the run's data.

    Raises:
      ValueError: if it was written with other settings or other data.
    """
    wanted = json.loads(to_json(config))
    found = record["config"]
    # A setting that did not exist then had the value that is its default now.
    found = {**json.loads(to_json(from_json(json.dumps(found)))), **found}
    differing = [k for k in wanted if k not in _FREE and wanted[k] != found[k]]
    if differing:
        raise ValueError(
            f"resume: the checkpoint in {folder} was made with other settings of "
            f"{differing}; use its settings or another folder"
        )
    # Checkpoints from before data were recorded say nothing about them.
    for name, sha256 in record.get("data", data).items():
        if data.get(name) != sha256:
            raise ValueError(
                f"resume: the checkpoint in {folder} was made with other data: "
                f"{name} had sha256 {sha256[:12]} under Python {record['python']}, here it has "
                f"{str(data.get(name))[:12]} under Python {platform.python_version()}; "
                "resume with the same data and versions, or start in another folder"
            )


def check_finite(name: Path | str, meta_parameters: Any) -> None:
    """Checks that a run can learn from what it begins with or goes on from.

    Args:
      name: of the argument, the file or the folder, for the message.
      meta_parameters: a tree of arrays.

    Raises:
      ValueError: for numbers that are not finite: all losses of such a rule are none either, so
        that no step leads back.
    """
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(meta_parameters)):
        raise ValueError(
            f"{name}: expected meta-parameters that are finite, found others, from which no step "
            "leads back; begin elsewhere, with weights of an earlier step"
        )


class Checkpoints:
    """Checkpoints of a run: Orbax writes under a temporary name and renames, so kill -9 is safe."""

    def __init__(
        self, folder: Path, config: MetaTrainConfig, data: Mapping[str, str], resume: bool
    ):
        self._config = config
        self._data = dict(data)
        self._folder = folder / "checkpoints"
        if resume and not self._folder.is_dir():
            raise self._nothing_to_resume()
        claim = lock(folder / ".lock")
        if claim is None:
            raise ValueError(f"folder: {folder} is in use by another run; choose another")
        self._claim = claim
        try:
            options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
            self._manager = ocp.CheckpointManager(self._folder, options=options)
            if not resume and self._manager.latest_step() is not None:
                raise ValueError(
                    f"folder: {self._folder} already holds checkpoints; resume, or choose another"
                )
        except BaseException:
            claim.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: Any) -> None:
        self._manager.close()
        self._claim.close()

    def _nothing_to_resume(self) -> ValueError:
        return ValueError(
            f"resume: expected checkpoints in {self._folder}, found none; check the folder, or "
            "start without resume"
        )

    def due(self, step: int, seconds: float) -> bool:
        """Whether to save after the report of a step, the seconds after the last time."""
        del step
        return seconds > self._config.checkpoint_seconds

    def saved_up_to(self, step: int) -> str:
        """What a run that ends after a step has saved, in words."""
        del step
        return "saved"

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Writes a checkpoint of this step unless there is one."""
        if step in self._manager.all_steps():
            return
        leaves = {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(state)) if leaf.size}
        settings = json.loads(to_json(self._config))
        made_with = {"data": self._data, "python": platform.python_version()}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(leaves),
                record=ocp.args.JsonSave({"config": settings, **made_with, **record}),
            ),
        )

    def restore(self, like: Any) -> tuple[Any, int, dict[str, Any]]:
        """Reads the newest checkpoint into the shapes and shardings of `like`.

        Raises:
          ValueError: if there is none, it is damaged, or it was written with other settings or
            other data.
        """
        step = self._manager.latest_step()
        if step is None:
            raise self._nothing_to_resume()
        record = self._read(step, record=ocp.args.JsonRestore())["record"]
        check_same(self._folder, record, self._config, self._data)
        leaves, structure = jax.tree.flatten(like)
        template = {
            f"{i:05d}": jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for i, leaf in enumerate(leaves)
            if leaf.size  # Orbax does not store empty arrays
        }
        restored = self._read(step, state=ocp.args.StandardRestore(template))["state"]
        state = structure.unflatten(
            [
                restored[f"{i:05d}"] if leaf.size
                else jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding)
                for i, leaf in enumerate(leaves)
            ]
        )  # fmt: skip
        check_finite(self._folder / str(step), state.meta_parameters)
        return state, step, record

    def _read(self, step: int, **items: Any) -> Any:
        """Items of a checkpoint; Orbax names neither the folder nor what to do."""
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (KeyError, OSError, ValueError) as error:
            raise ValueError(
                f"{self._folder / str(step)}: expected a checkpoint of this config ({error}); "
                "without this folder, resume goes on from the checkpoint before"
            ) from error
