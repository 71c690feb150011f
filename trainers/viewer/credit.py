"""Who got what in a group, by the run's own credit rule and by others, computed on the spot.

Credit is compared over a whole step, so the step is loaded and each rule is computed for all of it; the latest are kept, with
what was computed of them, so that going from rule to rule, or from group to group, is quick. Episodes that count have
ended and change no more: a step is loaded anew only when there are others. Tokens are counted before a step is loaded, so that
what is kept is bounded, and a step beyond that is refused.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_rl.credit import RULES
from lightning_rl.credit.records import Rollout
from lightning_rl.errors import LightningError
from lightning_rl.recipe.functions import did_you_mean
from lightning_rl.store import Store
from lightning_rl.store.outlines import load_ended, load_for_credit, load_group_place, load_step_tokens
from trainers.credit_view.report import GroupReport, RuleCredit, credit_by, group_report
from trainers.learning import groups_of, rollouts_of
from trainers.viewer.episode_view import TRAIN
from trainers.viewer.library import NotThere
from trainers.viewer.opened import OpenRun
from trainers.viewer.texts import short

if TYPE_CHECKING:
    from lightning_rl.recipe import Recipe

KEPT_STEPS = 4
MOST_TOKENS = 6_000_000
"""Prompt and sampled tokens of the steps that are kept, some 300 MB."""


class NoCredit(LightningError):
    """Credit that was asked for where there is none."""


def group_credit(run: OpenRun, group: str, rules: Sequence[str]) -> GroupReport:
    """As `credit_report` has it. Raises NotThere, NoCredit, and what a rule or the recipe's weights raise."""
    if run.recipe is None:
        raise NoCredit(
            run.recipe_note or "by which recipe are these episodes to be credited?",
            hint="`lrl ui` of a run's directory knows it; `lrl credit FILE EPISODE --recipe recipe.yaml` takes any",
        )
    wanted = [_known(rule, run.recipe) for rule in rules]
    step = _step_of(run.store, group)
    with _STEPS.lock:
        credits = _STEPS.of(run.store, run.recipe, step)
        members = credits.rollouts.get(group)
        if members is None:
            raise NoCredit(
                f"no episode of group {short(group)} counts, so none has credit",
                hint="they are running, or failed: the outcomes of the recipe say which count",
            )
        others = [credits.by(rule) for rule in dict.fromkeys(wanted)]
        return group_report(run.recipe, group, members, credits.by(None), others)


class _StepCredits:
    """A step's rollouts, and what rules have given to them so far."""

    def __init__(self, recipe: Recipe, store: Store, step: int, tokens: int) -> None:
        self._recipe, self.tokens = recipe, tokens
        episodes = store.read(lambda connection: load_for_credit(connection, TRAIN, step))
        self.rollouts: dict[str, list[Rollout]] = {
            group: rollouts_of(recipe, members) for group, members in groups_of(episodes).items()
        }
        self._by_rule: dict[str | None, RuleCredit] = {}

    def by(self, rule: str | None) -> RuleCredit:
        """None is the recipe's own."""
        own = self._by_rule.get(None)
        if own is not None and rule == own.rule:
            return own
        if rule not in self._by_rule:
            try:
                self._by_rule[rule] = credit_by(self._recipe, self.rollouts, rule)
            except SystemExit as error:
                raise NoCredit(
                    f"the credit rule {short(rule or self._recipe.train.rule)} ends the program (sys.exit)",
                    hint="a rule says that it cannot go on by raising an error",
                ) from error
        return self._by_rule[rule]


class _Steps:
    """The latest steps that somebody looked at, of any store. Whoever uses one holds the lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._kept: OrderedDict[tuple[weakref.ref[Store], int], tuple[object, _StepCredits]] = OrderedDict()

    def of(self, store: Store, recipe: Recipe, step: int) -> _StepCredits:
        key = (weakref.ref(store), step)
        state = (recipe, store.read(lambda connection: load_ended(connection, TRAIN, step)))
        before, credits = self._kept.pop(key, (None, None))
        if credits is None or before != state:
            tokens = store.read(lambda connection: load_step_tokens(connection, TRAIN, step))
            if tokens > MOST_TOKENS:
                raise NoCredit(
                    f"step {step + 1} has {tokens:,} tokens: the viewer computes the credit of up to {MOST_TOKENS:,}",
                    hint="`lrl credit RUN EPISODE` computes it of any",
                )
            credits = None
            self._make_room(tokens)
            credits = _StepCredits(recipe, store, step, tokens)
        self._kept[key] = (state, credits)
        return credits

    def _make_room(self, tokens: int) -> None:
        for key in list(self._kept):
            held = sum(kept.tokens for _, kept in self._kept.values())
            if key[0]() is None or held + tokens > MOST_TOKENS or len(self._kept) >= KEPT_STEPS:
                del self._kept[key]


_STEPS = _Steps()


def _known(rule: str, recipe: Recipe) -> str:
    """A rule of ours, or the recipe's own: no other code is run because an address names it."""
    if rule not in RULES and rule != recipe.train.rule:
        raise NoCredit(
            f"there is no credit rule {short(rule)}{did_you_mean(rule, [*RULES])}",
            hint=f"choose from {', '.join(RULES)}",
        )
    return rule


def _step_of(store: Store, group: str) -> int:
    place = store.read(lambda connection: load_group_place(connection, group)) if group else None
    if place is None:
        raise NotThere(f"there is no group {short(group)}", hint="groups are those of training: STEP/TASK, from step 0")
    phase, step = place
    if phase != TRAIN:
        raise NoCredit(
            f"group {short(group)} is of the phase {short(phase)}: credit is assigned in training only",
            hint="its rewards are at its episodes",
        )
    return step
