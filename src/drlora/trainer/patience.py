"""A run that ends when evaluations get no better: transformers' early stopping, told of ranks.

Ranks that later growth events would have given out are then in no expert: the adapter is smaller
than its budget, which the run says and records.
"""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback, TrainerState

from drlora.trainer.objectives import OwnSettings

_COUNTER = "early_stopping_patience_counter"


class Patience(EarlyStoppingCallback):
    """transformers' EarlyStoppingCallback.

    Attributes:
        has_ended: whether it has ended the run.
    """

    has_ended = False

    @classmethod
    def of(cls, own: OwnSettings) -> Patience | None:
        """As a recipe says; None where it has no patience to set."""
        if own.early_stopping_patience is None:
            return None
        return cls(own.early_stopping_patience, own.early_stopping_threshold)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on from what the checkpoint says; the Trainer leaves that to its callbacks."""
        super().on_train_begin(args, state, control, **kwargs)
        self.go_on_from(state)

    def go_on_from(self, state: TrainerState) -> None:
        """Take up the count of a checkpoint's state; it may have come to its end there."""
        known: Any = state.stateful_callbacks or {}
        saved = known.get(type(self).__name__)
        if state.global_step and isinstance(saved, dict):
            self.early_stopping_patience_counter = saved["attributes"][_COUNTER]
            self.has_ended = self.early_stopping_patience_counter >= self.early_stopping_patience

    def on_evaluate(  # type: ignore[override]  # as transformers' own
        self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any
    ) -> None:
        """Count evaluations that brought nothing better."""
        super().on_evaluate(args, state, control, metrics, **kwargs)
        self.has_ended |= self.early_stopping_patience_counter >= self.early_stopping_patience
