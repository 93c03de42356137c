"""Brings remote weights files into a folder: addresses, downloads, checks.

Only folders that the caller made are written to; what becomes of the files is the caller's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import http.client
import importlib.util
import json
import logging
import os
import re
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, urlsplit

from lopt_jax.weights.base import WeightsError, printable, weights_error
from lopt_jax.weights.schema import MAX_BYTES
from lopt_jax.weights.sources import (
    GIN,
    JSON,
    KNOWN_ENDINGS,
    KNOWN_NAMES,
    MLP_FOLDER,
    RNN_FOLDER,
    scheme_of,
)
from lopt_jax.weights.store import DESCRIPTION, PARAMS

logger = logging.getLogger("lopt_jax")

_TIMEOUT = 30.0  # seconds without a byte
_BLOCK = 1 << 20
_MAX_LISTING = 4 << 20
_MAX_FILES = 256
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


class NotThere(WeightsError):
    """The server answers, and has no such file."""


def hub_endpoint() -> str:
    """Returns the Hugging Face Hub's address; HF_ENDPOINT overrides it, as everywhere."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _bucket_endpoint() -> str:
    return (os.environ.get("LOPT_JAX_GCS_ENDPOINT") or "https://storage.googleapis.com").rstrip("/")


def _git_endpoint() -> str:
    default = "https://raw.githubusercontent.com"
    return (os.environ.get("LOPT_JAX_GITHUB_ENDPOINT") or default).rstrip("/")


def refuse_offline(address: str) -> None:
    """Raises a WeightsError where the user wants no network.

    Args:
      address: what would be connected to.
    """
    variables = ["LOPT_JAX_OFFLINE"]
    if scheme_of(address) == "hf" or address.startswith(f"{hub_endpoint()}/"):
        variables.append("HF_HUB_OFFLINE")  # as the Hub's other clients, for the Hub alone
    for variable in variables:
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on"):
            raise weights_error(address, expected="a network", found=f"{variable} is set")


@dataclasses.dataclass(frozen=True)
class HubAddress:
    """hf://owner/repo[@revision][/file], or the same of github://."""

    scheme: str
    repository: str
    revision: str
    file: str

    @classmethod
    def parse(cls, address: str) -> HubAddress:
        """Splits an hf:// or github:// address.

        Raises:
          WeightsError: it has no owner and repository.
        """
        scheme = scheme_of(address)
        parts = address.split("://", 1)[1].split("/", 2)
        repository, _, revision = (parts[1] if len(parts) > 1 else "").partition("@")
        if not parts[0] or not repository:
            raise weights_error(
                address,
                expected=f"{scheme}://owner/repository[/file]",
                found="no owner or repository",
            )
        file = parts[2].strip("/") if len(parts) > 2 else ""
        return cls(scheme, f"{parts[0]}/{repository}", revision or "main", file)

    def url(self, file: str) -> str:
        """Returns the https address of a file of the repository."""
        revision = quote(self.revision, safe="")
        if self.scheme == "github":
            return f"{_git_endpoint()}/{quote(self.repository)}/{revision}/{quote(file)}"
        return f"{hub_endpoint()}/{quote(self.repository)}/resolve/{revision}/{quote(file)}"


def http_address(address: str) -> str:
    """Returns the https address behind a gs://, hf://, github:// or https:// one.

    Raises:
      WeightsError: another scheme, or http to another machine than this one.
    """
    scheme = scheme_of(address)
    if scheme == "gs":
        return f"{_bucket_endpoint()}/{quote(address.split('://', 1)[1])}"
    if scheme in ("hf", "github"):
        hub = HubAddress.parse(address)
        return hub.url(hub.file)
    if scheme == "https" or (scheme == "http" and urlsplit(address).hostname in _LOCAL_HOSTS):
        return address
    raise weights_error(
        address,
        expected="a path, or an address of scheme file, https, gs, hf or github",
        found=f"the scheme {scheme or 'none'!r}",
        advice="Download the file and convert the copy.",
    )


@dataclasses.dataclass(frozen=True)
class Fetched:
    """What is known of one file that was fetched.

    Attributes:
      url: the https address that was asked, before redirections.
      revision: the commit of the repository, or the generation of a bucket's object; "" where the
        server does not tell.
      sha256: of the file.
      date: the day, UTC, as 2026-01-31.
    """

    url: str
    revision: str
    sha256: str
    date: str


Record = Mapping[str, Fetched]  # by the files' names in the folder


def as_metadata(record: Record) -> dict[str, Any]:
    """Returns the record for `Weights.metadata`."""
    return {"fetched": {name: dataclasses.asdict(file) for name, file in record.items()}}


