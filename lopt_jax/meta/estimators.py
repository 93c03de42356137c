"""Estimators of the meta-gradient, behind one signature.

`full_es` and `truncated_es`, `truncated_pes` perturb the meta-parameters by antithetic pairs
(+e, -e) that share tasks, starts and batches; `truncated_backprop` differentiates through the
unroll. All estimate the gradient of the mean, over a life, of the meta-loss.

Reference: https://arxiv.org/abs/2112.13835 (persistent evolution strategies), algorithms 1 and 2.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lopt_jax.applying import in_batch
from lopt_jax.meta.rules import MetaParameters
from lopt_jax.meta.unroll import Guidance, Unroll, UnrollMetrics, UnrollState

EstimatorName = Literal["full_es", "truncated_pes", "truncated_es", "truncated_backprop"]


class Estimate(NamedTuple):
    """One estimate of the meta-gradient."""

    gradient: MetaParameters
    loss: jax.Array  # () float32: mean meta-loss of the particles
    final_score: jax.Array  # () float32: mean score of the particles near the end of their lives
    diverged: jax.Array  # () float32: fraction of particles above their initial loss
    rejected: jax.Array  # () float32: fraction of pairs left out because a loss was not finite


class Resumption(NamedTuple):
    """How lives begin: afresh, or from a stored state of a training that was failing.

    Where a truncation's losses raised the pair's `unroll.Struggle`, and where a life ends, the
    state that the truncation began with is stored in place of the oldest one. A stored state keeps
    the perturbations that led to it, so that the gradient stays that of the whole, longer life.

    Fields:
      probability: that a life begins from one of the pair's stored states.
      slots: how many of them a pair has.

    Reference: https://arxiv.org/abs/2607.06772 (ELO).
    """

    probability: float = 0.0
    slots: int = 2


_AFRESH = Resumption()


class Stored(NamedTuple):
    """Stored states of every pair; the fields of all slots hold first what the pair began with."""

    particles: UnrollState  # (num_pairs, 2, slots, ...) a leaf
    accumulator: MetaParameters  # (num_pairs, slots, ...) a leaf
    next_slot: jax.Array  # (num_pairs,) int32: the oldest


class EstimatorState(NamedTuple):
    """Unrolls on their way, one antithetic pair a row of every array."""

    particles: UnrollState  # (num_pairs, 2, ...) a leaf: +e, -e
    accumulator: MetaParameters  # sum of this life's perturbations, (num_pairs, ...) a leaf
    stored: Any = ()  # Stored, where lives are resumed


class Estimator(NamedTuple):
    """init(meta_parameters, key) -> state, and estimate.

    estimate(meta_parameters, key, state, mask, guidance=None) -> (estimate, state), where the mask
    is a tree of factors that broadcast to the meta-parameters: 0 for those that stay as they are, 1
    otherwise; and the guidance is given where the unroll has an expert. Every array of the state
    has the pairs (or the particles) as its leading axis.
    """

    init: Callable[[MetaParameters, jax.Array], Any]
    estimate: Callable[..., tuple[Estimate, Any]]


def no_mask(meta_parameters: MetaParameters) -> MetaParameters:
    """The mask that lets every meta-parameter change."""
    return jax.tree.map(lambda x: jnp.ones((), x.dtype), meta_parameters)


def perturb(
    meta_parameters: MetaParameters,
    key: jax.Array,
    standard_deviation: float,
    mask: MetaParameters,
) -> MetaParameters:
    """Draws one Gaussian perturbation of the shape of the meta-parameters, times the mask."""
    leaves, structure = jax.tree.flatten(meta_parameters)
    keys = jax.random.split(key, len(leaves))
    draws = [
        standard_deviation * jax.random.normal(k, leaf.shape, leaf.dtype)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return _multiply(structure.unflatten(draws), mask)


def _select(condition: jax.Array, new: Any, old: Any) -> Any:
    def choose(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(
            condition.reshape(condition.shape + (1,) * (a.ndim - condition.ndim)), a, b
        )

    return jax.tree.map(choose, new, old)


def _add(a: MetaParameters, b: MetaParameters) -> MetaParameters:
    return jax.tree.map(jnp.add, a, b)


def _multiply(a: MetaParameters, b: MetaParameters) -> MetaParameters:
    return jax.tree.map(jnp.multiply, a, b)


def _summarise(
    gradient: MetaParameters, losses: jax.Array, metrics: UnrollMetrics, rejected: jax.Array
) -> Estimate:
    late = (metrics.fraction > 0.8).astype(jnp.float32)
    # Not a number where no particle is near its end; the trainer skips those in its averages.
    final_score = jnp.sum(metrics.final_score * late) / jnp.sum(late)
    diverged = jnp.mean(metrics.diverged)
    return Estimate(gradient, jnp.mean(losses), final_score, diverged, jnp.mean(rejected))


def _antithetic_gradient(
    perturbations: MetaParameters,
    positive_loss: jax.Array,
    negative_loss: jax.Array,
    standard_deviation: float,
    clip: float,
) -> tuple[MetaParameters, jax.Array]:
    """Mean over pairs of perturbation * (loss+ - loss-) / (2 sigma^2); bad pairs count as zero."""
    difference = positive_loss - negative_loss
    bad = ~jnp.isfinite(difference)
    difference = jnp.clip(jnp.where(bad, 0.0, difference), -clip, clip)
    factor = difference / (2.0 * standard_deviation**2 * difference.shape[0])
    gradient = jax.tree.map(lambda e: jnp.tensordot(factor, e, 1), perturbations)
    return gradient, bad.astype(jnp.float32)


def _store(
    stored: Stored, push: jax.Array, particles: UnrollState, accumulator: MetaParameters
) -> Stored:
    """Puts the pairs where `push` (num_pairs,) is true into their oldest slots."""

    def one(stored: Stored, push: jax.Array, *new: Any) -> Stored:
        slot, slots = stored.next_slot, jax.tree.leaves(stored.accumulator)[0].shape[0]

        def put(axis: int, old: jax.Array, value: jax.Array) -> jax.Array:
            value = jnp.where(push, value, jnp.take(old, slot, axis))
            return jax.lax.dynamic_update_index_in_dim(old, value, slot, axis)

        return Stored(
            jax.tree.map(functools.partial(put, 1), stored.particles, new[0]),
            jax.tree.map(functools.partial(put, 0), stored.accumulator, new[1]),
            jnp.where(push, (slot + 1) % slots, slot),
        )

    return jax.vmap(one)(stored, push, particles, accumulator)


def _truncated_evolution(
    unroll: Unroll,
    num_pairs: int,
    standard_deviation: float,
    clip: float,
    persistent: bool,
    resumption: Resumption,
) -> Estimator:
    resumes = resumption.probability > 0
    if resumes != bool(unroll.watched):
        raise ValueError("resumption: expected where the unroll watches losses, and there alone")
    make_optimizer = unroll.make_optimizer
    unroll = dataclasses.replace(
        unroll, make_optimizer=lambda *args: in_batch(make_optimizer(*args), 2 * num_pairs)
    )
    # Axes (pair, sign): the two of a pair share keys, and pairs shard over devices unmoved.
    signs = jnp.array([1.0, -1.0])
    start = jax.vmap(jax.vmap(unroll.init, (0, None)))

    def advance(
        perturbed: MetaParameters,
        keys: jax.Array,
        particles: UnrollState,
        guidance: Guidance | None,
    ) -> Any:
        def one(theta: MetaParameters, key: jax.Array, state: UnrollState) -> Any:
            return unroll.advance(theta, key, state, guidance)

        return jax.vmap(jax.vmap(one, (0, None, 0)))(perturbed, keys, particles)

    def begin(
        perturbed: MetaParameters, key: jax.Array, keys: jax.Array, state: EstimatorState
    ) -> tuple[UnrollState, MetaParameters]:
        """Particles at the start of a life, and the perturbations that led to them."""
        fresh = start(perturbed, keys)
        none = jax.tree.map(jnp.zeros_like, state.accumulator)
        if not resumes:
            return fresh, none
        key_use, key_slot = jax.random.split(jax.random.fold_in(key, 3))
        use = jax.random.bernoulli(key_use, resumption.probability, (num_pairs,))
        slots = jax.random.randint(key_slot, (num_pairs,), 0, resumption.slots)

        def take(axis: int, tree: Any) -> Any:
            return jax.tree.map(
                lambda x: jax.vmap(lambda row, slot: jnp.take(row, slot, axis))(x, slots), tree
            )

        again = jax.vmap(jax.vmap(unroll.resume, (0, None)))(take(1, state.stored.particles), keys)
        both = jnp.stack([use, use], 1)
        led = _select(use, take(0, state.stored.accumulator), none)
        return _select(both, again, fresh), led

    def remember(
        state: EstimatorState, began: UnrollState, led: MetaParameters, ended: UnrollState
    ) -> tuple[UnrollState, Any]:
        """The particles after a truncation, and the stored states."""
        before = jnp.mean(began.struggle.highest, 1)
        after = jnp.mean(ended.struggle.highest, 1)
        push = (after > before) | unroll.finished(ended)[:, 0]
        push &= jnp.all(jnp.isfinite(ended.struggle.last_loss), 1)
        stored = _store(state.stored, push, began, led)
        # The two of a pair are stored for the same reason, so they go on from the same bound.
        highest = jnp.where(push, after, before)
        struggle = ended.struggle._replace(highest=jnp.stack([highest, highest], 1))
        return ended._replace(struggle=struggle), stored

    def init(meta_parameters: MetaParameters, key: jax.Array) -> EstimatorState:
        keys = jax.random.split(key, num_pairs)
        single = jax.vmap(lambda k: unroll.init(meta_parameters, k, True))(keys)
        particles = jax.tree.map(lambda x: jnp.stack([x, x], 1), single)
        zeros = jax.tree.map(lambda x: jnp.zeros((num_pairs, *x.shape), x.dtype), meta_parameters)
        if not resumes:
            return EstimatorState(particles, zeros)

        def copies(axis: int, tree: Any) -> Any:
            return jax.tree.map(lambda x: jnp.stack([x] * resumption.slots, axis), tree)

        first = jnp.zeros((num_pairs,), jnp.int32)
        stored = Stored(copies(2, particles), copies(1, zeros), first)
        return EstimatorState(particles, zeros, stored)

    def estimate(
        meta_parameters: MetaParameters,
        key: jax.Array,
        state: EstimatorState,
        mask: MetaParameters,
        guidance: Guidance | None = None,
    ) -> tuple[Estimate, EstimatorState]:
        keys = [jax.random.split(k, num_pairs) for k in jax.random.split(key, 3)]
        noise = jax.vmap(lambda k: perturb(meta_parameters, k, standard_deviation, mask))(keys[0])
        perturbed = jax.tree.map(
            lambda x, e: x + e[:, None] * signs.reshape(2, *(1,) * x.ndim), meta_parameters, noise
        )
        over = unroll.finished(state.particles)  # the same for both of a pair
        fresh, led = begin(perturbed, key, keys[1], state)
        began = _select(over, fresh, state.particles)
        led = _select(over[:, 0], led, state.accumulator)
        accumulator = _add(led, noise)
        particles, losses, metrics = advance(perturbed, keys[2], began, guidance)
        stored = state.stored
        if resumes:
            particles, stored = remember(state, began, led, particles)
        used = _multiply(accumulator, mask) if persistent else noise
        gradient, rejected = _antithetic_gradient(
            used, losses[:, 0], losses[:, 1], standard_deviation, clip
        )
        estimated = _summarise(gradient, losses, metrics, rejected)
        return estimated, EstimatorState(particles, accumulator, stored)

    return Estimator(init, estimate)


def truncated_pes(
    unroll: Unroll,
    num_pairs: int,
    standard_deviation: float = 0.01,
    clip: float = 2.0,
    resumption: Resumption = _AFRESH,
) -> Estimator:
    """Persistent evolution strategies: unbiased for the whole life from truncations of it.

    Args:
      unroll: the inner training.
      num_pairs: antithetic pairs, each with its own task.
      standard_deviation: of the perturbations.
      clip: bound on the difference of a pair's losses.
      resumption: how lives begin.

    Returns:
      The estimator.
    """
    return _truncated_evolution(unroll, num_pairs, standard_deviation, clip, True, resumption)


def truncated_es(
    unroll: Unroll,
    num_pairs: int,
    standard_deviation: float = 0.01,
    clip: float = 2.0,
    resumption: Resumption = _AFRESH,
) -> Estimator:
    """Evolution strategies on truncations: blind to what a truncation does to later ones.

    Args:
      unroll: the inner training.
      num_pairs: antithetic pairs, each with its own task.
      standard_deviation: of the perturbations.
      clip: bound on the difference of a pair's losses.
      resumption: how lives begin.

    Returns:
      The estimator; biased towards short horizons.
    """
    return _truncated_evolution(unroll, num_pairs, standard_deviation, clip, False, resumption)


def _whole_life(
    unroll: Unroll, meta_parameters: MetaParameters, key: jax.Array, guidance: Guidance | None
) -> tuple[jax.Array, UnrollMetrics]:
    """One life from start to horizon: its mean meta-loss and its last truncation's metrics."""
    key_start, key_unroll = jax.random.split(key)
    state = unroll.init(meta_parameters, key_start)

    def advance(
        carry: tuple[UnrollState, jax.Array], key: jax.Array
    ) -> tuple[tuple[UnrollState, jax.Array], UnrollMetrics]:
        state, total = carry
        live = ~unroll.finished(state)
        new, loss, metrics = unroll.advance(meta_parameters, key, state, guidance)
        state = jax.tree.map(lambda a, b: jnp.where(live, a, b), new, state)
        return (state, total + jnp.where(live, loss, 0.0)), metrics

    keys = jax.random.split(key_unroll, unroll.max_truncations)
    (state, total), metrics = jax.lax.scan(advance, (state, jnp.zeros(())), keys)
    last = state.step // unroll.truncation_length - 1
    return total / (last + 1), jax.tree.map(lambda x: x[last], metrics)


