"""The papers' formulas in plain Python: one number at a time, one sequence at a time, gradients worked out by hand.

Nothing here knows searchr1's functions. `LossConfig` is read as what it is, a list of settings.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from searchr1.algorithms.correction import CorrectionSettings
from searchr1.algorithms.loss import LossConfig
from searchr1.algorithms.policy_losses import ClipSettings


@dataclass(slots=True)
class Token:
    """One token of a response."""

    logp: float
    old: float
    rollout: float
    ref: float
    entropy: float
    advantage: float
    policy: bool


@dataclass(slots=True)
class Answer:
    """The loss of a mini-batch and its slopes: one list per sequence, one number per token."""

    loss: float
    d_logp: list[list[float]]
    d_entropy: list[list[float]]


Pair = tuple[float, float]
"""A value and its slope in the token's own log-probability."""


def exp20(d: float) -> Pair:
    """e^d with d held within ±20; no slope beyond."""
    if abs(d) > 20:
        return math.exp(math.copysign(20, d)), 0.0
    return math.exp(d), math.exp(d)


def surrogate(ratio: Pair, advantage: float, clip: ClipSettings) -> Pair:
    """PPO's clipped objective as a loss, case by case."""
    r, slope = ratio
    if advantage >= 0:
        if r > 1 + clip.high:
            return -advantage * (1 + clip.high), 0.0
    elif r < 1 - clip.low:
        return -advantage * (1 - clip.low), 0.0
    elif clip.dual is not None and r > clip.dual:
        return -advantage * clip.dual, 0.0
    return -advantage * r, -advantage * slope


def policy_terms(tokens: Sequence[Token], name: str, clip: ClipSettings) -> list[Pair]:
    """Of one sequence's policy tokens."""
    if name == "actor":
        return [surrogate(exp20(t.logp - t.old), t.advantage, clip) for t in tokens]
    if name == "gspo":  # the token form: the value of s, the slope of s through the token itself
        s = math.exp(sum(min(max(t.logp - t.old, -20), 20) for t in tokens) / len(tokens))
        return [surrogate((s, s if abs(t.logp - t.old) <= 20 else 0.0), t.advantage, clip) for t in tokens]
    found = []
    for t in tokens:
        r, slope = exp20(t.logp - t.old)
        if name == "cispo":
            weight = min(max(r, 1 - clip.low), 1 + clip.high)
            found.append((-weight * t.advantage * t.logp, -weight * t.advantage))
        else:
            tau = clip.tau_positive if t.advantage > 0 else clip.tau_negative
            gate = 1 / (1 + math.exp(-tau * (r - 1)))
            found.append((-t.advantage * 4 / tau * gate, -t.advantage * 4 * gate * (1 - gate) * slope))
    return found


def kl_term(d: float, name: str) -> Pair:
    """An estimate of the KL from d = logp - logp_ref."""
    if name in ("k1", "kl"):
        return d, 1.0
    if name == "abs":
        return abs(d), math.copysign(1, d) if d else 0.0
    if name in ("k2", "mse"):
        return d * d / 2, d
    value = math.exp(-min(max(d, -20), 20)) - 1 + min(max(d, -20), 20)
    return (10.0, 0.0) if value > 10 else (value, 1 - math.exp(-d))


def correction_weights(ds: Sequence[float], settings: CorrectionSettings) -> list[float]:
    """Of one sequence, from its tokens' d = log p_train - log p_rollout."""
    exponents = {
        "token": list(ds),
        "sequence": [sum(ds)] * len(ds),
        "geometric": [sum(ds) / len(ds)] * len(ds) if ds else [],
    }[settings.level]
    found = []
    for exponent in exponents:
        w = exp20(exponent)[0]
        if settings.bound == "truncate":
            w = min(w, settings.upper)
        elif settings.bound == "clip":
            w = min(max(w, settings.lower), settings.upper)
        elif not settings.lower <= w <= settings.upper:
            w = 0.0
        elif settings.bound == "reject":
            w = 1.0
        found.append(w)
    if settings.veto and any(exp20(d)[0] < settings.veto for d in ds):
        return [0.0] * len(ds)
    return found


def llds_terms(sequence: Sequence[Token], gate: str) -> list[Pair]:
    """Of one sequence's policy tokens; an action is an unbroken run of them, or all of them."""
    actions: list[list[Token]] = [[]]
    for t in sequence:
        if t.policy:
            actions[-1].append(t)
        elif gate == "action":
            actions.append([])
    found = []
    for action in actions:
        fell = sum(t.old - t.logp for t in action) > 0
        for t in action:
            on = fell and t.advantage >= 0 and t.old > t.logp
            found.append((t.old - t.logp, -1.0) if on else (0.0, 0.0))
    return found


def token_scale(lengths: Sequence[int], aggregation: str, longest: int) -> list[float]:
    """What each token of a sequence counts, from the sequences' numbers of policy tokens."""
    sequences = max(1, sum(length > 0 for length in lengths))
    return [
        {
            "token-mean": 1 / max(1, sum(lengths)),
            "seq-mean-token-sum": 1 / sequences,
            "seq-mean-token-mean": 1 / (sequences * max(1, length)),
            "seq-mean-token-sum-norm": 1 / (sequences * longest),
        }[aggregation]
        for length in lengths
    ]


def corrections(tokens: Sequence[Token], config: LossConfig, scale: float) -> list[float]:
    """What each policy token's loss is multiplied by."""
    if config.correction is None:
        return [1.0] * len(tokens)
    if config.ratio_is_correction:  # the ratio is the weight already: only what is dropped shows
        weights = correction_weights([t.logp - t.rollout for t in tokens], config.correction)
        return [float(w > 0) for w in weights]
    return [scale * w for w in correction_weights([t.old - t.rollout for t in tokens], config.correction)]


