r"""A linter for models: do the six functions of a `Model` tell of one and the same distribution?

Shapes and dtypes are compared without running anything. Then three samplers are held against three densities,

    z ~ sample_q(x)   and log_q(x, z),          at the given x and at one from `sample`
    (x, z) ~ sample   and log_joint(x, z)
    (sin + cos)(z)    and its two gradients, pathwise and by the score, by whatever log_q reads

by identities whose means are zero (`statistics`), each alarm at |z| > 5 after a correction for the number of
components. A correct model passes whatever its support; a wrong one is told which identity fails, where, and what
that usually means.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vdiff.evaluate.checks.agreement import joint_moments, pilot_draws, q_moments
from vdiff.evaluate.checks.reference import Joint, Names, coordinate_names, fit_reference
from vdiff.evaluate.checks.statistics import Moments, Worst, worst
from vdiff.evaluate.checks.structure import (
    component_name,
    describe,
    first_line,
    floats_of,
    probe,
    shape_faults,
    what_is_read,
)
from vdiff.types import Key, Model, ModelLike, Params, PyTree, check_key, is_discrete

ALARM = 5.0
NUM_PILOT = 1_000
FAR = 8.0

ADVICE = {
    "shapes": "every function is of ONE datum; log_joint and log_q return a scalar, sample a pair (x, z) like the "
    "given x and sample_q's z",
    "running": "call the function by itself, under jax.jit and jax.vmap",
    "draws differ": "pass the key on to jax.random, and make no key inside a model function",
    "who reads what": "cv is what an estimator learns: move what a model reads to theta, phi or lam",
    "tails": "keep logarithms and square roots away from zero: log_softmax, log_sigmoid, softplus, the logarithm of a "
    "scale as its parameter",
    "log_q score": "sample_q and log_q use different parameters or a different law: let one function return the "
    "parameters of q to both",
    "log_q Stein": "sample_q does not draw from log_q: compare scale with variance and log scale, loc with scale, the "
    "log-determinant of a transform, and split a key that is used twice",
    "log_q moves": "sample_q does not draw the discrete part from log_q: compare logits with probabilities, and "
    "split a key that is used twice",
    "log_q normalisation": "log_q does not integrate to one: a constant, a log-determinant or a log-normaliser is "
    "missing or counted twice",
    "log_joint score": "sample and log_joint use different parameters or a different law for z or for x given z",
    "log_joint Stein": "sample does not draw from log_joint: is log p(z) in it, with weight one? is it summed, not "
    "averaged, over the dimensions? does sample split its key between z and x?",
    "log_joint moves": "sample does not draw the discrete part from log_joint: is it summed, not averaged, over the "
    "dimensions? are logits made probabilities once? does sample split its key between z and x?",
    "log_joint normalisation": "log_joint does not integrate to one: a constant of log p(z) or log p(x | z) is "
    "missing or counted twice",
    "reparametrisation": "gradients through sample_q are not those of its law: take stop_gradient and comparisons "
    "out of it (12.2.5), or train with score_function and give a discrete z an integer dtype",
    "elbo_terms": "their sum is not the mean of log_joint - log_q: compare the closed forms, e.g. the sign of a KL "
    "divergence, or leave elbo_terms out",
}

BLIND = (
    "whether the model is a good one: only that its functions agree with each other",
    "levels, modes and events so rare that no draw showed them",
)


class Check(NamedTuple):
    """Hold the verdict on one property.

    Attributes:
        name: of the property.
        z_score: |z| after the correction for many components; NaN where nothing was averaged.
        is_ok: whether it holds.
        found: what was found.
        advice: what usually is the cause, and the fix.
    """

    name: str
    z_score: float
    is_ok: bool
    found: str
    advice: str = ""


class ModelReport(NamedTuple):
    """Hold the verdicts on a model; `print` shows them as a table.

    Attributes:
        checks: one for each property.
        cannot_see: what no check of this report would have noticed.
    """

    checks: tuple[Check, ...]
    cannot_see: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Tell whether every check holds."""
        return all(check.is_ok for check in self.checks)

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = [f"{'check':{width}}  {'|z|':>6}        found"]
        for check in self.checks:
            score = "-" if math.isnan(check.z_score) else f"{min(check.z_score, 9999.0):.1f}"
            status = "ok" if check.is_ok else "FAIL"
            lines.append(f"{check.name:{width}}  {score:>6}  {status:4}  {check.found}")
        failed = [check for check in self.checks if not check.is_ok]
        lines += ["", *(f"{check.name}: {check.advice}." for check in failed)]
        lines += [""] * bool(failed) + [
            "Not seen by any of these:",
            *(f"- {each}" for each in self.cannot_see),
        ]
        return "\n".join(lines)


