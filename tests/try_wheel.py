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
for arguments in (["list"], ["show", "lopt"], ["--help"]):
    subprocess.run([Path(sys.prefix) / "bin" / "lopt", *arguments], check=True, capture_output=True)
print(f"lopt_jax {lopt_jax.__version__}: the wheel works; loss {float(names['loss']):.2g}")
