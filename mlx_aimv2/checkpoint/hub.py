"""Downloads files from the Hugging Face Hub and uploads folders to it; a failure is one line.

`HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` work as everywhere.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit


def download(repo: str, *, revision: str | None, patterns: Iterable[str]) -> Path:
    """Fetches the matching files of a repository into the Hub's cache and returns their folder, named by its commit.

    A connection that is cut is taken up where it broke; without a network the cache serves at once. Raises
    FileNotFoundError for a repository or revision that is not there, PermissionError for one that asks for a login,
    ConnectionError for a Hub that does not answer.
    """
    from huggingface_hub import constants, snapshot_download

    at = f" at revision {revision}" if revision else ""
    with _one_line(repo, at, "the download broke off; run it again, files that came whole are kept"):
        cache_only = not _has_address(constants.ENDPOINT)  # else each request would be tried for half a minute
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=list(patterns), local_files_only=cache_only)
        )


def check_upload(repo: str) -> None:
    """Raises ValueError for what is no name of a repository, ConnectionError when the Hub may not be asked."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except errors.HFValidationError as error:
        raise ValueError(f"{repo}: no Hub name of the form owner/name ({_first_line(error)})") from None
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError(f"{repo}: nothing can be uploaded while HF_HUB_OFFLINE is set; unset it")


def upload(folder: Path, repo: str) -> str:
    """Publishes every file of a folder as a repository of that name, made if need be: `folder, name -> its address`.

    Needs a token that may write (HF_TOKEN, or a login stored by `hf auth login`). Raises PermissionError without one.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _one_line(repo, "", "the upload broke off; run it again"):
        address = str(api.create_repo(repo, exist_ok=True))
        # Not upload_large_folder, which newer releases of huggingface_hub have folded into this.
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload an MLX folder with mlx-aimv2")
    return address


@contextlib.contextmanager
def _one_line(repo: str, at: str, broken: str) -> Iterator[None]:
    """Turns what the Hub and the network raise into a few built-in errors, each in one line."""
    from huggingface_hub import errors

    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of every retry
    try:
        yield
    except errors.GatedRepoError:
        raise PermissionError(f"{repo}: the Hub asks for a login; accept its terms there and set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{repo}: the Hub has no such revision{at}") from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{repo}: neither a folder here nor a repository on the Hub (a private one needs HF_TOKEN)"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise ConnectionError(
            f"{repo}{at}: the Hub cannot be reached, and its cache does not hold all of this; connect once (and unset "
            "HF_HUB_OFFLINE), or give a folder"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise PermissionError(
                f"{repo}: the Hub refuses ({status}); set HF_TOKEN to a token that may do this"
            ) from None
        raise ConnectionError(f"{repo}{at}: the Hub answered with an error ({_first_line(error)})") from None
    except errors.HFValidationError as error:
        raise ValueError(f"{repo}: no Hub name of the form owner/name ({_first_line(error)})") from None
    except Exception as error:
        if (
            not isinstance(error, OSError | RuntimeError)
            and type(error).__module__.split(".")[0] not in _NETWORK_MODULES
        ):
            raise
        raise ConnectionError(f"{repo}{at}: {broken} ({_first_line(error)})") from None
    finally:
        log.setLevel(level)


def _has_address(endpoint: str) -> bool:
    """Whether the Hub's name can be looked up, which fails at once on a machine without a network."""
    if urllib.request.getproxies():  # then the proxy resolves the name
        return True
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, None)
    except OSError:
        return False
    return True


_NETWORK_MODULES = ("huggingface_hub", "httpx", "httpx2", "httpcore", "requests", "urllib3", "hf_xet")
"""Whose errors mean that the network failed: huggingface_hub and what it speaks HTTP with, by release."""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
