"""Which finished files of an interrupted run a later one may keep."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from kimi_convert.checkpoints.journal import FinishedFile
from kimi_convert.checkpoints.staging import Staging
from kimi_convert.checkpoints.written import difference
from kimi_convert.errors import CheckpointError

_log = logging.getLogger(__name__)


def files_to_keep(staging: Staging, sources: Mapping[str, str]) -> dict[str, FinishedFile]:
    """Return by name what is whole, and was made of files of the source in the same state.

    Args:
        staging: a claimed folder.
        sources: the state of each file of the source.
    """
    found = () if staging.resumed is None else staging.resumed.finished
    same = [one for one in found if one.sources.items() <= sources.items()]
    if len(same) < len(found):
        text = "%s: %s of %s finished files are made again: their source was touched since"
        _log.warning(text, staging.folder, len(found) - len(same), len(found))
    return {one.written.name: one for one in same if _is_whole(staging, one)}


def _is_whole(staging: Staging, file: FinishedFile) -> bool:
    try:
        return difference(staging.path / file.written.name, file.written) == ""
    except CheckpointError:
        return False
