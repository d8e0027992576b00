"""One line for each failure of the Hub or its client: what happened, and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from huggingface_hub import constants, errors
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# The client raises this when a request gets no answer. It is that of httpx or httpx2, by the client's version.
HTTPError: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]


@contextlib.contextmanager
def explain_hub_errors(repo_id: str, revision: str | None, otherwise: str) -> Iterator[None]:
    """Replace any error of the Hub's client in the block by an `OSError` of one line.

    Args:
        repo_id: The repository that the block reads or writes.
        revision: Its branch, tag or commit. `None`: main.
        otherwise: The line for all other failures. Its two `{}` are the repository and the reason.

    Raises:
        OSError: The block failed. The cause is the client's error.
    """
    try:
        yield
    except (OSError, HTTPError, HFValidationError, RuntimeError) as error:
        # diffusers and the client wrap the Hub's answer, sometimes twice, in "not fully cached locally".
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        raise OSError(_explanation(repo_id, revision or "main", causes, otherwise)) from error


def _explanation(repo_id: str, revision: str, causes: list[BaseException], otherwise: str) -> str:
    """Return the line for an error, given with its chain of causes."""
    answers = [cause for cause in causes if isinstance(cause, HfHubHTTPError)]
    status = {answer.response.status_code for answer in answers if not isinstance(answer, RepositoryNotFoundError)}
    if 401 in status:
        return (
            f"The Hub rejected your token (from HF_TOKEN, `token=` or `hf auth login`). Log in again; or, if {repo_id}"
            " is public, read it without a token: unset HF_TOKEN, run `hf auth logout` or give `token=False`."
        )
    if 403 in status:
        return (
            f"Your token has no write access to {repo_id}. Create a token with write access"
            f" ({constants.ENDPOINT}/settings/tokens), and check that you are a member of"
            f" {repo_id.partition('/')[0]}."
        )
    for kind, message in (
        (
            GatedRepoError,
            f"The repository {repo_id} is gated. Request access at {constants.ENDPOINT}/{repo_id}, then run"
            " `hf auth login`.",
        ),
        (
            RepositoryNotFoundError,
            f"The repository {repo_id} does not exist, or it is private and you have no access to it. Check the name,"
            " or log in with `hf auth login` or `token=`.",
        ),
        (RevisionNotFoundError, f"The repository {repo_id} has no revision {revision!r}."),
        (HFValidationError, f"{repo_id!r} is not a valid repository name. Write user/name."),
        (
            (LocalEntryNotFoundError, OfflineModeIsEnabled),
            f"The repository {repo_id} (revision {revision!r}) is not in the local cache, and the Hub cannot be"
            " reached or offline mode is on (HF_HUB_OFFLINE, `local_files_only=True`). Load it once while online.",
        ),
        (EntryNotFoundError, f"The repository {repo_id} holds no pipeline: it has no model_index.json."),
    ):
        if any(isinstance(cause, kind) for cause in causes):
            return message
    if not answers and any(isinstance(cause, HTTPError) for cause in causes):
        reason = _first_line(causes[-1])
        return f"The connection to the Hub ({constants.ENDPOINT}) failed: {reason}. Check the network and try again."
    return otherwise.format(repo_id, _first_line(answers[0] if answers else causes[-1]))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