def loss(sequences: Sequence[Sequence[Token]], config: LossConfig, longest: int, weight_scale: float = 1.0) -> Answer:
    """The whole loss of a mini-batch."""
    policies = [[t for t in sequence if t.policy] for sequence in sequences]
    scales = token_scale([len(tokens) for tokens in policies], config.aggregation, longest)
    answer = Answer(0.0, [[0.0] * len(s) for s in sequences], [[0.0] * len(s) for s in sequences])
    for number, (sequence, tokens, scale) in enumerate(zip(sequences, policies, scales, strict=True)):
        if not tokens:
            continue
        terms = policy_terms(tokens, config.loss_type, config.clip)
        weights = corrections(tokens, config, weight_scale)
        kept = llds_terms(sequence, config.llds_gate)
        places = [place for place, t in enumerate(sequence) if t.policy]
        for place, t, term, weight, llds in zip(places, tokens, terms, weights, kept, strict=True):
            kl = kl_term(t.logp - t.ref, config.kl_penalty_type)
            value, slope = (weight * term[i] + config.kl_beta * kl[i] + config.llds_coef * llds[i] for i in (0, 1))
            answer.loss += scale * (value - config.entropy_bonus * t.entropy)
            answer.d_logp[number][place] = scale * slope
            answer.d_entropy[number][place] = -scale * config.entropy_bonus
    return answer


def mean_weight(sequences: Sequence[Sequence[Token]], settings: CorrectionSettings) -> float:
    """Of all policy tokens of a mini-batch, before anything is normalised."""
    ds = [[t.old - t.rollout for t in sequence if t.policy] for sequence in sequences]
    weights = [w for d in ds for w in correction_weights(d, settings)]
    return sum(weights) / len(weights)


def mates(groups: Sequence[int], index: int) -> list[int]:
    """The members of an attempt's group, itself included."""
    return [other for other, group in enumerate(groups) if group == groups[index]]


def _grpo(rewards: Sequence[float], own: int, members: Sequence[int]) -> float:
    values = [rewards[i] for i in members]
    if len(set(values)) == 1:
        return 0.0
    return (rewards[own] - statistics.fmean(values)) / (statistics.stdev(values) + 1e-6)


def _centred(rewards: Sequence[float], own: int, members: Sequence[int]) -> float:
    values = [rewards[i] for i in members]
    return 0.0 if len(set(values)) == 1 else rewards[own] - statistics.fmean(values)


def _leave_one_out(rewards: Sequence[float], own: int, members: Sequence[int]) -> float:
    others = [rewards[i] for i in members if i != own]
    return rewards[own] - statistics.fmean(others) if others else 0.0


PER_ATTEMPT: dict[str, Callable[[Sequence[float], int, Sequence[int]], float]] = {
    "grpo": _grpo,
    "grpo_dynamic": _grpo,
    "dr_grpo": _centred,
    "rloo": _leave_one_out,
    "reinforce++": lambda rewards, own, members: rewards[own],
    "reinforce++_baseline": _centred,
}


def whiten(values: Sequence[float], tokens: Sequence[int]) -> list[float]:
    """Mean 0 and variance 1 over the tokens, each of which has its attempt's value."""
    spelled_out = [value for value, count in zip(values, tokens, strict=True) for _ in range(count)]
    mean = statistics.fmean(spelled_out) if spelled_out else 0.0
    deviation = statistics.stdev(spelled_out) if len(spelled_out) > 1 else 0.0
    return [(value - mean) / (deviation + 1e-6) for value in values]


def advantages(
    name: str, rewards: Sequence[float], groups: Sequence[int], tokens: Sequence[int], normalize: bool = False
) -> list[float]:
    """Of each attempt."""
    found = [PER_ATTEMPT[name](rewards, i, mates(groups, i)) for i in range(len(rewards))]
    for _ in range(name.startswith("reinforce++") + normalize):
        found = whiten(found, tokens)
    return found


def gae(rewards: Sequence[float], values: Sequence[float], gamma: float, lam: float) -> tuple[list[float], list[float]]:
    """Advantages by the definition, a sum over all that follows, and returns; of one attempt's policy tokens."""
    ahead = [*values[1:], 0.0][: len(values)]
    deltas = [r + gamma * after - v for r, after, v in zip(rewards, ahead, values, strict=True)]
    count = len(deltas)
    found = [sum((gamma * lam) ** (later - t) * deltas[later] for later in range(t, count)) for t in range(count)]
    return found, [a + v for a, v in zip(found, values, strict=True)]


def turn_advantages(
    attempt_advantages: Sequence[float], turn_rewards: Sequence[Sequence[float]], groups: Sequence[int], weight: float
) -> list[list[float]]:
    """MT-GRPO: a turn that is not an attempt's last is also compared with the same turn of its mates."""
    found = []
    for own, rewards in enumerate(turn_rewards):
        per_turn = [attempt_advantages[own]] * max(1, len(rewards))
        for k in range(len(rewards) - 1):
            same = [turn_rewards[i][k] for i in mates(groups, own) if k < len(turn_rewards[i]) - 1]
            if len(set(same)) > 1:
                per_turn[k] += weight * (rewards[k] - statistics.fmean(same)) / (statistics.stdev(same) + 1e-6)
        found.append(per_turn)
    return found


def value_term(value: float, old: float, target: float, clip: float) -> Pair:
    """PPO's clipped squared error of one token, and its slope in the value."""
    held = min(max(value, old - clip), old + clip)
    if (held - target) ** 2 > (value - target) ** 2:
        return (held - target) ** 2 / 2, 0.0
    return (value - target) ** 2 / 2, value - target
