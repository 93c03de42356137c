"""The path from mesh to checkpoint in docs/sharding.md runs as it is printed, on eight devices."""

from pathlib import Path

import jax
import numpy as np
from test_docs import run_page

import lopt_jax

PAGE = "docs/sharding.md"


def test_a_gpt_on_eight_devices():
    assert jax.device_count() == 8
    names = run_page(PAGE, __name__=Path(PAGE).stem)
    kernel = names["params"]["blocks"]["up"]["kernel"]
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == 8
    losses = np.asarray(names["losses"])
    assert losses[-1] < 0.8 * losses[0]
    restored, kept = names["restored"], (names["params"], names["state"])
    jax.tree.map(np.testing.assert_array_equal, restored, kept)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, kept)
    rules = {leaf.path: leaf.rule for leaf in lopt_jax.describe(names["tx"], kept[0]).leaves}
    assert rules["['blocks']['up']['kernel']"] == "learned"
    assert rules["['head']['kernel']"] == "adamw"
