"""The Hub's side of a publication: login, repository, upload, pull request, merge, tag.

Contents go up first, where nobody sees them; one commit then names all of them. What changes the
repository is never tried twice blindly: a failure ends the run, and the next one looks what came
of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, get_token

from kimi_convert.checkpoints.messages import listed, quoted
from kimi_convert.config.progress import ProgressCallback
from kimi_convert.errors import HubError, OutputError, VerificationError
from kimi_convert.hub.failures import NETWORK_ERRORS, call, hub_error
from kimi_convert.hub.listing import RemoteFile
from kimi_convert.hub.publish_plan import PublishPlan, differences, foreign_changes
from kimi_convert.hub.reference import DEFAULT_REVISION
from kimi_convert.hub.remote import Remote
from kimi_convert.hub.upload import upload_contents

_LOOKS_AFTER_MERGE = 3

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class State:
    """The repository as it was found."""

    is_private: bool
    commit: str  # of the branch, or of main where there is no such branch yet
    has_branch: bool
    files: Mapping[str, RemoteFile]  # at that commit


@dataclass(frozen=True, slots=True)
class Published:
    """What came of it."""

    commit: str
    pull_request: int | None = None
    merged: bool = False


class Publication:
    """One repository and branch that something is published to."""

    def __init__(self, remote: Remote, repository: str, branch: str) -> None:
        """Ask nothing yet."""
        self._remote = remote
        self._api = remote.api
        self._repository = repository
        self._branch = branch

    def check_login(self) -> None:
        """Check, before any work, that the Hub knows who publishes.

        Raises:
            HubError: it does not.
        """
        if get_token() is None:
            raise HubError(
                "nobody is logged in, so nothing can be published",
                where=self._repository,
                hint="Log in with `hf auth login`, or set HF_TOKEN to a token that may write.",
            )
        whoami = cast("Callable[..., object]", self._api.whoami)  # pyright: ignore[reportUnknownMemberType]
        self._ask(whoami)

    def look(self) -> State | None:
        """Return the repository as it is, or None if there is none.

        Raises:
            HubError: it cannot be looked at.
        """
        if not self._ask(lambda: self._api.repo_exists(self._repository)):
            return None
        info = self._ask(lambda: self._api.repo_info(self._repository))
        branches = self._ask(lambda: self._api.list_repo_refs(self._repository)).branches
        heads = {branch.name: branch.target_commit for branch in branches}
        commit = heads.get(self._branch) or heads.get(DEFAULT_REVISION) or info.sha
        if not commit:
            raise HubError("the Hub names no commit", where=self._repository)
        files = self._remote.listing(self._repository, commit)
        return State(bool(info.private), commit, self._branch in heads, files)

    def create(self, *, private: bool) -> State:
        """Make the repository.

        Raises:
            HubError: it cannot be made.
        """
        self._once(lambda: self._api.create_repo(self._repository, private=private, exist_ok=True))
        state = self.look()
        if state is None or (private and not state.is_private):
            raise HubError("repository was not made as asked", where=self._repository)
        return state

    def check_tag(self, tag: str | None, plan: PublishPlan, state: State) -> None:
        """Refuse a tag that marks something else already.

        Raises:
            OutputError: it does.
        """
        if tag is None:
            return
        tags = self._ask(lambda: self._api.list_repo_refs(self._repository)).tags
        target = {found.name: found.target_commit for found in tags}.get(tag)
        if target is not None and not (plan.is_done and target == state.commit):
            raise OutputError(
                "repository has this tag already",
                where=self._repository,
                found=f"{quoted(tag)} at {target[:12]}",
                hint="Choose another --tag.",
            )

    def tag(self, name: str, commit: str) -> None:
        """Mark a commit; a tag that marks it already is left.

        Raises:
            HubError: it cannot be.
        """
        self._once(
            lambda: self._api.create_tag(
                self._repository, tag=name, revision=commit, exist_ok=True
            )
        )

    def run(
        self,
        folder: Path,
        plan: PublishPlan,
        state: State,
        *,
        merge: bool,
        on_progress: ProgressCallback,
    ) -> Published:
        """Bring the repository to what is planned.

        Args:
            folder: where the files lie.
            plan: what to send and to remove.
            state: what the plan was made against.
            merge: whether a pull request is merged when it has been found right.
            on_progress: told of bytes uploaded.

        Raises:
            HubError: it cannot be.
            VerificationError: what the repository lists is not what was sent.
        """
        if not state.has_branch:
            self._once(
                lambda: self._api.create_branch(
                    self._repository, branch=self._branch, revision=state.commit
                )
            )
        if plan.is_done:
            return Published(state.commit)
        if self._branch != DEFAULT_REVISION:
            return self._to_branch(folder, plan, state, on_progress)
        title = f"Publish by kimi-convert, contents {plan.digest}"
        number = self._open_pull_request(title, plan, state)
        if number is None:
            additions = self._upload(folder, plan, branch=None, on_progress=on_progress)
            number = self._propose(title, plan, additions, state)
        head = self._verify(plan, f"refs/pr/{number}", before=state.files)
        if not merge:
            return Published(head, number)
        self._once(lambda: self._api.merge_pull_request(self._repository, number))
        return Published(self._verify_merged(plan), number, merged=True)

    def _to_branch(
        self, folder: Path, plan: PublishPlan, state: State, on_progress: ProgressCallback
    ) -> Published:
        """Commit to a branch: all of it at once, and only if nobody has been there since."""
        additions = self._upload(folder, plan, branch=self._branch, on_progress=on_progress)
        self._once(
            lambda: self._api.create_commit(
                self._repository,
                [*additions, *map(_deletion, plan.remove)],
                commit_message=f"Publish by kimi-convert, contents {plan.digest}",
                revision=self._branch,
                parent_commit=state.commit,
            )
        )
        return Published(self._verify(plan, self._branch))

    def _upload(
        self,
        folder: Path,
        plan: PublishPlan,
        *,
        branch: str | None,
        on_progress: ProgressCallback,
    ) -> list[CommitOperationAdd]:
        return upload_contents(
            self._remote, self._repository, folder, plan, branch=branch, on_progress=on_progress
        )

    def _open_pull_request(self, title: str, plan: PublishPlan, state: State) -> int | None:
        """Return the pull request that an earlier run has left with these contents alone.

        Anybody may open one under this title: what it changes beside the plan rules it out.
        """
        found = self._ask(
            lambda: list(
                self._api.get_repo_discussions(
                    self._repository,
                    discussion_type="pull_request",
                    discussion_status="open",
                )
            )
        )
        for pull in found:
            if pull.title == title and pull.status == "open":
                listing = self._remote.listing(self._repository, f"refs/pr/{pull.num}")
                if not differences(plan, listing) and not foreign_changes(
                    plan, state.files, listing
                ):
                    return pull.num
        return None

    def _propose(
        self, title: str, plan: PublishPlan, additions: list[CommitOperationAdd], state: State
    ) -> int:
        made = self._once(
            lambda: self._api.create_commit(
                self._repository,
                [*additions, *map(_deletion, plan.remove)],
                commit_message=title,
                create_pr=True,
                parent_commit=state.commit,
            )
        )
        if made.pr_num is None:
            raise HubError("the Hub made no pull request", where=self._repository)
        return made.pr_num

    def _verify(
        self, plan: PublishPlan, revision: str, *, before: Mapping[str, RemoteFile] | None = None
    ) -> str:
        """Hold the listing against what was sent; return the commit.

        Args:
            plan: what was sent.
            revision: where it should be.
            before: what the repository held; given where nothing else may have changed.

        Raises:
            VerificationError: they differ.
        """
        info = self._ask(lambda: self._api.repo_info(self._repository, revision=revision))
        commit = str(info.sha)
        listing = self._remote.listing(self._repository, commit)
        wrong = differences(plan, listing)
        if before is not None:
            wrong += foreign_changes(plan, before, listing)
        if wrong:
            raise VerificationError(
                f"{len(wrong)} files of the repository are not what was sent",
                where=f"{self._repository} at {revision}",
                found=listed(wrong),
                hint="Somebody else may have changed them: look at its page, then run again.",
            )
        return commit

    def _verify_merged(self, plan: PublishPlan) -> str:
        """Like `_verify`, with some patience: a listing may lag behind a merge."""
        for failures in range(1, _LOOKS_AFTER_MERGE):
            try:
                return self._verify(plan, DEFAULT_REVISION)
            except VerificationError:
                time.sleep(self._remote.policy.wait_s(failures, None))
        return self._verify(plan, DEFAULT_REVISION)

    def _ask(self, request: Callable[[], T]) -> T:
        """Make a request that changes nothing, or nothing that shows: again where that helps."""
        return call(request, what=self._repository, policy=self._remote.policy)

    def _once(self, request: Callable[[], T]) -> T:
        try:
            return request()
        except NETWORK_ERRORS as error:
            raise hub_error(error, what=self._repository) from error


def _deletion(name: str) -> CommitOperationDelete:
    return CommitOperationDelete(name)
