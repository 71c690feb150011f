"""An objective as a formula, in words and in LaTeX, from its `Settings`: what will be minimised, knob by knob.

A knob is in the text exactly where it has an effect: bounds of a ratio that nothing is done with are not printed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from lightning_rl.algorithms.advantage import EPSILON as GROUP_EPSILON
from lightning_rl.algorithms.batch import EPSILON as BATCH_EPSILON
from lightning_rl.algorithms.kl import LARGEST_K3_PENALTY
from lightning_rl.algorithms.settings import AdvantageSettings, Correction, Kl, Overlong, Settings
from lightning_rl.credit import WITH_CRITIC
from lightning_rl.credit.formula import rule_formula


class Part(Struct, frozen=True, kw_only=True):
    what: str
    """Which part of the objective it is, a word or two."""
    words: str
    latex: str
    """A formula without dollar signs; "" where there is none."""


def formula(
    settings: Settings,
    rule: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    *,
    critic: float | None = None,
    length: int | None = None,
) -> list[Part]:
    """In the order of computing. `rule` and its arguments are the recipe's credit rule; None is the objective's own. `critic`:
    the weight of a critic's loss, where one is trained; `length`: L, `sampling.max_tokens`, where it is known.

    KeyError if `rule` is neither built in nor a reference to a function.
    """
    rule = rule or settings.credit
    has_company = (settings.advantage.baseline, settings.advantage.normalise) != ("none", "none")
    credit = rule_formula(rule, arguments or {}, compared=has_company)
    parts = [
        _reward(settings.overlong, settings.kl, length),
        Part(what="credit", words=f"{rule}: {credit.words}", latex=credit.latex),
        _critics_advantage() if rule in WITH_CRITIC else _advantage(settings.advantage, rule),
        _token_penalty(settings.kl),
        _batch(settings.advantage),
        _ratio(settings),
        _surrogate(settings),
        _correction(settings),
        _kl(settings.kl),
        _entropy(settings.entropy),
        _weights(settings, length),
        _critic(rule, critic),
        _loss(settings, with_critic=critic is not None),
        _dynamic(settings.dynamic_sampling),
    ]
    return [part for part in parts if part is not None]


def _reward(overlong: Overlong | None, kl: Kl | None, length: int | None) -> Part | None:
    words, latex = [], r"r_k \leftarrow r_k"
    if overlong is not None:
        buffer, penalty = number(overlong.buffer), number(overlong.penalty)
        words.append(
            f"a call loses up to {penalty}, growing over the last {buffer} of {_limit(length)}, for its length y"
        )
        latex += (
            rf" - {penalty} \, \mathrm{{clip}}\!\left(\frac{{y_k - (1 - {buffer}) L}}{{{buffer} L}},\, 0,\, 1\right)"
        )
    if kl is not None and kl.place == "reward":
        beta, name = number(kl.coefficient), _penalty_name(kl)
        words.append(f"a call loses {beta} times the sum of {name} over its tokens, against the reference policy")
        latex += rf" - {beta} \sum_{{t \in k}} {_divergence(kl, old=True)}"
    return Part(what="reward", words="; ".join(words), latex=latex) if words else None


def _advantage(settings: AdvantageSettings, rule: str) -> Part:
    """The tree takes away the baseline itself, so that only the scale is left; a user's rule may do so."""
    epsilon = _latex_number(GROUP_EPSILON)
    scaled = settings.normalise == "std"
    sigma = rf"\sigma = s_R + {epsilon}" if scaled else r"\sigma = 1"
    divided = (
        f"divided by the company's standard deviation + {number(GROUP_EPSILON)}"
        if scaled
        else "not divided by anything"
    )
    if rule == "tree":
        of = "the standard deviation of the group's returns"
        words = (
            f"the difference is divided by {of} + {number(GROUP_EPSILON)}" if scaled else f"the difference is {divided}"
        )
        return Part(what="advantage", words=words, latex=sigma)
    base_words, top = {
        "group_mean": ("the mean over its company (its own rollout among them)", r"x_i - \bar{x}"),
        "leave_one_out": ("the mean over the others of its company", r"x_i - \bar{x}_{-i}"),
        "none": ("", "x_i"),
    }[settings.baseline]
    if settings.baseline == "none":
        words = f"the value itself; it is compared with nothing, and {divided}"
    else:
        words = f"{base_words} is taken from a value, and the difference is {divided}"
        words += "; each rollout is one point of a baseline, however many calls it made"
    within = scaled and (":" in rule or rule == "gigpo")
    if within:
        words += (
            "; where calls of one rollout have values of their own in one company, v, the mean over the rollouts of the mean "
            "square by which they differ from their rollout's point, is added to the variance"
        )
    if ":" in rule:
        words += "; from terms that the rule says are differences, nothing is taken"
    spread = r"\sqrt{s_x^2 + v_x}" if within else "s_x"
    latex = rf"\frac{{{top}}}{{{spread} + {epsilon}}}" if scaled else top
    return Part(what="advantage", words=words, latex=rf"\mathrm{{adv}}(x_i) = {latex}")


