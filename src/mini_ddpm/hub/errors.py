"""One line for each failure of the Hub or its client: what happened, and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from huggingface_hub import constants, errors

# The client raises this when a request gets no answer. It is that of httpx or httpx2, by the client's version.
HTTPError: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]


@contextlib.contextmanager
def explain_hub_errors(repo_id: str, revision: str | None, otherwise: str) -> Iterator[None]:
    """Replace any error of the Hub's client in the block by an `OSError` of one line, whose cause is that error.

    `otherwise` is the line for failures that have none here. Its two `{}` are the repository and the reason.
    """
    try:
        yield
    except (OSError, HTTPError, errors.HFValidationError, RuntimeError) as error:
        # diffusers and the client wrap the Hub's answer, sometimes twice, in "not fully cached locally".
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        raise OSError(_explanation(repo_id, revision or "main", causes, otherwise)) from error


def _explanation(repo_id: str, revision: str, causes: list[BaseException], otherwise: str) -> str:
    """Return the line for an error, given with its chain of causes."""
    answers = [cause for cause in causes if isinstance(cause, errors.HfHubHTTPError)]
    no_repository = errors.RepositoryNotFoundError
    status = {answer.response.status_code for answer in answers if not isinstance(answer, no_repository)}
    explained = answers[0] if answers else causes[-1]
    reason = (str(explained).strip() or repr(explained)).splitlines()[0].rstrip(".")

    def has(*kinds: type[Exception]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    for applies, message in (
        (
            401 in status,
            f"The Hub rejected your token (from HF_TOKEN, `token=` or `hf auth login`). Log in again; or, if {repo_id}"
            " is public, read it without a token: unset HF_TOKEN, run `hf auth logout` or give `token=False`.",
        ),
        (
            403 in status,
            f"Your token has no write access to {repo_id}. Create a token with write access"
            f" ({constants.ENDPOINT}/settings/tokens), and check that you are a member of"
            f" {repo_id.partition('/')[0]}.",
        ),
        (
            has(errors.GatedRepoError),
            f"The repository {repo_id} is gated. Request access at {constants.ENDPOINT}/{repo_id}, then run"
            " `hf auth login`.",
        ),
        (
            has(no_repository),
            f"The repository {repo_id} does not exist, or it is private and you have no access to it. Check the name,"
            " or log in with `hf auth login` or `token=`.",
        ),
        (has(errors.RevisionNotFoundError), f"The repository {repo_id} has no revision {revision!r}."),
        (has(errors.HFValidationError), f"{repo_id!r} is not a valid repository name. Write user/name."),
        (
            has(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled),
            f"The repository {repo_id} (revision {revision!r}) is not in the local cache, and the Hub cannot be"
            " reached or offline mode is on (HF_HUB_OFFLINE, `local_files_only=True`). Load it once while online.",
        ),
        (
            has(errors.EntryNotFoundError),
            f"The repository {repo_id} holds no pipeline: it has no model_index.json.",
        ),
        (
            not answers and has(HTTPError),
            f"The connection to the Hub ({constants.ENDPOINT}) failed: {reason}. Check the network and try again.",
        ),
    ):
        if applies:
            return message
    return otherwise.format(repo_id, reason)
