"""Tasks: what an optimizer is trained on. A task has static shapes and random content.

One compiled program therefore serves every sample of a task under `vmap`: which rows of the data,
which labels, which activation, which scale at the start are all traced values.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lopt_jax.meta import data
from lopt_jax.meta.networks import ConvNet, Mlp, Network, Params, Rnn, Transformer

Content = Any
Batch = Any
Split = Literal["train", "valid"]


class Task(Protocol):
    """A family of optimization problems of one shape."""

    @property
    def name(self) -> str:
        """A short name for tables."""
        ...

    def sample(self, key: jax.Array) -> Content:
        """Draws the random content of one problem: a pytree of arrays."""
        ...

    def init(self, key: jax.Array, content: Content) -> Params:
        """Draws initial parameters."""
        ...

    def batch(self, key: jax.Array, content: Content, split: Split) -> Batch:
        """Draws a batch of training or of held-out examples."""
        ...

    def examples(self, content: Content, split: Split, limit: int) -> Batch:
        """The first examples of a split, at most `limit`, always the same: for evaluation."""
        ...

    def loss(self, params: Params, content: Content, batch: Batch) -> jax.Array:
        """The mean loss on a batch, a scalar."""
        ...


def data_hashes(tasks: Iterable[Task]) -> dict[str, str]:
    """Reads the data of tasks, and says what it was.

    Args:
      tasks: those with a method `data_hashes`, or whose source has one, are asked; tasks of one's
        own need none.

    Returns:
      sha256 by name of the data set, of all tasks.

    Raises:
      ModuleNotFoundError: for data of a package that is not installed.
      FileNotFoundError: for data that has to be prepared.
    """
    found: dict[str, str] = {}
    for task in tasks:
        for owner in (task, getattr(task, "source", None)):
            hashes = getattr(owner, "data_hashes", dict)
            found.update(hashes())
    return found


class Example(NamedTuple):
    """A batch: inputs (batch, ...) and targets (batch, ...)."""

    inputs: jax.Array
    targets: jax.Array


class Source(Protocol):
    """Where a task's examples come from."""

    def sample(self, key: jax.Array) -> Any:
        """Draws the content: which examples, in which disguise."""
        ...

    def batch(self, key: jax.Array, content: Any, split: Split, size: int) -> Example:
        """Draws `size` examples."""
        ...

    def examples(self, content: Any, split: Split, limit: int) -> Example:
        """The first examples of a split."""
        ...


class TableContent(NamedTuple):
    """Which table, which of its training rows, and how its columns and labels are disguised."""

    start: jax.Array  # () int32: first row of the table in the pool
    num_train: jax.Array  # () int32: training rows used
    valid_start: jax.Array  # () int32
    num_valid: jax.Array  # () int32
    feature_order: jax.Array  # (D,) int32
    feature_sign: jax.Array  # (D,) float32
    labels: jax.Array  # (N,) int32: the label of every row of the pool; (0,) without classes


_PHOTOGRAPHS = ("china", "flower")