def check_model(
    model: ModelLike, params: Params, x: PyTree, key: Key, num_draws: int = 10_000
) -> ModelReport:
    """Check that the functions of a model agree with each other.

    A wrong model raises nothing: what it does wrong, a crash included, is a failed check. At 10,000 draws a scale
    of q off by 5 % or a prior's mean off by .1 is found. Takes seconds; half a minute and 1 GB with 1.4 million
    parameters on two CPU cores, whose gradients are those of blocks of draws.

    Args:
        model: any `Model`.
        params: where; more is seen away from a symmetric start, such as all zeros.
        x: one datum.
        key: a typed key.
        num_draws: of each sampler, at least 100.

    Returns:
        A `ModelReport`; `print` it.

    Raises:
        TypeError: if `key` is not a typed key.
        ValueError: if `num_draws` is less than 100.
    """
    key_pilot, key_probe, key_q, key_joint = jax.random.split(check_key(key), 4)
    if num_draws < 100:
        raise ValueError(f"num_draws: got {num_draws}, expected at least 100; 10,000 is a good choice")
    params, x = jax.tree.map(jnp.asarray, (params, x))
    faults = shape_faults(model, params, x)
    checks = [_verdict("shapes", f"{name}: {fault}") for name, fault in faults.items()]
    sound = frozenset(name for name in Model._fields if getattr(model, name) is not None) - frozenset(faults)
    try:
        draws = jax.device_get(pilot_draws(model, sound, key_pilot, params, x, NUM_PILOT))
        if not faults:
            checks.append(_verdict("shapes", "", f"x {describe(x)}, z {describe(_first(draws['given']))}"))
        checks.append(_check_draws(draws))
        if {"log_joint", "log_q"} & sound and {"given", "joint"} & set(draws):
            z, is_far = _probe_points(draws)
            values, is_finite = jax.device_get(probe(model, sound, key_probe, params, x, z, len(is_far)))
            read = what_is_read(lambda p: probe(model, sound, key_probe, p, x, z, len(is_far))[0], params)
            checks += [_check_reading(read, params), _check_tails(values, is_finite)]
            if {"log_q", "sample_q"} <= sound:
                near = [np.abs(values[name][~is_far]) for name in is_finite]
                # Large log-densities are rounded more: their differences are taken in a larger unit.
                unit = float(1.0 + 0.01 * np.max(np.nan_to_num(near, posinf=0.0)))
                checks += _check_q(model, sound, key_q, params, x, draws, read["log_q"], unit, num_draws)
            if {"log_joint", "sample"} <= sound:
                checks += _check_joint(model, key_joint, params, draws["joint"], read["log_joint"], num_draws)
    except Exception as error:  # A user's function may raise anything.
        checks.append(_verdict("running", first_line(error)))
    silences = tuple(check.found for check in checks if check.found.startswith("cannot"))
    return ModelReport(tuple(checks), BLIND + silences)


def _verdict(name: str, fault: str, found: str = "", z_score: float = math.nan) -> Check:
    return Check(name, z_score, not fault, fault or found, ADVICE[name] if fault else "")


def _judged(name: str, found: str, z_score: float) -> Check:
    # Not "greater than": a NaN is an alarm.
    return _verdict(name, "" if z_score <= ALARM else found, found, z_score)


def _check_draws(draws: dict[str, PyTree]) -> Check:
    """Every key must give another draw; a discrete leaf may have but one likely value."""
    drawn = {"sample_q": Joint((), draws.get("given", ())), "sample": draws.get("joint", ())}
    constant = [
        f"{function} draws the same {component_name(path)} with every key"
        for function, tree in drawn.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and leaf.size and np.all(leaf == leaf[:1])
    ]
    return _verdict("draws differ", "; ".join(constant), "each key gives another draw")