def full_es(
    unroll: Unroll, num_pairs: int, standard_deviation: float = 0.01, clip: float = 2.0
) -> Estimator:
    """Evolution strategies on whole lives: unbiased, and as slow as the longest life.

    Args:
      unroll: the inner training.
      num_pairs: antithetic pairs, each with its own task.
      standard_deviation: of the perturbations.
      clip: bound on the difference of a pair's losses.

    Returns:
      The estimator; its state is empty.
    """

    def init(meta_parameters: MetaParameters, key: jax.Array) -> tuple[()]:
        del meta_parameters, key
        return ()

    def estimate(
        meta_parameters: MetaParameters,
        key: jax.Array,
        state: tuple[()],
        mask: MetaParameters,
        guidance: Guidance | None = None,
    ) -> tuple[Estimate, tuple[()]]:
        noise_keys, keys = (jax.random.split(k, num_pairs) for k in jax.random.split(key))
        noise = jax.vmap(lambda k: perturb(meta_parameters, k, standard_deviation, mask))(
            noise_keys
        )

        def life(e: MetaParameters, k: jax.Array) -> tuple[jax.Array, UnrollMetrics]:
            return _whole_life(unroll, _add(meta_parameters, e), k, guidance)

        positive, metrics = jax.vmap(life)(noise, keys)
        negative, other = jax.vmap(life)(jax.tree.map(jnp.negative, noise), keys)
        gradient, rejected = _antithetic_gradient(
            noise, positive, negative, standard_deviation, clip
        )
        both = jax.tree.map(lambda *x: jnp.stack(x), metrics, other)
        return _summarise(gradient, jnp.stack([positive, negative]), both, rejected), state

    return Estimator(init, estimate)


