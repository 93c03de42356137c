"""benchmarks/quirks.py: every quirk has a case, and its row says what was measured."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from lopt_jax.compiler.quirks import QUIRKS

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "quirks.py"


@pytest.fixture(scope="module")
def quirks():
    spec = importlib.util.spec_from_file_location("benchmark_of_quirks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_quirk_has_a_case(quirks):
    assert list(quirks.CASES) == list(QUIRKS)


def test_a_row(quirks, monkeypatch):
    shapes = {"w": (256, 256)}  # large enough for passes of its own
    case = dataclasses.replace(quirks.CASES["shared_expressions"], shapes=shapes)
    monkeypatch.setitem(quirks.CASES, "shared_expressions", case)
    monkeypatch.setattr(quirks, "TURNS", 1)
    record = quirks.measure("shared_expressions")
    assert record.changes
    assert min(record.ms, record.ms_without, record.compile_s, record.compile_s_without) > 0
    assert quirks.row(record).count("|") == quirks.HEADER.splitlines()[0].count("|")
    same = dataclasses.replace(record, changes=False)
    assert "the same program" in quirks.row(same)
    assert quirks.row(same).count("|") == quirks.row(record).count("|")
