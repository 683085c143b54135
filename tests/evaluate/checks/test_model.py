"""The linter finds every planted bug, and passes every correct model, whatever its support.

The planted bugs are switched by an integer in params, so that one compilation serves them all.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax.lax import stop_gradient

import vdiff as vd
from tests import toys
from vdiff import likelihoods
from vdiff.evaluate.checks.model import check_model
from vdiff.types import Model, Params


def failed(report):
    return {check.name: check.z_score for check in report.checks if not check.is_ok}


# A model with bugs: z ~ N(m, I)^2 -> x of 5 pixels; q a scaled flow of a Gaussian.

WEIGHT = np.array([[1.5, -0.4], [0.3, 1.1], [-0.9, 0.6], [0.5, 0.5], [-1.2, -0.7]], np.float32)
BUGS = [
    "none",
    "swapped mean and scale in log_q",
    "variance as scale in log_q",
    "scale of log_q times 1.05",
    "missing log-determinant",
    "constant in log_q",
    "key reuse inside q",
    "constant key in q",
    "draw stopped",
    "scale stopped",
    "sign of the KL",
    "forgotten prior",
    "prior weighted .9",
    "prior mean off by .1",
    "constant in log_joint",
    "mean over pixels",
    "sigmoid twice",
    "key reuse between z and x",
]


def buggy(is_bernoulli):
    def pick(params, name, wrong, right):
        return jnp.where(params.theta["bug"] == BUGS.index(name), wrong, right)

    def decode(params, z):
        return params.theta["weight"] @ z + params.theta["bias"]

    def log_likelihood(params, x, z):
        out = decode(params, z)
        if is_bernoulli:
            out = pick(params, "sigmoid twice", jax.nn.sigmoid(out), out)
            each = x.astype(jnp.float32) * out - jax.nn.softplus(out)
        else:
            each = jax.scipy.stats.norm.logpdf(x, out, 0.5)
        return pick(params, "mean over pixels", jnp.mean(each), jnp.sum(each))

    def log_joint(params, x, z):
        loc = pick(params, "prior mean off by .1", params.phi["loc"] + 0.1, params.phi["loc"])
        prior = jnp.sum(jax.scipy.stats.norm.logpdf(z, loc))
        prior = pick(params, "forgotten prior", 0.0, pick(params, "prior weighted .9", 0.9 * prior, prior))
        return prior + log_likelihood(params, x, z) + pick(params, "constant in log_joint", 0.3, 0.0)

    def sample(key, params):
        key_z, key_x = jax.random.split(key)
        is_reused = params.theta["bug"] == BUGS.index("key reuse between z and x")
        key_x = jax.random.wrap_key_data(
            jnp.where(is_reused, jax.random.key_data(key_z), jax.random.key_data(key_x))
        )
        z = params.phi["loc"] + jax.random.normal(key_z, (2,))
        out = decode(params, z)
        if is_bernoulli:
            return jax.random.bernoulli(key_x, jax.nn.sigmoid(out)).astype(jnp.int32), z
        return out + 0.5 * jax.random.normal(key_x, (5,)), z

    def q(params, x):
        lam = params.lam
        return lam["weight"] @ x.astype(jnp.float32) + lam["bias"], jnp.exp(lam["log_scale"])

    def sample_q(key, params, x):
        loc, scale = q(params, x)
        eps = pick(
            params,
            "constant key in q",
            jax.random.normal(jax.random.key(0), (2,)),
            jax.random.normal(key, (2,)),
        )
        eps = pick(params, "key reuse inside q", eps[:1], eps)
        z = jnp.exp(params.lam["stretch"]) * (
            loc + pick(params, "scale stopped", stop_gradient(scale), scale) * eps
        )
        return pick(params, "draw stopped", stop_gradient(z), z)

    def log_q(params, x, z):
        loc, scale = q(params, x)
        swapped = [
            pick(params, "swapped mean and scale in log_q", jnp.exp(loc), scale),
            pick(params, "swapped mean and scale in log_q", scale, loc),
        ]
        scale, loc = swapped
        scale = pick(params, "variance as scale in log_q", scale**2, scale)
        scale = pick(params, "scale of log_q times 1.05", 1.05 * scale, scale)
        stretch = params.lam["stretch"]
        value = jnp.sum(jax.scipy.stats.norm.logpdf(z * jnp.exp(-stretch), loc, scale))
        value -= pick(params, "missing log-determinant", 0.0, jnp.sum(stretch))
        return value + pick(params, "constant in log_q", 0.3, 0.0)

    def elbo_terms(key, params, x):
        loc, scale = (v * jnp.exp(params.lam["stretch"]) for v in q(params, x))
        kl = 0.5 * jnp.sum((loc - params.phi["loc"]) ** 2 + scale**2 - 1.0) - jnp.sum(jnp.log(scale))
        reconstruction = log_likelihood(params, x, sample_q(key, params, x))
        return {"reconstruction": reconstruction, "kl": pick(params, "sign of the KL", kl, -kl)}

    def params(bug="none"):
        return Params(
            theta={
                "weight": jnp.asarray(WEIGHT),
                "bias": jnp.array([0.2, -0.3, 0.1, 0.4, -0.2]),
                "bug": jnp.asarray(BUGS.index(bug), jnp.int32),
            },
            phi={"loc": jnp.array([0.4, -0.3])},
            lam={
                "weight": jnp.asarray(0.3 * WEIGHT.T),
                "bias": jnp.array([0.5, 0.3]),
                "log_scale": jnp.array([-0.7, -0.2]),
                "stretch": jnp.array([0.3, -0.2]),
            },
        )

    return Model(lambda key: params(), log_joint, log_q, sample_q, sample, elbo_terms), params


GAUSSIAN, GAUSSIAN_PARAMS = buggy(False)
BERNOULLI, BERNOULLI_PARAMS = buggy(True)
REAL, BITS = jnp.array([0.5, -1.0, 0.2, 1.1, -0.4]), jnp.array([1, 0, 0, 1, 0], jnp.int32)


def planted(kind, bug, seed=0):
    if kind == "gaussian":
        return check_model(GAUSSIAN, GAUSSIAN_PARAMS(bug), REAL, jax.random.key(seed))
    return check_model(BERNOULLI, BERNOULLI_PARAMS(bug), BITS, jax.random.key(seed))


# Correct models.

PIXELS = (3,)


def perturbed(model, seed=1, by=0.2):
    """The model's params moved off any symmetric start."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: leaf + by * jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype),
        model.init(jax.random.key(7)),
    )


