"""Time as a continuum: the limit of chains, one ELBO for every schedule, and a schedule that learns to vary least."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vdiff as vd
from tests import toys
from tests.diffusion.cases import gaussian_denoiser, tiny_denoiser
from vdiff import diffusion

LOC, SCALE = 0.3, 0.25
DATA = np.array([[0.5, -1.0], [-0.3, 0.4]], np.float32)

CHAINS = {
    "bins, m = 3": (diffusion.learned_log_snr(3.0, -3.0, 5), 3, vd.predict.noise),
    "bins, m = 5": (diffusion.learned_log_snr(2.0, -3.0, 3), 5, vd.predict.velocity),
    "monotone, m = 4": (diffusion.monotone_log_snr(2.0, -3.0, 4), 4, vd.predict.data),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_under_a_learned_schedule_has_the_elbos_gradient(name):
    """By lam as by theta: pathwise over the path against the terms."""
    schedule, num_steps, predict = CHAINS[name]
    made = vd.vdm(
        tiny_denoiser(2),
        schedule,
        shape=(2,),
        num_steps=num_steps,
        predict=predict,
        reverse_variance=diffusion.beta_variance(),
        likelihood=diffusion.gaussian(0.5),
    )
    seed = 100 + 10 * list(CHAINS).index(name)
    params = made.init(jax.random.key(seed))
    params = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(5), leaf.shape), params)
    path_value, path = toys.gradient_draws({"": vd.pathwise(made)}, params, DATA, 200_000, seed + 1)[""]
    terms_value, terms = toys.gradient_draws({"": made.elbo_terms}, params, DATA, 200_000, seed + 2)[""]
    pairs = [(path_value[:, None].astype(float), terms_value[:, None].astype(float), 0.004)]
    # By lam the path's gradient is mostly noise: what shows there is a bias of 20 %.
    for part, precision in (("theta", 0.01), ("lam", 0.04)):
        pairs.append((toys.flat(getattr(path, part)), toys.flat(getattr(terms, part)), precision))
    for one, other, precision in pairs:
        difference = one.mean(0) - other.mean(0)
        std_error = np.sqrt((one.var(0) + other.var(0)) / len(one))
        norm = np.linalg.norm(other.mean(0))
        assert np.max(np.abs(difference) / np.maximum(std_error, 1e-6 * norm)) < 5
        direction = other.mean(0) / norm
        along = np.sqrt(((one @ direction).var() + (other @ direction).var()) / len(one))
        assert along < precision * norm
        assert abs(difference @ direction) < 5 * along


# Gaussian data, its own denoiser: the exact term is a logarithm.

FIRST, LAST = 13.3, -5.0
EXACT = 0.5 * math.log((1 + SCALE**2 * math.exp(FIRST)) / (1 + SCALE**2 * math.exp(LAST)))
SCHEDULES = {
    "linear": diffusion.linear_log_snr(FIRST, LAST),
    "cosine": diffusion.cosine_log_snr(FIRST, LAST),
    "edm": diffusion.edm(math.exp(-FIRST / 2), math.exp(-LAST / 2), 7.0),
    "bins": diffusion.learned_log_snr(FIRST, LAST, 32),
    "monotone": diffusion.monotone_log_snr(FIRST, LAST, 8),
}


def continuous(schedule, dims=64):
    return vd.vdm(gaussian_denoiser(), schedule, shape=(dims,), predict=vd.predict.data)


def term_at(made, params, key, u):
    key_x, key_z = jax.random.split(key)
    return made.rate_at(key_z, params, LOC + SCALE * jax.random.normal(key_x, made.shape), u).value


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_has_the_same_elbo(name):
    """With the same ends: a lattice of times, drawn anew many times, against the exact term."""
    made = continuous(SCHEDULES[name], dims=16)
    params = made.init(jax.random.key(0))
    params = params._replace(
        lam=jax.tree.map(
            lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(1), leaf.shape), params.lam
        )
    )

    def sweep(key):
        key_u, key_draws = jax.random.split(key)
        u = (jnp.arange(1000.0) + jax.random.uniform(key_u)) / 1000
        return jnp.mean(
            jax.vmap(lambda k, u: term_at(made, params, k, u))(jax.random.split(key_draws, 1000), u)
        )

    values = -np.asarray(jax.jit(jax.vmap(sweep))(jax.random.split(jax.random.key(2), 600)), float) / 16
    std_error = values.std() / math.sqrt(len(values))
    assert std_error < 0.004 * EXACT
    assert abs(values.mean() - EXACT) < 5 * std_error


def spread(made, params, lattice, num_batches=2000, batch=128):
    """Mean and standard deviation of one batch's estimate, nats per dimension."""

    def estimate(key):
        key_u, key_draws = jax.random.split(key)
        keys = jax.random.split(key_draws, batch)
        if lattice:
            _, step = jax.random.split(key_u)
            lifted = vd.stratified(lambda k, params, x, u: {"": term_at(made, params, k, u)})
            terms, _ = lifted(step, params, jnp.zeros((batch, 1)), jnp.arange(batch), ())
            return jnp.mean(terms[""])
        u = jax.random.uniform(key_u, (batch,))
        return jnp.mean(jax.vmap(lambda k, u: term_at(made, params, k, u))(keys, u))

    run = jax.jit(lambda keys: jax.lax.map(estimate, keys))
    values = -np.asarray(run(jax.random.split(jax.random.key(5), num_batches)), float) / math.prod(made.shape)
    return values.mean(), values.std()


