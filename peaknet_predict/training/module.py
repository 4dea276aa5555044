"""`PeakNetModule` with what training needs: steps, figures, and what a checkpoint keeps.

Shape legend: B events, P panels of an event, N = B*P, C classes, H rows, W columns.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peaknet_predict.models.peaknet import PeakNet
from peaknet_predict.module import PeakNetModule
from peaknet_predict.preprocess import Prepared, Transform
from peaknet_predict.simulation.labels import IGNORED
from peaknet_predict.training.loss import focal_loss, peak_log_odds
from peaknet_predict.training.metrics import OPERATING_POINT, Figures, Scores, operating_point
from peaknet_predict.training.optim import Progress, parameter_groups, rate_factor

if TYPE_CHECKING:
    from peaknet_predict.simulation.shots import LabelledShots

log = logging.getLogger(__name__)

_PRECISIONS = ("bf16-mixed", "32-true")

_RARE = 0.01
"""Fraction of peak pixels that a fresh network expects; otherwise the first steps would only teach
it that peaks are rare (arXiv:1708.02002, section 3.3)."""


class PeakNetTraining(PeakNetModule):
    """A `PeakNetModule` that `Trainer.fit` can train, and that predicts with what it has learned.

    Parameters
    ----------
    net, preprocess, **kwargs
        As for `PeakNetModule`.
    learning_rate
        AdamW's full rate. From there it falls to a hundredth by the end of the run.
    weight_decay
        Decay of convolution and linear kernels.
    warmup_steps
        Steps until the rate is full.

    Attributes
    ----------
    operating_point
        The best threshold of the last validation, and its figures; None before.
    """

    def __init__(
        self,
        net: nn.Module,
        preprocess: list[Transform],
        learning_rate: float = 2e-3,
        weight_decay: float = 0.05,
        warmup_steps: int = 200,
        **kwargs: Any,
    ) -> None:
        super().__init__(net, preprocess, **kwargs)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.operating_point: Figures | None = None
        self._scores = Scores()

    def setup(self, stage: str) -> None:
        """Check the precision, lay the weights out, and give a fresh network its first guess."""
        super().setup(stage)
        if stage != "fit":
            return
        if str(self.trainer.precision) not in _PRECISIONS:
            raise ValueError(
                f"precision {self.trainer.precision} rounds small steps of the weights away: train "
                f"with trainer.precision {' or '.join(_PRECISIONS)}"
            )
        if isinstance(self.net, PeakNet) and self.provenance.is_random:
            self.net.add_to_peak_logit(math.log(_RARE / (1 - _RARE)))
        if self.trainer.strategy.root_device.type == "cuda":
            # Norms and linear layers want channels last; before DDP plans its buckets.
            self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def on_fit_start(self) -> None:
        """Run the network as it is, at full resolution."""
        self._forward_pass.start_training()

    def configure_optimizers(self) -> Any:
        """Return AdamW, whose rate follows the run's progress in steps or time."""
        groups = parameter_groups(self.net, self.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate)
        progress = Progress(self.trainer)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rate_factor(step, progress(step), self.warmup_steps)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def training_step(self, shots: LabelledShots, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        logits_NCHW, labels_NHW, _ = self._labelled_logits(shots)
        loss = focal_loss(logits_NCHW, labels_NHW)
        self.log("train/loss", loss, batch_size=len(shots.images_BPHW), prog_bar=True)
        return loss

    def on_train_batch_end(self, *args: object) -> None:
        """Make sure that the last weights are validated, even if the run ends within an epoch.

        Lightning validates before a requested stop, but not before `max_steps`.
        """
        if 0 <= self.trainer.max_steps <= self.trainer.global_step:
            self.trainer.should_stop = True

    def on_validation_epoch_start(self) -> None:
        """Begin to count."""
        self._scores = Scores()

    def validation_step(self, shots: LabelledShots, batch_idx: int) -> None:
        """Count the peaks found in one batch, and note its loss."""
        logits_NCHW, labels_NHW, prepared = self._labelled_logits(shots)
        loss = focal_loss(logits_NCHW, labels_NHW)
        self.log("val/loss", loss, batch_size=len(shots.images_BPHW), sync_dist=True)
        odds_NHW = peak_log_odds(logits_NCHW)
        self._scores.add(odds_NHW, prepared.valid_N1HW[:, 0], shots, self.preprocess)

    def on_validation_epoch_end(self) -> None:
        """Log the figures of the best operating point, and the best F1 of any."""
        counts_TK = self._scores.counts_TK
        if self.trainer.world_size > 1:
            counts_TK = counts_TK.to(self.device)
            counts_TK = self.trainer.strategy.reduce(counts_TK, reduce_op="sum").cpu()
            self._scores.counts_TK = counts_TK
        figures = self._scores.figures()
        self._scores = Scores()  # lets go of the GPU's memory
        self.operating_point = operating_point(figures)
        best = max(f.f1 for f in figures)
        # The same on all ranks; marked as synchronised, because Lightning would warn.
        self.log("val/f1", best, prog_bar=True, sync_dist=True)
        for name, value in self.operating_point.as_dict().items():
            name = "f1_at_threshold" if name == "f1" else name
            self.log(f"val/{name}", value, sync_dist=True)
        if self.trainer.is_global_zero:
            log.info(
                "step %d: best F1 %.3f; %s", self.trainer.global_step, best, self.operating_point
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the operating point with the weights it was measured with, for the export."""
        if self.operating_point is not None:
            checkpoint[OPERATING_POINT] = self.operating_point.as_dict()

    def _labelled_logits(self, shots: LabelledShots) -> tuple[Tensor, Tensor, Prepared]:
        """Return logits (N, C, H, W), labels (N, H, W) of the prepared panels, and the latter."""
        logits_NCHW, _, prepared = self._forward_pass(shots.images_BPHW)
        labels_N1HW = self.preprocess.move(shots.labels_BPHW, fill=IGNORED)
        labels_N1HW = torch.where(prepared.valid_N1HW, labels_N1HW, IGNORED)
        return logits_NCHW, labels_N1HW[:, 0], prepared