@dataclasses.dataclass(frozen=True)
class Tables:
    """One or several tables padded to one shape: classification, or reconstruction of the input.

    Args:
      names: data sets of `data.load_tabular`, or "china" and "flower" for patches.
      width: columns; narrower tables are padded with zeros.
      num_classes: classes; tables with fewer use the first ones.
      disguise: permute columns and labels, flip signs, use a random part of the training rows.
      keep_places: do not permute columns (for convolutions).
      few: bounds of the number of training rows, log-uniform; None: from a fifth to all.
      label_noise: up to this fraction of the training rows has a random label, always the same;
        held-out rows never do.
    """

    names: tuple[str, ...]
    width: int
    num_classes: int
    disguise: bool = True
    keep_places: bool = False
    few: tuple[int, int] | None = None
    label_noise: float = 0.0

    @staticmethod
    def _load(name: str) -> data.Dataset:
        return data.load_patches(name) if name in _PHOTOGRAPHS else data.load_tabular(name)

    def data_hashes(self) -> Mapping[str, str]:
        """sha256 of each table."""
        return {name: self._load(name).sha256 for name in self.names}

    def _pool(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        inputs, targets, rows = [], [], []
        start = 0
        for name in self.names:
            patches = name in _PHOTOGRAPHS
            table = self._load(name)
            padding = ((0, 0), (0, self.width - table.inputs.shape[1]))
            inputs.append(np.pad(table.inputs, padding))
            if table.num_classes:
                targets.append(table.targets)
            elif patches:
                targets.append(np.zeros(len(table.inputs), np.int32))
            else:
                targets.append(table.targets[:, 0])
            rows.append((start, table.num_train, len(table.inputs) - table.num_train))
            start += len(table.inputs)
        return np.concatenate(inputs), np.concatenate(targets), np.array(rows, np.int32)

    def sample(self, key: jax.Array) -> TableContent:
        """Draws a table and its disguise."""
        keys = jax.random.split(key, 6)
        _, targets, table_rows = self._pool()
        rows = jnp.asarray(table_rows)
        start, num_train, num_valid = rows[jax.random.randint(keys[0], (), 0, len(self.names))]
        order = jnp.arange(self.width)
        sign = jnp.ones((self.width,))
        labels = jnp.arange(self.num_classes)
        used = num_train
        if self.disguise:
            labels = jax.random.permutation(keys[1], labels)
            # Half of the problems see all training rows, the others down to a fifth of them.
            if self.few is None:
                low, high = jnp.log(0.2 * num_train), jnp.log(num_train) + 0.7
            else:
                low, high = jnp.log(jnp.array(self.few, jnp.float32))
            count = jnp.exp(jax.random.uniform(keys[2], (), minval=low, maxval=high))
            used = jnp.minimum(count.astype(jnp.int32), num_train)
            if not self.keep_places:
                order = jax.random.permutation(keys[3], order)
                sign = jax.random.rademacher(keys[4], (self.width,), jnp.float32)
        found = jnp.zeros((0,), jnp.int32)
        if self.num_classes:
            found = labels[jnp.asarray(targets)]
        if self.label_noise:
            key_rate, key_rows, key_label = jax.random.split(keys[5], 3)
            rate = jax.random.uniform(key_rate, (), maxval=self.label_noise)
            place = jnp.arange(len(targets)) - start
            noisy = jax.random.bernoulli(key_rows, rate, found.shape) & (place < num_train)
            wrong = jax.random.randint(key_label, found.shape, 0, self.num_classes)
            found = jnp.where(noisy, wrong, found)
        return TableContent(start, used, start + num_train, num_valid, order, sign, found)

    def _take(self, content: TableContent, rows: jax.Array) -> Example:
        inputs, targets, _ = self._pool()
        x = jnp.asarray(inputs)[rows][:, content.feature_order] * content.feature_sign
        if self.num_classes == 0:
            y = jnp.asarray(targets)[rows]
            return Example(x, x if y.dtype == jnp.int32 else y[:, None])
        return Example(x, content.labels[rows])

    def batch(self, key: jax.Array, content: TableContent, split: Split, size: int) -> Example:
        """Draws rows with replacement."""
        start = content.start if split == "train" else content.valid_start
        count = content.num_train if split == "train" else content.num_valid
        return self._take(content, start + jax.random.randint(key, (size,), 0, count))

    def examples(self, content: TableContent, split: Split, limit: int) -> Example:
        """The first rows of a split; of several pooled tables the smallest says how many."""
        counts = self._pool()[2][:, 1 if split == "train" else 2]
        places = jnp.arange(min(limit, int(counts.min())))
        if split == "train":
            return self._take(content, content.start + places % content.num_train)
        return self._take(content, content.valid_start + places)


class TeacherContent(NamedTuple):
    """A random network that labels Gaussian inputs, and how noisy its labels are."""

    params: Params
    spread: jax.Array  # (D,) float32: standard deviation of each input
    noise: jax.Array  # () float32: standard deviation of the noise on the teacher's outputs
    examples_key: jax.Array  # (2,) uint32
    num_train: jax.Array  # () int32: training examples; 0 where they are drawn afresh


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Random inputs, labelled by a random network with noise.

    Args:
      sizes: the teacher's widths.
      classify: the label is the largest output's index; else the outputs are the target.
      few: bounds of the number of training examples, log-uniform; None: always fresh ones.
      max_noise: the largest standard deviation of the noise on the teacher's outputs.
    """

    sizes: tuple[int, ...]
    classify: bool
    few: tuple[int, int] | None = None
    max_noise: float = 0.5

    def sample(self, key: jax.Array) -> TeacherContent:
        """Draws a teacher."""
        keys = jax.random.split(key, 4)
        params = Mlp(self.sizes).init(keys[0], jnp.float32(1.5))
        spread = jnp.exp(0.7 * jax.random.normal(keys[1], (self.sizes[0],)))
        low, high = jnp.log(0.01), jnp.log(self.max_noise)
        noise = jnp.exp(jax.random.uniform(keys[2], (), minval=low, maxval=high))
        count = jnp.int32(0)
        if self.few is not None:
            low, high = jnp.log(jnp.array(self.few, jnp.float32))
            key_count = jax.random.fold_in(keys[2], 1)
            count = jnp.exp(jax.random.uniform(key_count, (), minval=low, maxval=high))
        return TeacherContent(
            params, spread, noise, jax.random.key_data(keys[3]), jnp.asarray(count, jnp.int32)
        )

    def batch(self, key: jax.Array, content: TeacherContent, split: Split, size: int) -> Example:
        """Draws inputs and labels them; training labels carry noise, held-out ones do not."""
        if split == "train" and self.few is not None:
            return self._fixed(content, jax.random.randint(key, (size,), 0, content.num_train))
        key_input, key_noise = jax.random.split(key)
        inputs = jax.random.normal(key_input, (size, self.sizes[0]))
        noise = jax.random.normal(key_noise, (size, self.sizes[-1]))
        return self._label(content, inputs, noise * (split == "train"))

    def _fixed(self, content: TeacherContent, places: jax.Array) -> Example:
        """The training examples at these places of a finite set."""
        key = jax.random.fold_in(jax.random.wrap_key_data(content.examples_key), 2)
        count = self.sizes[0] + self.sizes[-1]
        draws = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (count,)))(places)
        return self._label(content, draws[:, : self.sizes[0]], draws[:, self.sizes[0] :])

    def _label(self, content: TeacherContent, inputs: jax.Array, noise: jax.Array) -> Example:
        inputs = inputs * content.spread
        outputs = Mlp(self.sizes).apply(content.params, inputs, jnp.int32(1))
        outputs = outputs + content.noise * noise
        targets = jnp.argmax(outputs, -1) if self.classify else outputs
        return Example(inputs, targets)

    def examples(self, content: TeacherContent, split: Split, limit: int) -> Example:
        """Inputs of a fixed key of the content, or the first of a finite set."""
        if split == "train" and self.few is not None:
            return self._fixed(content, jnp.arange(limit) % content.num_train)
        key = jax.random.wrap_key_data(content.examples_key)
        return self.batch(jax.random.fold_in(key, split == "train"), content, split, limit)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Small pictures as rows of pixels, standardised; all training examples, without disguise.

    Args:
      name: of `data.load_pictures`.
      side: height and width.
      channels: 1 for grey, 3 for colour.
    """

    name: str
    side: int
    channels: int = 1

    def _load(self) -> data.Pictures:
        return data.load_pictures(self.name, self.side, self.channels)

    def data_hashes(self) -> Mapping[str, str]:
        """sha256 of the pictures as they were prepared."""
        return {self.name: self._load().sha256}

    def sample(self, key: jax.Array) -> tuple[()]:
        """Nothing is random."""
        del key
        return ()

    def _take(self, rows: jax.Array) -> Example:
        pictures = self._load()
        # Bytes are constants of the program; as floats they would be four times as large.
        pixels = jnp.asarray(pictures.images.reshape(len(pictures.images), -1))[rows]
        inputs = (pixels.astype(jnp.float32) - pictures.mean) / pictures.deviation
        return Example(inputs, jnp.asarray(pictures.labels)[rows])

    def batch(self, key: jax.Array, content: tuple[()], split: Split, size: int) -> Example:
        """Draws pictures with replacement."""
        del content
        pictures = self._load()
        first, last = 0, pictures.num_train
        if split == "valid":
            first, last = last, len(pictures.images)
        return self._take(jax.random.randint(key, (size,), first, last))

    def examples(self, content: tuple[()], split: Split, limit: int) -> Example:
        """The first pictures of a split."""
        del content
        pictures = self._load()
        first = 0 if split == "train" else pictures.num_train
        count = pictures.num_train if split == "train" else len(pictures.images) - first
        return self._take(first + jnp.arange(min(limit, count)))


class TextContent(NamedTuple):
    """Which stretch of the text is for training, and how its tokens are renamed."""

    start: jax.Array  # () int32
    length: jax.Array  # () int32
    names: jax.Array  # (VOCABULARY,) int32


@dataclasses.dataclass(frozen=True)
class Characters:
    """Windows of a text; the target is the next byte.

    Args:
      length: bytes of a window.
      disguise: rename the tokens, and take a random part of the training text.
      text: "python_library", the sources of Python's own; or a name of `data.load_text`.
    """

    length: int
    disguise: bool = True
    text: str = "python_library"

    def _load(self) -> data.Text:
        is_source = self.text == "python_library"
        return data.load_source_code() if is_source else data.load_text(self.text)

    def data_hashes(self) -> Mapping[str, str]:
        """sha256 of the text."""
        return {self.text: self._load().sha256}

    def sample(self, key: jax.Array) -> TextContent:
        """Draws a stretch of the training text and a renaming of the tokens."""
        num_train = self._load().num_train
        names = jnp.arange(data.VOCABULARY)
        if not self.disguise:
            return TextContent(jnp.int32(0), jnp.int32(num_train), names)
        keys = jax.random.split(key, 3)
        fraction = jnp.exp(jax.random.uniform(keys[0], (), minval=jnp.log(0.05), maxval=0.0))
        length = (num_train * fraction).astype(jnp.int32)
        start = jax.random.randint(keys[1], (), 0, num_train - length + 1)
        return TextContent(start, length, jax.random.permutation(keys[2], names))

    def _windows(self, content: TextContent, starts: jax.Array) -> Example:
        tokens = jnp.asarray(self._load().tokens)
        windows = tokens[starts[:, None] + jnp.arange(self.length + 1)]
        windows = content.names[windows]
        return Example(windows[:, :-1], windows[:, 1:])

    def batch(self, key: jax.Array, content: TextContent, split: Split, size: int) -> Example:
        """Draws windows at random places."""
        tokens, num_train, _ = self._load()
        if split == "train":
            last = content.length - self.length - 1
            return self._windows(content, content.start + jax.random.randint(key, (size,), 0, last))
        last_place = len(tokens) - self.length - 1
        return self._windows(content, jax.random.randint(key, (size,), num_train, last_place))

    def examples(self, content: TextContent, split: Split, limit: int) -> Example:
        """Evenly spaced windows."""
        tokens, num_train, _ = self._load()
        limit = min(limit, 128)
        first, last = (0, num_train) if split == "train" else (num_train, len(tokens))
        places = np.linspace(first, last - self.length - 1, limit).astype(np.int32)
        return self._windows(content, jnp.asarray(places))


class SupervisedContent(NamedTuple):
    """A supervised task's content: the source's, the activation and the scale at the start."""

    source: Any
    activation: jax.Array  # () int32
    init_scale: jax.Array  # () float32


def cross_entropy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean of -log softmax at the target's index; outputs (..., K), targets (...) int."""
    hot = jax.nn.one_hot(targets, outputs.shape[-1])
    return -jnp.mean(jnp.sum(hot * jax.nn.log_softmax(outputs), -1))


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over all elements of the squared difference."""
    return jnp.mean(jnp.square(outputs - targets))


@dataclasses.dataclass(frozen=True)
class SupervisedTask:
    """A source of examples, a network and a loss.

    Args:
      name: for tables.
      source: where examples come from.
      network: what is trained.
      loss_function: maps outputs and targets to a scalar.
      batch_size: examples a training step.
      valid_size: held-out examples a measurement during meta-training.
      activation: index of `networks.activate`, or None for a random one a problem.
      log_init_spread: the weights' scale at the start is exp of a uniform number in
        [-log_init_spread, log_init_spread].
    """

    name: str
    source: Source
    network: Network
    loss_function: Callable[[jax.Array, jax.Array], jax.Array]
    batch_size: int
    valid_size: int = 128
    activation: int | None = None
    log_init_spread: float = 0.5

    def sample(self, key: jax.Array) -> SupervisedContent:
        """Draws a problem."""
        keys = jax.random.split(key, 3)
        if self.activation is None:
            activation = jax.random.randint(keys[1], (), 0, 4)
        else:
            activation = jnp.int32(self.activation)
        spread = self.log_init_spread
        init_scale = jnp.exp(jax.random.uniform(keys[2], (), minval=-spread, maxval=spread))
        return SupervisedContent(self.source.sample(keys[0]), activation, init_scale)

    def init(self, key: jax.Array, content: SupervisedContent) -> Params:
        """Draws the network's parameters."""
        return self.network.init(key, content.init_scale)

    def batch(self, key: jax.Array, content: SupervisedContent, split: Split) -> Example:
        """Draws examples from the source."""
        size = self.batch_size if split == "train" else self.valid_size
        return self.source.batch(key, content.source, split, size)

    def examples(self, content: SupervisedContent, split: Split, limit: int) -> Example:
        """The source's first examples of a split."""
        return self.source.examples(content.source, split, limit)

    def loss(self, params: Params, content: SupervisedContent, batch: Example) -> jax.Array:
        """The loss of the network's outputs."""
        outputs = self.network.apply(params, batch.inputs, content.activation)
        return self.loss_function(outputs, batch.targets)


class JoinedContent(NamedTuple):
    """Which of several tasks a problem is of, and a content of each of them."""

    which: jax.Array  # () int32
    contents: tuple[SupervisedContent, ...]


@dataclasses.dataclass(frozen=True)
class Joined:
    """Tasks of one shape as one: a problem is of one of them, drawn at random.

    They run in one program, side by side. The examples of all are drawn, which costs little beside
    a step of the network and of the optimizer.

    Args:
      tasks: supervised tasks that differ in their sources alone; see `join`.
    """

    tasks: tuple[SupervisedTask, ...]

    @property
    def name(self) -> str:
        """The names of all."""
        return "+".join(task.name for task in self.tasks)

    def data_hashes(self) -> Mapping[str, str]:
        """Those of all."""
        return data_hashes(self.tasks)

    def sample(self, key: jax.Array) -> JoinedContent:
        """Draws a task, and a problem of each."""
        keys = jax.random.split(key, len(self.tasks) + 1)
        which = jax.random.randint(keys[-1], (), 0, len(self.tasks))
        contents = [task.sample(k) for task, k in zip(self.tasks, keys[:-1], strict=True)]
        return JoinedContent(which, tuple(contents))

    def _chosen(self, content: JoinedContent, items: list[Any]) -> Any:
        return jax.tree.map(lambda *x: jax.lax.select_n(content.which, *x), *items)

    def _shared(self, content: JoinedContent) -> SupervisedContent:
        """What the network needs to know: the chosen task's, but for the source's part."""
        plain = [c._replace(source=()) for c in content.contents]
        return self._chosen(content, plain)

    def init(self, key: jax.Array, content: JoinedContent) -> Params:
        """Draws the network's parameters."""
        return self.tasks[0].init(key, self._shared(content))

    def batch(self, key: jax.Array, content: JoinedContent, split: Split) -> Example:
        """Draws examples from the task's source."""
        pairs = zip(self.tasks, content.contents, strict=True)
        return self._chosen(content, [task.batch(key, c, split) for task, c in pairs])

    def examples(self, content: JoinedContent, split: Split, limit: int) -> Example:
        """The first examples of the task's source; as many as the smallest has."""
        pairs = zip(self.tasks, content.contents, strict=True)
        found = [task.examples(c, split, limit) for task, c in pairs]
        count = min(len(example.inputs) for example in found)
        return self._chosen(content, [jax.tree.map(lambda x: x[:count], e) for e in found])

    def loss(self, params: Params, content: JoinedContent, batch: Example) -> jax.Array:
        """The loss of the network's outputs."""
        return self.tasks[0].loss(params, self._shared(content), batch)


def join(tasks: Iterable[Task]) -> list[tuple[Task, int]]:
    """Tasks of one shape as one.

    Args:
      tasks: any.

    Returns:
      Tasks, each with the number of those that it stands for, in the order of their first ones.
    """
    groups: dict[Any, list[Task]] = {}
    for task in tasks:
        groups.setdefault(_shape_of(task), []).append(task)
    joined: list[tuple[Task, int]] = []
    for group in groups.values():
        if len(group) == 1:
            joined.append((group[0], 1))
        else:
            joined.append((Joined(tuple(group)), len(group)))  # type: ignore[arg-type]
    return joined


def _shape_of(task: Task) -> Any:
    """Equal for tasks that can be joined."""
    if not isinstance(task, SupervisedTask):
        return task.name
    plain = dataclasses.replace(task, name="", source=())  # type: ignore[arg-type]

    def batches(key: jax.Array) -> Any:
        content = task.sample(key)
        return [task.batch(key, content, split) for split in ("train", "valid")]

    shapes = jax.eval_shape(batches, jax.random.key(0))
    return plain, tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(shapes))


