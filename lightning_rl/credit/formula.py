"""The formula of each credit rule of ours, in words and in LaTeX: for people, not for computing.

Symbols: r_k what call k of a rollout earned, K the number of its calls, O the rest of the rollout's reward, R = Σ r_k + O.
A value is compared with its company, the rollouts that a rule names: adv(x | company) is how much better x is than what those
earned, as the objective says (`algorithms.formula`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from lightning_rl.credit import parameters, rule_function


class Formula(Struct, frozen=True, kw_only=True):
    words: str
    """What a call gets."""
    company: str = ""
    """With whom that is compared, where the objective compares; "" for rules that do it themselves."""
    latex: str


FORMULAS = {
    "equal": Formula(
        words="each call gets the whole return R",
        company="the group's rollouts",
        latex=r"A_k = \mathrm{adv}(R \mid \text{group})",
    ),
    "final": Formula(
        words="the last call gets the whole return R; the others get no credit",
        company="the group's rollouts",
        latex=r"A_K = \mathrm{adv}(R \mid \text{group})",
    ),
    "step_rewards": Formula(
        words="each call keeps what it earned, r_k, and has an equal share of the outcome O",
        company="of r_k the k-th calls of the group, of O the group's outcomes",
        latex=r"A_k = \mathrm{adv}(r_k \mid \text{calls } k) + \tfrac{1}{K}\, \mathrm{adv}(O \mid \text{group})",
    ),
    "return_to_go": Formula(
        words="each call gets what was earned from it on",
        company="the k-th calls of the group, 0 for rollouts that had ended",
        latex=r"A_k = \mathrm{adv}(G_k \mid \text{calls } k), \quad G_k = r_k + \gamma\, G_{k+1}, \quad G_K = r_K + O",
    ),
    "per_agent": Formula(
        words="each call gets what its agent's calls earned and the outcome",
        company="the same agent in the group's rollouts",
        latex=r"A_k = \mathrm{adv}(R_a \mid \text{agent } a), \quad R_a = \sum_{j \in a} r_j + O",
    ),
    "mt_grpo": Formula(
        words="each call but the last gets its own reward r_k, and λ times the outcome; the last gets the outcome, which has its "
        "own reward in it",
        company="of r_k the k-th calls of the group, of the outcome the group's",
        latex=r"A_k = \mathrm{adv}(r_k \mid \text{calls } k) + \lambda\, A_K \;\; (k < K), \quad "
        r"A_K = \mathrm{adv}(O + r_K \mid \text{group})",
    ),
    "tree": Formula(
        words="each call gets the mean outcome of what it led to, less that of the state it was made in (or of the nearest one "
        "above it with company); nothing else is taken away, and the scale is that of the group's returns",
        latex=r"A_k = \frac{V(s_k, a_k) - V(s_k^*)}{\sigma}",
    ),
    "gigpo": Formula(
        words="each call gets the return R of its rollout, and ω times G_k, what was earned from it on",
        company="of R the group's rollouts, of G_k the calls of the group that were made before the same observation, each rollout "
        "the mean of its own",
        latex=r"A_k = \mathrm{adv}(R \mid \text{group}) + \omega\, \mathrm{adv}(G_k \mid \text{observation of } k), \quad "
        r"G_k = r_k + \gamma\, G_{k+1}, \quad G_K = r_K + O",
    ),
    "turn_gae": Formula(
        words="the critic's advantages over calls: each call is one action, V_k the value before its first token; the outcome is "
        "earned at the last call; all tokens of a call get A_k",
        latex=r"A_k = \sum_{l \ge 0} (\gamma \lambda)^l \delta_{k+l}, \quad \delta_k = r_k + \gamma V_{k+1} - V_k",
    ),
    "token_gae": Formula(
        words="the critic's advantages over the sampled tokens of the rollout, one after the other; what a call earned is earned "
        "at its last token, the outcome at the last of all",
        latex=r"A_t = \sum_{l \ge 0} (\gamma \lambda)^l \delta_{t+l}, \quad \delta_t = r_t + \gamma V_{t+1} - V_t",
    ),
}
SYMBOLS = {
    "return_to_go": {"discount": r"\gamma"},
    "mt_grpo": {"weight": r"\lambda"},
    "gigpo": {"discount": r"\gamma", "weight": r"\omega"},
    "turn_gae": {"discount": r"\gamma", "lam": r"\lambda"},
    "token_gae": {"discount": r"\gamma", "lam": r"\lambda"},
}
"""What parameters are called in the formulas."""


def rule_formula(rule: str, arguments: Mapping[str, Any], *, compared: bool = True) -> Formula:
    """With the values of all parameters, and where the objective has a baseline or a scale (`compared`) with the company in the
    words. `rule` may be a user's function, of which nothing but the arguments is known."""
    if ":" in rule:
        values = dict(arguments)
        known = Formula(
            words="each call gets what the function says",
            company="what the function says; of returns that it gives without one, the group's rollouts, each the mean of its "
            "calls",
            latex=r"A_k = \text{user's rule}",
        )
    else:
        values, known = {**parameters(rule_function(rule)), **arguments}, FORMULAS[rule]
    words = f"{known.words}; company: {known.company}" if known.company and compared else known.words
    if not values:
        return Formula(words=words, latex=known.latex)
    symbols = SYMBOLS.get(rule, {})
    given = ", ".join(f"{name} = {value}" for name, value in values.items())
    latex = r",\; ".join(f"{symbols.get(name) or _text(name)} = {_value(value)}" for name, value in values.items())
    return Formula(words=f"{words} ({given})", latex=rf"{known.latex} \quad ({latex})")


def _value(value: Any) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else _text(str(value))


def _text(text: str) -> str:
    """Text in a formula: letters that mean something in LaTeX are written as themselves."""
    escaped = "".join(f"\\{letter}" if letter in "_%&#${}" else letter for letter in text if letter not in "\\^~")
    return rf"\text{{{escaped}}}"
