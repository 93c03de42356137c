"""What is done for XLA alone, with the reason for each and a switch.

Every quirk was measured on the versions that are named here and may be gone in another. To see what
an update is without one, hand its name to `lopt_jax.applying.steering`:

    lopt_jax.applying.steering(tx, without=("slices",))

The values of an update stay the same up to rounding. How XLA sums on CPUs (`lopt_jax.reductions`)
and takes the precision of products (`lopt_jax.compiler.precision`) is part of the values, so these
have no switch.
"""

from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Quirk:
    """Something that XLA does, and what is done about it.

    Attributes:
      why: what XLA would do.
      gain: what was measured.
      where: the function that does something about it.
    """

    why: str
    gain: str
    where: str


SEEN_ON = "jax 0.12.0.1 on CPUs and on an H200"

QUIRKS = {
    "shared_expressions": Quirk(
        why="Passes B and C share the reciprocal root of the second moment and its products with "
        "the momenta, and off CPUs the new accumulators. XLA computes them once and stores them: "
        "arrays as large as the tensor.",
        gain="VeLO on an MLP of 0.67M parameters, two CPU cores: 45 ms of processor time to 30. "
        "Temporaries of one (4096, 4096) leaf: 4.0 times the leaf to 2.0. Compiled for a TPU v5e, "
        "hidden size 4 on one (8192, 8192) leaf: 72 bytes a parameter in place of 88.",
        where="lopt_jax.xla.network.XlaNetwork.read_anew",
    ),
    "row_factors": Quirk(
        why="A vector that is divided by its own mean starts a Triton kernel. XLA tries its "
        "tilings on all that reads the vector, also on hundreds of operations of a network.",
        gain="About half of a small MLP's time to compile for a GPU.",
        where="lopt_jax.xla.network.XlaNetwork.store",
    ),
    "unrolled_weights": Quirk(
        why="Weights that are parts of one array are read anew for every element.",
        gain="An unrolled wide network on a CPU takes a sixth of the time.",
        where="lopt_jax.xla.network.XlaNetwork.step",
    ),
    "known_decays": Quirk(
        why="Of an average whose decay is known to be one half XLA keeps a copy, and computes it "
        "twice.",
        gain="rnn_mlp_lopt on one (4096, 1024) leaf, on a CPU: temporaries of 2.7 times the leaf "
        "to 1.4, and a tenth of the operations.",
        where="lopt_jax.optimizers.rnn_mlp_lopt.rnn_mlp_lopt",
    ),
    "many_leaves": Quirk(
        why="Each kernel that reads joined leaves joins them itself, and takes up to two seconds "
        "to compile where they are 24.",
        gain="Those seconds; one kernel more.",
        where="lopt_jax.xla.passes.joined_once",
    ),
    "scattered_results": Quirk(
        why="Parts of a result's computation are repeated for every leaf, after the leaf's old "
        "value is gone, so that XLA copies that value first.",
        gain="Those copies.",
        where="lopt_jax.batches.scatter",
    ),
    "slices": Quirk(
        why="On a GPU XLA launches a kernel for every slice that lies at a known place.",
        gain="GPT-2 355M with VeLO: 545 launches in place of 1,811, 8.50 ms in place of 9.58.",
        where="lopt_jax.compiler.slices.opaque_zero",
    ),
    "turns": Quirk(
        why="Equal large leaves are compiled one by one, two seconds each.",
        gain="Off CPUs, one of them is compiled where there are more than sixteen.",
        where="lopt_jax.batches.make_batches",
    ),
    "complex_products": Quirk(
        why="XLA compiles dozens of variants of a real product for a GPU and times them.",
        gain="VeLO's LSTM on an H200: 0.1 s of compilation a product in place of seconds.",
        where="lopt_jax.compiler.products.product",
    ),
}


def barrier(quirk: str, arrays: Any, without: tuple[str, ...]) -> Any:
    """The arrays behind a barrier that XLA moves nothing across.

    Args:
      quirk: what it is for, a name of `QUIRKS`.
      arrays: a tree of arrays.
      without: names of quirks that nothing is done about.

    Returns:
      The arrays.
    """
    assert quirk in QUIRKS
    return arrays if quirk in without else jax.lax.optimization_barrier(arrays)
