"""How do files come from and go to the Hugging Face Hub, and what does a failure say?"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def download(repo: str, *, revision: str | None, patterns: Iterable[str]) -> Path:
    """Fetches the matching files of a repository into the Hub's cache and returns their folder, named by its commit.

    `HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` work as everywhere. Raises FileNotFoundError for a
    repository or revision that is not there, PermissionError for one that asks for a login, ConnectionError for a Hub
    that does not answer.
    """
    from huggingface_hub import errors, snapshot_download

    at = f" at revision {revision}" if revision else ""
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except errors.GatedRepoError:
        raise PermissionError(f"{repo}: the Hub asks for a login; accept its terms there and set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{repo}: no revision {revision} on the Hub") from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{repo}: neither a folder here nor a repository on the Hub (a private one needs HF_TOKEN)"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise ConnectionError(
            f"{repo}{at}: not in the Hub's cache, and the Hub cannot be reached; connect once (and unset "
            "HF_HUB_OFFLINE), or give a folder"
        ) from None
    except errors.HfHubHTTPError as error:
        raise ConnectionError(f"{repo}{at}: the Hub answered with an error ({_first_line(error)})") from None
    except OSError as error:
        raise ConnectionError(
            f"{repo}{at}: the download broke off ({_first_line(error)}); run it again to resume"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
