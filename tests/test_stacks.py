"""What the log says of leaves that hold the layers of a scanned model."""

import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optimizers
import pytest
from flax import nnx

from lopt_jax import partition
from lopt_jax.stacks import scanned_subtrees
from lopt_jax.tensors import tensors_of

LAYERS = {"kernel": np.zeros((3, 4, 4)), "bias": np.zeros((3, 4))}
HEAD = {"kernel": np.zeros((4, 2)), "bias": np.zeros((2,))}


class Block(nn.Module):
    boxed: bool

    @nn.compact
    def __call__(self, x, _):
        init = nn.initializers.lecun_normal()
        init = nn.with_partitioning(init, (None, "model")) if self.boxed else init
        return nn.Dense(4, kernel_init=init)(x), None


class Scanned(nn.Module):
    boxed: bool
    name_of_scan: str | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        metadata = {nn.PARTITION_NAME: "layers"} if self.boxed else {}
        scanned = nn.scan(
            nn.remat(Block) if self.remat else Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params=metadata,
        )
        x, _ = scanned(self.boxed, name=self.name_of_scan)(x, None)
        return nn.Dense(2)(x)


@pytest.mark.parametrize(
    ("model", "path"),
    [
        (Scanned(False), ("ScanBlock_0",)),
        (Scanned(False, remat=True), ("ScanCheckpointBlock_0",)),
        (Scanned(True, "named"), ("named",)),
        (Scanned(True), ("ScanBlock_0",)),
        (Scanned(False, "named"), None),  # nothing tells
    ],
)
def test_scans_of_linen(model, path):
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 4))))
    assert scanned_subtrees(shapes["params"]) == ([path] if path else [])


def test_variables_of_nnx():
    kernel = nnx.Param(
        LAYERS["kernel"], out_sharding=("layers", None, "model"), eager_sharding=False
    )
    state = nnx.State(
        {"blocks": {"kernel": kernel, "bias": nnx.Param(LAYERS["bias"])}, "head": HEAD}
    )
    assert scanned_subtrees(state) == [("blocks",)]


@pytest.mark.parametrize(
    ("params", "paths"),
    [
        ({"layers": LAYERS, "head": HEAD}, [("layers",)]),
        (
            {"decoder": {"blocks": LAYERS}, "encoder": {"blocks": LAYERS}, "head": HEAD},
            [("decoder", "blocks"), ("encoder", "blocks")],
        ),
        ({"layers": [HEAD, HEAD], "head": HEAD}, []),
        ({"layers": {"kernel": np.zeros((4, 4)), "bias": np.zeros((4,))}}, []),
        ({"layers": {"kernel": np.zeros((3, 3, 4, 8)), "bias": np.zeros((8,))}}, []),
        ({"layers": {"a": np.zeros((3, 4)), "b": np.zeros((5, 3))}}, []),
        ({}, []),
        (np.zeros((3, 4)), []),
    ],
)
def test_names_of_subtrees(params, paths):
    assert scanned_subtrees(params) == paths


@pytest.fixture
def said(caplog, monkeypatch):
    """What the log says when the optimizer's state is made, twice."""
    monkeypatch.setattr(partition, "_said", set())

    def run(params, **arguments):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="lopt_jax"):
            for _ in range(2):
                jax.eval_shape(optimizers.make(name, **arguments).init, params)
        return [record.message for record in caplog.records]

    name = "small_fc_lopt"
    return run


def test_forgotten_stacked_axes_are_said_once_with_the_function_to_give(said):
    params = {"layers": LAYERS, "head": HEAD}
    (message,) = said(params)
    code = message.split("stacked_axes=", 1)[1].split(" treats")[0]
    chosen = eval(code, {"jax": jax})  # the log's own code
    stacks = [entry.stack for entry in tensors_of(params, chosen)]
    assert stacks == [(), (), (3,), (3,)]
    assert said(params, stacked_axes=chosen) == said(params, stacked_axes=0) == []


def test_one_number_for_a_whole_model_is_said_where_it_splits_biases(said):
    (message,) = said({"layers": LAYERS, "head": HEAD}, stacked_axes=1)
    assert "['head']['bias'] of shape (2,) is split into 2 tensors of shape ()" in message
    assert said(LAYERS, stacked_axes=1) == []
    assert said({"layers": LAYERS, "head": HEAD}, stacked_axes={"layers": 1, "head": 0}) == []