def truncated_backprop(
    unroll: Unroll, num_pairs: int, standard_deviation: float = 0.01, clip: float = 2.0
) -> Estimator:
    """Differentiates through each truncation; twice `num_pairs` unrolls, for a fair comparison.

    Args:
      unroll: the inner training.
      num_pairs: half the number of unrolls.
      standard_deviation: unused; here so that the estimators share a signature.
      clip: bound on the norm of one unroll's gradient.

    Returns:
      The estimator; biased as every truncated one, and noisy where training is chaotic.
    """
    del standard_deviation
    count = 2 * num_pairs

    def init(meta_parameters: MetaParameters, key: jax.Array) -> UnrollState:
        keys = jax.random.split(key, count)
        return jax.vmap(lambda k: unroll.init(meta_parameters, k, True))(keys)

    def estimate(
        meta_parameters: MetaParameters,
        key: jax.Array,
        state: UnrollState,
        mask: MetaParameters,
        guidance: Guidance | None = None,
    ) -> tuple[Estimate, UnrollState]:
        key_start, key_unroll = jax.random.split(key)

        def one(
            meta_parameters: MetaParameters, start: jax.Array, key: jax.Array, state: UnrollState
        ) -> tuple[jax.Array, tuple[UnrollState, UnrollMetrics]]:
            over = unroll.finished(state)
            fresh = unroll.init(meta_parameters, start)
            state = jax.tree.map(lambda a, b: jnp.where(over, a, b), fresh, state)
            state, loss, metrics = unroll.advance(meta_parameters, key, state, guidance)
            return loss, (state, metrics)

        differentiate = jax.value_and_grad(one, has_aux=True)
        keys = jax.random.split(key_start, count), jax.random.split(key_unroll, count)
        (losses, (state, metrics)), gradients = jax.vmap(differentiate, (None, 0, 0, 0))(
            meta_parameters, *keys, state
        )
        square = sum(
            jnp.sum(jnp.square(g).reshape(count, -1), -1) for g in jax.tree.leaves(gradients)
        )
        bad = ~jnp.isfinite(square)
        scale = jnp.where(bad, 0.0, jnp.minimum(1.0, clip / jnp.sqrt(jnp.maximum(square, 1e-20))))

        def mean(g: jax.Array) -> jax.Array:
            shape = (count,) + (1,) * (g.ndim - 1)
            return jnp.mean(jnp.where(bad.reshape(shape), 0.0, g) * scale.reshape(shape), 0)

        gradient = _multiply(jax.tree.map(mean, gradients), mask)
        return _summarise(gradient, losses, metrics, bad.astype(jnp.float32)), state

    return Estimator(init, estimate)


ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    "full_es": full_es,
    "truncated_pes": truncated_pes,
    "truncated_es": truncated_es,
    "truncated_backprop": truncated_backprop,
}
