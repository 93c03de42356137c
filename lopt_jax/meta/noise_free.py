"""Tasks with nothing to regularise: fresh examples or all of them, and no noise.

Here only the training loss counts, and a decay that holds weights small costs the most.
`noise_free_tasks` are for evaluation. `noise_free_tuning_tasks` are for choosing constants.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lopt_jax.meta import data
from lopt_jax.meta.networks import Mlp
from lopt_jax.meta.tasks import Example, Split, SupervisedTask, Teacher, squared_error

_TANH = 1  # of `networks.activate`


class Waves(NamedTuple):
    """A sum of sines: outputs are sum_k amplitude_k sin(frequency_k . x + phase_k)."""

    frequencies: jax.Array  # (waves, D) float32
    phases: jax.Array  # (waves,) float32
    amplitudes: jax.Array  # (waves,) float32


@dataclasses.dataclass(frozen=True)
class Sines:
    """Fresh points of [-1, 1]^D and a random sum of sines there.

    Args:
      dimensions: D.
      waves: sines of the sum.
      frequency: the standard deviation of their frequencies, in radians a unit.
    """

    dimensions: int
    waves: int
    frequency: float

    def sample(self, key: jax.Array) -> Waves:
        """Draws the function; its variance is about one."""
        keys = jax.random.split(key, 3)
        shape = (self.waves, self.dimensions)
        return Waves(
            self.frequency * jax.random.normal(keys[0], shape),
            jax.random.uniform(keys[1], (self.waves,), maxval=2 * np.pi),
            jnp.sqrt(2.0 / self.waves) * jax.random.normal(keys[2], (self.waves,)),
        )

    def batch(self, key: jax.Array, content: Waves, split: Split, size: int) -> Example:
        """Draws points and their values."""
        del split
        points = jax.random.uniform(key, (size, self.dimensions), minval=-1.0)
        angles = points @ content.frequencies.T + content.phases
        return Example(points, (jnp.sin(angles) @ content.amplitudes)[:, None])

    def examples(self, content: Waves, split: Split, limit: int) -> Example:
        """Points of a fixed key for each split."""
        return self.batch(jax.random.key(int(split == "train")), content, split, limit)


@dataclasses.dataclass(frozen=True)
class Coordinates:
    """Pixels of a photograph: from a place, as features of sines, to its grey.

    Args:
      photograph: "china" or "flower", of scikit-learn.
      side: height and width of the middle part that is learned, in pixels.
      octaves: frequencies 1, 2, 4, ... of the features, in half turns a picture.
    """

    photograph: str
    side: int
    octaves: int

    def sample(self, key: jax.Array) -> tuple[()]:
        """Nothing is random."""
        del key
        return ()

    def _take(self, rows: jax.Array) -> Example:
        pixels = jnp.asarray(data.load_picture(self.photograph, self.side)).ravel()
        places = jnp.stack([rows // self.side, rows % self.side], -1) / self.side
        angles = np.pi * 2.0 ** jnp.arange(self.octaves) * places[..., None]
        features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
        return Example(features.reshape(len(rows), -1), pixels[rows][:, None])

    def batch(self, key: jax.Array, content: tuple[()], split: Split, size: int) -> Example:
        """Draws pixels."""
        del content, split
        return self._take(jax.random.randint(key, (size,), 0, self.side**2))

    def examples(self, content: tuple[()], split: Split, limit: int) -> Example:
        """Evenly spaced pixels: all splits are the whole picture."""
        del content, split
        return self._take(jnp.linspace(0, self.side**2 - 1, limit).astype(jnp.int32))


def _task(name: str, source: Any, sizes: tuple[int, ...], batch: int) -> SupervisedTask:
    fixed: dict[str, Any] = {"activation": _TANH, "log_init_spread": 0.0}
    return SupervisedTask(name, source, Mlp(sizes), squared_error, batch, **fixed)


def _clean_teacher(inputs: int) -> Teacher:
    return Teacher((inputs, 32, 1), False, max_noise=0.01)  # its noise is 0.01: variance 0.0001


def noise_free_tasks() -> dict[str, SupervisedTask]:
    """The tasks of the evaluation, by name."""
    tasks = (
        _task("sines_1d", Sines(1, 5, 6.0), (1, 32, 32, 1), 128),
        _task("clean_regression", _clean_teacher(16), (16, 32, 1), 64),
        _task("coordinates_flower", Coordinates("flower", 64, 6), (24, 64, 64, 1), 256),
    )
    return {task.name: task for task in tasks}


def noise_free_tuning_tasks() -> dict[str, SupervisedTask]:
    """Other functions, widths and pictures: where constants may be chosen."""
    tasks = (
        _task("tuning_sines_2d", Sines(2, 8, 4.0), (2, 48, 48, 1), 128),
        _task("tuning_clean_regression", _clean_teacher(24), (24, 64, 32, 1), 64),
        _task("tuning_coordinates_china", Coordinates("china", 48, 5), (20, 96, 96, 1), 128),
    )
    return {task.name: task for task in tasks}
