"""What the trainer's models must say about a step's tokens before anything is learned from them.

Most objectives need nothing: with one update a step, π_old is the policy that is updated, and its log-probs come with the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct

from lightning_rl.credit import WITH_CRITIC
from lightning_rl.episode import Call, Episode
from lightning_rl.errors import RecipeError
from lightning_rl.recipe import Critic, Recipe
from lightning_rl.scores import CallScores
from lightning_rl.transition import learning_calls


class Needs(Struct, frozen=True, kw_only=True):
    old: bool
    """log π_old: the policy changes between the updates of a step."""
    reference: bool
    """log π_ref, for a KL penalty."""
    values: bool
    """The critic's values, for the credit rule."""
    before_credit: bool
    """Whether rewards and advantages depend on the scores, and not only the loss."""

    @property
    def scores(self) -> bool:
        return self.old or self.reference or self.values


def critic(recipe: Recipe) -> Critic | None:
    """The critic that is trained: for a rule that reads one, and for a user's rule where the recipe has one."""
    return recipe.train.critic or (Critic() if recipe.train.rule in WITH_CRITIC else None)


def needs(recipe: Recipe) -> Needs:
    kl = recipe.train.objective.settings().kl
    values = critic(recipe) is not None
    return Needs(
        old=recipe.train.minibatches * recipe.train.epochs > 1,
        reference=kl is not None,
        values=values,
        before_credit=values or (kl is not None and kl.place != "loss"),
    )


def learners_calls(recipe: Recipe, episode: Episode) -> list[Call]:
    """What the learner did in an episode, in order of arrival: what credit is about, and what is scored."""
    learning = set(learning_calls(episode, recipe.agent.learns, recipe.model.adapters))
    return sorted((call for call in episode.calls if call.id in learning), key=lambda call: (call.index, call.id))


def calls_to_score(recipe: Recipe, counted: Sequence[Episode]) -> list[Call]:
    """The learner's, but for those that were not sampled from a distribution, and redacted ones: their ids are not what was
    sampled."""
    return [
        call
        for episode in counted
        for call in learners_calls(recipe, episode)
        if call.sampled_ids and call.temperature > 0 and not call.redacted
    ]


def require_scores(recipe: Recipe, counted: Sequence[Episode], scores: Mapping[str, CallScores] | None) -> None:
    """Raises RecipeError if credit needs scores of these episodes, and nobody has scored them."""
    if scores is not None or not needs(recipe).before_credit or not calls_to_score(recipe, counted):
        return
    if needs(recipe).values:
        what, instead = f"the credit rule {recipe.train.rule} reads a critic's values", "choose another rule"
    else:
        what = "train.objective.kl, taken from rewards, reads the log-probs of the trainer's policies"
        instead = "take the penalty away, train.objective.kl={coefficient: 0}"
    raise RecipeError(
        f"{what}, and a record of episodes has none",
        hint="`lrl traces replay … --train --out DIR` trains a policy that says them; for credit from the record alone "
        f"{instead}",
    )
