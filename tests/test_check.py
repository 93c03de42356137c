"""`lopt check`: kernels against XLA, and which kernels a GPU runs because of it."""

import dataclasses
import json
import os
import types
from pathlib import Path

import pytest
from kernels import one_device, running  # noqa: F401 (a fixture)

import lopt_jax
from lopt_jax import check as check_module
from lopt_jax.check import CASES, Case, Finding, compare, in_own_process, keep, passing
from lopt_jax.cli import main
from pallas_kernels import checked, supports
from pallas_kernels.supports import CUDA_CORES, KERNELS, MATRIX_UNITS, kernels_reason

HOPPER, BLACKWELL, AMPERE = (
    types.SimpleNamespace(platform="gpu", device_kind=f"GPU {x}", compute_capability=x)
    for x in ("9.0", "10.0", "8.0")
)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(check_module, "SHAPES", {"kernel": (16, 64)})
    monkeypatch.setattr(check_module, "STEPS", 1)


@pytest.mark.nightly
@pytest.mark.usefixtures("small", "one_device")
def test_kernels_agree_with_xla():
    with running():
        finding = compare(CASES["velo"])
    assert finding.problem == ""
    assert finding.error > 0  # they add up in another order


@pytest.mark.usefixtures("small", "one_device")
def test_a_kernel_that_is_wrong_is_found():
    def make(backend):
        factor = 1.001 if backend == "pallas" else 1.0
        return lopt_jax.small_fc_lopt(backend="xla", learning_rate=factor)

    problem = compare(Case(CUDA_CORES, make)).problem
    assert problem == "differs from XLA by 1.0e-03 of the largest change"


@pytest.mark.parametrize(
    ("finding", "problem"),
    [
        (Finding(1e-6, True), ""),
        (Finding(1e-6, False), "two runs differ"),
        (Finding(float("nan"), True), "differs from XLA by nan of the largest change"),
        (Finding(float("inf"), True), "differs from XLA by inf of the largest change"),
    ],
)
def test_problems(finding, problem):
    assert finding.problem == problem


def test_all_cases_of_a_kernel_have_to_pass(capsys):
    found = {name: Finding(1e-6, True) for name in CASES} | {"celo": "exit status -6: aborted"}
    assert passing(found.__getitem__) == [MATRIX_UNITS]
    assert "celo (cuda_cores): FAILED: exit status -6: aborted" in capsys.readouterr().out
    assert {case.kernels for case in CASES.values()} == set(KERNELS)


def test_a_case_that_cannot_run_is_no_error_of_the_command():
    """Here without the interpreter: the process of the case ends with what stops the kernels."""
    if supports.device_reason(check_module.jax.devices()[0]) is None:
        pytest.skip("needs a machine whose kernels do not run")
    found = in_own_process("velo", 120)
    assert found.startswith("exit status ")
    assert in_own_process("velo", 0.01) == "took more than 0 seconds"


def test_the_command_says_why_there_are_no_kernels(capsys, monkeypatch):
    monkeypatch.setattr(check_module.jax, "devices", lambda: [AMPERE])
    assert main(["check"]) == 0
    text = "GPU 8.0 has compute capability 8.0; the kernels need 9.0 (Hopper) or newer"
    assert text in capsys.readouterr().out


def test_which_kernels_a_gpu_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LOPT_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert supports.device_reason(AMPERE) is not None
    assert supports.device_reason(HOPPER) is supports.device_reason(BLACKWELL) is None
    for kernels in KERNELS:
        assert kernels_reason(kernels, HOPPER, is_asked_for=False) is None
    for is_asked_for in (False, True):
        assert "wgmma" in kernels_reason(MATRIX_UNITS, BLACKWELL, is_asked_for)
    assert kernels_reason(CUDA_CORES, BLACKWELL, is_asked_for=True) is None
    assert "run `lopt check`" in kernels_reason(CUDA_CORES, BLACKWELL, is_asked_for=False)

    keep(BLACKWELL, [CUDA_CORES])
    assert kernels_reason(CUDA_CORES, BLACKWELL, is_asked_for=False) is None
    other = types.SimpleNamespace(**{**vars(BLACKWELL), "device_kind": "another"})
    assert kernels_reason(CUDA_CORES, other, is_asked_for=False) is not None
    keep(BLACKWELL, [])  # a later check that fails
    assert kernels_reason(CUDA_CORES, BLACKWELL, is_asked_for=False) is not None


def test_checks_of_other_versions_count_for_nothing(tmp_path):
    file = keep(BLACKWELL, KERNELS, tmp_path / "kernels.json")
    assert checked.kernels_checked(BLACKWELL, file) == set(KERNELS)
    (entry,) = json.loads(file.read_text())
    entry["versions"] = [["jax", "0.0.1"]]
    file.write_text(json.dumps([entry]))
    assert checked.kernels_checked(BLACKWELL, file) == frozenset()
    keep(HOPPER, [CUDA_CORES], file)
    assert len(json.loads(file.read_text())) == 2


@pytest.mark.parametrize("text", ["", "[", "3", '[{"kernels": 3}]', '["x"]', "[" * 100_000])
def test_damaged_files_count_for_nothing(tmp_path, text):
    file = tmp_path / "kernels.json"
    file.write_text(text)
    assert checked.kernels_checked(BLACKWELL, file) == frozenset()
    assert checked.kernels_checked(keep_over(file), file) == {CUDA_CORES}


def test_a_file_that_another_process_removes_counts_for_nothing(tmp_path, monkeypatch):
    file = keep(BLACKWELL, KERNELS, tmp_path / "kernels.json")
    stat = os.stat

    def once(path, *arguments, **options):
        result = stat(path, *arguments, **options)
        if Path(path) == file:
            file.unlink()
        return result

    monkeypatch.setattr(os, "stat", once)
    keep(BLACKWELL, [CUDA_CORES], file)
    monkeypatch.undo()
    assert checked.kernels_checked(BLACKWELL, file) == {CUDA_CORES}


def test_a_user_without_a_cache_folder_has_checked_nothing(monkeypatch):
    monkeypatch.setenv("LOPT_JAX_CACHE", "gs://bucket/cache")
    assert checked.kernels_checked(BLACKWELL) == frozenset()


def keep_over(file):
    """A check written over what is damaged."""
    assert keep(BLACKWELL, [CUDA_CORES], file) == file
    assert dataclasses.asdict(checked._read(file, file.stat().st_size, 0)[0])["device_kind"]
    return BLACKWELL
