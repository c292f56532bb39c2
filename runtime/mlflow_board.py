"""What TensorBoard is told, to MLflow as well. Not to W&B: one is enough, and anybody can run a server of MLflow."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from ip2p.recipe import MLflow, Recipe
from ip2p.records import digest
from ip2p.workspace import Workspace, flatten

PARAMS_AT_ONCE = 100  # what MLflow takes
LONGEST_VALUE = 6000


class MLflowBoard:
    """One run of MLflow for one training; a training that goes on goes on with its run, whose parameters stay."""

    def __init__(self, settings: MLflow, workspace: Workspace, name: str, recipe: Recipe):
        self.client = MlflowClient(settings.tracking_uri)
        experiment = self.client.get_experiment_by_name(settings.experiment)
        id_ = experiment.experiment_id if experiment else self.client.create_experiment(settings.experiment)
        which = f"{digest(workspace.uri(), name):016x}"
        if found := self.client.search_runs([id_], f"tags.ip2p = '{which}'"):
            self.run = found[0].info.run_id
            self.client.update_run(self.run, status="RUNNING")
            return
        tags = {"ip2p": which, "workspace": workspace.uri()}
        self.run = self.client.create_run(id_, tags=tags, run_name=f"{recipe.name} {name}").info.run_id
        settings_ = flatten(recipe.model_dump(mode="json"))
        parameters = [Param(key, str(value)[:LONGEST_VALUE]) for key, value in settings_.items()]
        for first in range(0, len(parameters), PARAMS_AT_ONCE):
            self.client.log_batch(self.run, params=parameters[first : first + PARAMS_AT_ONCE])

    def scalars(self, values: Mapping[str, Any], step: int) -> None:
        now = round(1000 * time.time())
        self.client.log_batch(self.run, [Metric(name, float(value), now, step) for name, value in values.items()])

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """`image` is uint8 (H, W, 3)."""
        self.client.log_image(self.run, image, artifact_file=f"{name}/step-{step:07d}.png")

    def publish(self) -> None:
        """All has been sent already."""

    def finish(self) -> None:
        self.client.set_terminated(self.run)