class QuadraticContent(NamedTuple):
    """A diagonal quadratic bowl: curvature and minimum of each coordinate."""

    curvature: jax.Array
    minimum: jax.Array


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """0.5 * mean(curvature * (x - minimum)^2): small, exact, for tests of the estimators."""

    dimension: int = 4
    name: str = "quadratic"

    def sample(self, key: jax.Array) -> QuadraticContent:
        """Draws curvatures in [0.5, 2] and a minimum."""
        keys = jax.random.split(key)
        curvature = jax.random.uniform(keys[0], (self.dimension,), minval=0.5, maxval=2.0)
        return QuadraticContent(curvature, jax.random.normal(keys[1], (self.dimension,)))

    def init(self, key: jax.Array, content: QuadraticContent) -> Params:
        """Draws the starting point."""
        del content
        return {"x": jax.random.normal(key, (self.dimension,))}

    def batch(self, key: jax.Array, content: QuadraticContent, split: Split) -> Batch:
        """No data."""
        del key, content, split
        return ()

    def examples(self, content: QuadraticContent, split: Split, limit: int) -> Batch:
        """No data."""
        del content, split, limit
        return ()

    def loss(self, params: Params, content: QuadraticContent, batch: Batch) -> jax.Array:
        """The bowl's height."""
        del batch
        return 0.5 * jnp.mean(content.curvature * jnp.square(params["x"] - content.minimum))


