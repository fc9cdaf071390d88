"""A run folder held by one process, or by several at once under `torchrun`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from robustvlm.core.ranks import Ranks
from robustvlm.runs.folder import RunFolder
from robustvlm.runs.manifest import Manifest


@contextmanager
def opened_by_all(
    folder: RunFolder, manifest: Manifest, ranks: Ranks, *, fresh: bool, resume: bool
) -> Iterator[Manifest]:
    """Hold the folder's lock, on rank 0, while all processes work on it; tell the others when this one fails.

    Yields the manifest on disk, which is an older one when the run is continued.
    """
    try:
        if ranks.leader:
            with folder.opened(manifest, fresh=fresh, resume=resume) as known:
                ranks.barrier()
                yield known
                ranks.barrier()
        else:
            ranks.barrier()
            yield folder.joined(manifest)
            ranks.barrier()
    except BaseException as error:
        ranks.fail(str(error) or "interrupted")
        raise
