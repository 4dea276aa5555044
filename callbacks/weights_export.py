"""The weights of a training run as a file for prediction, as soon as there are better ones."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from peaknet_predict.process.files import expanded
from peaknet_predict.training.export import export_weights


class WeightsExport(L.Callback):
    """Write the best checkpoint's network as a weight file, see `export_weights`.

    It is written whenever a `ModelCheckpoint` with a `monitor` has kept a better one, and at the
    end; so a run that is killed leaves its best weights too.

    Parameters
    ----------
    path
        The ``.safetensors`` file.
    """

    def __init__(self, path: str) -> None:
        self.path = str(expanded(path))
        self._exported: tuple[str, float] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that there will be checkpoints to export."""
        if stage == "fit" and _keeper_of_the_best(trainer) is None:
            raise ValueError(
                "WeightsExport writes the weights of the best checkpoint: add a ModelCheckpoint "
                "with `monitor` to the callbacks"
            )

    def on_train_batch_start(self, trainer: L.Trainer, *args: object) -> None:
        """Export the previous validation's better weights: checkpoints come after all hooks."""
        self._export(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export the best of the run."""
        self._export(trainer)

    def _export(self, trainer: L.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        checkpoints = _keeper_of_the_best(trainer)
        assert checkpoints is not None
        best, score = checkpoints.best_model_path, checkpoints.best_model_score
        # A better checkpoint may have the previous one's name.
        now = best, float("nan") if score is None else float(score)
        if best and now != self._exported and Path(best).is_file():
            export_weights(best, self.path)
            self._exported = now


def _keeper_of_the_best(trainer: L.Trainer) -> ModelCheckpoint | None:
    keepers = (c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint))
    return next((keeper for keeper in keepers if keeper.monitor is not None), None)
