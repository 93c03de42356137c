"""A meta-training as a chain of runs: a folder of small files that every run goes on from.

Inner trainings are not kept. The config's `deal_every` says after how many outer steps they are
all dealt anew, by seed and step alone, whether a run ends there or not. State is written there and
nowhere else. So a run that was killed loses the steps since the last one, and the weights are
bitwise those of one run from the beginning to the end.

campaign.json has the config, the data's hashes, and versions and times of every run;
state.npz has the meta-parameters, the outer optimizer's state and the step;
history.json has the reports; weights/STEP.npz has the meta-parameters of that step.
"""

import dataclasses
import datetime
import hashlib
import io
import json
import math
import os
import platform
import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from lopt_jax.meta.checkpoints import check_finite, check_same
from lopt_jax.meta.config import MetaTrainConfig, from_json, to_json
from lopt_jax.meta.files import read_json, read_rows, write_rows, write_whole
from lopt_jax.meta.locks import lock
from lopt_jax.meta.rules import MetaParameters, rescaled
from lopt_jax.weights import Weights

_RECORD, _STATE, _HISTORY, _WEIGHTS = "campaign.json", "state.npz", "history.json", "weights"


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a campaign's folder holds for those who only read it.

    Attributes:
      folder: of the campaign.
      config: of the meta-training.
      record: all of campaign.json.
      step: outer steps done.
      steps: those whose weights are there, rising from 0.
      history: reports, as mappings by their fields' names.
    """

    folder: Path
    config: MetaTrainConfig
    record: Mapping[str, Any]
    step: int
    steps: tuple[int, ...]
    history: list[dict[str, Any]]

    def weights(self, step: int) -> Weights:
        """The weights of a step of `steps`, with the record of what made them.

        Raises:
          ValueError: for a file that is damaged.
        """
        arrays = _read_arrays(_weights_path(self.folder, step))
        params: dict[str, Any] = {}
        for name, value in arrays.items():
            *parents, last = name.split("/")
            place = params
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = value
        settings = self.record["config"]
        record = {**settings, **{k: v for k, v in self.record.items() if k != "config"}}
        record |= {"runs": _runs_up_to(self.record["runs"], step), "steps": step}
        record |= {"not_good_for": self.config.notes}
        metadata = {
            "source": "meta-trained with lopt_jax.meta",
            "licence": "Apache-2.0",
            "recommended": {
                "learning_rate": self.config.learning_rate_peak,
                "weight_decay": self.config.weight_decay,
                "chosen": "the values of the meta-training",
            },
            "meta_training": record,
        }
        if self.config.recipe == "lopt":
            metadata["use"] = "lopt_jax.lopt(num_steps, weights)"
        config = dict(self.config.architecture_config)
        return Weights(self.config.architecture, config, params, metadata)


def exists(folder: Path) -> bool:
    """Whether a folder holds a campaign."""
    return (folder / _STATE).is_file()


def read(folder: Path) -> Kept:
    """Reads a campaign.

    Raises:
      ValueError: where there is none, or a file is damaged; the message names it.
    """
    record = _read_record(folder)
    if record is None or not exists(folder):
        raise ValueError(
            f"folder: expected a campaign with {_RECORD} and {_STATE}, found none in {folder}; "
            "`lopt meta-train NAME --campaign FOLDER` makes one"
        )
    step = int(_read_state(folder)["step"])
    paths = (folder / _WEIGHTS).glob("*.npz")
    steps = sorted(int(path.stem) for path in paths if path.stem.isdigit())
    history = _read_history(folder, step)
    config = from_json(json.dumps(record["config"]))
    return Kept(folder, config, record, step, tuple(s for s in steps if s <= step), history)


def _read_history(folder: Path, step: int) -> list[dict[str, Any]]:
    """The reports up to a step."""
    rows = read_rows(folder / _HISTORY, ("step", "loss"))
    return [row for row in rows if row["step"] <= step]


class Campaign:
    """The folder of a campaign, claimed by the run that goes on with it.

    Args:
      folder: of the campaign; made where it is missing.
      config: of the meta-training.
      data: sha256 of its data by name.
      initial: the meta-parameters that it was told to start from; None: its own start.

    Raises:
      ValueError: for a config without `deal_every`, a folder in use, or a campaign of another
        config, other data or another start.
    """

    def __init__(
        self,
        folder: Path,
        config: MetaTrainConfig,
        data: Mapping[str, str],
        initial: MetaParameters | None,
    ):
        if not config.deal_every:
            raise ValueError(
                "deal_every: expected the outer steps after which inner trainings are dealt anew, "
                "where a campaign can go on, found 0; give it some hundreds"
            )
        self._folder, self._config, self._data = folder, config, dict(data)
        self._began = time.monotonic()
        self._first = (0, 0.0)  # step and seconds of training that this run began with
        self._is_noted = False
        self._saved = -1
        claim = lock(folder / ".lock")
        if claim is None:
            raise ValueError(f"folder: {folder} is in use by another run; choose another")
        self._claim = claim
        try:
            self.is_new = not exists(folder)
            self._record = self._checked(initial)
        except BaseException:
            claim.close()
            raise

    def _checked(self, initial: MetaParameters | None) -> dict[str, Any]:
        """The record to go on with."""
        found = _read_record(self._folder)
        digest = "" if initial is None else _digest(initial)
        if self.is_new and found is not None and any(run["to"] for run in found["runs"]):
            raise ValueError(
                f"folder: {self._folder} holds a campaign without its {_STATE}, so that none can "
                "go on from it; put the file back, or start in another folder"
            )
        if self.is_new:  # or killed before it had a state
            settings = json.loads(to_json(self._config))
            return {"config": settings, "data": self._data, "start": digest, **_versions(),
                    "runs": []}  # fmt: skip
        if found is None:
            raise ValueError(f"folder: expected {self._folder / _RECORD}, found none")
        check_same(self._folder, found, self._config, self._data)
        if digest and digest != found["start"]:
            raise ValueError(
                f"--weights: the campaign in {self._folder} began with other weights; leave them "
                "out, or start in another folder"
            )
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: Any) -> None:
        self._claim.close()

    def due(self, step: int, seconds: float) -> bool:
        """Whether to save at a step; the seconds since the last time do not matter."""
        del seconds
        return step % self._config.deal_every == 0

    def saved_up_to(self, step: int) -> str:
        """What a run that ends after a step has saved, in words."""
        is_end = step == self._config.outer_steps
        return f"saved up to step {step if is_end else step - step % self._config.deal_every}"

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Writes everything of this step, if it is one to go on from; state.npz is the last."""
        is_due = self.due(step, 0.0) or step == record["total"]
        if step == self._saved or not is_due:
            return
        self._saved = step
        theta, optimizer_state = jax.device_get((state.meta_parameters, state.optimizer_state))
        own = rescaled(theta, dict(self._config.scales))
        _write_arrays(_weights_path(self._folder, step), _by_path(own))
        names = record["fields"]
        rows = [dict(zip(names, map(_short, row), strict=True)) for row in record["history"]]
        write_rows(self._folder / _HISTORY, rows)
        self._note_run(step, record["seconds"])
        leaves = jax.tree.leaves((theta, optimizer_state))
        arrays = {f"{i:05d}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
        arrays |= {"step": np.asarray(step), "seconds": np.asarray(record["seconds"])}
        _write_arrays(self._folder / _STATE, arrays)

    def _note_run(self, step: int, seconds: float) -> None:
        """Adds this run to the record, or what it has done since."""
        runs, (first, before) = self._record["runs"], self._first
        if not self._is_noted:
            runs.append({})
            self._is_noted = True
        runs[-1] = {
            "from": first,
            "to": step,
            "seconds": round(seconds - before, 3),
            "wall_seconds": round(time.monotonic() - self._began, 1),
            **_versions(),
            "date": datetime.date.today().isoformat(),
        }
        write_whole(self._folder / _RECORD, json.dumps(self._record, indent=1).encode())

    def restore(self, like: Any) -> tuple[Any, int, dict[str, Any]]:
        """Reads the state, without inner trainings, into the shapes and shardings of `like`.

        Raises:
          ValueError: for a file that is damaged or of other shapes.
        """
        path = self._folder / _STATE
        arrays = _read_state(self._folder)
        wanted = (like.meta_parameters, like.optimizer_state)
        leaves, structure = jax.tree.flatten(wanted)
        found = [arrays.get(f"{i:05d}") for i in range(len(leaves))]
        for array, leaf in zip(found, leaves, strict=True):
            if array is None or (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
                shape = None if array is None else array.shape
                raise ValueError(
                    f"{path}: expected arrays of the shapes of the config, {leaf.shape} among "
                    f"them, found {shape}; start in another folder"
                )
        placed = [jax.device_put(x, leaf.sharding) for x, leaf in zip(found, leaves, strict=True)]
        theta, optimizer_state = structure.unflatten(placed)
        check_finite(path, theta)
        step, seconds = int(arrays["step"]), float(arrays["seconds"])
        self._first = (step, seconds)
        self._record["runs"] = _runs_up_to(self._record["runs"], step)
        rows = _read_history(self._folder, step)
        history = [[math.nan if x is None else x for x in row.values()] for row in rows]
        state = like._replace(
            meta_parameters=theta, optimizer_state=optimizer_state, estimators=None
        )
        record = {"total": self._config.outer_steps, "planned": True, "seconds": seconds,
                  "history": history}  # fmt: skip
        return state, step, record


def _versions() -> dict[str, str]:
    devices = jax.devices()
    return {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "hardware": f"{len(devices)} {devices[0].device_kind}",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _digest(tree: Any) -> str:
    content = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))
    return hashlib.sha256(content).hexdigest()


def _weights_path(folder: Path, step: int) -> Path:
    return folder / _WEIGHTS / f"{step:08d}.npz"


def _by_path(tree: Any) -> dict[str, np.ndarray]:
    """Leaves of nested dictionaries by their keys with slashes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(key.key) for key in path): np.asarray(leaf) for path, leaf in leaves}


def _short(value: Any) -> Any:
    """Numbers to six digits, None for those that JSON does not have."""
    if isinstance(value, tuple | list):
        return [_short(item) for item in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_whole(path, buffer.getvalue())


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (EOFError, KeyError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected arrays of a campaign ({error})") from error


def _read_state(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of the state, "step" and "seconds" among them."""
    path = folder / _STATE
    arrays = _read_arrays(path)
    for name in ("step", "seconds"):
        if name not in arrays or arrays[name].shape != ():
            raise ValueError(f"{path}: expected arrays of a campaign, found none named {name!r}")
    return arrays


def _read_record(folder: Path) -> dict[str, Any] | None:
    """What campaign.json holds; None where there is no such file."""
    path = folder / _RECORD
    record = read_json(path)
    if record is None:
        return None
    kinds = {"config": dict, "data": dict, "start": str, "runs": list}
    for name, kind in kinds.items():
        if not isinstance(record, dict) or not isinstance(record.get(name), kind):
            raise ValueError(f"{path}: expected the record of a campaign, found no {name!r} in it")
    return record


def _runs_up_to(runs: Sequence[Mapping[str, Any]], step: int) -> list[dict[str, Any]]:
    """The runs as they led to a step: what later ones did that was not kept is left out."""
    return [{**run, "to": min(run["to"], step)} for run in runs if run["from"] < step]
