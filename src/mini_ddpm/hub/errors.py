"""One line for each way in which the Hub or its client fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from huggingface_hub import (
    constants,
    errors,
)
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

# What a request without an answer raises: the error of httpx or of httpx2, by the client's version.
HTTPError: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]


@contextlib.contextmanager
def _plain_words(name: str, revision: str | None, otherwise: str) -> Iterator[None]:
    """Turns what the client raises into an `OSError` of one line: what happened, and what to do.

    `otherwise` is the line for what has none of its own.
    """
    try:
        yield
    except (OSError, HTTPError, HFValidationError, RuntimeError) as error:
        # The host and the client wrap what the Hub said, sometimes twice, in "not fully cached locally".
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        raise OSError(_explain(name, causes, revision or "main", otherwise)) from error


def _explain(name: str, causes: list[BaseException], revision: str, otherwise: str) -> str:
    """Returns the line for an error of the client's."""
    answers = [cause for cause in causes if isinstance(cause, HfHubHTTPError)]
    status = {answer.response.status_code for answer in answers if not isinstance(answer, RepositoryNotFoundError)}
    if 401 in status:
        return (
            "The Hub does not know your token (HF_TOKEN, `token=` or that of an earlier `hf auth login`): log in anew,"
            f" or, if {name} is public, read it without a token: unset HF_TOKEN, `hf auth logout`, or `token=False`."
        )
    if 403 in status:
        return (
            f"Your token may not write to {name}: it needs the right to write"
            f" ({constants.ENDPOINT}/settings/tokens), and you to be a member of {name.partition('/')[0]}."
        )
    for kind, message in (
        (GatedRepoError, f"The repository {name} is gated: ask for access on its page, then `hf auth login`."),
        (
            RepositoryNotFoundError,
            f"No repository {name} on the Hub, or it is private and you are not logged in with access to it"
            " (`hf auth login`, or `token=`).",
        ),
        (RevisionNotFoundError, f"The repository {name} has no revision {revision!r}."),
        (HFValidationError, f"{name!r} is not a valid name of a repository on the Hub (user/name)."),
        (
            (LocalEntryNotFoundError, OfflineModeIsEnabled),
            f"The repository {name} (revision {revision!r}) is not in the local cache, and the Hub cannot be reached"
            " or was not to be asked.",
        ),
        (EntryNotFoundError, f"The repository {name} holds no pipeline: it has no model_index.json."),
    ):
        if any(isinstance(cause, kind) for cause in causes):
            return message
    if not answers and any(isinstance(cause, HTTPError) for cause in causes):
        reason = _first_line(causes[-1])
        return f"The connection to the Hub ({constants.ENDPOINT}) failed: {reason}. Check the network, and try again."
    return otherwise.format(name, _first_line(answers[0] if answers else causes[-1]))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
