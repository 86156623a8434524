"""Downloads files from the Hugging Face Hub and uploads folders to it; a failure is one line.

`HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` work as everywhere.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shlex
import socket
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from mlx_aimv2.config import megabytes, near_release

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_log = logging.getLogger(__name__)


def download(repo: str, *, revision: str | None, patterns: Iterable[str]) -> Path:
    """Fetches the matching files of a repository into the Hub's cache and returns their folder, named by its commit.

    An interrupted download resumes where it stopped; without a network the cache is used at once. Raises
    FileNotFoundError for a repository or revision that does not exist, PermissionError for one that needs a login,
    ConnectionError if the Hub does not answer.
    """
    from huggingface_hub import constants, snapshot_download

    _check_settings()
    at = f" at revision {revision}" if revision else ""
    with _one_line(repo, at, "the download was interrupted; run it again, complete files are kept"):
        cache_only = not _has_address(constants.ENDPOINT)  # otherwise each request would be retried for half a minute
        folder = Path(
            snapshot_download(repo, revision=revision, allow_patterns=list(patterns), local_files_only=cache_only)
        )
    if not folder.is_dir():  # the Hub's library creates none if no name matches a pattern
        raise FileNotFoundError(f"{repo}{at} has no checkpoint files")
    _check_inside(folder, Path(constants.HF_HUB_CACHE))
    return folder


def announce(repo: str, *, revision: str | None, names: Iterable[str]) -> None:
    """Logs how much of these files is not in the cache yet, as information; nothing if that is unknown."""
    from huggingface_hub import constants, try_to_load_from_cache

    absent = [name for name in names if not isinstance(try_to_load_from_cache(repo, name, revision=revision), str)]
    if absent and _has_address(constants.ENDPOINT):
        with contextlib.suppress(OSError, ValueError):  # the download will say what is wrong
            held = file_sizes(repo, revision=revision)
            if size := sum(held.get(name, 0) for name in absent):
                _log.info("downloading %s of %s into %s", megabytes(size), repo, constants.HF_HUB_CACHE)


def file_sizes(repo: str, *, revision: str | None) -> dict[str, int]:
    """Bytes of each file of a repository, asked of the Hub in one call. Raises what `download` does."""
    from huggingface_hub import HfApi

    _check_settings()
    with _one_line(repo, f" at revision {revision}" if revision else "", "the Hub was asked in vain; run it again"):
        siblings = HfApi().model_info(repo, revision=revision or "main", files_metadata=True).siblings or []
        return {one.rfilename: int(one.size or 0) for one in siblings}


def is_in_cache(repo: str, *, revision: str | None) -> bool:
    """Whether weights of a repository were downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json", revision=revision)
    return isinstance(config, str) and any(Path(config).parent.glob("*.safetensors"))


def check_upload(repo: str) -> None:
    """Asks the Hub whether this machine's token may write to a repository, which need not exist yet.

    Raises ValueError for a name that is not of the form owner/name, PermissionError if the token is missing, unknown or
    may not write there, ConnectionError if the Hub may not be asked or does not answer.
    """
    from huggingface_hub import HfApi, constants, errors, get_token
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    with _one_line(repo, "", ""):
        validate_repo_id(repo)
    owner, slash, _ = repo.partition("/")
    if not slash:
        raise ValueError(f"{repo}: not a Hub name of the form owner/name: put your name or an organisation's in front")
    _check_settings()
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError(f"{repo}: nothing can be uploaded while HF_HUB_OFFLINE is set; unset it")
    if get_token() is None:
        raise PermissionError(f"{repo}: an upload needs a token with write access: run hf auth login, or set HF_TOKEN")
    with _one_line(repo, "", "the Hub was asked in vain; run it again"):
        about = HfApi().whoami()
        with contextlib.suppress(errors.RepositoryNotFoundError, TypeError):  # older releases cannot ask for writing
            HfApi().auth_check(repo, write=True)
    owners = [about["name"], *(one["name"] for one in about.get("orgs", ()) if one.get("roleInOrg") != "read")]
    if owner.casefold() not in map(str.casefold, owners):
        raise PermissionError(f"{repo}: the token is {about['name']}'s, who may write only to {', '.join(owners)}")
    if about.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PermissionError(f"{repo}: the token is read-only: create one with write access, and set HF_TOKEN to it")