def tiny_vae(likelihood, prior=None):
    encoder = vd.nets.mlp(PIXELS, (4,), hidden=(3,), activation=jnp.tanh)
    decoder = vd.nets.mlp((2,), likelihood.out_shape(PIXELS), hidden=(3,), activation=jnp.tanh)
    return vd.vae(encoder, decoder, latent_dim=2, likelihood=likelihood, prior=prior)


def in_the_middle():
    """A decoder whose output stays near .5, so that N(out, .05^2) leaves nothing outside [0, 1)."""
    encoder = vd.nets.mlp(PIXELS, (4,), hidden=(3,), activation=jnp.tanh)
    decoder = vd.Network(
        lambda key: {"weight": jax.random.normal(key, (3, 2))},
        lambda theta, z: 0.5 + 0.1 * jnp.tanh(theta["weight"] @ z),
    )
    model = vd.vae(encoder, decoder, latent_dim=2, likelihood=likelihoods.gaussian(0.05))
    return vd.dequantized(model, 4)


def of_toy(name):
    toy = toys.toy(name)
    return toy.model, toy.params, toy.data[0]


def of_model(model, x):
    return model, perturbed(model), x


def from_distributions(prior, likelihood, q, params, x):
    """A user's model with one prior p(z), x | z and q(z | x), each `(params, ...) -> numpyro distribution`."""

    def sample(key, params):
        key_z, key_x = jax.random.split(key)
        z = prior(params).sample(key_z)
        return likelihood(params, z).sample(key_x), z

    model = Model(
        lambda key: params,
        lambda params, x, z: prior(params).log_prob(z) + likelihood(params, z).log_prob(x),
        lambda params, x, z: q(params, x).log_prob(z),
        lambda key, params, x: (
            q(params, x).rsample(key) if q(params, x).has_rsample else q(params, x).sample(key)
        ),
        sample,
    )
    return model, params, x