def _critics_advantage() -> Part:
    return Part(
        what="advantage",
        words="the critic's, as the credit rule computes it; it has no group to be compared with, and needs no baseline",
        latex="",
    )


def _critic(rule: str, coefficient: float | None) -> Part | None:
    if coefficient is None:
        return None
    target, targets, latex = {
        "token_gae": (
            "its advantage by the rule plus V as it was before the step",
            "tokens",
            r"A_t^{\mathrm{rule}} + V_t",
        ),
        "turn_gae": (
            "its call's advantage by the rule plus V as it was before the step, and only first tokens are asked",
            "calls",
            r"A_k^{\mathrm{rule}} + V_k",
        ),
    }.get(rule, ("what the credit rule gives as `value_targets`", "tokens that have one", r"\text{user's}"))
    return Part(
        what="critic",
        words=f"V, what the critic says a state is worth, learns beside the policy: {number(coefficient)} times the mean square by "
        f"which V before a token misses its target, over the M {targets} of the optimiser step; the target is {target}",
        latex=rf"\mathcal{{V}} = {_latex_number(coefficient)} \sum_t v_t \left(V(s_t) - T_t\right)^2, \quad "
        rf"v_t = \frac{{1}}{{M}}, \quad T_t = {latex}",
    )


def _token_penalty(kl: Kl | None) -> Part | None:
    if kl is None or kl.place != "token_reward":
        return None
    beta = number(kl.coefficient)
    return Part(
        what="token penalty",
        words=f"each token loses {beta} times the sum of {_penalty_name(kl)}, against the reference policy, "
        "from it to the end of its rollout",
        latex=rf"A_t \leftarrow A_t - {beta} \sum_{{j \ge t}} {_divergence(kl, old=True, index='j')}",
    )


def _batch(settings: AdvantageSettings) -> Part | None:
    match settings.batch:
        case "none":
            return None
        case "mean":
            return Part(
                what="batch",
                words="the mean over the rollouts of the step is taken away, of which each counts as the mean over its tokens that "
                "are trained on",
                latex=r"A_t \leftarrow A_t - \frac{1}{I} \sum_i \overline{A}_i",
            )
        case "std":
            return Part(
                what="batch",
                words="the mean over all tokens of the step that are trained on is taken away, and the difference divided by "
                f"the root of their variance + {number(BATCH_EPSILON)}; a rollout of more tokens counts more in both",
                latex=r"A_t \leftarrow \frac{A_t - \overline{A}}"
                rf"{{\sqrt{{\mathrm{{var}}(A) + {_latex_number(BATCH_EPSILON)}}}}}",
            )


def _ratio(settings: Settings) -> Part | None:
    if settings.surrogate == "reinforce":
        return None
    below = r"\mu" if settings.old == "server" else r"\pi_{\mathrm{old}}"
    to = (
        "the policy as the server sampled (to the trainer's where the sampling was restricted)"
        if settings.old == "server"
        else "the trainer's policy before the step"
    )
    if settings.ratio == "token":
        latex = rf"\rho_t = \frac{{\pi(y_t)}}{{{below}(y_t)}}"
        return Part(what="ratio", words=f"of each token, to {to}", latex=latex)
    return Part(
        what="ratio",
        words=f"the geometric mean over the call's tokens, to {to}; in the gradient each token has its own part",
        latex=rf"\rho_t = \Big(\prod_{{j \in k}} \frac{{\pi(y_j)}}{{{below}(y_j)}}\Big)^{{1 / n_k}}",
    )