def _classifier(
    name: str, source: Source, network: Network, batch: int, **kw: Any
) -> SupervisedTask:
    return SupervisedTask(name, source, network, cross_entropy, batch, **kw)


def _digits(disguise: bool = True) -> Tables:
    return Tables(("digits",), 64, 10, disguise, keep_places=not disguise)


def training_tasks() -> dict[str, Task]:
    """The tasks meta-training may use, by name."""
    pooled = Tables(("digits", "wine"), 64, 10)
    few_rows = Tables(("digits", "wine"), 64, 10, few=(60, 500), label_noise=0.2)
    places = Tables(("digits",), 64, 10, keep_places=True)
    china = Tables(("china",), 64, 0)
    mse = squared_error
    tasks: list[Task] = [
        Quadratic(),
        _classifier("tables_mlp_16", pooled, Mlp((64, 16, 10)), 32, valid_size=128),
        _classifier("tables_mlp_32x2", pooled, Mlp((64, 32, 32, 10)), 64, valid_size=256),
        _classifier("digits_mlp_64", _digits(), Mlp((64, 64, 10)), 128, valid_size=256),
        _classifier("digits_mlp_norm_32x3", _digits(), Mlp((64, 32, 32, 32, 10), True), 32),
        _classifier("digits_conv_8", places, ConvNet(8, (8, 16), 10), 32, valid_size=128),
        SupervisedTask("china_autoencoder", china, Mlp((64, 48, 12, 48, 64)), mse, 32),
        SupervisedTask(
            "diabetes_mlp", Tables(("diabetes",), 10, 0), Mlp((10, 32, 16, 1)), mse, 16, 128
        ),
        SupervisedTask(
            "teacher_regression", Teacher((16, 32, 4), False), Mlp((16, 32, 32, 4)), mse, 64
        ),
        _classifier("teacher_classification", Teacher((16, 32, 8), True), Mlp((16, 48, 8)), 32),
        _classifier(
            "tables_few_mlp_32x2", few_rows, Mlp((64, 32, 32, 10)), 32, valid_size=256
        ),
        _classifier(
            "teacher_few_mlp_32x2", Teacher((24, 8, 2), True, (60, 600), 1.0),
            Mlp((24, 32, 32, 2)), 32, valid_size=256,
        ),
        _classifier("bytes_rnn_32", Characters(16), Rnn(data.VOCABULARY, 32), 16, valid_size=32),
    ]  # fmt: skip
    tasks += _picture_tasks() + _direction_tasks()
    return {task.name: task for task in tasks}


