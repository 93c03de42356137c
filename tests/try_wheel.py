"""Tries an installed wheel, without extras and without a network; `make wheel-tried` runs it."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

os.environ["LOPT_JAX_OFFLINE"] = "1"

import lopt_jax

assert Path(sys.prefix) in Path(lopt_jax.__file__).parents, lopt_jax.__file__
metadata = importlib.metadata.metadata("lopt_jax")
readme = metadata["Description"] or metadata.get_payload()
example = re.search(r"```python\n(.*?)```", readme, flags=re.S)[1]
names: dict = {}
exec(compile(example, "README.md", "exec"), names)
assert names["loss"] < 1.0, names["loss"]
relative = [t for t in re.findall(r"\]\(([^)]+)\)", readme) if not t.startswith("https://")]
assert not relative, relative
for weights in lopt_jax.list_weights():
    if weights.offline:
        lopt_jax.load_weights(weights.name)
assert (Path(lopt_jax.__file__).parent / "py.typed").exists()
command = Path(sys.prefix) / "bin" / "lopt"
for arguments in (["list"], ["show", "lopt"], ["show", "velo"], ["--help"], ["--version"]):
    subprocess.run([command, *arguments], check=True, capture_output=True)
os.environ["LOPT_JAX_CACHE"] = str(Path("cache").absolute())
for arguments, advice in (  # what is missing is said in one line
    (["convert", "velo", "weights"], "run `lopt show velo`"),
    (["meta-train", "tiny", "--out", "run"], "pip install 'lopt_jax[meta]'"),
    (["meta-eval"], "pip install 'lopt_jax[meta]'"),
    (["meta-eval", "--plot", "plot.png"], "pip install 'lopt_jax[plot]'"),
):
    run = subprocess.run([command, *arguments], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, ""), (arguments, run)
    assert len(run.stderr.splitlines()) == 1, run.stderr
    assert advice in run.stderr, run.stderr
print(f"lopt_jax {lopt_jax.__version__}: the wheel works; loss {float(names['loss']):.2g}")