def positive():
    """An exponential latent and an exponential datum: densities that end where they are largest."""
    return from_distributions(
        lambda params: dist.Exponential(jnp.exp(params.phi["log_rate"])),
        lambda params, z: dist.Exponential(jnp.exp(params.theta["log_rate"]) + z),
        lambda params, x: dist.Exponential(jnp.exp(params.lam["log_rate"]) + x),
        Params({"log_rate": jnp.array(0.3)}, {"log_rate": jnp.array(-0.2)}, {"log_rate": jnp.array(0.1)}),
        jnp.array(0.7),
    )


def in_the_unit_interval():
    """Beta latents, one of them with a density that does not vanish at one."""
    return from_distributions(
        lambda params: dist.Beta(jnp.exp(params.phi["log_a"]), jnp.ones(2)).to_event(1),
        lambda params, z: dist.Normal(params.theta["weight"] @ z, jnp.ones(3)).to_event(1),
        lambda params, x: dist.Beta(jnp.exp(params.lam["log_a"]), jnp.array([1.5, 1.0])).to_event(1),
        Params(
            {"weight": jnp.asarray(WEIGHT[:3])},
            {"log_a": jnp.array([0.4, 0.9])},
            {"log_a": jnp.array([0.1, 0.5])},
        ),
        jnp.array([0.2, 0.5, 0.1]),
    )


def heavy_tails():
    return from_distributions(
        lambda params: dist.StudentT(3.0 * jnp.ones(2), params.phi["loc"], jnp.ones(2)).to_event(1),
        lambda params, z: dist.StudentT(3.0 * jnp.ones(3), params.theta["weight"] @ z, jnp.ones(3)).to_event(
            1
        ),
        lambda params, x: dist.StudentT(
            3.0 * jnp.ones(2), params.lam["weight"] @ x, jnp.exp(params.lam["log_scale"])
        ).to_event(1),
        Params(
            {"weight": jnp.asarray(WEIGHT[:3])},
            {"loc": jnp.array([0.3, -0.5])},
            {"weight": jnp.asarray(WEIGHT[:3].T), "log_scale": jnp.array([-0.3, 0.2])},
        ),
        jnp.array([0.2, 0.5, 0.1]),
    )


def rare_levels():
    """Levels of which some are never drawn: their gradients are small, equal, and of one sign."""
    logits = np.linspace(4.0, -14.0, 12, dtype=np.float32)
    return from_distributions(
        lambda params: dist.Normal(params.phi["loc"], jnp.ones(2)).to_event(1),
        lambda params, z: dist.Categorical(logits=jnp.asarray(logits) + params.theta["weight"] @ z),
        lambda params, x: dist.Normal(params.lam["loc"], jnp.exp(params.lam["log_scale"])).to_event(1),
        Params(
            {"weight": jnp.asarray(0.3 * np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32))},
            {"loc": jnp.array([0.3, -0.5])},
            {"loc": jnp.array([0.3, -0.1]), "log_scale": jnp.array([-0.3, 0.2])},
        ),
        jnp.int32(1),
    )


