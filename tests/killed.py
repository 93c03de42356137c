"""A meta-training in a process of its own that is killed on its way."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from lopt_jax.meta.config import to_json

_RUN = """
import sys, threading
from lopt_jax.meta.config import from_json
from lopt_jax.meta.trainer import Trainer
config, folder, kind, last = sys.argv[1:]
def report(r, total, left):
    print(r.step, flush=True)
    if r.step >= int(last):
        threading.Event().wait()  # for its end, however late it comes
Trainer(from_json(open(config).read())).train(**{kind: folder}, on_report=report)
"""


def killed_run(config, folder, kind, first, last):
    """Kills a run between its reports of two steps.

    Args:
      config: of the meta-training.
      folder: for its files.
      kind: the argument of `Trainer.train` that takes the folder.
      first: the report after which it is killed.
      last: the report at which it waits for that.
    """
    path = folder.with_suffix(".json")
    path.write_text(to_json(config))
    process = subprocess.Popen(
        [sys.executable, "-c", _RUN, str(path), str(folder), kind, str(last)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= first:
                break
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
