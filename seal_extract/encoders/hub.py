"""The Hugging Face Hub: files from it or its cache, and folders uploaded to it.

``HF_ENDPOINT``, ``HF_HOME``, ``HF_HUB_CACHE``, ``HF_HUB_OFFLINE`` and ``HF_TOKEN`` have the meaning that
``huggingface_hub`` gives them, and are read when a file is asked for. Importing this module asks for nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)

from seal_extract.encoders.cache import cache_folder
from seal_extract.encoders.files import FoundFile
from seal_extract.errors import (
    GateError,
    HubError,
    MissingOnHubError,
    NetworkError,
    OutputError,
    SealExtractError,
    TokenError,
    UsageError,
    first_line,
)
from seal_extract.publish import disk_advice

# what the HTTP client raises: httpx.HTTPError for huggingface_hub 1, httpx2.HTTPError for 2; before: OSError
_TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
_TRUE = {"1", "ON", "YES", "TRUE"}


def fetch(
    repo_id: str, filenames: Sequence[str], revision: str | None = None, offline: bool = False
) -> FoundFile:
    """Get one file of a repository, from the cache if the cached copy is current.

    Args:
        repo_id: ``owner/name``.
        filenames: possible names of the file; the first that exists is taken.
        revision: branch, tag or commit; the main branch by default.
        offline: use the cache only; ``HF_HUB_OFFLINE=1`` has the same effect.

    Raises:
        TokenError: no token, an unknown one, or one without the right to read gated repositories.
        GateError: this account has no access to a gated repository.
        MissingOnHubError: no such repository, revision or file.
        NetworkError: the Hub is out of reach, or offline and not in the cache.
        OutputError: the cache cannot be written.
        UsageError: ``repo_id`` is not of the form ``owner/name``.
    """
    cache_only = _cache_only(offline)
    failure: Exception | None = None
    for filename in filenames:
        try:
            path = Path(
                hf_hub_download(
                    repo_id,
                    filename,
                    revision=revision,
                    endpoint=endpoint(),
                    cache_dir=cache_folder(),
                    local_files_only=cache_only,
                )
            )
        except LocalEntryNotFoundError as exc:  # not asked or not reached: another spelling may be cached
            failure, cache_only = failure or exc, True
        except EntryNotFoundError as exc:
            failure = failure or exc
        except (
            HfHubHTTPError,
            _TRANSPORT_ERROR,
            HFValidationError,
            XetDownloadError,
            OSError,
            RuntimeError,
        ) as exc:
            raise translate(exc, repo_id, filenames, revision) from exc
        else:
            return FoundFile(path, repo_id, _commit(path), _promised_sha256(path))
    assert failure is not None, "no file name was given"
    raise translate(failure, repo_id, filenames, revision) from failure


def fetch_beside(file: FoundFile, filename: str, offline: bool = False) -> Path | None:
    """A small file in the same folder, or in the same commit on the Hub; None if there is none.

    Offline, a file that was never downloaded counts as missing. The cache also remembers that a commit lacks
    a file, so the Hub is asked once.

    Raises:
        HubError: the Hub does not say whether it is there.
    """
    if file.revision is None:
        path = file.path.with_name(filename)
        return path if path.is_file() else None
    cached = try_to_load_from_cache(file.source, filename, cache_dir=cache_folder(), revision=file.revision)
    if isinstance(cached, str):
        return Path(cached)
    if cached is not None or _cache_only(offline):
        return None
    try:
        return fetch(file.source, [filename], file.revision).path
    except MissingOnHubError:
        return None


def _cache_only(offline: bool) -> bool:
    return offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE


def endpoint() -> str:
    """URL of the Hub, by the present environment."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT


def _commit(path: Path) -> str | None:
    """The cache stores files as ``.../models--owner--name/snapshots/{commit}/{file}``."""
    found = re.search(r"/models--[^/]+/snapshots/([^/]+)/", path.as_posix())
    return found and found[1]


def _promised_sha256(path: Path) -> str | None:
    """The cache names large files by the hash that the Hub announced, which downloads are not held to."""
    content = path.resolve().name
    return content if re.fullmatch("[0-9a-f]{64}", content) else None