def _probe_points(draws: dict[str, PyTree]) -> tuple[PyTree, np.ndarray]:
    """Return z at which to look, a tree of [T, ...], near and far for each sampler; and which are far, [T]."""
    latents = [draws["given"]] * ("given" in draws) + [draws["joint"].z] * ("joint" in draws)
    z = jax.tree.map(lambda *leaves: np.concatenate([_probes(leaf) for leaf in leaves]), *latents)
    return z, np.tile(np.arange(6) >= 2, len(latents))


def _probes(draws: np.ndarray) -> np.ndarray:
    """Return two draws of a leaf and four points 8 standard deviations out, but not across a likely end."""
    if not jnp.issubdtype(draws.dtype, jnp.inexact):
        return draws[:6]
    sign = np.where(np.random.default_rng(0).random((2, *draws.shape[1:])) < 0.5, -1.0, 1.0)
    sign = np.concatenate([np.ones_like(sign[:1]), -np.ones_like(sign[:1]), sign])
    far = draws.mean(0) + FAR * draws.std(0) * sign
    low, high = draws.min(0), draws.max(0)
    # A coordinate that keeps its sign, or stays in [-1, 1], may end there.
    is_bounded = (low >= -1.0) & (high <= 1.0)
    far = np.where(is_bounded | (low > 0), np.maximum(far, low), far)
    far = np.where(is_bounded | (high < 0), np.minimum(far, high), far)
    return np.concatenate([draws[:2], far.astype(draws.dtype)])


def _check_reading(read: dict[str, frozenset[str]], params: Params) -> Check:
    everything = frozenset().union(*read.values())
    cv = sorted(name for name in everything if name.startswith("cv"))
    p = ("theta", "phi")
    own = {"log_joint": p, "sample": p, "log_q": ("lam",)}
    notes = [
        f"{function} reads {name}"
        for function, parts in own.items()
        for name in sorted(read.get(function, ()))
        if not name.startswith(parts)
    ]
    names = [component_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params._replace(cv=()))]
    notes += [f"nothing reads {name}" for name in names if name not in everything]
    found = "note: " + "; ".join(notes[:3]) + (f" and {len(notes) - 3} more" if len(notes) > 3 else "")
    found = found if notes else "log_joint and sample theta and phi, log_q lam"
    return _verdict("who reads what", f"a function of the model reads {', '.join(cv)}" if cv else "", found)


def _check_tails(values: dict[str, PyTree], is_finite: dict[str, np.ndarray]) -> Check:
    faults, notes = [], []
    for name, gradient_is_finite in is_finite.items():
        value = values[name]
        if np.any(np.isnan(value) | (value == np.inf)):
            faults.append(f"{name} is NaN or +inf")
        elif np.any(np.isfinite(value) & ~gradient_is_finite):
            faults.append(f"the gradient of {name} is not finite")
        elif np.any(value == -np.inf):
            notes.append(f"note: {name} is -inf")
    where = f" at z within {FAR:.0f} standard deviations"
    fault = "; ".join(faults) + where if faults else ""
    return _verdict("tails", fault, ("; ".join(notes) or "values and gradients are finite") + where)


def _check_q(
    model: ModelLike,
    sound: frozenset[str],
    key: Key,
    params: Params,
    x: PyTree,
    draws: dict[str, PyTree],
    read: frozenset[str],
    unit: float,
    num_draws: int,
) -> list[Check]:
    learned = _learned(params, read)
    terms = model.elbo_terms if {"elbo_terms", "log_joint"} <= sound else None
    is_pathwise = bool(jax.tree.leaves(learned)) and not is_discrete(draws["given"])
    levels = [Joint((), draws["joint"].z)] if "joint" in draws else []
    means, names = {}, {}
    for where in [name for name in ("given", "sampled") if name in draws]:
        at = x if where == "given" else _first(draws["joint"].x)
        y, moments_of_z = Joint((), draws[where]), None
        reference = fit_reference(y, *levels)
        if is_pathwise:
            loc, scale = (jax.tree.map(f, draws[where]) for f in (lambda v: v.mean(0), _positive_std))
            moments_of_z = (loc, scale)
        out = q_moments(
            model, terms, num_draws, jax.random.fold_in(key, len(means)),
            params, learned, at, reference, moments_of_z, unit,
        )  # fmt: skip
        means[f"at the {where} x"] = jax.device_get(out)
        names[f"at the {where} x"] = coordinate_names(reference, _first(y))
    checks = _check_identities("log_q", means, names, num_draws)
    if is_pathwise:
        checks.append(_check_gradient(means, num_draws))
    if terms is not None:
        where, top = _farthest(means, num_draws, "elbo_terms")
        off = f"off by {top.mean * unit:.2g} +- {top.std_error * unit:.1g} nats, {where}"
        checks.append(_judged("elbo_terms", off, top.z_score))
    return checks


