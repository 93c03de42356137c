"""The trainings of the scale suite: a model, real data, a loss, and how long it trains.

`EVIDENCE` is what is reported. `TUNING` is where the constants of `lopt` are chosen: other
packages' sources, other pictures, other sizes.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lopt_jax.meta.scale import corpora, models

_LENGTH = 256  # tokens of a sequence
_SHIFT = 2  # pixels that a training picture is moved by, at most


@dataclasses.dataclass(frozen=True)
class Split:
    """Arrays of one task on the device.

    Attributes:
      train: a tree of arrays that `Task.sample` draws from.
      validation: the same, for measurements.
      digest: sha256 of the data.
    """

    train: Any
    validation: Any
    digest: str


@dataclasses.dataclass(frozen=True)
class Task:
    """One training.

    Attributes:
      name: for tables and files.
      model: a Flax module.
      example: from a batch to the arguments of the module.
      loss: from the module's outputs and a batch to ().
      load: from the folders of prepared data and of caches to the data.
      sample: from a key, arrays of a split, the batch size and whether to augment, to a batch.
      batch: examples a step.
      items: tokens or pictures of an example, for records.
      horizons: numbers of steps.
      validation_batches: of a measurement.
      lanes: runs side by side.
    """

    name: str
    model: Any
    example: Callable[[Any], tuple[Any, ...]]
    loss: Callable[[Any, Any], jax.Array]
    load: Callable[[Path, Path], Split]
    sample: Callable[[jax.Array, Any, int, bool], Any]
    batch: int
    items: int
    horizons: tuple[int, ...]
    validation_batches: int = 16
    lanes: int = 5

    def init(self, key: jax.Array, data: Split) -> Any:
        """The parameters: a tree of float32."""
        batch = self.sample(key, data.train, 2, False)
        return self.model.init(key, *self.example(batch))["params"]

    def training_loss(self, params: Any, batch: Any) -> jax.Array:
        """The mean loss of a batch: () float32."""
        return self.loss(self.model.apply({"params": params}, *self.example(batch)), batch)


def stacked_axes(path: Any, leaf: Any) -> int:
    """One stacked axis for the leaves of scanned blocks."""
    del leaf
    return int(any(getattr(entry, "key", None) == "blocks" for entry in path))


def _draw_tokens(key: jax.Array, tokens: jax.Array, batch: int, augment: bool) -> jax.Array:
    del augment
    starts = jax.random.randint(key, (batch,), 0, len(tokens) - _LENGTH - 1)
    take = lambda start: jax.lax.dynamic_slice(tokens, (start,), (_LENGTH + 1,))  # noqa: E731
    return jax.vmap(take)(starts).astype(jnp.int32)


def _next_token_loss(logits: jax.Array, batch: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    return jnp.mean(losses)


def _sources(folder: Path, cache: Path, train: str, validation: str, limit: int) -> Split:
    del folder
    kept = corpora.tokens(
        corpora.python_sources(train, limit),
        corpora.python_sources(validation, limit // 12),
        cache,
        f"sources_{train}",
    )
    return Split(jnp.asarray(kept.train), jnp.asarray(kept.validation), kept.digest)


def _english(folder: Path, cache: Path, names: tuple[str, ...]) -> Split:
    kept = corpora.tokens(corpora.english(folder, names), None, cache, "_".join(names))
    return Split(jnp.asarray(kept.train), jnp.asarray(kept.validation), kept.digest)


def language_task(
    name: str,
    width: int,
    layers: int,
    batch: int,
    horizons: tuple[int, ...],
    load: Callable[[Path, Path], Split],
    lanes: int = 5,
) -> Task:
    """A GPT on tokens."""
    return Task(
        name=name,
        model=models.Gpt(corpora.VOCABULARY, width, layers),
        example=lambda tokens: (tokens[:, :-1],),
        loss=_next_token_loss,
        load=load,
        sample=_draw_tokens,
        batch=batch,
        items=_LENGTH,
        horizons=horizons,
        lanes=lanes,
    )


def _pictures(folder: Path, cache: Path, name: str) -> Split:
    del cache
    kept = corpora.images(folder, name)
    train = (jnp.asarray(kept.train), jnp.asarray(kept.train_labels))
    validation = (jnp.asarray(kept.validation), jnp.asarray(kept.validation_labels))
    return Split(train, validation, kept.digest)


def _draw_pictures(key: jax.Array, data: Any, batch: int, augment: bool) -> Any:
    images, labels = data
    keys = jax.random.split(key, 4)
    rows = jax.random.randint(keys[0], (batch,), 0, len(images))
    pictures = images[rows].astype(jnp.float32) / 127.5 - 1.0
    if augment:
        flips = jax.random.bernoulli(keys[1], 0.5, (batch, 1, 1, 1))
        pictures = jnp.where(flips, pictures[:, :, ::-1], pictures)
        shifts = jax.random.randint(keys[2], (batch, 2), -_SHIFT, _SHIFT + 1)
        pictures = jax.vmap(lambda x, s: jnp.roll(x, (s[0], s[1]), (0, 1)))(pictures, shifts)
    noise_key, level_key = jax.random.split(keys[3])
    return {
        "images": pictures,
        "labels": labels[rows],
        "noise": jax.random.normal(noise_key, pictures.shape),
        "level": jax.random.uniform(level_key, (batch,)),
    }


def _class_loss(logits: jax.Array, batch: Any) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return jnp.mean(losses)


def _noisy(batch: Any) -> tuple[jax.Array, jax.Array]:
    angle = (0.5 * np.pi * batch["level"])[:, None, None, None]
    return jnp.cos(angle) * batch["images"] + jnp.sin(angle) * batch["noise"], batch["level"]


def picture_task(name: str, model: Any, data: str, batch: int, horizons: tuple[int, ...]) -> Task:
    """A classifier of pictures."""
    return Task(
        name=name,
        model=model,
        example=lambda batch: (batch["images"],),
        loss=_class_loss,
        load=functools.partial(_pictures, name=data),
        sample=_draw_pictures,
        batch=batch,
        items=1,
        horizons=horizons,
    )


def denoising_task(name: str, width: int, data: str, batch: int, horizons: tuple[int, ...]) -> Task:
    """Prediction of the noise in pictures: the objective of a diffusion model."""
    return Task(
        name=name,
        model=models.Denoiser(width),
        example=_noisy,
        loss=lambda noise, batch: jnp.mean(jnp.square(noise - batch["noise"])),
        load=functools.partial(_pictures, name=data),
        sample=_draw_pictures,
        batch=batch,
        items=1,
        horizons=horizons,
    )


_CODE = functools.partial(_sources, train="train", validation="validation", limit=120_000_000)
_TUNING_CODE = functools.partial(
    _sources, train="tuning", validation="tuning_validation", limit=60_000_000
)
_GCIDE = functools.partial(_english, names=("gcide",))

EVIDENCE = (
    language_task("gpt12m_code", 384, 5, 32, (1000, 4000, 10000), _CODE),
    language_task("gpt12m_english", 384, 5, 32, (1000, 4000), _GCIDE),
    language_task("gpt35m_code", 640, 6, 64, (1000, 4000), _CODE, 2),
    language_task("gpt35m_english", 640, 6, 64, (1000,), _GCIDE, 2),
    language_task("gpt109m_code", 1024, 8, 64, (1000, 4000), _CODE, 1),
    picture_task("vit_fashion", models.Vit(10, 192, 6), "fashion_mnist", 256, (1000, 5000)),
    picture_task("resnet_fashion", models.ResNet(10, 32), "fashion_mnist", 256, (1000, 5000)),
    denoising_task("denoiser_fashion", 64, "fashion_mnist", 128, (1000, 5000)),
)

TUNING = (
    language_task("tuning_gpt5m", 256, 4, 32, (300, 1000, 4000), _TUNING_CODE),
    language_task("tuning_gpt18m", 512, 5, 32, (300, 1000, 4000), _TUNING_CODE),
    language_task("tuning_gpt66m", 896, 6, 32, (300, 1000), _TUNING_CODE),
    picture_task("tuning_vit_clipart", models.Vit(22, 128, 4), "clipart", 128, (1000, 4000)),
    picture_task("tuning_resnet_clipart", models.ResNet(22, 24), "clipart", 128, (1000, 4000)),
)


def task_named(name: str) -> Task:
    """The task of a name.

    Raises:
      ValueError: there is none; the message lists the names.
    """
    tasks = {task.name: task for task in (*EVIDENCE, *TUNING)}
    if name not in tasks:
        raise ValueError(f"task: expected one of {', '.join(tasks)}; found {name!r}.")
    return tasks[name]