def translate(
    exc: Exception, repo_id: str, filenames: Sequence[str], revision: str | None
) -> SealExtractError:
    """The error of ``huggingface_hub`` as ours, whose message says what to do."""
    files, page = " or ".join(filenames), f"https://huggingface.co/{repo_id}"
    if isinstance(exc, LocalEntryNotFoundError):
        return _not_cached(exc, repo_id, filenames, revision)
    if isinstance(exc, HFValidationError):
        return UsageError(f"{repo_id!r} cannot be a Hub repository; give owner/name")
    if isinstance(exc, RevisionNotFoundError):
        return MissingOnHubError(
            f"{repo_id} has no revision {revision!r}; choose one from {page}/commits/main"
        )
    if isinstance(exc, EntryNotFoundError):
        where = f" at revision {revision}" if revision else ""
        return MissingOnHubError(
            f"{repo_id} has no file {files}{where}; see {page}/tree/{revision or 'main'}"
        )
    if isinstance(exc, HfHubHTTPError):
        return _refused(exc, repo_id, page)
    if isinstance(exc, FileMetadataError):
        return NetworkError(
            f"what answered for {repo_id} at {endpoint()} is no Hugging Face Hub; check HF_ENDPOINT and proxy"
        )
    if isinstance(exc, OSError) and (advice := disk_advice(exc, "folder with HF_HOME")):
        return OutputError(f"cannot keep {files} in {cache_folder()}: {advice}")
    return NetworkError(
        f"the download of {files} from {repo_id} broke off: {first_line(exc)}; run it again, or use "
        "--offline with a copy in the cache"
    )


def _not_cached(
    exc: LocalEntryNotFoundError, repo_id: str, filenames: Sequence[str], revision: str | None
) -> SealExtractError:
    """Nothing in the cache; the cause tells whether the Hub was not asked, not reached, or refused."""
    cause = exc.__cause__
    if isinstance(cause, (HfHubHTTPError, FileMetadataError)):
        return translate(cause, repo_id, filenames, revision)
    answer = getattr(cause, "response", None)
    if answer is not None:  # before version 1, what was retried in vain comes as the HTTP client raised it
        return _in_trouble(answer.status_code, repo_id)
    at = f" --revision {revision}" if revision else ""
    if cause is None or isinstance(cause, OfflineModeIsEnabled):
        return NetworkError(
            f"offline, and {repo_id} {' or '.join(filenames)} is not in the cache {cache_folder()}; "
            f"on a machine with network, type: hf download {repo_id} {filenames[0]}{at}"
        )
    return NetworkError(
        f"cannot reach {endpoint()} for {repo_id}: {first_line(cause)}; "
        "check network and proxy, or use --offline with a copy in the cache"
    )


def _refused(exc: HfHubHTTPError, repo_id: str, page: str) -> HubError:
    """Distinguish token, gate and absence: the Hub answers 401 to all three without a valid token."""
    status, code = exc.response.status_code, exc.response.headers.get("X-Error-Code", "")
    known = get_token() is not None
    if isinstance(exc, GatedRepoError) and status == 403:
        return GateError(f"{repo_id} is gated and this account has no access yet; ask for it at {page}")
    if status == 401 and known and code != "RepoNotFound":
        return TokenError(
            f"the Hub does not accept the token for {repo_id}; type: hf auth login, or renew HF_TOKEN"
        )
    if status == 401 and not known:
        return TokenError(
            f"{repo_id} is gated, private or does not exist, and no token was sent; type: hf auth login, "
            f"then accept the terms at {page}"
        )
    if isinstance(exc, RepositoryNotFoundError) or status == 404:
        return MissingOnHubError(
            f"there is no repository {repo_id} for this account; check the name at {page}"
        )
    if status == 403:
        return TokenError(
            f"the token may not read {repo_id}: {first_line(exc.server_message or exc)}; allow it to read "
            "gated repositories at https://huggingface.co/settings/tokens"
        )
    return _in_trouble(status, repo_id)


def _in_trouble(status: int, repo_id: str) -> HubError:
    return NetworkError(
        f"the Hub answered {status} for {repo_id}; try again later, or use --offline with a cached copy"
    )


def upload(
    folder: Path, repo_id: str, *, private: bool, revision: str | None, message: str, create_pr: bool
) -> str:
    """Commit all files of ``folder`` to a repository, which is created if needed.

    Returns:
        The page of the commit, or of the pull request.

    Raises:
        HubError: no token, one that may not write there, or the Hub is out of reach.
        UsageError: ``repo_id`` is not of the form ``owner/name``, or the Hub refuses the files.
    """
    api = HfApi(endpoint=endpoint())
    try:
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=made.repo_id,  # with its owner
            folder_path=folder,
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
        )
    except HfHubHTTPError as exc:
        if exc.response.status_code not in (401, 403):
            raise translate(exc, repo_id, [p.name for p in folder.iterdir()], revision) from exc
        raise TokenError(
            f"the Hub does not let this token write to {repo_id}: {first_line(exc.server_message or exc)}; "
            "type: hf auth login, with a token that may write, from https://huggingface.co/settings/tokens"
        ) from exc
    except HFValidationError as exc:
        raise translate(exc, repo_id, (), revision) from exc
    except (_TRANSPORT_ERROR, OSError, RuntimeError) as exc:
        raise NetworkError(
            f"the upload to {repo_id} at {endpoint()} broke off: {first_line(exc)}; run it again"
        ) from exc
    except ValueError as exc:  # raised by huggingface_hub for a card that the Hub refuses
        raise UsageError(f"the Hub refuses the files for {repo_id}: {first_line(exc)}") from exc
    return str(commit.pr_url or commit.commit_url)
