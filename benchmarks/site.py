"""The ground of one run, that all its systems share: the model, the preloaded process, folders, LMCache's packages."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from benchmarks.shapes import write_model
from benchmarks.systems import Recipe, preloaded, undisturbed
from cluster.bundled import BUNDLED_FOLDER
from cluster.progress import Progress
from cluster.runfolder import RunFolder
from cluster.zygote import Zygote


class Site:
    """Everything that it started is stopped with it. disk: where tiers on disk keep their blocks."""

    def __init__(self, recipe: Recipe, progress: Progress, lmcache: Path | None, zygote: Zygote | None) -> None:
        """zygote: shared with somebody else, and left running."""
        self.recipe = recipe
        self.progress = progress
        self.lmcache = lmcache
        self._stack = ExitStack()
        self.folder = RunFolder.create()
        self._stack.callback(self.folder.remove)
        self.disk = Path(tempfile.mkdtemp(prefix="baton-bench-", dir=tempfile.gettempdir()))
        self._stack.callback(shutil.rmtree, self.disk, ignore_errors=True)
        self.model = write_model(recipe.shape, self.folder.subfolder("model"), BUNDLED_FOLDER)
        self._zygote = zygote

    def zygote(self) -> Zygote | None:
        """One preloaded process for all of Baton's engines and the plain ones."""
        if self._zygote is None:
            self._zygote = preloaded(self.folder, self._stack, self.progress)
        return self._zygote

    def close(self) -> None:
        """Stops and removes everything, undisturbed by a second Ctrl-C."""
        with undisturbed():
            self._stack.close()


@contextmanager
def site_of(recipe: Recipe, progress: Progress, lmcache: Path | None, zygote: Zygote | None = None) -> Iterator[Site]:
    """The ground of one run."""
    with closing(Site(recipe, progress, lmcache, zygote)) as site:
        yield site