def fetch_folder(address: str, folder: Path) -> Record:
    """Fetches what stands behind an address into an empty folder.

    Args:
      address: of a file (its neighbour config.gin or config.json is fetched if there is one), or
        hf://owner/repo, whose weights file is looked for.
      folder: where to; exists and is empty.

    Returns:
      What was fetched.

    Raises:
      WeightsError: something cannot be fetched, or there is no weights file.
    """
    refuse_offline(address)
    if scheme_of(address) == "hf" and not HubAddress.parse(address).file:
        return fetch_files(_repository_files(HubAddress.parse(address), address), folder)
    plain = address if scheme_of(address) in ("gs", "hf", "github") else address.partition("?")[0]
    base, _, name = plain.rpartition("/")
    name = unquote(name)
    if not _is_safe(name) or not (name.endswith(KNOWN_ENDINGS) or name in KNOWN_NAMES):
        name = KNOWN_NAMES[0]  # the format is recognised by content
    record = {name: download(address, folder / name)}
    for neighbour in (GIN, JSON):
        with contextlib.suppress(NotThere):
            path = folder / neighbour
            record[neighbour] = download(f"{base}/{neighbour}", path, optional=True)
    return record


def fetch_files(
    files: Mapping[str, str],
    folder: Path,
    sha256: Mapping[str, str] | None = None,
    git_blob: Mapping[str, str] | None = None,
) -> Record:
    """Fetches several files.

    Args:
      files: name in the folder -> address.
      folder: where to.
      sha256: name -> expected digest, where known.
      git_blob: name -> expected name in git, where known.

    Returns:
      What was fetched.

    Raises:
      WeightsError: one cannot be fetched or is not the expected one; or all are too large.
    """
    total = 0
    record = {}
    for name, address in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        record[name] = download(
            address,
            target,
            limit=MAX_BYTES - total,
            sha256=(sha256 or {}).get(name),
            git_blob=(git_blob or {}).get(name),
        )
        total += target.stat().st_size
    return record


def _repository_files(hub: HubAddress, address: str) -> dict[str, str]:
    """Chooses the files of a Hub repository that make its weights."""
    listing = f"{hub_endpoint()}/api/models/{quote(hub.repository)}"
    if hub.revision != "main":
        listing += f"/revision/{quote(hub.revision, safe='')}"
    with tempfile.TemporaryDirectory(prefix="lopt_jax-") as folder:
        answer = Path(folder) / "listing"
        download(listing, answer, limit=_MAX_LISTING)
        try:
            document = json.loads(answer.read_bytes())
            names = [item["rfilename"] for item in document["siblings"]]
            # All files are those of one commit, also where somebody pushes meanwhile.
            commit = document.get("sha")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise weights_error(
                address, expected="the Hub's list of files", found=f"{error}"[:120]
            ) from error
    names = [name for name in names if isinstance(name, str) and _is_safe(name)]
    if DESCRIPTION in names:
        chosen = [n for n in names if n == DESCRIPTION or n.startswith(f"{PARAMS}/")]
    elif f"{RNN_FOLDER}/model.safetensors" in names and f"{MLP_FOLDER}/model.safetensors" in names:
        chosen = [n for n in names if n.startswith((f"{RNN_FOLDER}/", f"{MLP_FOLDER}/"))]
    else:
        weights = [n for n in KNOWN_NAMES if n in names][:1]
        others = [n for n in names if n.endswith(KNOWN_ENDINGS) and "/" not in n]
        chosen = weights or (others if len(others) == 1 else [])
        if not chosen:
            raise weights_error(
                address,
                expected=f"one weights file: {DESCRIPTION}, {', '.join(KNOWN_NAMES)}",
                found=f"{len(others)} files that may be one",
                advice="Name the file: hf://owner/repository/file.",
            )
        chosen += [name for name in (GIN, JSON) if name in names]
    if len(chosen) > _MAX_FILES:
        raise weights_error(address, expected=f"at most {_MAX_FILES} files", found=f"{len(chosen)}")
    if isinstance(commit, str) and re.fullmatch("[0-9a-f]{40}", commit):
        hub = dataclasses.replace(hub, revision=commit)
    return {name: hub.url(name) for name in chosen}


def _is_safe(name: str) -> bool:
    """Tells whether a name that a server sent stays inside the folder."""
    path = PurePosixPath(name)
    characters = all(c.isprintable() and c not in '\\:*?"<>|' for c in name)
    plain = not path.is_absolute() and not {"..", "", "."} & set(name.split("/"))
    return bool(name) and plain and characters and len(name) < 200 and name.count("/") < 8