def _direction_tasks() -> list[Task]:
    """Networks of several matrices, of each kind that people train, on pictures and English.

    Other data, widths and lengths than the held-out tasks have.
    """
    clipart = "clipart"
    words, colour = "brown", Pictures(clipart, 16, 3)
    return [
        _classifier(
            "clipart_mlp_norm_32x3", Pictures(clipart, 16), Mlp((256, 32, 32, 32, 10), True), 64
        ),
        _classifier(
            "clipart_mlp_48x2_colour", Pictures(clipart, 8, 3), Mlp((192, 48, 48, 10)), 64
        ),
        _classifier("clipart_conv_colour", colour, ConvNet(16, (12, 24), 10, 3), 32),
        _classifier(
            "clipart_transformer_colour", colour, Transformer(10, 24, 2, 2, 16, 48), 32
        ),
        _classifier(
            "words_rnn_48", Characters(16, True, words), Rnn(data.VOCABULARY, 48), 16,
            valid_size=32,
        ),
        _classifier(
            "words_transformer_48", Characters(24, True, words),
            Transformer(data.VOCABULARY, 48, 2, 3, 24), 16, valid_size=32,
        ),
        _classifier(
            "words_transformer_24", Characters(24, True, words),
            Transformer(data.VOCABULARY, 24, 2, 2, 24), 16, valid_size=32,
        ),
        _classifier("teacher_mlp_32x3", Teacher((16, 32, 8), True), Mlp((16, 32, 32, 32, 8)), 64),
    ]  # fmt: skip


