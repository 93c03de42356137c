"""Augmentation of tasks: reparametrisation, and several tasks stacked into one.

Reference: https://arxiv.org/abs/2501.12670 (Celo), section on task augmentation.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lopt_jax.meta.networks import Params
from lopt_jax.meta.tasks import Batch, Content, Split, Task, data_hashes


class ReparametrisedContent(NamedTuple):
    """The inner task's content and the scale of every tensor."""

    content: Any
    scales: Any  # a tree of scalars, one a parameter tensor


@dataclasses.dataclass(frozen=True)
class Reparametrised:
    """The same functions, seen through scaled parameters: `inner(scale * raw)`.

    The start is `inner's start / scale`, so the loss at the start is the inner task's; what changes
    is how much a step of a given size does.

    Args:
      task: the inner task.
      scale_range: the scales are log-uniform in [1 / scale_range, scale_range].
      level: "global" for one scale a problem, "tensor" for one a tensor, "mixed" for a third
        each of none, global and tensor.
    """

    task: Task
    scale_range: float
    level: Literal["global", "tensor", "mixed"] = "mixed"

    @property
    def name(self) -> str:
        """The inner task's name."""
        return self.task.name

    def data_hashes(self) -> Mapping[str, str]:
        """Of the inner task's data."""
        return data_hashes([self.task])

    def sample(self, key: jax.Array) -> ReparametrisedContent:
        """Draws the inner content and the scales."""
        keys = jax.random.split(key, 4)
        content = self.task.sample(keys[0])
        shapes = jax.eval_shape(self.task.init, keys[0], content)
        leaves, structure = jax.tree.flatten(shapes)
        limit = math.log(self.scale_range)
        shared = jax.random.uniform(keys[1], (), minval=-limit, maxval=limit)
        single = jax.random.uniform(keys[2], (len(leaves),), minval=-limit, maxval=limit)
        if self.level == "global":
            exponents = jnp.broadcast_to(shared, single.shape)
        elif self.level == "tensor":
            exponents = single
        else:
            choice = jax.random.randint(keys[3], (), 0, 3)
            exponents = jnp.select(
                [choice == 0, choice == 1], [0.0 * single, 0.0 * single + shared], single
            )
        return ReparametrisedContent(content, structure.unflatten(list(jnp.exp(exponents))))

    def init(self, key: jax.Array, content: ReparametrisedContent) -> Params:
        """The inner start divided by the scales."""
        inner = self.task.init(key, content.content)
        return jax.tree.map(lambda p, s: p / s, inner, content.scales)

    def batch(self, key: jax.Array, content: ReparametrisedContent, split: Split) -> Batch:
        """The inner task's batch."""
        return self.task.batch(key, content.content, split)

    def examples(self, content: ReparametrisedContent, split: Split, limit: int) -> Batch:
        """The inner task's examples."""
        return self.task.examples(content.content, split, limit)

    def loss(self, params: Params, content: ReparametrisedContent, batch: Batch) -> jax.Array:
        """The inner loss at the scaled parameters."""
        inner = jax.tree.map(lambda p, s: p * s, params, content.scales)
        return self.task.loss(inner, content.content, batch)


@dataclasses.dataclass(frozen=True)
class Stacked:
    """Several tasks trained at once as one: their parameters side by side, their losses averaged.

    An optimizer that looks across tensors (VeLO, Celo) meets tensors of unlike networks this way.

    Args:
      tasks: the tasks.
    """

    tasks: tuple[Task, ...]

    @property
    def name(self) -> str:
        """The names joined by '+'."""
        return "+".join(task.name for task in self.tasks)

    def data_hashes(self) -> Mapping[str, str]:
        """Of the tasks' data."""
        return data_hashes(self.tasks)

    def sample(self, key: jax.Array) -> Content:
        """A tuple of the tasks' contents."""
        keys = jax.random.split(key, len(self.tasks))
        return tuple(task.sample(k) for task, k in zip(self.tasks, keys, strict=True))

    def init(self, key: jax.Array, content: Content) -> Params:
        """A dictionary of the tasks' parameters."""
        keys = jax.random.split(key, len(self.tasks))
        parts = zip(self.tasks, keys, content, strict=True)
        return {f"task{i}": task.init(k, c) for i, (task, k, c) in enumerate(parts)}

    def batch(self, key: jax.Array, content: Content, split: Split) -> Batch:
        """A tuple of the tasks' batches."""
        keys = jax.random.split(key, len(self.tasks))
        parts = zip(self.tasks, keys, content, strict=True)
        return tuple(task.batch(k, c, split) for task, k, c in parts)

    def examples(self, content: Content, split: Split, limit: int) -> Batch:
        """A tuple of the tasks' examples."""
        parts = zip(self.tasks, content, strict=True)
        return tuple(task.examples(c, split, limit) for task, c in parts)

    def loss(self, params: Params, content: Content, batch: Batch) -> jax.Array:
        """The mean of the tasks' losses."""
        parts = zip(self.tasks, content, batch, strict=True)
        losses = [task.loss(params[f"task{i}"], c, b) for i, (task, c, b) in enumerate(parts)]
        return jnp.mean(jnp.stack(losses))