def trained(schedule, num_steps=400):
    """Raise the objective by lam alone, whose aim is the variance of the estimate."""
    made = continuous(schedule)
    params = made.init(jax.random.key(0))
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, num_steps))

    @jax.jit
    def step(lam, opt_state, key):
        def loss(lam):
            here = params._replace(lam=lam)
            lifted = vd.stratified(lambda k, params, x, u: {"": term_at(made, params, k, u)})
            terms, _ = lifted(key, here, jnp.zeros((128, 1)), jnp.arange(128), ())
            return -jnp.mean(terms[""])

        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(jax.grad(loss)(lam), opt_state)
        return optax.apply_updates(lam, updates), opt_state

    lam, opt_state = params.lam, optimizer.init(params.lam)
    for i in range(num_steps):
        lam, opt_state = step(lam, opt_state, jax.random.key(i))
    return made, params._replace(lam=lam)


@pytest.mark.slow
@pytest.mark.parametrize("lattice", [True, False], ids=["lattice", "independent"])
def test_the_learned_schedules_spread_is_near_the_floor(lattice):
    """The floor: a batch of B d draws of a chi-square, exact sqrt(2 / (B d)); the ledger's toy."""
    made, params = trained(diffusion.learned_log_snr(FIRST, LAST, 32))
    mean, std = spread(made, params, lattice)
    floor = EXACT * math.sqrt(2 / (128 * 64))
    assert abs(mean - EXACT) < 5 * std / math.sqrt(2000)
    assert std < 1.1 * floor
    assert std > 0.9 * floor, "below what is possible: the estimate does not vary as it should"


@pytest.mark.slow
def test_fixed_schedules_are_further_from_it():
    floor = EXACT * math.sqrt(2 / (128 * 64))
    ratios = {}
    for name in ("cosine", "linear"):
        made = continuous(SCHEDULES[name])
        mean, std = spread(made, made.init(jax.random.key(0)), lattice=True)
        assert abs(mean - EXACT) < 5 * std / math.sqrt(2000)
        ratios[name] = std / floor
    assert 10 < ratios["cosine"] < 40 and 1.15 < ratios["linear"] < 1.5, ratios


