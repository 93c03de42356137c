"""The command line `lopt`: weights here, meta-training and benchmarks where they are built.

Commands of other parts of the library are registered by `add_commands(subparsers)` of their own
module, which is imported only when one of them is asked for.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

# command -> (module with add_commands, help)
_LATE = {
    "meta-train": ("lopt_jax.meta.cli", "meta-train a learned optimizer"),
    "meta-select": ("lopt_jax.meta.cli", "find the best weights of a meta-training"),
    "meta-eval": ("lopt_jax.meta.cli", "evaluate meta-trained weights"),
    "bench": ("lopt_jax.benchmark", "measure milliseconds a step of each optimizer"),
    "check": ("lopt_jax.check", "compare the fused kernels with XLA on this GPU"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: without the program's name; those of the process where None.

    Returns:
      0; 2 after an error of the user or of a file, which is printed as one message; 130 after an
      interruption; 141 where nobody reads the output any more.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may be of any characters
            stream.reconfigure(errors="backslashreplace")
    try:
        options = _parser(given).parse_args(given)
        status = int(options.run(options) or 0)
        if sys.stdout is not None:  # None: it was closed before Python started
            sys.stdout.flush()  # here, not when Python ends: it may be a pipe that was closed
        return status
    except BrokenPipeError:
        # As `lopt list | head -1` does. What is left to write goes nowhere when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as error:
        print(f"lopt: interrupted {error}".rstrip(), file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"lopt: {message(error)}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "initialize backend" not in str(error):  # what jax says of JAX_PLATFORMS
            raise
        print(f"lopt: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2


def message(error: Exception) -> str:
    """What a command prints of an error: of the system's, the file and what is wrong with it."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lopt",
        description="Learned optimizers for JAX.",
        epilog="For example: `lopt list`, then `lopt show velo_small`. `lopt COMMAND --help` says "
        "what a command takes.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show versions and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    convert = commands.add_parser("convert", help="convert weights into a checkpoint of lopt_jax")
    convert.add_argument(
        "source",
        metavar="SRC",
        help="a path, a registered name, or an address: https://, gs://, hf://owner/repo",
    )
    convert.add_argument("target", metavar="DST", help="the folder to write")
    convert.add_argument("--architecture", help="the optimizer; inferred where left out")
    convert.add_argument("--config", type=_json_object, help="a JSON object of config values")
    convert.add_argument(
        "--to",
        choices=("lopt_jax", "pylo", "original"),
        default="lopt_jax",
        help="the format of DST",
    )
    convert.set_defaults(run=_convert)

    listing = commands.add_parser("list", help="list the weights that have a name")
    listing.set_defaults(run=_list)

    show = commands.add_parser("show", help="show config, arrays and origin of weights")
    show.add_argument("name", metavar="NAME", help="a registered name, a path or an address")
    show.set_defaults(run=_show)

    _add_late(commands, given)
    return parser


class _Version(argparse.Action):
    """Prints the versions that a report of a fault needs."""

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any, **options: Any) -> None:
        import importlib.metadata

        import lopt_jax

        others = ("jax", "optax", "flax", "orbax-checkpoint", "numpy")
        versions = [f"{name} {importlib.metadata.version(name)}" for name in others]
        print(f"lopt_jax {lopt_jax.__version__} ({', '.join(versions)})")
        parser.exit()


def _add_late(commands: Any, given: Sequence[str]) -> None:
    asked = next((word for word in given if not word.startswith("-")), None)
    if asked in _LATE:
        module, _ = _LATE[asked]
        try:
            importlib.import_module(module).add_commands(commands)
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise
            raise ImportError(f"`lopt {asked}` is not part of this installation") from error
    for name, (_, text) in _LATE.items():
        if name not in commands.choices:
            commands.add_parser(name, help=text)