def mixed():
    """A component and a place: z = {"c": int, "y": float}, q's y depends on its c."""
    params = Params(
        theta={"scale": jnp.array([0.8, 0.5])},
        phi={"logits": jnp.array([0.5, -0.2, 0.1]), "loc": jnp.array([-1.5, 0.2, 1.0])},
        lam={
            "logits": jnp.array([0.2, 0.4, -0.6]),
            "loc": jnp.array([-1.0, 0.3, 0.6]),
            "log_scale": jnp.array(-0.4),
        },
    )

    def q(params, x):
        return dist.Categorical(logits=params.lam["logits"] + x[0]), params.lam["loc"] + 0.3 * x[1]

    def log_q(params, x, z):
        of_c, loc = q(params, x)
        of_y = dist.Normal(loc[z["c"]], jnp.exp(params.lam["log_scale"]))
        return of_c.log_prob(z["c"]) + of_y.log_prob(z["y"])

    def sample_q(key, params, x):
        key_c, key_y = jax.random.split(key)
        of_c, loc = q(params, x)
        c = of_c.sample(key_c).astype(jnp.int32)
        return {"c": c, "y": loc[c] + jnp.exp(params.lam["log_scale"]) * jax.random.normal(key_y)}

    def log_joint(params, x, z):
        of_c = dist.Categorical(logits=params.phi["logits"]).log_prob(z["c"])
        of_y = dist.Normal(params.phi["loc"][z["c"]], 1.0).log_prob(z["y"])
        return of_c + of_y + dist.Normal(z["y"], params.theta["scale"]).to_event(1).log_prob(x)

    def sample(key, params):
        keys = jax.random.split(key, 3)
        c = jax.random.categorical(keys[0], params.phi["logits"]).astype(jnp.int32)
        y = params.phi["loc"][c] + jax.random.normal(keys[1])
        return y + params.theta["scale"] * jax.random.normal(keys[2], (2,)), {"c": c, "y": y}

    return Model(lambda key: params, log_joint, log_q, sample_q, sample), params, jnp.array([0.3, -0.4])


def one_hot():
    """One-hot latents, whose log-density is as finite outside their support as inside."""
    params = Params(
        {"loc": jnp.array([-1.0, 0.5, 2.0])},
        {"logits": jnp.array([0.3, 0.0, -0.5])},
        {"logits": jnp.array([0.1, 0.4, 0.2])},
    )

    def log_p(logits, z):
        return jnp.sum(z.astype(jnp.float32) * jax.nn.log_softmax(logits))

    def draw(key, logits):
        return jax.nn.one_hot(jax.random.categorical(key, logits), 3, dtype=jnp.int32)

    def sample(key, params):
        key_z, key_x = jax.random.split(key)
        z = draw(key_z, params.phi["logits"])
        return z.astype(jnp.float32) @ params.theta["loc"] + jax.random.normal(key_x), z

    model = Model(
        lambda key: params,
        lambda params, x, z: (
            log_p(params.phi["logits"], z)
            + jax.scipy.stats.norm.logpdf(x, z.astype(jnp.float32) @ params.theta["loc"])
        ),
        lambda params, x, z: log_p(params.lam["logits"] * x, z),
        lambda key, params, x: draw(key, params.lam["logits"] * x),
        sample,
    )
    return model, params, jnp.array(1.2)


def angles():
    """A datum on the circle: the density does not end at pi, and does not vanish there."""
    return from_distributions(
        lambda params: dist.Normal(params.phi["loc"], 1.0),
        lambda params, z: dist.VonMises(z, jnp.exp(params.theta["log_kappa"])),
        lambda params, x: dist.Normal(params.lam["weight"] * jnp.sin(x), 0.7),
        Params({"log_kappa": jnp.array(-0.5)}, {"loc": jnp.array(0.3)}, {"weight": jnp.array(0.6)}),
        jnp.array(1.0),
    )


def without_latent():
    model = Model(
        init=lambda key: Params(theta={"loc": jnp.array([0.3, -1.0])}),
        log_joint=lambda params, x, z: jnp.sum(jax.scipy.stats.norm.logpdf(x, params.theta["loc"])),
        log_q=lambda params, x, z: jnp.zeros(()),
        sample_q=lambda key, params, x: (),
        sample=lambda key, params: (params.theta["loc"] + jax.random.normal(key, (2,)), ()),
    )
    return model, model.init(jax.random.key(0)), jnp.array([0.1, 0.2])


def mixture(encoder=None):
    return vd.gmm(3, 2, encoder=encoder)


def of_family(family):
    """A VAE whose q is another family's, amortised."""
    vae = tiny_vae(likelihoods.gaussian(0.3))
    encoder = vd.nets.mlp(PIXELS, (family.size,), hidden=(3,), activation=jnp.tanh)
    return of_model(vd.with_q(vae, vd.amortized(encoder, family)), VAES["gaussian"][1])