@pytest.mark.parametrize("name", ["bins", "monotone"])
def test_the_schedules_gradient_is_that_of_the_variance(name):
    """By quadrature in float64: d/d lam of minus E[f^2], f = L' |eps_hat - eps|^2 / (2 d), each expectation known."""
    dims = 4
    schedule = {
        "bins": diffusion.learned_log_snr(4.0, -4.0, 5),
        "monotone": diffusion.monotone_log_snr(4.0, -4.0, 3),
    }[name]
    made = continuous(schedule, dims)
    params = made.init(jax.random.key(0))
    lam = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(1), leaf.shape), params.lam)

    def squared_rate(log_snr):
        """E (|eps_hat - eps|^2 / (2 d))^2 at one log-SNR: |eps_hat - eps|^2 is SNR mse times a chi-square of d."""
        signal, noise = jax.nn.sigmoid(log_snr), jax.nn.sigmoid(-log_snr)
        mean_square = signal * SCALE**2 / (SCALE**2 * signal + noise)
        return (0.5 * mean_square / dims) ** 2 * (dims**2 + 2 * dims)

    def minus_second_moment_of_bins(lam):
        """Int squared_rate / p dlog_snr, p a histogram. (Inside an integral over u, the moving edges would be lost.)"""
        log_snr = 4.0 - 8.0 * (jnp.arange(200_000, dtype=jnp.float64) + 0.5) / 200_000
        per_bin = jnp.mean(squared_rate(log_snr).reshape(5, -1), axis=1) * (8.0 / 5)
        share = 0.999 * jax.nn.softmax(lam) + 0.001 / 5
        return -jnp.sum(per_bin / (share / (8.0 / 5)))

    def minus_second_moment(lam):
        """Int over u of squared_rate / p^2, p = 1 / |L'|, all of it smooth."""
        u = (jnp.arange(200_000, dtype=jnp.float64) + 0.5) / 200_000
        log_snr = jax.vmap(schedule.apply, in_axes=(None, 0))(lam, u)
        decay = -jax.vmap(jax.grad(schedule.apply, argnums=1), in_axes=(None, 0))(lam, u)
        return -jnp.mean(decay**2 * squared_rate(log_snr))

    of = minus_second_moment_of_bins if name == "bins" else minus_second_moment
    exact = toys.flat_single(toys.in_float64(jax.grad(of), lam))

    def draw(lam, key):
        key_draw, key_u = jax.random.split(key)
        return term_at(made, params._replace(lam=lam), key_draw, jax.random.uniform(key_u))

    keys = jax.random.split(jax.random.key(3), 400_000)
    gradients = toys.flat(jax.device_get(jax.jit(jax.vmap(jax.grad(draw), in_axes=(None, 0)))(lam, keys)))
    scores = toys.z_scores(gradients, exact)
    assert np.max(scores) < 5, scores
    direction = exact / np.linalg.norm(exact)
    assert (gradients @ direction).std() / math.sqrt(len(keys)) < 0.02 * np.linalg.norm(exact)


def test_the_schedules_aim_reaches_nothing_but_the_schedule():
    """A latent prior's x carries an encoder's gradient: it is the same with the schedule learned and fixed."""
    schedule = diffusion.monotone_log_snr(3.0, -3.0, 4)
    made = vd.vdm(tiny_denoiser(2), schedule, shape=(2,), predict=vd.predict.velocity)
    params = made.init(jax.random.key(0))
    fixed = diffusion.Schedule(lambda key: (), lambda lam, t: schedule.apply(params.lam, t))
    other = vd.vdm(tiny_denoiser(2), fixed, shape=(2,), predict=vd.predict.velocity)
    x, key = jnp.asarray(DATA[0]), jax.random.key(3)
    one = jax.grad(vd.total(made.elbo_terms), argnums=(1, 2))(key, params, x)
    two = jax.grad(vd.total(other.elbo_terms), argnums=(1, 2))(key, params._replace(lam=()), x)
    assert np.array_equal(one[1], two[1])
    jax.tree.map(np.testing.assert_array_equal, one[0].theta, two[0].theta)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(one[0].lam))
    values = (
        vd.total(made.elbo_terms)(key, params, x),
        vd.total(other.elbo_terms)(key, params._replace(lam=()), x),
    )
    assert values[0] == values[1]


def test_in_continuous_time_there_is_no_path():
    made = continuous(SCHEDULES["linear"], dims=2)
    params, x, key = made.init(jax.random.key(0)), jnp.zeros(2), jax.random.key(1)
    for call in (
        lambda: made.log_joint(params, x, x[None]),
        lambda: made.log_q(params, x, x[None]),
        lambda: made.sample_q(key, params, x),
        lambda: vd.pathwise(made)(key, params, x),
    ):
        with pytest.raises(ValueError, match="num_steps"):
            call()
    with pytest.raises(ValueError, match="ancestral"):
        made.sample(key, params)
    sampled = made._replace(sample=vd.ancestral(made, 50))
    x, z = jax.jit(sampled.sample)(key, params)
    assert x.shape == (2,) and z.shape == (50, 2)
    with pytest.raises(ValueError, match="num_steps: got 0"):
        vd.vdm(gaussian_denoiser(), SCHEDULES["linear"], shape=(2,), num_steps=0)


