"""Tasks with nothing to regularise: their examples are what their docstrings say."""

import jax
import numpy as np
import pytest

from lopt_jax.meta import data
from lopt_jax.meta.noise_free import (
    Coordinates,
    Sines,
    noise_free_tasks,
    noise_free_tuning_tasks,
)


def test_sines_are_sums_of_sines():
    source = Sines(2, 3, 4.0)
    content = source.sample(jax.random.key(0))
    batch = source.batch(jax.random.key(1), content, "train", 5)
    frequencies, phases, amplitudes = map(np.float64, content)
    for point, value in zip(np.float64(batch.inputs), batch.targets[:, 0], strict=True):
        waves = [
            a * np.sin(f @ point + p)
            for a, f, p in zip(amplitudes, frequencies, phases, strict=True)
        ]
        assert value == pytest.approx(sum(waves), abs=1e-5)
    assert np.all(np.abs(batch.inputs) <= 1)


def test_coordinates_are_the_pixels_of_a_picture():
    pytest.importorskip("sklearn")
    source = Coordinates("china", 20, 2)
    picture = data.load_picture("china", 20)
    assert picture.shape == (20, 20)
    np.testing.assert_allclose((picture.mean(), picture.std()), (0, 1), atol=1e-5)
    examples = source.examples((), "valid", 400)
    np.testing.assert_array_equal(examples.targets[:, 0], picture.ravel())
    row, column = 7 / 20, 3 / 20
    expected = [
        wave(np.pi * octave * place)
        for place in (row, column)
        for wave in (np.sin, np.cos)
        for octave in (1, 2)
    ]
    np.testing.assert_allclose(examples.inputs[7 * 20 + 3], expected, atol=1e-5)


def test_constants_are_chosen_on_others_than_those_reported():
    assert not set(noise_free_tasks()) & set(noise_free_tuning_tasks())
    sources = [task.source for task in noise_free_tasks().values()]
    assert all(task.source not in sources for task in noise_free_tuning_tasks().values())