def of_flow():
    """Two coupling layers that see x, off the identity, around free parameters."""
    layers = [vd.conditioner(2, context_dim=3, hidden=(4,)) for _ in range(2)]
    posterior = vd.flow(vd.local(vd.families.full_rank(2)), layers, context=lambda x: x)
    return of_model(vd.with_q(tiny_vae(likelihoods.gaussian(0.3)), posterior), VAES["gaussian"][1])


def belief_network(num_layers):
    def layer(size):
        return vd.nets.mlp((size,), (2,), hidden=())

    encoders = [layer(3), *(layer(2) for _ in range(num_layers - 1))]
    decoders = [vd.nets.mlp((2,), PIXELS, hidden=()), *(layer(2) for _ in range(num_layers - 1))]
    return vd.sbn(encoders, decoders, num_units=2, likelihood=likelihoods.bernoulli())


def relaxed_network():
    sbn = belief_network(1)
    model = vd.concrete(sbn, sbn.logits, 0.5, prior_logits=sbn.prior_logits, sample_x=sbn.sample_x)
    return of_model(model, VAES["bernoulli"][1])


VAES = {
    "bernoulli": (likelihoods.bernoulli(), jnp.array([1, 0, 1], jnp.int32)),
    "categorical": (likelihoods.categorical(4), jnp.array([1, 0, 3], jnp.int32)),
    "discretized logistic": (likelihoods.discretized_logistic(5), jnp.array([1, 0, 4], jnp.int32)),
    "gaussian": (likelihoods.gaussian(0.3), jnp.array([0.1, -0.3, 0.5])),
    "learned gaussian": (likelihoods.gaussian(), jnp.array([0.1, -0.3, 0.5])),
}
CORRECT = {
    "linear": lambda: of_toy("linear"),
    "full-rank q": lambda: of_toy("linear2"),
    "shared weights, two layers": lambda: of_toy("shared"),
    "Bernoulli latent": lambda: of_toy("bernoulli"),
    "numpyro, Poisson": lambda: of_toy("numpyro"),
    **{f"vae, {name}": lambda v=v: of_model(tiny_vae(v[0]), v[1]) for name, v in VAES.items()},
    "vae, mixture prior": lambda: of_model(
        tiny_vae(likelihoods.bernoulli(), vd.collapsed(mixture())), VAES["bernoulli"][1]
    ),
    "vae, prior with a latent": lambda: of_model(
        tiny_vae(likelihoods.bernoulli(), mixture()), VAES["bernoulli"][1]
    ),
    "gmm": lambda: of_model(mixture(), jnp.array([0.3, -0.8])),
    "gmm, encoder": lambda: of_model(
        mixture(vd.nets.mlp((2,), (3,), hidden=(3,), activation=jnp.tanh)), jnp.array([0.3, -0.8])
    ),
    "collapsed gmm": lambda: of_model(vd.collapsed(mixture()), jnp.array([0.3, -0.8])),
    "dequantized": lambda: of_model(in_the_middle(), jnp.array([1, 2, 2], jnp.int32)),
    "flow": lambda: (GAUSSIAN, GAUSSIAN_PARAMS(), REAL),
    "flow, Bernoulli": lambda: (BERNOULLI, BERNOULLI_PARAMS(), BITS),
    "positive": positive,
    "unit interval": in_the_unit_interval,
    "heavy tails": heavy_tails,
    "rare levels": rare_levels,
    "mixed": mixed,
    "one-hot": one_hot,
    "angles": angles,
    "without a latent": without_latent,
    **{
        f"{name} q": lambda family=family: of_family(family)
        for name, family in {
            "mean-field": vd.families.mean_field(2),
            "full-rank amortised": vd.families.full_rank(2),
            "low-rank": vd.families.low_rank(2, 1),
            "mixture": vd.families.mixture(2, 2),
        }.items()
    },
    "coupling flow q": of_flow,
    "belief network": lambda: of_model(belief_network(1), VAES["bernoulli"][1]),
    "belief network of two layers": lambda: of_model(belief_network(2), VAES["bernoulli"][1]),
    "relaxed belief network": relaxed_network,
}


@functools.cache
def correct(name):
    return CORRECT[name]()