def test_a_long_chain_nears_continuous_time():
    """The same lam, data and draws: the chain's exact mean tends to the continuous one from below."""
    gaps = []
    for num_steps in (9, 17, 33, 65):
        log_snr = np.linspace(FIRST, LAST, num_steps)
        signal = 1 / (1 + np.exp(-log_snr))
        mse = SCALE**2 * (1 - signal) / (SCALE**2 * signal + 1 - signal)
        exact = 0.5 * np.sum(np.expm1(log_snr[:-1] - log_snr[1:]) * np.exp(log_snr[1:]) * mse[1:])
        made = vd.vdm(
            gaussian_denoiser(), SCHEDULES["linear"], shape=(8,), num_steps=num_steps, predict=vd.predict.data
        )
        params = made.init(jax.random.key(0))
        keys = jax.random.split(jax.random.key(num_steps), 20_000)
        u = (jnp.arange(20_000.0) + 0.5) / 20_000
        values = jax.jit(jax.vmap(lambda k, u, m=made, p=params: term_at(m, p, k, u)))(keys, u)
        values = -np.asarray(values, float) / 8
        assert abs(values.mean() - exact) < 5 * values.std() / math.sqrt(len(values))
        gaps.append(exact - EXACT)
    assert np.all(np.array(gaps) > 0) and np.all(np.diff(gaps) < 0)


# A VAE whose prior is a diffusion model: one ELBO.


def latent_vae(num_steps):
    schedule = diffusion.monotone_log_snr(3.0, -3.0, 2)
    prior = vd.vdm(
        tiny_denoiser(2),
        schedule,
        shape=(2,),
        num_steps=num_steps,
        predict=vd.predict.velocity,
        likelihood=diffusion.gaussian(0.4),
    )
    encoder = vd.Network(
        lambda key: {"w": 0.5 * jax.random.normal(key, (2, 3)), "log_scale": jnp.array([-0.7, -0.5])},
        lambda lam, x: jnp.concatenate([lam["w"] @ x, lam["log_scale"]]),
    )
    decoder = vd.Network(lambda key: {"w": jax.random.normal(key, (3, 2))}, lambda theta, z: theta["w"] @ z)
    likelihood = vd.likelihoods.gaussian(0.7)
    return vd.vae(encoder, decoder, latent_dim=2, likelihood=likelihood, prior=prior)


@pytest.mark.slow
def test_latent_diffusion_is_one_elbo():
    """`vae(..., prior=vdm(...))`: its terms against the generic estimators, by part, the schedule's lam gathered."""
    made = latent_vae(num_steps=3)
    params = made.init(jax.random.key(0))
    data = np.array([[0.5, -1.0, 0.3], [0.1, 0.4, -0.2]], np.float32)
    reference = toys.gradient_draws({"": vd.pathwise(made)}, params, data, 100_000, 1)[""]
    others = {
        "terms": toys.gradient_draws({"": made.elbo_terms}, params, data, 100_000, 2)[""],
        "stl": toys.gradient_draws({"": vd.doubly_reparameterized(made)}, params, data, 100_000, 3)[""],
    }
    for name, (value, gradient) in others.items():
        pairs = [(reference[0][:, None].astype(float), value[:, None].astype(float))]
        pairs += [
            (toys.flat(getattr(reference[1], part)), toys.flat(getattr(gradient, part)))
            for part in ("theta", "phi", "lam")
        ]
        for one, other in pairs:
            std_error = np.sqrt((one.var(0) + other.var(0)) / len(one))
            scale = 1e-6 * np.linalg.norm(one.mean(0))
            assert np.max(np.abs(one.mean(0) - other.mean(0)) / np.maximum(std_error, scale)) < 5, name


def test_latent_diffusion_in_continuous_time_has_named_terms():
    made = latent_vae(num_steps=None)
    terms = made.elbo_terms(jax.random.key(1), made.init(jax.random.key(0)), jnp.zeros(3))
    assert set(terms) == {
        "reconstruction",
        "entropy",
        "prior_prior",
        "prior_reconstruction",
        "prior_diffusion",
    }