def upload(folder: Path, repo: str, *, patterns: Iterable[str]) -> str:
    """Publishes the matching files of a folder as a repository, created if needed: `folder, name -> its address`.

    Needs a token with write access (`check_upload`). An interrupted upload resumes after the last complete file. An
    error, PermissionError or ConnectionError, ends with the command for that.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        with _one_line(repo, "", "the upload was interrupted"):
            address = str(api.create_repo(repo, exist_ok=True))
            # Not upload_large_folder, which newer releases of huggingface_hub have merged into this.
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                allow_patterns=list(patterns),
                commit_message="Upload a folder written by mlx-aimv2",
            )
    except OSError as error:
        command = shlex.join(["mlx-aimv2", "upload", str(folder), repo])
        raise type(error)(f"{error}; {folder} is complete: resume with {command}") from None
    return address


@contextlib.contextmanager
def _one_line(repo: str, at: str, broken: str) -> Iterator[None]:
    """Turns what the Hub and the network raise into a few built-in errors, each in one line."""
    from huggingface_hub import constants, errors

    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of every retry
    try:
        yield
    except errors.GatedRepoError:
        raise PermissionError(f"{repo}: the Hub requires a login; accept its terms there and set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{repo}: the Hub has no such revision{at}") from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{repo}: neither a folder here nor a repository on the Hub (a private one needs HF_TOKEN)"
            f"{near_release(repo)}"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):  # the Hub was reached
            raise _refused(repo, at, error.__cause__) from None
        how = "unset HF_HUB_OFFLINE to fetch the rest" if constants.HF_HUB_OFFLINE else "connect once"
        raise ConnectionError(
            f"{repo}{at}: the Hub cannot be reached, and this is not completely in its cache; {how}, or give a folder"
            f"{_held_instead(repo)}{near_release(repo)}"
        ) from None
    except errors.HfHubHTTPError as error:
        raise _refused(repo, at, error) from None
    except errors.HFValidationError as error:
        raise ValueError(f"{repo}: not a Hub name of the form owner/name ({_first_line(error)})") from None
    except _OTHER_ANSWERS as error:
        raise ConnectionError(
            f"{repo}{at}: the answer is not the Hub's, or is malformed ({type(error).__name__}: "
            f"{_first_line(error)}); a network login page or a proxy may be in between: open "
            f"{constants.ENDPOINT} in a browser, and check HF_ENDPOINT"
        ) from None
    except Exception as error:
        package = type(error).__module__.split(".")[0]
        if not (isinstance(error, OSError | RuntimeError) or package in _NETWORK_MODULES):
            raise
        reason = _first_line(error)
        if _is_full(error):
            reason = f"no space left for the Hub's cache {constants.HF_HUB_CACHE}: free some, or set HF_HOME elsewhere"
        raise ConnectionError(f"{repo}{at}: {broken} ({reason})") from None
    finally:
        log.setLevel(level)


def _refused(repo: str, at: str, error: HfHubHTTPError) -> OSError:
    """What an answer other than success means, and what to do about it."""
    status = error.response.status_code if error.response is not None else 0
    kind, advice = _ADVICE.get(min(status, 500), (ConnectionError, _first_line(error)))
    what = "refuses" if kind is PermissionError else "answered with an error"
    return kind(f"{repo}{at}: the Hub {what} ({status}); {advice}")


def _check_settings() -> None:
    """Raises ValueError or OSError for Hub settings that are bound to fail, and less clearly later."""
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE).absolute()
    existing = next(place for place in (cache, *cache.parents) if place.exists() or place.is_symlink())
    if not existing.is_dir():
        raise NotADirectoryError(
            f"{existing} is not a folder, but the Hub's cache should be in it: set HF_HOME to a folder, or unset it"
        )
    token = get_token() or ""
    if not (token.isascii() and token.isprintable()):
        raise ValueError(
            "the Hub's token (HF_TOKEN, or the file of a login) contains a character that no token has: copy it again"
        )


def _check_inside(folder: Path, cache: Path) -> None:
    """Raises OSError for a file outside the Hub's cache, where a server's answer may have led."""
    root = Path(os.path.realpath(cache))
    for place in (folder, *folder.iterdir()):
        if root not in Path(os.path.realpath(place)).parents:
            raise OSError(
                f"{place} leads outside the Hub's cache {cache}: it is not used; delete it and fetch it again"
            )


def _held_instead(repo: str) -> str:
    """The revisions of a repository in the cache, as `hf download` leaves them, and how to use one."""
    from huggingface_hub import constants

    refs = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "refs"
    names = sorted(file.name for file in refs.iterdir() if file.is_file()) if refs.is_dir() else []
    return f"; the cache holds {', '.join(names)}: add --revision {names[0]} to use it" if names else ""


def _is_full(error: BaseException | None) -> bool:
    """Whether an error was caused by a full disk."""
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return is_full or (error is not None and _is_full(error.__cause__ or error.__context__))


def _has_address(endpoint: str) -> bool:
    """Whether the Hub's name resolves, which fails at once without a network."""
    if urllib.request.getproxies():  # then the proxy resolves the name
        return True
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, None)
    except OSError:
        return False
    return True


_OTHER_ANSWERS = (ValueError, TypeError, KeyError, AttributeError, IndexError, AssertionError, RecursionError)
"""What huggingface_hub raises for unexpected answers."""

_ADVICE: dict[int, tuple[type[OSError], str]] = {
    401: (PermissionError, "set HF_TOKEN to a token that may do this"),
    403: (PermissionError, "set HF_TOKEN to a token that may do this, and accept the terms on the repository's page"),
    429: (ConnectionError, "too many requests: wait a few minutes and run it again; HF_TOKEN raises the limit"),
    500: (ConnectionError, "run it again later; HF_HUB_OFFLINE=1 uses what is in the cache"),
}
"""Status of an answer -> the error, and what to do about it; 500 also covers everything above it."""

_NETWORK_MODULES = ("huggingface_hub", "httpx", "httpx2", "httpcore", "requests", "urllib3", "hf_xet")
"""Modules whose errors mean a network failure: huggingface_hub and its HTTP library, by release."""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
