"""Steps that write the new parameters of sharded models, against one device's updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lopt_jax

SPECS = {"rows": P("d"), "columns": P(None, "d"), "small": P("d"), "b": P("d"), "whole": P()}
LOSS = jnp.float32(1.5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("velo", AxisType.Explicit),
        ("small_fc_lopt", AxisType.Auto),
        pytest.param("velo", AxisType.Auto, marks=pytest.mark.nightly),
        pytest.param("small_fc_lopt", AxisType.Explicit, marks=pytest.mark.nightly),
    ],
)
def test_new_parameters_stay_where_the_old_ones_are(name, kind):
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("d",), axis_types=(kind,))
    shapes = {"rows": (512, 160), "columns": (512, 160), "small": (16, 8), "b": (24,)}
    zeros = {k: jnp.zeros(shape) for k, shape in shapes.items()} | {"whole": jnp.zeros((160,))}
    params = optimizers.random_like(zeros, seed=0)
    gradients = [optimizers.random_like(params, seed=i, scale=0.1) for i in (1, 2)]
    tx = optimizers.make(name, weight_decay=0.1)

    update = jax.jit(lambda *xs: tx.update(*xs, value=LOSS))
    expected, state = params, tx.init(params)
    for g in gradients:
        updates, state = update(g, state, expected)
        expected = optax.apply_updates(expected, updates)

    def spread(tree):
        return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, SPECS)

    step = jax.jit(lambda g, s, p: lopt_jax.update_params(tx, g, s, p, value=LOSS))
    with jax.set_mesh(mesh):
        got = spread(params)
        state = jax.jit(tx.init)(got)
        for g in gradients:
            got, state = step(spread(g), state, got)
    for key, x in got.items():
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, SPECS[key]), x.ndim)
        error = np.max(np.abs(np.asarray(x) - np.asarray(expected[key])))
        assert error <= 2e-6 * np.max(np.abs(expected[key]))
