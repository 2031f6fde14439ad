"""A folder of this package's own format to the Hub, by huggingface_hub's own functions."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from seal_extract.encoders.hub import _TRANSPORT_ERROR, endpoint, translate
from seal_extract.errors import NetworkError, TokenError, UsageError


def upload(
    folder: Path, repo_id: str, *, private: bool, revision: str | None, message: str, create_pr: bool
) -> str:
    """Make the repository if need be, and commit all files of ``folder`` to it.

    Returns:
        The page of the commit, or of the pull request.

    Raises:
        HubError: no token, or one that may not write there; or the Hub is out of reach.
        UsageError: ``repo_id`` is none, or the Hub refuses the files.
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
        if exc.response.status_code in (401, 403):
            raise _may_not_write(exc, repo_id) from exc
        raise translate(exc, repo_id, [p.name for p in folder.iterdir()], revision) from exc
    except HFValidationError as exc:
        raise translate(exc, repo_id, (), revision) from exc
    except (_TRANSPORT_ERROR, OSError, RuntimeError) as exc:
        raise NetworkError(
            f"the upload to {repo_id} at {endpoint()} broke off: {_one_line(exc)}; run it again"
        ) from exc
    except ValueError as exc:  # how it reports a card that the Hub refuses
        raise UsageError(f"the Hub refuses the files for {repo_id}: {_one_line(exc)}") from exc
    return str(commit.pr_url or commit.commit_url)


def _may_not_write(exc: HfHubHTTPError, repo_id: str) -> TokenError:
    return TokenError(
        f"the Hub does not let this token write to {repo_id}: {_one_line(exc.server_message or exc)}; "
        "type: hf auth login, with a token that may write, from https://huggingface.co/settings/tokens"
    )


def _one_line(what: object) -> str:
    return " ".join(str(what).split())[:200] or type(what).__name__
