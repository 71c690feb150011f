"""The loss of a micro-batch: surrogate, correction, KL and entropy, put together as `settings` says.

Everything is a plain sum over sampled tokens, with weights that were computed over the whole step (`aggregation`), so that
how a step is cut into rows, micro-batches and ranks cannot change its gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lightning_rl.algorithms import cispo, dppo, ppo, reinforce
from lightning_rl.algorithms.correction import corrections
from lightning_rl.algorithms.gspo import sequence_log_ratio
from lightning_rl.algorithms.kl import ESTIMATORS, LARGEST_LOG_RATIO, k3
from lightning_rl.algorithms.settings import Correction, Settings

if TYPE_CHECKING:
    from torch import Tensor


class TokenBatch(NamedTuple):
    """Sampled tokens with a loss; [L] each. All tokens of a call that are trained on are in one batch."""

    logprobs: Tensor
    """log π, with gradient."""
    entropies: Tensor
    """H(π) in nats at the token's state; with gradient where the objective has an entropy bonus."""
    old: Tensor
    """log π_old."""
    behaviour: Tensor
    """log μ, as the server sampled."""
    advantages: Tensor
    weights: Tensor
    """The token's share of the step's loss."""
    sequences: Tensor
    """int64: number of the token's call in the batch, from 0."""
    correctable: Tensor
    """bool: whether μ is of the same distribution as π. Where sampling was restricted (a grammar, top_p, penalties), π_old / μ says
    nothing about trainer and server: those tokens get the correction 1."""
    reference: Tensor | None = None
    """log π_ref, if there is a reference policy."""


class LossSum(NamedTuple):
    """Both add up over the micro-batches of a step, as long as a call's tokens stay in one."""

    loss: Tensor
    """Scalar; weights already make it the step's mean."""
    metrics: dict[str, Tensor]
    """Sums over tokens; see `_metrics`."""


def objective_loss(batch: TokenBatch, settings: Settings) -> LossSum:
    """Σ w · (c · surrogate + β · kl − η · H). Gradients flow into `logprobs`, and into `entropies` if there is a bonus.

    Computed in float32 at least, in float64 where it is given. ValueError if the objective has a KL penalty in its loss and the
    batch no reference.
    """
    batch = _widened(batch)
    old = batch.behaviour.where(batch.correctable, batch.old) if settings.old == "server" else batch.old
    log_ratio = batch.logprobs - old
    if settings.ratio == "sequence":
        log_ratio = sequence_log_ratio(log_ratio, batch.sequences)
    ratio = log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
    per_token, clipped = _surrogate(batch, old, ratio, settings)
    constants = _corrections(batch, settings)
    per_token = per_token * constants
    if settings.kl is not None and settings.kl.place == "loss":
        if batch.reference is None:
            raise ValueError(f"{settings.name} has a KL penalty in its loss, but the batch has no reference log-probs")
        estimate = ESTIMATORS[settings.kl.estimator](batch.logprobs - batch.reference)
        per_token = per_token + settings.kl.coefficient * estimate
    if settings.entropy:
        per_token = per_token - settings.entropy * batch.entropies
    return LossSum((per_token * batch.weights).sum(), _metrics(batch, ratio.detach(), clipped, constants))


def _widened(batch: TokenBatch) -> TokenBatch:
    def wide(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype.itemsize < 4 else tensor

    return batch._replace(
        logprobs=wide(batch.logprobs),
        entropies=wide(batch.entropies),
        old=wide(batch.old.detach()),
        behaviour=wide(batch.behaviour.detach()),
        advantages=wide(batch.advantages),
        weights=wide(batch.weights),
        reference=None if batch.reference is None else wide(batch.reference.detach()),
    )


def _surrogate(batch: TokenBatch, old: Tensor, ratio: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    match settings.surrogate:
        case "reinforce":
            return reinforce.surrogate(batch.logprobs, batch.advantages)
        case "clip":
            return ppo.surrogate(ratio, batch.advantages, settings)
        case "cispo":
            return cispo.surrogate(batch.logprobs, ratio, batch.advantages, settings)
        case "dppo":
            return dppo.surrogate(batch.logprobs, old, ratio, batch.advantages, settings)


def _corrections(batch: TokenBatch, settings: Settings) -> Tensor:
    """Where the ratio is to μ itself, there is nothing to correct."""
    what = Correction(kind="none") if settings.old == "server" else settings.correction
    return corrections(batch.old - batch.behaviour, batch.correctable, batch.sequences, what)


def _metrics(batch: TokenBatch, ratio: Tensor, clipped: Tensor, constants: Tensor) -> dict[str, Tensor]:
    """Sums over tokens.

    Means are of all `tokens` for `clip_fraction`, `ratio`, `correction` (c), `correction_masked` (c = 0), `kl_old` (KL(π_old ‖ π))
    and `kl_reference` (KL(π ‖ π_ref), if there is a reference); and of the `correctable` tokens for `kl_behaviour` (KL(μ ‖ π)).
    With `weight_sum` (Σ c) and `weight_square_sum` (Σ c²) of the correctable tokens, the effective sample size is
    (Σ c)² / (correctable · Σ c²) of them.
    """
    logprobs = batch.logprobs.detach()
    weights = constants.where(batch.correctable, 0.0)
    metrics = {
        "tokens": constants.new_full((), len(constants)),
        "correctable": batch.correctable.sum().to(constants.dtype),
        "clip_fraction": clipped.sum().to(constants.dtype),
        "ratio": ratio.sum(),
        "correction": constants.sum(),
        "correction_masked": (constants == 0).sum().to(constants.dtype),
        "weight_sum": weights.sum(),
        "weight_square_sum": weights.square().sum(),
        "kl_old": k3(batch.old - logprobs).sum(),
        "kl_behaviour": k3(batch.behaviour - logprobs).where(batch.correctable, 0.0).sum(),
    }
    if batch.reference is not None:
        metrics["kl_reference"] = k3(logprobs - batch.reference).sum()
    return metrics
