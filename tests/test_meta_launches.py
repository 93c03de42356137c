"""The count of an inner step's operations, of a program written by hand."""

import importlib.util
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

TEXT = """HloModule jit_outer_step

%inner (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %a = s32[] get-tuple-element(%p), index=0
  %b = f32[4]{0} get-tuple-element(%p), index=1
  %c = f32[4]{0} fusion(%b), kind=kLoop, calls=%fused
  %d = f32[4]{0} fusion(%c), kind=kLoop, calls=%fused
  %e = f32[4]{0} copy(%d)
  ROOT %t = (s32[], f32[4]{0}) tuple(%a, %e)
}

%outer (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p.1 = (s32[], f32[4]{0}) parameter(0)
  %w.1 = (s32[], f32[4]{0}) while(%p.1), condition=%less, body=%inner
  ROOT %r = (s32[], f32[4]{0}) copy(%w.1)
}

ENTRY %main (x: (s32[], f32[4])) -> (s32[], f32[4]) {
  %x = (s32[], f32[4]{0}) parameter(0)
  %f.1 = (s32[], f32[4]{0}) fusion(%x), kind=kLoop, calls=%other
  %f.2 = (s32[], f32[4]{0}) fusion(%f.1), kind=kLoop, calls=%other
  %f.3 = (s32[], f32[4]{0}) fusion(%f.2), kind=kLoop, calls=%other
  %f.4 = (s32[], f32[4]{0}) fusion(%f.3), kind=kLoop, calls=%other
  ROOT %w.2 = (s32[], f32[4]{0}) while(%f.4), condition=%less, body=%outer
}
"""


@pytest.fixture
def benchmark(monkeypatch):
    pytest.importorskip("flax")  # of the models that another script, which it takes from, trains
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("launches_of", BENCHMARKS / "meta_launches.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_longest_body_of_a_loop_is_counted(benchmark):
    """Without what launches nothing, and without what is done once."""
    counts = benchmark.inner_step(benchmark.Program(TEXT))
    assert counts == {"fusion": 2, "copy": 1}
