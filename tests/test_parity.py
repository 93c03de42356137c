"""Every step and leaf of the reference trajectories, within the reference module's bound."""

import pytest
import reference

import lopt_jax

SMALL_FC = {"step_mult": 0.01}
NO_CONFIG = {"step_mult": 0.002}


def small_fc(name):
    return lopt_jax.small_fc_lopt(reference.weights(name, **SMALL_FC))


def velo(name, weights=None):
    settings = reference.config(name)
    if weights is None:
        weights = reference.weights(name, **settings["kwargs"])
    return lopt_jax.velo(
        settings["num_steps"], weights, gradient_accumulation=settings.get("num_accumulate")
    )


CASES = {
    "small_fc_lopt_h4": lambda: small_fc("small_fc_lopt_h4"),
    "small_fc_lopt_h32": lambda: small_fc("small_fc_lopt_h32"),
    "velo": lambda: velo("velo"),
    "velo_bugged_flags": lambda: velo("velo_bugged_flags"),
    "velo_gradient_accumulation": lambda: velo("velo_gradient_accumulation"),
}


@pytest.mark.parametrize("name", CASES)
def test_trajectory(name):
    worst, where = reference.worst_error(CASES[name](), reference.trajectory(name))
    assert worst <= 1, f"{worst:.2f} times the bound at {where}"


def test_original_checkpoint():
    """The layout of the released VeLO: what the tree cannot say comes from config.gin."""
    tx = velo("velo", reference.weights("original_checkpoint"))
    worst, where = reference.worst_error(tx, reference.trajectory("velo"))
    assert worst <= 1, f"{worst:.2f} times the bound at {where}"


def test_original_checkpoint_without_config():
    """The oldest layout: both historical bugs are on; only step_mult must be given."""
    weights = reference.weights("original_checkpoint_no_config", **NO_CONFIG)
    assert weights.config["use_bugged_next_lstm_state"]
    assert weights.config["use_bugged_loss_features"]
    tx = velo("velo_bugged_flags", weights)
    worst, where = reference.worst_error(tx, reference.trajectory("velo_bugged_flags"))
    assert worst <= 1, f"{worst:.2f} times the bound at {where}"