# The tests.

# Which checks must find it; all of them are |z| > 5, or a failure of structure.
FOUND_BY = {
    "swapped mean and scale in log_q": ["log_q score", "log_q Stein", "reparametrisation"],
    "variance as scale in log_q": ["log_q score", "log_q Stein", "reparametrisation"],
    "scale of log_q times 1.05": ["log_q score", "log_q Stein"],
    "missing log-determinant": ["log_q score", "log_q normalisation"],
    "constant in log_q": ["log_q normalisation"],
    "key reuse inside q": ["log_q Stein"],
    "constant key in q": ["draws differ", "log_q score"],
    "draw stopped": ["reparametrisation"],
    "scale stopped": ["reparametrisation"],
    "sign of the KL": ["elbo_terms"],
    "forgotten prior": ["log_joint Stein"],
    "prior weighted .9": ["log_joint normalisation"],
    "prior mean off by .1": ["log_joint score"],
    "constant in log_joint": ["log_joint normalisation"],
    "mean over pixels": ["log_joint Stein"],
    "sigmoid twice": ["log_joint score", "log_joint moves"],
    "key reuse between z and x": ["log_joint Stein"],
}
OF_X = {"mean over pixels", "sigmoid twice", "key reuse between z and x"}


@pytest.mark.parametrize(
    ("kind", "bug"),
    [("gaussian", bug) for bug in BUGS[1:] if bug != "sigmoid twice"]
    + [("bernoulli", bug) for bug in BUGS[1:] if bug in OF_X or "prior" in bug],
)
def test_a_planted_bug_is_found(kind, bug):
    """With three keys, 10,000 draws."""
    for seed in range(3):
        report = planted(kind, bug, seed)
        assert not report.ok
        assert set(FOUND_BY[bug]) <= set(failed(report)), str(report)
        if kind == "bernoulli" and bug in OF_X:
            assert "log_joint moves" in failed(report)
        if kind == "bernoulli" and "prior weighted" in bug:
            assert "log_joint Stein" in failed(report)
        # Nothing is averaged where there is nothing to average.
        scores = [failed(report)[name] for name in FOUND_BY[bug] if name != "draws differ"]
        assert bug == "draw stopped" or min(scores) > 5.0, str(report)
        # The other side is not accused.
        if bug in BUGS[1:10]:
            assert not any(name.startswith("log_joint") for name in failed(report))
        if bug in BUGS[11:]:
            assert not any(name.startswith("log_q") or name == "reparametrisation" for name in failed(report))


# The others are long.
FAST = {
    "Bernoulli latent", "gmm", "collapsed gmm", "flow", "flow, Bernoulli", "one-hot", "without a latent",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.long) for name in CORRECT]
)
def test_a_correct_model_passes(name):
    model, params, x = correct(name)
    for seed in range(2):
        report = check_model(model, params, x, jax.random.key(seed))
        assert report.ok, str(report)
        assert all(not check.advice for check in report.checks)


@pytest.mark.slow
def test_a_large_model_is_checked_by_blocks():
    """A VAE with 26,000 parameters on each side: right, log_q's scale times 1.05, and the prior's mean off by .1."""
    likelihood = likelihoods.bernoulli()
    encoder, decoder = vd.nets.mlp((60,), (8,), hidden=(400,)), vd.nets.mlp((4,), (60,), hidden=(400,))
    vae = vd.vae(encoder, decoder, latent_dim=4, likelihood=likelihood)

    def log_q(params, x, z):
        loc = encoder.apply(params.lam, likelihood.embed(x))[:4]
        factor = 1.0 + 0.05 * params.phi["wider"].astype(jnp.float32)
        return vae.log_q(params, x, loc + (z - loc) / factor) - 4 * jnp.log(factor)

    def log_joint(params, x, z):
        shift = 0.1 * params.phi["shifted"].astype(jnp.float32)
        return vae.log_joint(params, x, z) + jnp.sum(shift * z - 0.5 * shift**2)

    model = vae._replace(init=None, log_q=log_q, log_joint=log_joint, elbo_terms=None)
    x, right = jnp.ones(60, jnp.int32), vae.init(jax.random.key(0))
    for wider, shifted, found_by in [
        (0, 0, set()),
        (1, 0, {"log_q score", "log_q Stein"}),
        (0, 1, {"log_joint Stein"}),
    ]:
        params = right._replace(phi={"wider": jnp.int32(wider), "shifted": jnp.int32(shifted)})
        report = check_model(model, params, x, jax.random.key(0))
        assert found_by <= set(failed(report)) and report.ok == (not found_by), str(report)


