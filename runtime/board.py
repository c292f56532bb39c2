"""Training as it goes: Ray metrics, and TensorBoard events in its workspace.

tensorboard --logdir WORKSPACE/tensorboard
"""

import tempfile
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.fs as pafs
from tensorboardX import SummaryWriter

from ip2p.workspace import Workspace
from runtime.progress import set_gauges


class Board:
    """Writes to this machine and copies to the workspace, which may be a bucket, when told to.

    The last of all scalars are also the Ray metrics `ip2p_train_<name>`.

    Args:
        name: of the run; one that goes on writes a further file into the same folder.
        first_step: what an earlier, killed attempt wrote from here on is replaced.
    """

    def __init__(self, workspace: Workspace, name: str, first_step: int):
        self.workspace, self.name = workspace, name
        self._folder = tempfile.TemporaryDirectory()
        self._writer = SummaryWriter(self._folder.name, purge_step=first_step)
        self._safe_at = time.time()  # what was done until then a crash does not cost: so far nothing is

    def scalars(self, values: Mapping[str, Any], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        # Ray forgets a gauge that is not set again and again.
        set_gauges("train", {"step": step, "checkpoint_timestamp_seconds": self._safe_at, **values})

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """`image` is uint8 (H, W, 3)."""
        self._writer.add_image(name, image, step, dataformats="HWC")

    def finish(self) -> None:
        self._writer.close()

    def publish(self) -> None:
        """Let the workspace have all that was written so far; called at every checkpoint."""
        self._safe_at = time.time()
        self._writer.flush()
        self.workspace.fs.create_dir(self.workspace.path("tensorboard", self.name), recursive=True)
        pafs.copy_files(
            self._folder.name,
            self.workspace.path("tensorboard", self.name),
            destination_filesystem=self.workspace.fs,
        )
