"""Whether what a credit rule gave is credit: a finite number for each call, and each of them comparable.

Every rule is checked, ours too. A number that is missing or not finite would else be found, if at all, in the weights. Numbers and
sequences of other libraries (NumPy's, tensors) are taken for what they are, and given back as Python's.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from typing import Any, NoReturn

from lightning_rl.credit.records import Credits, Rollout, Term, compared_in_group
from lightning_rl.errors import CreditError


def checked(given: Any, group: Sequence[Rollout], name: str) -> Credits:
    """What the rule of that name gave, as credits.

    Raises CreditError, which names the rule, the call and its episode, for an answer that is neither a mapping nor credits; that
    leaves out a call, or has one that is not the learner's in this group; a value that is no finite number; terms that are not a
    list of `Term`; a scope without points, or with one of a rollout that is not in the group; a number of tokens that is not the
    call's.
    """
    check = _Check(group, name)
    if isinstance(given, Credits):
        return check.credits(given)
    if not isinstance(given, Mapping):
        raise CreditError(
            f"the credit rule {name} gave {type(given).__name__} for the group of {', '.join(check.rollouts)}",
            hint="a rule returns a number for each call by its id, or lightning_rl.credit.records.Credits",
        )
    return compared_in_group(group, check.returns(given))


class _Check:
    """Of one answer."""

    def __init__(self, group: Sequence[Rollout], name: str) -> None:
        self.name = name
        self.rollouts = [rollout.id for rollout in group]
        self.episode_of = {call.id: rollout.id for rollout in group for call in rollout.calls}
        self.tokens = {call.id: len(call.sampled_ids) for rollout in group for call in rollout.calls}

    def credits(self, credits: Credits) -> Credits:
        returns = self.returns(credits.returns)
        scopes = {
            scope: self._points(scope, points) for scope, points in self._mapping(credits.scopes, "scopes").items()
        }
        alone = credits.alone
        if isinstance(alone, str) or not isinstance(alone, Collection):
            self._refuse(f"gave {alone!r} for the calls that are alone, which is no collection of call ids")
        self._known(alone)
        terms = self._of_calls(credits.terms, "terms")
        token_advantages = self._of_calls(credits.token_advantages, "token_advantages")
        value_targets = self._of_calls(credits.value_targets, "value_targets")
        return Credits(
            returns=returns,
            terms={call_id: self._terms(call_id, given, scopes) for call_id, given in terms.items()},
            scopes=scopes,
            alone=frozenset(alone),
            token_advantages={
                call_id: [self._number(value, self._call(call_id)) for value in self._values(call_id, values)]
                for call_id, values in token_advantages.items()
            },
            value_targets={
                call_id: [
                    None if value is None else self._number(value, self._call(call_id))
                    for value in self._values(call_id, values)
                ]
                for call_id, values in value_targets.items()
            },
        )

    def returns(self, given: Any) -> dict[str, float]:
        returns = self._of_calls(given, "returns")
        missing = [call_id for call_id in self.episode_of if call_id not in returns]
        if missing:
            more = f", and for {len(missing) - 1} more" if len(missing) > 1 else ""
            self._refuse(f"gave nothing for {self._call(missing[0])}{more}")
        return {call_id: self._number(value, self._call(call_id)) for call_id, value in returns.items()}

    def _points(self, scope: Any, given: Any) -> dict[str, float]:
        points = self._mapping(given, f"the points of the scope {scope!r}")
        for rollout_id in points:
            if rollout_id not in self.rollouts:
                self._refuse(f"has a point of {rollout_id!r}, which is no rollout of the group, in the scope {scope!r}")
        return {id: self._number(value, f"episode {id} in the scope {scope!r}") for id, value in points.items()}

    def _terms(self, call_id: str, given: Any, scopes: Mapping[Any, Any]) -> list[Term]:
        call = self._call(call_id)
        if not isinstance(given, list | tuple) or not all(isinstance(term, Term) for term in given):
            self._refuse(f"gave {call} the terms {given!r}, which are no list of lightning_rl.credit.records.Term")
        return [
            Term(
                value=self._number(term.value, call),
                scope=self._scope(term.scope, call, scopes),
                weight=self._number(term.weight, f"a term of {call}, as its weight,"),
                centred=bool(term.centred),
            )
            for term in given
        ]

    def _scope(self, scope: Any, call: str, scopes: Mapping[Any, Any]) -> Any:
        try:
            known = scope in scopes
        except TypeError:
            self._refuse(f"compares {call} in the scope {scope!r}, which cannot be a key; a tuple can")
        if not known:
            self._refuse(f"compares {call} in a scope without points: {scope!r}")
        return scope

    def _values(self, call_id: str, given: Any) -> list[Any]:
        values = given.tolist() if hasattr(given, "tolist") else given
        if not isinstance(values, list | tuple):
            self._refuse(f"gave {self._call(call_id)} {given!r}, which is no list of a value for each token")
        if len(values) != self.tokens[call_id]:
            self._refuse(f"gave {len(values)} values for the {self.tokens[call_id]} tokens of {self._call(call_id)}")
        return [*values]

    def _of_calls(self, given: Any, what: str) -> Mapping[str, Any]:
        of_calls = self._mapping(given, what)
        self._known(of_calls)
        return of_calls

    def _mapping(self, given: Any, what: str) -> Mapping[Any, Any]:
        if not isinstance(given, Mapping):
            self._refuse(f"gave {type(given).__name__} for {what}, which is no mapping")
        return given

    def _known(self, calls: Collection[Any]) -> None:
        for call_id in calls:
            if not isinstance(call_id, str) or call_id not in self.episode_of:
                self._refuse(
                    f"names {call_id!r}, which is no call of the learner's in the group of {', '.join(self.rollouts)}"
                )

    def _number(self, value: Any, whose: str) -> float:
        if not isinstance(value, Real):
            self._refuse(f"gave {whose} {value!r}, which is no number")
        try:
            number = float(value)
        except OverflowError:
            self._refuse(f"gave {whose} a number that is too large")
        if not math.isfinite(number):
            self._refuse(f"gave {whose} the value {number}")
        return number

    def _call(self, call_id: str) -> str:
        return f"call {call_id} of episode {self.episode_of[call_id]}"

    def _refuse(self, what: str) -> NoReturn:
        raise CreditError(f"the credit rule {self.name} {what}")