def test_few_draws_are_enough_to_pass_and_to_see_a_gross_error():
    assert check_model(GAUSSIAN, GAUSSIAN_PARAMS(), REAL, jax.random.key(3), num_draws=100).ok
    params = GAUSSIAN_PARAMS("swapped mean and scale in log_q")
    assert not check_model(GAUSSIAN, params, REAL, jax.random.key(3), num_draws=100).ok


# Faults of structure: a variant of one small model each.

SMALL = toys.toy("linear")
X = jnp.asarray(SMALL.data[0])


def check_small(num_draws=200, params=SMALL.params, **functions):
    return check_model(SMALL.model._replace(**functions), params, X, jax.random.key(0), num_draws)


def crash(*args):
    raise RuntimeError("out of cheese")


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ({"log_q": lambda params, x, z: 0.0 * z}, r"log_q: got float32\[1\], expected float32\[\]; sum"),
        (
            {"log_joint": lambda params, x, z: 0.0 * x},
            r"log_joint: got float32\[3\], expected float32\[\]; sum",
        ),
        ({"log_q": crash}, "log_q: RuntimeError: out of cheese"),
        ({"sample": crash}, "sample: RuntimeError: out of cheese"),
        ({"sample_q": lambda key, params, x: z_of_another_length(key)}, r"z, against that of sample_q: got"),
        ({"sample": lambda key, params: X}, "sample: got float32.3., expected a pair"),
        (
            {"sample": lambda key, params: (X.astype(jnp.int32), jnp.zeros(1))},
            r"sample: x: got int32\[3\], expected float32\[3\]",
        ),
    ],
)
def test_wrong_shapes_and_crashes_are_reported(functions, message):
    report = check_small(**functions)
    faults = [check for check in report.checks if check.name == "shapes"]
    assert faults and not report.ok and all(check.advice for check in faults)
    assert any(re.search(message, check.found) for check in faults), str(report)


def z_of_another_length(key):
    return jax.random.normal(key, (2,))


@pytest.mark.slow
def test_what_is_read_and_by_whom_is_noted():
    note = {check.name: check for check in check_small().checks}["who reads what"]
    assert note.is_ok and note.found == "note: nothing reads lam['lower']"

    def log_joint(params, x, z):
        return SMALL.model.log_joint(params, x, z) + 0.0 * params.lam["bias"][0]

    note = {check.name: check for check in check_small(log_joint=log_joint).checks}["who reads what"]
    assert note.is_ok and "log_joint reads lam['bias']" in note.found

    def log_q(params, x, z):
        return SMALL.model.log_q(params, x, z) - 0.0 * params.cv

    fault = check_small(log_q=log_q, params=SMALL.params._replace(cv=jnp.ones(())))
    fault = {check.name: check for check in fault.checks}["who reads what"]
    assert not fault.is_ok and "cv" in fault.found and "theta, phi or lam" in fault.advice


def test_nan_in_the_tails_is_found():
    def log_joint(params, x, z):
        p = jax.nn.sigmoid(4.0 * z)  # One at z = 8, where log(1 - p) is -inf, and 0 times it NaN.
        return SMALL.model.log_joint(params, x, z) + 0.0 * jnp.sum(jnp.log(1.0 - p))

    def steep(params, x, z):  # A finite value, an infinite gradient.
        return SMALL.model.log_joint(params, x, z) + 0.0 * jnp.sum(jnp.sqrt(jnp.maximum(5.0 - z, 0.0)))

    tails = {check.name: check for check in check_small(log_joint=log_joint).checks}["tails"]
    assert not tails.is_ok and "log_joint is NaN" in tails.found and "log_sigmoid" in tails.advice
    tails = {check.name: check for check in check_small(log_joint=steep).checks}["tails"]
    assert not tails.is_ok and "gradient of log_joint" in tails.found


