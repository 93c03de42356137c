"""The bytes that `benchmarks/hlo_traffic.py` counts, against those of programs known by heart."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import lopt_jax

N = 1 << 14
ROWS = jax.ShapeDtypeStruct((16, N // 16), jnp.float32)


@pytest.fixture
def traffic(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(lopt_jax.__file__).parents[1] / "benchmarks"))
    monkeypatch.delitem(sys.modules, "hlo_traffic", raising=False)
    import hlo_traffic

    def of(function, *arguments, **options):
        compiled = jax.jit(function, **options).lower(*arguments).compile()
        return hlo_traffic.Program(compiled.as_text()).traffic()

    return of


def test_an_elementwise_function_reads_and_writes_once(traffic):
    made = traffic(lambda x, y: jnp.sin(x) * y + 1, ROWS, ROWS)
    assert made.main_bytes == pytest.approx(12 * N, rel=0.01)
    assert made.on_chip_bytes == 0
    assert made.launches == made.fusions == 1
    assert made.flops == 3 * N


def test_a_product_counts_two_operations_a_factor(traffic):
    a, b = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((32, 48), (48, 80)))
    assert traffic(jnp.dot, a, b).flops == 2 * 32 * 48 * 80


@pytest.mark.parametrize("times", [3, 16])
def test_a_loop_counts_as_often_as_it_runs(traffic, times):
    """Each step reads a row and writes it in place: not the whole array."""

    def rows(x):
        def body(i, x):
            row = jax.lax.dynamic_index_in_dim(x, i, keepdims=True)
            return jax.lax.dynamic_update_index_in_dim(x, jnp.sin(row), i, 0)

        return jax.lax.fori_loop(0, times, body, x)

    made = traffic(rows, ROWS, donate_argnums=0)
    row = 4 * N // 16
    assert made.main_bytes == pytest.approx(2 * times * row, rel=0.1)


def test_memory_on_the_chip_is_counted_apart(traffic):
    import hlo_traffic

    text = """HloModule of_a_tpu

%body (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %y = f32[8]{0} multiply(%x, %x)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %copy-start = (f32[8]{0:S(1)}, f32[8]{0}, u32[]{:S(2)}) copy-start(%p)
  %copy-done = f32[8]{0:S(1)} copy-done(%copy-start)
  ROOT %fusion = f32[8]{0} fusion(%copy-done), kind=kLoop, calls=%body
}
"""
    made = hlo_traffic.Program(text).traffic()
    assert (made.main_bytes, made.on_chip_bytes) == (64, 64)
    assert (made.fusions, made.launches, made.flops) == (1, 2, 8)
