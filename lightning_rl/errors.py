"""The errors that Lightning RL raises on purpose.

Every one says what happened, where, and how to mend it. The command line prints them without a traceback; anything else
that reaches it is a defect of ours and is printed with one.
"""

from __future__ import annotations


class LightningError(Exception):
    """Base of all deliberate errors. `hint` says how to go on and is printed under the message."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class RecipeError(LightningError):
    """A recipe that cannot be run as written; the message holds one line per problem with file, line and field."""


class MissingExtra(LightningError):
    """A feature whose optional packages are not installed; the hint is the command that installs them."""


class ModelError(LightningError):
    """A model name, path or checkpoint that cannot be resolved or read."""


class StoreError(LightningError):
    """The episode store could not be opened, read or written."""


class EpisodeEnded(StoreError):
    """A call came for an episode that has its outcome."""


class TraceFileError(LightningError):
    """A trace file that cannot be written, or read as what it says it is."""


class ServerError(LightningError):
    """The rollout server could not start, died, or refused a request of the trainer's."""


class PublishError(LightningError):
    """Trainer and server disagree about the policy after a publish: checksum, version or log-probs."""


class RewardError(LightningError):
    """An episode cannot be rewarded as the recipe says."""


class CreditError(LightningError):
    """A credit rule that cannot be called as the recipe says, that failed, or gave something that is no credit."""


class LedgerError(LightningError):
    """Sampled tokens are not all accounted for."""


class ResumeError(LightningError):
    """A run that cannot be resumed, or a checkpoint that cannot be read."""