def test_a_float_bernoulli_latent_is_told_to_take_an_integer_dtype():
    toy = toys.toy("bernoulli")

    def as_ints(log_density):
        return lambda params, x, z: log_density(params, x, z.astype(jnp.int32))

    def sample(key, params):
        x, z = toy.model.sample(key, params)
        return x, z.astype(jnp.float32)

    model = Model(
        toy.model.init,
        as_ints(toy.model.log_joint),
        as_ints(toy.model.log_q),
        lambda key, params, x: toy.model.sample_q(key, params, x).astype(jnp.float32),
        sample,
    )
    report = check_model(model, toy.params, toy.data[0], jax.random.key(0))
    assert set(failed(report)) == {"reparametrisation"}, str(report)
    advice = next(check.advice for check in report.checks if not check.is_ok)
    assert "score_function" in advice and "integer dtype" in advice


def test_a_crash_when_running_is_reported():
    def sample_q(key, params, x):
        def fail(value):
            raise RuntimeError("no more cheese")

        return jax.pure_callback(fail, jax.ShapeDtypeStruct((1,), jnp.float32), params.lam["bias"])

    report = check_small(sample_q=sample_q)
    assert not report.ok and "running" in failed(report)


# The report.


def test_the_table_reads_well():
    text = str(planted("gaussian", "constant in log_q"))
    lines = text.splitlines()
    assert lines[0].split() == ["check", "|z|", "found"]
    table = lines[1 : lines.index("")]
    starts = {line.index("  ok  ") if "  ok  " in line else line.index("  FAIL  ") for line in table}
    assert len(starts) == 1, "columns are not aligned"
    failing = [line for line in table if "  FAIL  " in line]
    assert len(failing) == 1 and failing[0].startswith("log_q normalisation")
    assert "log_q normalisation: log_q does not integrate to one" in text
    assert "Not seen by any of these:" in text and max(len(line) for line in table) < 140


@pytest.mark.slow
def test_what_cannot_be_seen_is_said():
    """Where h and p do not overlap a constant stays unseen, and the report says so."""

    def log_joint(params, x, z):
        return SMALL.model.log_joint(params, x, z)

    report = check_small(log_joint=log_joint)
    assert not any("constant" in each for each in report.cannot_see)
    toy = far_from_gaussian()
    report = check_model(toy, Params(), jnp.zeros(()), jax.random.key(0), 1_000)
    assert report.ok, str(report)
    assert any("log_joint is off by a constant" in each for each in report.cannot_see)


def far_from_gaussian():
    """Two narrow modes far apart: a Gaussian over both puts next to nothing on either."""

    def log_joint(params, x, z):
        modes = jnp.array([-1.0, 1.0])
        return jax.scipy.special.logsumexp(jax.scipy.stats.norm.logpdf(x, modes, 1e-4)) - jnp.log(2.0)

    def sample(key, params):
        key_mode, key_x = jax.random.split(key)
        return jax.random.rademacher(key_mode, (), jnp.float32) + 1e-4 * jax.random.normal(key_x), ()

    return Model(
        lambda key: Params(), log_joint, lambda params, x, z: jnp.zeros(()), lambda key, params, x: (), sample
    )


@pytest.mark.parametrize("key", [jnp.array([0, 1], jnp.uint32), jax.random.split(jax.random.key(0), 2)])
def test_wrong_keys_raise(key, unchecked):
    with pytest.raises(TypeError, match="key: got .* expected a typed key"):
        check_model(SMALL.model, SMALL.params, X, key)


def test_too_few_draws_raise():
    with pytest.raises(ValueError, match="num_draws: got 99, expected at least 100"):
        check_model(SMALL.model, SMALL.params, X, jax.random.key(0), num_draws=99)


def test_the_key_alone_decides():
    one = str(check_small(500))
    assert one == str(check_small(500))
    assert one != str(check_model(SMALL.model, SMALL.params, X, jax.random.key(1), 500))
