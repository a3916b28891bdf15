"""Upload files to a Hugging Face hub, in one commit. What goes wrong there becomes a sentence.

``huggingface_hub`` is imported where it is used: it takes as long as all of the command line.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acip_export.errors import HubError, InputError, UsageError
from acip_export.version import __version__

logger = logging.getLogger(__name__)
_HIDDEN = "HF_HUB_DISABLE_PROGRESS_BARS"
_ours: set[str] = set()


def hide_bars() -> None:
    """Have the hub's client draw no bars, unless the user has said whether it does; it must not be loaded yet."""
    if _HIDDEN not in os.environ:
        os.environ[_HIDDEN] = "1"
        _ours.add(_HIDDEN)


def show_bars() -> None:
    """Take that back, for a command that has no bar of its own."""
    for name in _ours:
        os.environ.pop(name, None)
    _ours.clear()


@dataclass(frozen=True)
class Commit:
    """What is on the hub now.

    Attributes:
        repository: its id, with its owner. url: of its page. oid: of the commit.
        pull_request: where it is to be merged; ``None``: it is in the branch.
    """

    repository: str
    url: str
    oid: str
    pull_request: str | None


def check_repository_id(repository: str) -> None:
    """Raise UsageError for what no repository of a hub can be called."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it is documented

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(
            f"{repository!r} is no name of a repository.\nWrite OWNER/NAME, of letters, digits, - _ and single dots; "
            "OWNER is you or an organization of yours, and may be left out if it is you"
        ) from error


def upload(
    files: Mapping[str, Path | bytes],
    repository: str,
    message: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
) -> Commit:
    """Commit files to a repository, which is created if it is not there: all of them, or none.

    Args:
        files: their contents by the name that they get. message: of the commit.
        private: whether only its owners may see the repository; of one that is there, it is demanded.
        revision: branch, created if it is not there; ``None``: the main one. create_pr: propose the commit only.

    Raises:
        UsageError: the repository's name is none. InputError: the hub finds fault with the model card.
        HubError: no token, one without permission, or the hub cannot be reached; nothing was committed.
    """
    check_repository_id(repository)
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    api = HfApi(library_name="acip-export", library_version=__version__)
    with _sentences(repository, str(api.endpoint)):
        if get_token() is None:
            raise HubError(
                f"there is no token for {api.endpoint}.\n"
                f"Make one that may write, at {api.endpoint}/settings/tokens, and type  hf auth login  "
                "(or set HF_TOKEN)"
            )
        created = api.create_repo(repository, private=private or None, exist_ok=True)
        repository = created.repo_id
        if private and not api.model_info(repository).private:
            raise HubError(
                f"{repository} is there already, and everybody can see it.\n"
                f"Make it private at {api.endpoint}/{repository}/settings, or leave out --private"
            )
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        made = api.create_commit(
            repository,
            [CommitOperationAdd(name, data if isinstance(data, bytes) else str(data)) for name, data in files.items()],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
        )
    page = f"{api.endpoint}/{repository}" + (f"/tree/{revision}" if revision else "")
    return Commit(repository, page, made.oid, made.pr_url)


@contextmanager
def _sentences(repository: str, endpoint: str) -> Iterator[None]:
    """Turn what the client raises and warns of into sentences."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except (HubError, KeyboardInterrupt):
            raise
        except Exception as error:  # the client raises many kinds; each means that nothing was committed
            raise _explained(error, repository, endpoint) from error
    for warning in caught:
        if issubclass(warning.category, UserWarning):  # others are for the client's own authors
            logger.warning("%s", warning.message)


def _explained(error: BaseException, repository: str, endpoint: str) -> HubError | InputError:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # "Error while uploading …"
        return _explained(error.__cause__, repository, endpoint)
    # By their names: clients of different years have them from different libraries.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, OfflineModeIsEnabled):
        return HubError("HF_HUB_OFFLINE is set, which forbids all use of the network.\nUnset it, and type this again")
    if "HfHubHTTPError" in kinds:
        return _refused(error, repository, endpoint)
    if kinds & {"TransportError", "RequestException"} or isinstance(error, ConnectionError | TimeoutError):
        return HubError(
            f"{endpoint} cannot be reached: {error}.\nWith a network, or the right HF_ENDPOINT, type this again: "
            "what is there already is not uploaded twice"
        )
    if isinstance(error, ValueError) and "metadata" in str(error):
        return InputError(
            f"the hub does not take the model card: {error}\nSee  acip-export push -h  for what to give it"
        )
    return HubError(f"the upload to {repository} failed, and nothing was committed: {error}\nTry again later")


def _refused(error: Any, repository: str, endpoint: str) -> HubError:
    """The hub answered, and not with yes."""
    status, said = error.response.status_code, error.server_message or str(error).partition("\n")[0]
    if status == 401:
        return HubError(
            f"{endpoint} does not accept the token: {said}.\nMake one that may write, at {endpoint}/settings/tokens, "
            "and type  hf auth login  (or set HF_TOKEN)"
        )
    if status == 403:
        return HubError(
            f"the token may not write to {repository}: {said}.\nTake a repository of yours, or a token that may write "
            f"there ({endpoint}/settings/tokens), or propose the files with  --create-pr"
        )
    if status == 404:
        return HubError(f"{repository} is not at {endpoint}: {said}.\nSee whether its name is right, and its owner's")
    return HubError(
        f"{endpoint} refuses the upload to {repository} ({status}): {said}.\nNothing was committed; try again later"
    )