def _check_joint(
    model: ModelLike, key: Key, params: Params, draws: Joint, read: frozenset[str], num_draws: int
) -> list[Check]:
    learned, reference = _learned(params, read), fit_reference(draws)
    means = jax.device_get(joint_moments(model, num_draws, key, params, learned, reference))
    names = coordinate_names(reference, _first(draws))
    return _check_identities("log_joint", {"over (x, z)": means}, {"over (x, z)": names}, num_draws)


def _check_identities(
    density: str, means: dict[str, Moments], names: dict[str, Names], num_draws: int
) -> list[Check]:
    """Judge the identities of one density, each at the place where it is farthest from holding."""
    checks = []
    for identity in ("score", "Stein", "moves"):
        where, top = _farthest(means, num_draws, identity)
        if top.num_tested:
            what = _component(identity, top, names[where])
            found = f"{what}: mean {top.mean:.2g} +- {top.std_error:.1g}, 0 if right, {where}"
            found += f", worst of {top.num_tested}"
            checks.append(_judged(f"{density} {identity}", found, top.z_score))
    where, top = _farthest(means, num_draws, "normalisation", "difference")
    overlap = max(float(each.mean["normalisation"]["overlap"]) for each in means.values())
    if overlap < 0.02 and not math.isnan(top.z_score):
        return [
            *checks,
            _verdict(f"{density} normalisation", "", f"cannot tell whether {density} is off by a constant"),
        ]
    found = f"integral against a fitted density off by {top.mean:.2g} +- {top.std_error:.1g}, {where}"
    return [*checks, _judged(f"{density} normalisation", found, top.z_score)]


def _check_gradient(means: dict[str, Moments], num_draws: int) -> Check:
    gradient = _farthest(means, num_draws, "pathwise", "gradient")[1].largest
    where, top = _farthest(means, num_draws, "pathwise", "difference")
    if gradient == 0.0 and top.largest > 1e-3:
        return _verdict("reparametrisation", "no gradient leads from z to the parameters that log_q reads")
    found = (
        f"gradient by {component_name(top.path, top.index)} off by {top.mean:.2g} +- {top.std_error:.1g}, {where}, "
        f"worst of {top.num_tested}"
    )
    return _judged("reparametrisation", found, top.z_score)


def _component(identity: str, top: Worst, names: Names) -> str:
    """Say in the names of the user's trees what the worst component of an identity is about."""
    features = names.paired + names.moved
    if identity == "score":
        return f"d/d {component_name(top.path, top.index)}"
    if identity == "moves":
        k, f = top.index
        return names.moved[k] + (f" with {features[f - 1]}" if f else "")
    kind = top.path[0].key
    if kind == "trace":
        return "second order, all coordinates"
    if kind == "pairs":
        j, f = top.index
        return f"{names.paired[j]} with {features[f]}"
    return f"{kind} order, {names.continuous[top.index[0]]}"


def _farthest(means: dict[str, Moments], num_draws: int, *names: str) -> tuple[str, Worst]:
    """Return where a statistic's mean is farthest from zero, and how far."""
    found = {}
    for where, each in means.items():
        for name in names:
            each = Moments(*(tree[name] for tree in each))
        found[where] = worst(each, num_draws)
    return max(found.items(), key=lambda item: math.inf if math.isnan(item[1].z_score) else item[1].z_score)


def _learned(params: Params, read: frozenset[str]) -> Params:
    """Return params with None for each leaf that is not read, or has no gradient."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if component_name(path) in read else None, floats_of(params)
    )


def _positive_std(draws: np.ndarray) -> np.ndarray:
    std = draws.std(axis=0)
    return np.where(std > 0, std, 1.0).astype(draws.dtype)


def _first(draws: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[0], draws)