def _picture_tasks() -> list[Task]:
    """MLPs of 32 hidden relu units on small pictures, in batches of 64: what Celo2 was made on."""
    fixed: dict[str, Any] = {"activation": 0, "log_init_spread": 0.0}
    sources = {
        "fashion_mlp_8": Pictures("fashion_mnist", 8),
        "fashion_mlp_16": Pictures("fashion_mnist", 16),
        "clipart_mlp_8": Pictures("clipart", 8),
        "clipart_mlp_16": Pictures("clipart", 16),
        "clipart_mlp_8_colour": Pictures("clipart", 8, 3),
        "clipart_mlp_16_colour": Pictures("clipart", 16, 3),
    }
    tasks: list[Task] = [
        _classifier(name, s, Mlp((s.side**2 * s.channels, 32, 10)), 64, **fixed)
        for name, s in sources.items()
    ]
    return [*tasks, _classifier("digits_mlp_8", _digits(False), Mlp((64, 32, 10)), 64, **fixed)]


def held_out_tasks() -> dict[str, Task]:
    """The tasks meta-training never sees, by name.

    Held out are the breast cancer table, the photograph "flower", the widest models, and
    transformers of digits and of source code: those among the training tasks have other widths
    and other data. Their content is not disguised.
    """
    vocabulary = data.VOCABULARY
    cancer = Tables(("breast_cancer",), 30, 2, disguise=False)
    flower = Tables(("flower",), 64, 0, disguise=False)
    fixed: dict[str, Any] = {"activation": 0, "log_init_spread": 0.0}
    tasks = [
        _classifier("digits_mlp_128", _digits(False), Mlp((64, 128, 10)), 128, **fixed),
        _classifier("digits_mlp_512x2", _digits(False), Mlp((64, 512, 512, 10)), 128, **fixed),
        _classifier("cancer_mlp_32x2", cancer, Mlp((30, 32, 32, 2)), 32, **fixed),
        _classifier("cancer_mlp_norm_64x3", cancer, Mlp((30, 64, 64, 64, 2), True), 64, **fixed),
        _classifier("digits_conv_32", _digits(False), ConvNet(8, (32, 64), 10), 64, **fixed),
        SupervisedTask(
            "flower_autoencoder", flower, Mlp((64, 256, 16, 256, 64)), squared_error, 64, **fixed
        ),
        _classifier(
            "digits_transformer", _digits(False), Transformer(10, 32, 2, 2, 8, 8), 64, **fixed
        ),
        _classifier(
            "bytes_transformer_32", Characters(32, False), Transformer(vocabulary, 32, 2, 2, 32),
            16, **fixed,
        ),
        _classifier(
            "bytes_transformer_64", Characters(32, False), Transformer(vocabulary, 64, 2, 4, 32),
            32, **fixed,
        ),
    ]  # fmt: skip
    return {task.name: task for task in tasks}
