"""The weights that have a name: where their authors publish them, as data.

Sources of the addresses: pretrained_optimizers.py of google/learned_optimization; README.md and
celo/factory.py of amoudgl/celo (also for the configs); the `hf_key` defaults of pylo/optim. Digests
are those of the files in the git repository amoudgl/celo.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Place:
    """One place to fetch from.

    Attributes:
      files: file name -> address. The first is the weights file; all are needed.
      config: what the files do not say.
      sha256: file name -> the expected digest, where the authors or a trusted copy tell it.
      git_blob: file name -> the expected name of the file in git, where that is what is known.
    """

    files: Mapping[str, str]
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)
    git_blob: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One name.

    Attributes:
      name: what `load_weights` takes.
      architecture: the optimizer that it belongs to.
      licence: SPDX name as its authors state it.
      places: where to fetch it, in the order of preference.
      about: one line.
    """

    name: str
    architecture: str
    licence: str
    places: tuple[Place, ...]
    about: str


_BUCKET = "gs://gresearch/learned_optimization/pretrained_lopts"
_VELO = f"{_BUCKET}/aug12_continue_on_bigger_2xbs_200kstep_bigproblem_v2_5620"


_CELO_COMMIT = "3ad5317e47c9c08a787e3e060c7898ac6a1c1132"
_CELO_FILES = f"github://amoudgl/celo@{_CELO_COMMIT}/algoperf/submissions"


def _theta(repository: str, **config: Any) -> Place:
    return Place({"theta.state": f"hf://{repository}/theta.state"}, config)


def _thetas(
    submission: str,
    repository: str,
    config: Mapping[str, Any],
    *,
    sha256: str | None = None,
    git_blob: str | None = None,
) -> tuple[Place, Place]:
    """The same file in the authors' git repository, of one commit, and on the Hub."""
    name = "theta.state"
    digests = [{} if digest is None else {name: digest} for digest in (sha256, git_blob)]
    return (
        Place({name: f"{_CELO_FILES}/{submission}/{name}"}, config, *digests),
        Place({name: f"hf://{repository}/{name}"}, config, *digests),
    )


def _pylo(repository: str) -> Place:
    model, config = "model.safetensors", "config.json"
    return Place({name: f"hf://{repository}/{name}" for name in (model, config)})


_NOT_BUGGED = {"use_bugged_next_lstm_state": False, "use_bugged_loss_features": False}

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "velo",
        "velo",
        "Apache-2.0",
        (
            Place({"params": f"{_VELO}/params", "config.gin": f"{_VELO}/config.gin"}),
            *_thetas(
                "velo_4000",
                "amoudgl/velo-4000",
                {"lstm_hidden_size": 512, "param_inits": 256, **_NOT_BUGGED},
                git_blob="2233e53ad4974489183a9863c8e165ab50ae4b63",
            ),
        ),
        "the released VeLO, meta-trained for 4,000 TPU months (arXiv 2211.09760)",
    ),
    Entry(
        "velo_pylo",
        "velo",
        "Apache-2.0",
        (
            Place(
                {
                    "VeLO_RNN/model.safetensors": "hf://Pauljanson002/VeLO_RNN/model.safetensors",
                    "VeLO_MLP/model.safetensors": "hf://Pauljanson002/VeLO_MLP/model.safetensors",
                }
            ),
        ),
        "the released VeLO as PyLO converted it (arXiv 2506.10315)",
    ),
    Entry(
        "velo_s",
        "velo",
        "MIT",
        # Its network multiplies the mean over the banks by 1, where VeLO multiplies by 100.
        (_theta("amoudgl/velo-s", ff_mult=1.0, **_NOT_BUGGED),),
        "a small VeLO, a baseline of the Celo paper (arXiv 2501.12670)",
    ),
    Entry(
        "celo",
        "celo",
        "MIT",
        _thetas(
            "celo",
            "amoudgl/celo",
            {"lstm_hidden_size": 64, "param_inits": 1},
            sha256="35683c6123069c101d62ec1f8b2e6d70d50a43e67ebe09953b27620a7dcb836b",
        ),
        "Celo, meta-trained on 4 image MLP tasks (arXiv 2501.12670)",
    ),
    Entry(
        "celo_adam",
        "celo_adam",
        "MIT",
        _thetas(
            "celo_adam",
            "amoudgl/celo-adam",
            {"lstm_hidden_size": 64},
            sha256="99c65fa0218a739c32eac4e8a99523b6fed92e2926d0c5d64e83835637b75d38",
        ),
        "Celo's scheduler over Adam (arXiv 2501.12670)",
    ),
    Entry(
        "adafac_mlp_lopt",
        "small_fc_lopt",
        "MIT",
        (_theta("amoudgl/adafac-mlp-lopt"),),
        "small_fc_lopt of hidden size 4, a baseline of the Celo paper (arXiv 2501.12670)",
    ),
    Entry(
        "rnn_mlp_lopt",
        "rnn_mlp_lopt",
        "MIT",
        (_theta("amoudgl/rnn-mlp-lopt"),),
        "an MLP and an LSTM (arXiv 2009.11243), a baseline of the Celo paper (arXiv 2501.12670)",
    ),
    Entry(
        "mulo",
        "mulo",
        "Apache-2.0",
        (_pylo("btherien/mulo"),),
        "small_fc_lopt meta-trained under muP (arXiv 2406.00153)",
    ),
    Entry(
        "celo2",
        "celo2",
        "Apache-2.0",
        (_pylo("DiamondXL/celo2"),),
        "Celo2 as PyLO converted it (arXiv 2602.19142)",
    ),
    Entry(
        "elo",
        "elo",
        "Apache-2.0",
        (_pylo("DiamondXL/elo"),),
        "PyLO's ELO (arXiv 2506.10315)",
    ),
    Entry(
        "elo_celo2",
        "elo_celo2",
        "Apache-2.0",
        (_pylo("DiamondXL/elo-celo2"),),
        "PyLO's ELO-CELO2 (arXiv 2506.10315)",
    ),
)

REGISTRY: dict[str, Entry] = {entry.name: entry for entry in ENTRIES}
