"""Ray Train's trainer, fit for a Ray that has no dashboard."""

from ray._private.services import get_webui_url_from_internal_kv
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback


class Trainer(TorchTrainer):
    """A `TorchTrainer` that starts Ray's `PlacementGroupCleaner` only on a Ray with a dashboard.

    The cleaner asks the dashboard every second whether the controller lives, and removes the
    workers' placement group when it does not. The Ray that `connect` starts has no dashboard. It
    ends with its job and takes the placement group with it. There the cleaner would warn every
    second, or ask the dashboard of another Ray that listens on localhost:8265.
    """

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        callbacks = super()._create_default_callbacks()
        if get_webui_url_from_internal_kv():
            return callbacks
        return [each for each in callbacks if not isinstance(each, PlacementGroupCleanerCallback)]
