"""Which epoch is kept and when to stop: by validation volumetric Dice, never by loss."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EarlyStopping:
    """Keeps the best validation Dice.

    Parameters
    ----------
    patience : int or None
        Epochs without a better Dice after which to stop; None never stops.
    best : float or None
        Best mean validation Dice so far.
    best_epoch : int
        The epoch of it; 0 is before training.

    Examples
    --------
    >>> stopping = EarlyStopping(patience=2)
    >>> [stopping.update(epoch, dice) for epoch, dice in enumerate([0.5, 0.6, 0.6, 0.55])]
    [True, True, False, False]
    >>> stopping.best_epoch, stopping.exhausted(3)
    (1, True)
    """

    patience: int | None = None
    best: float | None = None
    best_epoch: int = 0

    def update(self, epoch: int, dice: float) -> bool:
        """Take an epoch's Dice; True where it is better than all before (an equal one is not)."""
        if self.best is not None and not dice > self.best:
            return False
        self.best, self.best_epoch = float(dice), epoch
        return True

    def exhausted(self, epoch: int) -> bool:
        """Whether patience has run out at `epoch`."""
        return self.patience is not None and self.best is not None and epoch - self.best_epoch >= self.patience