def download(
    address: str,
    target: Path,
    *,
    limit: int = MAX_BYTES,
    sha256: str | None = None,
    git_blob: str | None = None,
    optional: bool = False,
) -> Fetched:
    """Downloads one file; `target` appears when it is whole and checked, not before.

    Args:
      address: https, gs, hf or github address.
      target: the file to create.
      limit: the most bytes to accept.
      sha256: the expected digest.
      git_blob: the expected name of the file in git.
      optional: an answer that the file is not there, or not for everybody, is `NotThere`.

    Returns:
      What was fetched.

    Raises:
      WeightsError: no connection, an error of the server, a body that is cut off, too long or of
        another digest.
    """
    refuse_offline(address)
    part = target.with_name(f".{target.name}.part-{os.getpid()}")
    try:
        url = http_address(address)
        with _open(url, address, optional) as (response, revision), part.open("wb") as file:
            digest = _copy(response, file, address, limit)
        _check_digest(address, "sha256", sha256, digest)
        if git_blob is not None:
            _check_digest(address, "git blob", git_blob, _git_blob(part.read_bytes()))
        os.replace(part, target)
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        logger.info("fetched %s, revision %s, sha256 %s", url, revision or "unknown", digest)
        return Fetched(url, revision, digest, date)
    except WeightsError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:  # the last: no valid address
        reason = getattr(error, "reason", None) or error
        raise weights_error(
            address,
            expected="a download",
            found=f"{type(error).__name__}: {reason}"[:160],
            advice="Check the address and the network.",
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _check_digest(address: str, kind: str, expected: str | None, found: str) -> None:
    if expected is not None and found != expected.lower():
        raise weights_error(
            address,
            expected=f"{kind} {expected}",
            found=found,
            advice="The file is not the one that was published: do not use it.",
        )


def _git_blob(data: bytes) -> str:
    """Returns the name that git gives to a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _copy(response: Any, file: BinaryIO, address: str, limit: int) -> str:
    length = response.headers.get("Content-Length")
    length = int(length) if length is not None and length.isdigit() else None
    too_long = weights_error(address, expected=f"at most {limit} bytes", found="a longer file")
    if length is not None and length > limit:
        raise too_long
    hasher = hashlib.sha256()
    received = 0
    with _progress(address, length) as advance:
        while block := response.read(_BLOCK):
            received += len(block)
            if received > limit:
                raise too_long
            hasher.update(block)
            file.write(block)
            advance(len(block))
    if length is not None and received != length:
        raise weights_error(
            address,
            expected=f"{length} bytes",
            found=f"{received}: the connection broke off",
            advice="Try again.",
        )
    return hasher.hexdigest()


@contextlib.contextmanager
def _open(url: str, address: str, optional: bool) -> Iterator[tuple[Any, str]]:
    """Yields the response, and the revision of the file where the server tells it."""
    request = urllib.request.Request(url, headers={"User-Agent": "lopt_jax"})
    token = _hub_token() if url.startswith(hub_endpoint() + "/") else None
    if token:
        # Unredirected: storage servers that the Hub sends us to do not get the token.
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    redirects = _SafeRedirects()
    opener = urllib.request.build_opener(redirects)
    try:
        response = opener.open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            absent = error.code in ((401, 403, 404, 410) if optional else (404, 410))
        message = f"HTTP {error.code} {error.reason}"
        kind = NotThere if absent else WeightsError
        raise kind(str(weights_error(address, expected="a file", found=message))) from error
    with response:
        yield response, _revision(response.headers) or redirects.revision or _commit_in(url)


# How the Hub names the commit, and a bucket the object's generation.
_REVISION_HEADERS = ("X-Repo-Commit", "x-goog-generation")


def _revision(headers: Any) -> str:
    """Returns the revision that a server tells, shortened and escaped: it is a stranger's text."""
    told = next((headers[name] for name in _REVISION_HEADERS if headers[name]), "")
    return printable(told)[:64]


def _commit_in(url: str) -> str:
    """Returns the commit that an address names, if it does."""
    names = urlsplit(url).path.split("/")
    return next((name for name in names if re.fullmatch("[0-9a-f]{40}", name)), "")


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections to https alone (and on this machine to http).

    `revision`: what the first server that told one said; those it sends us to know of none.
    """

    revision = ""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, url: str
    ) -> Any:
        local = urlsplit(url).hostname in _LOCAL_HOSTS
        if scheme_of(url) != "https" and not (scheme_of(url) == "http" and local):
            raise urllib.error.URLError(f"redirected to {url[:80]}, which is not https")
        self.revision = self.revision or _revision(headers)
        return super().redirect_request(req, fp, code, msg, headers, url)


def _hub_token() -> str | None:
    token = os.environ.get("HF_TOKEN")
    if not token and importlib.util.find_spec("huggingface_hub") is not None:
        from huggingface_hub import get_token

        token = get_token()
    return token or None


@contextlib.contextmanager
def _progress(address: str, length: int | None) -> Iterator[Callable[[int], None]]:
    """Shows progress of a longer download where somebody looks at it."""
    if not sys.stderr.isatty() or (length is not None and length < _BLOCK):
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(address.rpartition("/")[2] or address, total=length)
        yield lambda count: progress.advance(task, count)
