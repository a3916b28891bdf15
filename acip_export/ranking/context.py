"""What every part of one ranking works with, as one object."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from acip_export.io.kept_work import Work
from acip_export.lowrank.cache import FactorCache
from acip_export.model.checkpoint import Checkpoint
from acip_export.progress import ProgressCallback, silent
from acip_export.ranking.config import AcipConfig, DataConfig
from acip_export.ranking.data import CalibrationData
from acip_export.ranking.processes import ALONE, Processes
from acip_export.ranking.run_state import RunStates
from acip_export.ranking.tasks import Task


@dataclass(frozen=True)
class RankContext:
    """The model that is ranked, the text it is ranked on, and the settings of the run.

    Attributes:
        checkpoint: where the model is from. model: the loaded model; its linear layers are factorized in place.
        data: the text, cut for statistics, training and the curve. calibration: how the text is used.
        processes: those that rank together. progress: what is told about every step.
        factors: the cache of factorized weights.
        acip: hyper-parameters of an algorithm that learns; ``None`` for the others.
        run_states: where the state of an algorithm that learns is stored, if it is.
        work: what is done of the ranking, with what is too large for memory.
    """

    checkpoint: Checkpoint
    model: nn.Module
    data: CalibrationData
    calibration: DataConfig = field(default_factory=DataConfig)
    processes: Processes = ALONE
    progress: ProgressCallback = silent
    factors: FactorCache = field(default_factory=lambda: FactorCache(None))
    acip: AcipConfig | None = None
    run_states: RunStates | None = None
    work: Work = field(default_factory=Work)

    @property
    def task(self) -> Task:
        """What the model is for."""
        return self.data.task

    @property
    def windows(self) -> Tensor:
        """The windows (n, length) that statistics are measured on."""
        return self.data.statistics

    @property
    def graded(self) -> Tensor:
        """The first of these windows, which gradients are measured on."""
        return self.data.statistics[: self.data.graded]

    @property
    def batch(self) -> int:
        """How many windows make one forward pass of statistics and curve."""
        return self.calibration.batch

    @property
    def seed(self) -> int:
        """What everything random follows from."""
        return self.calibration.seed