def _surrogate(settings: Settings) -> Part:
    low, high = number(settings.clip_low), number(settings.clip_high)
    span = f"1 - {low} … 1 + {high} ({number(1 - settings.clip_low)} … {number(1 + settings.clip_high)})"
    bounds = rf"1 - {_latex_number(settings.clip_low)},\, 1 + {_latex_number(settings.clip_high)}"
    match settings.surrogate:
        case "reinforce":
            return Part(
                what="surrogate",
                words="the log-probability times the advantage; no ratio, no clipping",
                latex=r"\ell_t = -A_t \log \pi(y_t)",
            )
        case "clip":
            words = f"the smaller promise of the ratio and of the ratio clipped to {span}"
            latex = rf"\min\big(\rho_t A_t,\; \mathrm{{clip}}(\rho_t,\, {bounds})\, A_t\big)"
            if settings.dual_clip is None:
                return Part(what="surrogate", words=words, latex=rf"\ell_t = -{latex}")
            bound = number(settings.dual_clip)
            least = rf"\max(m_t,\, {_latex_number(settings.dual_clip)}\, A_t)"
            return Part(
                what="surrogate",
                words=f"{words}; where the advantage is negative, a token's loss is at most {bound} times its size",
                latex=rf"m_t = {latex}, \quad \ell_t = \begin{{cases}} -{least} & A_t < 0 \\ -m_t & \text{{else}} \end{{cases}}",
            )
        case "cispo":
            return Part(
                what="surrogate",
                words=f"the log-probability times the advantage, weighed by the ratio clipped to {span} "
                "and held constant: no token loses its gradient",
                latex=rf"\ell_t = -\mathrm{{sg}}\big(\mathrm{{clip}}(\rho_t,\, {bounds})\big)\, A_t \log \pi(y_t)",
            )
        case "dppo":
            below = r"\mu" if settings.old == "server" else r"\pi_{\mathrm{old}}"
            return Part(
                what="surrogate",
                words="the ratio times the advantage; a token has no loss where its probability has risen by more than "
                f"{high} with a positive advantage, or fallen by more than {low} with a negative one",
                latex=rf"\ell_t = \begin{{cases}} 0 & A_t > 0,\; \pi - {below} > {_latex_number(settings.clip_high)} \\ "
                rf"0 & A_t < 0,\; \pi - {below} < -{_latex_number(settings.clip_low)} \\ -\rho_t A_t & \text{{else}} \end{{cases}}",
            )


def _correction(settings: Settings) -> Part:
    given = settings.correction
    if settings.old == "server":
        words = "none: the ratio is to the server's policy itself"
        if settings.surrogate == "reinforce":
            words = "none: `old: server` asks for none"
        return Part(what="correction", words=words, latex="c_t = 1")
    if given.kind == "none":
        return Part(
            what="correction", words="none: trainer and server are taken to agree on every token", latex="c_t = 1"
        )
    weight = (
        r"w_t = \frac{\pi_{\mathrm{old}}(y_t)}{\mu(y_t)}"
        if given.level == "token"
        else r"w_t = \prod_{j \in k} \frac{\pi_{\mathrm{old}}(y_j)}{\mu(y_j)}"
    )
    of = "its probability" if given.level == "token" else "its call's probability"
    what, latex = _corrected(given)
    return Part(
        what="correction",
        words=f"{given.kind}: w is {of} for the trainer before the step over that for the server; {what}; tokens whose "
        "sampling was restricted keep their loss",
        latex=rf"{weight}, \quad {latex}",
    )


def _corrected(given: Correction) -> tuple[str, str]:
    low, high = number(given.low), number(given.high)
    ends = rf"{_latex_number(given.low)},\, {_latex_number(given.high)}"
    inside = rf"{_latex_number(given.low)} \le {{}} %s \le {_latex_number(given.high)}"
    match given.kind:
        case "mask" | "icepop":
            return (
                f"the loss is multiplied by w where {low} ≤ w ≤ {high}, and by 0 elsewhere",
                rf"c_t = w_t \, [{inside % 'w_t'}]",
            )
        case "sequence_mask":
            mean = r"\Big(\prod_{j \in k} \tfrac{\pi_{\mathrm{old}}}{\mu}\Big)^{1/n_k}"
            return (
                f"the loss is multiplied by w in calls whose geometric mean over their tokens is from {low} to {high}, and by 0 in "
                "others",
                rf"c_t = w_t \, [{inside % mean}]",
            )
        case _:
            return (
                f"the loss is multiplied by w, held between {low} and {high}",
                rf"c_t = \mathrm{{clip}}(w_t,\, {ends})",
            )


def _kl(kl: Kl | None) -> Part:
    if kl is None:
        return Part(what="KL", words="no penalty for leaving the reference policy; none is kept", latex="")
    if kl.place != "loss":
        where = "reward" if kl.place == "reward" else "token penalty"
        return Part(what="KL", words=f"in the {where}, above; not in the loss", latex="")
    return Part(
        what="KL",
        words=f"{number(kl.coefficient)} times {kl.estimator} of each token against the reference policy, added to its loss",
        latex=rf"\kappa_t = {_latex_number(kl.coefficient)} \cdot {_divergence(kl, old=False)}",
    )


