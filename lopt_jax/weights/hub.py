"""`push_to_hub`: a checkpoint of ours on the Hugging Face Hub, with a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lopt_jax.brief import brief
from lopt_jax.weights.base import Weights, printable, thaw
from lopt_jax.weights.store import save_weights

# Names that the Hub knows for the licences that occur; another is left to the text of the card.
_LICENCES = {
    "apache-2.0": "apache-2.0",
    "mit": "mit",
    "bsd-3-clause": "bsd-3-clause",
    "cc-by-4.0": "cc-by-4.0",
}
_SHOWN_FIRST = ("about", "source", "licence", "recommended", "sha256", "format")


def model_card(weights: Weights, repo_id: str) -> str:
    """Returns the text of README.md for a repository of weights, made from their metadata.

    Args:
      weights: the weights.
      repo_id: owner/name, for the example.
    """
    loading = f'lopt_jax.load_weights("hf://{repo_id}")'
    files = "The files are an Orbax checkpoint (`params/`) and its description (`weights.json`)."
    return _card(weights, repo_id.rpartition("/")[2], loading, files)


def export_card(weights: Weights, name: str, layout: str, use: str = "") -> str:
    """As `model_card`, for a folder in the layout of another code.

    Args:
      weights: the weights.
      name: of the folder, for the example.
      layout: whose layout, after "the layout".
      use: Markdown that tells how the other code uses the files.
    """
    loading = f"lopt_jax.convert_weights({name!r})"
    files = f"The files are in the layout {layout}, exported by lopt_jax."
    files = f"{files}\n\n{use}" if use else files
    return _card(weights, name, loading, files)


def _card(weights: Weights, title: str, loading: str, files: str) -> str:
    metadata = thaw(weights.metadata)
    licence = _LICENCES.get(str(metadata.get("licence", "")).lower())
    head = ["---", "library_name: lopt_jax", "tags:", "- learned-optimizer", "- jax"]
    head += [f"license: {licence}"] if licence else []
    keys = [key for key in _SHOWN_FIRST if key in metadata]
    keys += sorted(key for key in metadata if key not in _SHOWN_FIRST)
    lines = [
        *head,
        "---",
        "",
        f"# {printable(title)}",
        "",
        f"Meta-trained weights of the learned optimizer `{weights.architecture}`, for lopt_jax:",
        "",
        "```python",
        "import lopt_jax",
        "",
        f"weights = {loading}",
        f"tx = lopt_jax.{weights.architecture}({_example_arguments(weights.architecture)})",
        "```",
        "",
        files,
        "",
        "## Where they come from",
        "",
        *(_entries({key: metadata[key] for key in keys}) or ["Their metadata are empty."]),
        "",
        "## Config",
        "",
        *_entries(thaw(weights.config)),
        "",
    ]
    return "\n".join(lines)


def _entries(mapping: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, value in mapping.items():
        text = value if isinstance(value, str) else json.dumps(value)
        lines.append(printable(f"- {key}: {' '.join(text.split())}"))
    return lines


def _example_arguments(architecture: str) -> str:
    first = {
        "mulo": "width_multipliers, ",
        "velo": "num_steps, ",
        "celo": "num_steps, ",
        "celo_adam": "num_steps, ",
        "celo2": "learning_rate, ",
        "elo": "learning_rate, ",
        "elo_celo2": "learning_rate, ",
    }
    return first.get(architecture, "") + "weights=weights"


def push_to_hub(
    weights: Weights,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool = False,
    commit_message: str = "Upload lopt_jax weights",
) -> str:
    """Uploads weights and a model card; `load_weights("hf://" + repo_id)` reads them back.

    Args:
      weights: the weights.
      repo_id: owner/name; created if it is not there.
      token: a token that may write; the one that `hf auth login` stored where None.
      private: whether a repository that is created is private.
      commit_message: for the Hub's history.

    Returns:
      The address of the commit.

    Raises:
      WeightsError: the weights are not valid, or LOPT_JAX_OFFLINE is set.
      ImportError: the extra "hub" is not installed.
      ValueError: `repo_id` is not owner/name.
    """
    parts = repo_id.split("/") if isinstance(repo_id, str) else []
    if len(parts) != 2 or not all(parts):
        raise ValueError(f"repo_id must be 'owner/name', found {brief(repo_id)}")
    from lopt_jax.weights.fetch import hub_endpoint, refuse_offline

    refuse_offline(f"hf://{repo_id}")

    try:
        from huggingface_hub import CommitOperationAdd, HfApi
    except ImportError as error:
        raise ImportError(
            "push_to_hub needs huggingface_hub: pip install 'lopt_jax[hub]'"
        ) from error
    import tempfile

    api = HfApi(endpoint=hub_endpoint(), token=token)
    with tempfile.TemporaryDirectory(prefix="lopt_jax-") as name:
        folder = Path(name) / "weights"
        save_weights(folder, weights)
        (folder / "README.md").write_text(model_card(weights, repo_id), encoding="utf-8")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        additions = [
            CommitOperationAdd(path.relative_to(folder).as_posix(), path.read_bytes())
            for path in files
        ]
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.create_commit(
            repo_id, operations=additions, commit_message=commit_message, repo_type="model"
        )
    return str(commit.commit_url)