def positive_integer(text: str) -> int:
    """The type of arguments that count something.

    Raises:
      argparse.ArgumentTypeError: for anything else than an integer above 0.
    """
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, found {text!r}")
    return value


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"no JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("expected a JSON object such as '{\"step_mult\": 0.01}'")
    return value


def _convert(options: argparse.Namespace) -> None:
    from lopt_jax.weights import export_weights, save_weights
    from lopt_jax.weights.registry import find_weights

    weights = find_weights(options.source, options.architecture, options.config)
    if options.to == "lopt_jax":
        save_weights(options.target, weights)
    else:
        export_weights(weights, options.target, options.to)
    print(f"{options.target}: {weights.architecture}, {_size(weights)} numbers")


def _size(weights: Any) -> str:
    import jax

    return f"{sum(leaf.size for leaf in jax.tree.leaves(weights.params)):,}"


def _list(options: argparse.Namespace) -> None:
    from lopt_jax.weights import list_weights
    from lopt_jax.weights.registry import optimizer_of

    rows = [("NAME", "OPTIMIZER", "OFFLINE", "FROM")]
    for info in list_weights():
        here = "yes" if info.offline else "no"
        places = ", then ".join(dict.fromkeys(map(_place, info.source)))
        rows.append((info.name, optimizer_of(info.architecture), here, places))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[3]]))
    print("`lopt show NAME` has the addresses in full.")


def _place(address: str) -> str:
    """The beginning of an address, of two files the first's: scheme, owner and repository."""
    scheme, mark, rest = address.split(" with ")[0].partition("://")
    owner, *more = rest.split("@")[0].split("/")
    return f"{scheme}{mark}" + "/".join([owner, *more[:1]]) if mark else address


def _show(options: argparse.Namespace) -> None:
    import jax

    from lopt_jax.weights import WeightsError
    from lopt_jax.weights.registry import NotFetchedError, find_weights, published

    entry = published(options.name)
    try:
        weights = find_weights(options.name)
    except WeightsError as error:
        if entry is None:
            raise
        _show_entry(entry)
        reason = error.failures[0] if isinstance(error, NotFetchedError) else str(error)
        print(f"arrays: not on this machine, and not fetched: {reason}")
        return
    print(f"architecture: {weights.architecture}")
    _show_mapping("config", weights.config)
    _show_mapping("metadata", weights.metadata)
    print(f"arrays ({_size(weights)} numbers):")
    for path, leaf in jax.tree_util.tree_flatten_with_path(weights.params)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        print(f"  {name}: {leaf.dtype} {leaf.shape}")


def _show_mapping(title: str, mapping: Any) -> None:
    from lopt_jax.weights.base import printable, thaw

    print(f"{title}:")
    for line in _lines(thaw(mapping), "  "):
        print(printable(line))


def _lines(mapping: dict[str, Any], indent: str) -> Iterator[str]:
    """A line a key; a mapping in a mapping has lines of its own."""
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{key}:"
            yield from _lines(value, f"{indent}  ")
        else:
            yield f"{indent}{key}: {value if isinstance(value, str) else json.dumps(value)}"


def _show_entry(entry: Any) -> None:
    """Prints what the catalogue knows without the arrays."""
    from lopt_jax.weights.registry import by_hand, shipped

    print(f"architecture: {entry.architecture}")
    _show_mapping("metadata", {"about": entry.about, "licence": entry.licence})
    for place in entry.places:
        print("place:")
        for name, address in place.files.items():
            digests = (("sha256", place.sha256), ("git blob", place.git_blob))
            pins = [f"{kind} {pinned[name]}" for kind, pinned in digests if name in pinned]
            print(f"  {name}: {address}" + "".join(f" ({pin})" for pin in pins))
        if place.config:
            print(f"  config: {json.dumps(dict(place.config))}")
    if here := shipped(entry.architecture):
        print(f"weights of {entry.architecture} that need no network: {', '.join(here)}")
    print("by hand:", *by_hand(entry), sep="\n  ")


if __name__ == "__main__":
    sys.exit(main())