def _penalty_name(kl: Kl) -> str:
    return f"k3 (at most {number(LARGEST_K3_PENALTY)} a token)" if kl.estimator == "k3" else kl.estimator


def _divergence(kl: Kl, *, old: bool, index: str = "t") -> str:
    policy = r"\pi_{\mathrm{old}}" if old else r"\pi"
    d = rf"\log\frac{{{policy}(y_{index})}}{{\pi_{{\mathrm{{ref}}}}(y_{index})}}"
    match kl.estimator:
        case "k1":
            return d
        case "k2":
            return rf"\tfrac12 \Big({d}\Big)^2"
        case "k3":
            inverse = rf"\frac{{\pi_{{\mathrm{{ref}}}}(y_{index})}}{{{policy}(y_{index})}}"
            k3 = rf"{inverse} - 1 + {d}"
            return rf"\min\Big({k3},\, {number(LARGEST_K3_PENALTY)}\Big)" if old else rf"\Big({k3}\Big)"


def _entropy(eta: float) -> Part:
    if not eta:
        return Part(what="entropy", words="no bonus", latex="")
    return Part(
        what="entropy",
        words=f"a nat of the policy's entropy at a token is worth {number(eta)}",
        latex=rf"\eta_t = {_latex_number(eta)}\, H(\pi_t)",
    )


def _weights(settings: Settings, length: int | None) -> Part:
    words, latex = {
        "token": (
            "each token weighs the same: the mean over all tokens of the optimiser step; a rollout of more tokens, so of more or "
            "longer calls, weighs more",
            r"\frac{1}{N}",
        ),
        "sequence": (
            "each call weighs the same, shared by its n tokens: the mean over the B calls of the optimiser step; a "
            "rollout of more calls weighs more",
            r"\frac{1}{B\, n_k}",
        ),
        "rollout": (
            "each rollout weighs the same, shared by its n tokens: the mean over the I rollouts of the optimiser step; a "
            "rollout weighs no more for more or longer calls",
            r"\frac{1}{I\, n_i}",
        ),
        "fixed": (
            "each token weighs the same constant: the sum over tokens, divided by the B calls of the optimiser step and by "
            f"{_limit(length)}; a rollout of more tokens, so of more or longer calls, weighs more",
            r"\frac{1}{B\, L}",
        ),
    }[settings.aggregation]
    return Part(what="weights", words=words, latex=f"w'_t = {latex}")


def _loss(settings: Settings, *, with_critic: bool) -> Part:
    inside, words = r"c_t\, \ell_t", ["correction times surrogate"]
    if settings.kl is not None and settings.kl.place == "loss":
        inside += r" + \kappa_t"
        words.append("plus KL")
    if settings.entropy:
        inside += r" - \eta_t"
        words.append("minus entropy")
    inside = inside if len(words) == 1 else f"({inside})"
    everywhere = (
        ""
        if settings.asks_everywhere or with_critic
        else "; calls without advantage count in the weights and are not computed"
    )
    more = "; to it the critic's is added" if with_critic else ""
    return Part(
        what="loss",
        words=f"the sum over the tokens of the optimiser step, each with its weight: {', '.join(words)}{everywhere}{more}",
        latex=rf"\mathcal{{L}} = \sum_t w'_t\, {inside}" + (r" + \mathcal{V}" if with_critic else ""),
    )


def _dynamic(rounds: int) -> Part | None:
    if not rounds:
        return None
    times = "once" if rounds == 1 else f"up to {rounds} times"
    return Part(
        what="dynamic sampling",
        words=f"while fewer than train.tasks_per_step groups have signal, the step goes for as many tasks as it lacks, {times}; "
        "groups without signal are left out of the batch",
        latex="",
    )


def _limit(length: int | None) -> str:
    return "sampling.max_tokens (L)" if length is None else f"sampling.max_tokens (L = {length})"


def number(value: float) -> str:
    """As people write it: 0.2, 0.0003, 1e-08, ∞."""
    return "∞" if math.isinf(value) else f"{value:g}"


def _latex_number(value: float) -> str:
    if math.isinf(value):
        return r"\infty"
    digits, mark, power = f"{value:g}".partition("e")
    return rf"{digits} \cdot 10^{{{int(power)}}}" if mark else digits
