"""The chain under fixed betas: its ELBO term by term is the ELBO of the path, and the lecture's VAE when m = 1."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import norm

import vdiff as vd
from tests import toys
from tests.diffusion.cases import gaussian_denoiser, gaussian_mse, tiny_denoiser
from vdiff import diffusion

LOC, SCALE = 0.3, 0.25
DATA = np.array([[0.5, -1.0], [-0.3, 0.4]], np.float32)
LEVELS = np.array([[3, 11], [7, 8]], np.int32)


def model(betas, *, hidden=4, **settings):
    return vd.ddpm(tiny_denoiser(2, hidden), betas, shape=(2,), **settings)


CASES = {
    "m = 1": (lambda: model([0.4], likelihood=diffusion.gaussian(0.5)), DATA),
    "m = 2, noise, beta": (lambda: model([0.3, 0.5]), DATA),
    "m = 3, data, posterior": (
        lambda: model(
            [0.2, 0.4, 0.6],
            predict=vd.predict.data,
            reverse_variance=diffusion.posterior_variance(),
            likelihood=diffusion.gaussian(0.5),
        ),
        DATA,
    ),
    "m = 5, velocity, learned": (
        lambda: model(
            np.linspace(0.1, 0.6, 5),
            predict=vd.predict.velocity,
            reverse_variance=diffusion.learned_variance(3.0, -3.0, 4),
        ),
        DATA,
    ),
    "m = 7, preconditioned, constant": (
        lambda: model(
            diffusion.constant_betas(7, 0.3),
            predict=vd.predict.preconditioned(0.7),
            reverse_variance=diffusion.optimal_variance(gaussian_mse(0.0, 0.7)),
            likelihood=diffusion.gaussian(0.5),
        ),
        DATA,
    ),
    "m = 4, levels": (
        lambda: model([0.05, 0.3, 0.4, 0.5], predict=vd.predict.velocity, likelihood=diffusion.levels(16)),
        LEVELS,
    ),
    "m = 4, discretized": (
        lambda: model(
            [0.1, 0.3, 0.4, 0.5], predict=vd.predict.data, likelihood=diffusion.discretized_gaussian(16)
        ),
        LEVELS,
    ),
}


@functools.cache
def both(name):
    """Gradients of the path's ELBO and of its terms, each under keys of its own, fresh for each case."""
    build, data = CASES[name]
    num_draws = 500_000 if "learned" in name else 200_000
    made = build()
    seed = 10 * list(CASES).index(name)
    params = made.init(jax.random.key(seed))
    params = jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(9), leaf.shape), params)
    path = toys.gradient_draws({"path": vd.pathwise(made)}, params, data, num_draws, seed=seed + 1)["path"]
    terms = toys.gradient_draws({"terms": made.elbo_terms}, params, data, num_draws, seed=seed + 2)["terms"]
    return path, terms


def signed_scores(one, other):
    """(mean - mean) in standard errors, component by component, for draws [N, P]."""
    difference = one.mean(0) - other.mean(0)
    std_error = np.sqrt((one.var(0, ddof=1) + other.var(0, ddof=1)) / len(one))
    floor = 1e-6 * np.linalg.norm(other.mean(0)) + 1e-12
    return difference / np.maximum(std_error, floor)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_diffusion_loss_is_the_elbo_of_a_hierarchical_vae(name):
    """THE centrepiece: log p(x, z_1..z_m) - log q(z_1..z_m | x) on whole paths, against three closed-form terms."""
    (path_value, path), (terms_value, terms) = both(name)
    score = signed_scores(path_value[:, None].astype(float), terms_value[:, None].astype(float))
    assert abs(score[0]) < 5
    for part in ("theta", "phi"):
        if not jax.tree.leaves(getattr(path, part)):
            continue
        one, other = toys.flat(getattr(path, part)), toys.flat(getattr(terms, part))
        assert np.max(np.abs(signed_scores(one, other))) < 5, part
        # Along the gradient itself: a bias of 2 % of its norm would be 5 standard errors.
        direction = other.mean(0) / np.linalg.norm(other.mean(0))
        along = (one @ direction)[:, None], (other @ direction)[:, None]
        std_error = np.sqrt((along[0].var() + along[1].var()) / len(one))
        assert std_error < 0.004 * np.linalg.norm(other.mean(0)), part
        assert abs(signed_scores(*along)[0]) < 5, part


@pytest.mark.slow
def test_the_scores_lean_to_neither_side():
    """A bias too small for any one case would give all of them one sign."""
    scores = []
    for name in CASES:
        (path_value, _), (terms_value, _) = both(name)
        scores.append(signed_scores(path_value[:, None].astype(float), terms_value[:, None].astype(float))[0])
    assert abs(np.sum(scores)) / math.sqrt(len(scores)) < 4, scores


def test_sample_q_is_the_lectures_noising():
    betas = np.linspace(0.1, 0.5, 4, dtype=np.float32)
    made, key, x = model(betas), jax.random.key(3), jnp.asarray(DATA[0])
    path = made.sample_q(key, made.init(key), x)
    assert np.array_equal(path, vd.forward_noise(key, x, jnp.asarray(betas)))
    before = np.concatenate([DATA[:1], path[:-1]])
    scale = np.sqrt(betas.astype(float))[:, None]
    exact = norm.logpdf(path, np.sqrt(1 - betas)[:, None] * before, scale).sum()
    assert float(made.log_q(made.init(key), x, path)) == pytest.approx(exact, rel=1e-5)


def test_log_joint_is_the_sum_of_its_kernels():
    """By hand, in float64, for two latents."""
    betas = np.array([0.3, 0.5])
    made = model(betas, predict=vd.predict.data, likelihood=diffusion.gaussian(0.5))
    params = made.init(jax.random.key(0))
    x, z = DATA[0], np.array([[0.2, -0.7], [-0.4, 0.1]], np.float32)
    alpha_bar = np.cumprod(1 - betas)
    log_snr = np.log(alpha_bar / (1 - alpha_bar))
    denoise = lambda i: np.asarray(made.denoise(params, jnp.asarray(z[i]), jnp.float32(log_snr[i])), float)  # noqa: E731
    # Ho et al., eq. 7, for t = 2.
    mean = (
        math.sqrt(alpha_bar[0]) * betas[1] * denoise(1) + math.sqrt(1 - betas[1]) * (1 - alpha_bar[0]) * z[1]
    ) / (1 - alpha_bar[1])
    exact = (
        norm.logpdf(z[1]).sum()
        + norm.logpdf(z[0], mean, math.sqrt(betas[1])).sum()
        + norm.logpdf(x, denoise(0), 0.5).sum()
    )
    assert float(made.log_joint(params, jnp.asarray(x), jnp.asarray(z))) == pytest.approx(exact, rel=1e-5)


def test_with_one_latent_it_is_a_vae():
    """m = 1: the same terms as `vae` whose encoder is the noising and whose decoder is the denoiser."""
    beta, dims = 0.4, 2
    made = model([beta], predict=vd.predict.data, likelihood=diffusion.gaussian(0.5))
    params = made.init(jax.random.key(0))
    log_snr = jnp.float32(math.log((1 - beta) / beta))
    denoiser = tiny_denoiser(dims)
    encoder = vd.Network(
        lambda key: (),
        lambda lam, x: jnp.concatenate([math.sqrt(1 - beta) * x, jnp.full(dims, 0.5 * math.log(beta))]),
    )
    decoder = vd.Network(denoiser.init, lambda theta, z: denoiser.apply(theta, z, log_snr))
    vae = vd.vae(encoder, decoder, latent_dim=dims, likelihood=vd.likelihoods.gaussian(0.5))
    of_vae = vd.Params(theta=params.theta["denoiser"])
    x = jnp.asarray(DATA[0])
    for z in (jnp.array([0.2, -0.7]), jnp.array([-1.0, 2.0])):
        assert float(made.log_joint(params, x, z[None])) == pytest.approx(
            float(vae.log_joint(of_vae, x, z)), rel=1e-5
        )
        assert float(made.log_q(params, x, z[None])) == pytest.approx(
            float(vae.log_q(of_vae, x, z)), rel=1e-5
        )
    keys = jax.random.split(jax.random.key(1), 40_000)
    ours = jax.vmap(made.elbo_terms, in_axes=(0, None, None))(keys, params, x)
    theirs = jax.vmap(vae.elbo_terms, in_axes=(0, None, None))(jax.random.split(keys[0], 40_000), of_vae, x)
    assert np.all(ours["diffusion"] == 0)
    assert float(ours["prior"][0]) == pytest.approx(float(theirs["kl"][0]), rel=1e-5)
    one, other = (np.asarray(terms["reconstruction"], float)[:, None] for terms in (ours, theirs))
    assert abs(signed_scores(one, other)[0]) < 5


# Gaussian data with its closed-form denoiser: x ~ N(loc, scale^2 I).


def gaussian_chain(log_snr_max, log_snr_min, num_latents, reverse_variance, dims=2, likelihood=None):
    """Latents even in log-SNR between fixed ends, the data's own denoiser."""
    log_snrs = jnp.linspace(log_snr_max, log_snr_min, num_latents)
    return vd.ddpm(
        gaussian_denoiser(),
        diffusion.betas_of(log_snrs),
        shape=(dims,),
        predict=vd.predict.data,
        reverse_variance=reverse_variance,
        likelihood=likelihood,
    )


def exact_diffusion_term(log_snr_max, log_snr_min, num_latents, kind, dims=2):
    """Its mean over data, by the textbook's KLs in float64; |x - x_hat|^2 per dimension is Var(x | z)."""
    log_snr = np.linspace(log_snr_max, log_snr_min, num_latents)
    signal = 1 / (1 + np.exp(-log_snr))
    noise = 1 - signal
    mse = SCALE**2 * noise / (SCALE**2 * signal + noise)
    total = 0.0
    for s in range(num_latents - 1):
        t = s + 1
        kept = 1 - np.exp(log_snr[t] - log_snr[s])
        posterior, beta = noise[s] * kept, noise[t] * kept
        drift = signal[s] * kept**2 * mse[t]
        eta = {"posterior": posterior, "beta": beta, "optimal": posterior + drift}[kind]
        total += dims / 2 * (posterior / eta - 1 - np.log(posterior / eta) + drift / eta)
    return -total


KINDS = {
    "beta": diffusion.beta_variance,
    "posterior": diffusion.posterior_variance,
    "optimal": lambda: diffusion.optimal_variance(gaussian_mse()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_diffusion_term_rises_to_its_limit(kind):
    """From below as m doubles; equal to it at every m with the optimal reverse variance."""
    first, last, dims = 6.0, -6.0, 2
    limit = -dims / 2 * math.log((1 + SCALE**2 * math.exp(first)) / (1 + SCALE**2 * math.exp(last)))
    terms = [exact_diffusion_term(first, last, m, kind) for m in (4, 8, 16, 32, 64, 128)]
    if kind == "optimal":
        assert np.allclose(terms, limit, rtol=1e-10)
    else:
        assert np.all(np.diff(terms) > 0) and terms[-1] < limit
        # Halving the steps halves the gap.
        gaps = limit - np.array(terms)
        assert np.allclose(gaps[-2] / gaps[-1], 2, atol=0.15)
    for m in (4, 16):
        made = gaussian_chain(first, last, m, KINDS[kind]())
        params = made.init(jax.random.key(m))

        def term(key, made=made, params=params):
            key_x, key_z, key_u = jax.random.split(key, 3)
            x = LOC + SCALE * jax.random.normal(key_x, (dims,))
            return made.rate_at(key_z, params, x, jax.random.uniform(key_u)).value

        draws = np.asarray(jax.jit(jax.vmap(term))(jax.random.split(jax.random.key(m), 400_000)), float)
        exact = exact_diffusion_term(first, last, m, kind)
        std_error = draws.std() / math.sqrt(len(draws))
        assert std_error < 0.004 * abs(exact)
        assert abs(draws.mean() - exact) < 5 * std_error


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_elbo_and_its_known_gap_are_log_p(kind):
    """Every expectation in closed form, by the model's own functions at Gauss-Hermite nodes, in float64."""
    first, last, m, scale = 5.0, -5.0, 6, 0.1
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights = weights / weights.sum()

    def elbo():
        made = gaussian_chain(first, last, m, KINDS[kind](), dims=1, likelihood=diffusion.gaussian(scale))
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), made.init(jax.random.key(0)))
        log_snrs = jnp.linspace(first, last, m)

        def at(x, eps):
            x, eps = x[None], eps[None]
            alpha, sigma = diffusion.alpha(log_snrs), diffusion.sigma(log_snrs)
            z = alpha[:, None] * x[None] + sigma[:, None] * eps[None]
            total = 0.0
            for s in range(m - 1):
                x_hat = made.denoise(params, z[s + 1], log_snrs[s + 1])
                mean, variance = diffusion.forward_posterior(z[s + 1], x, log_snrs[s], log_snrs[s + 1])
                guess, _ = diffusion.forward_posterior(z[s + 1], x_hat, log_snrs[s], log_snrs[s + 1])
                eta = made.reverse_variance(params, log_snrs[s], log_snrs[s + 1])
                ratio = variance / eta
                total -= 0.5 * (ratio - 1 - jnp.log(ratio) + jnp.sum((mean - guess) ** 2) / eta)
            x_hat = made.denoise(params, z[0], log_snrs[0])
            total += jnp.sum(jax.scipy.stats.norm.logpdf(x, x_hat, scale))
            loc, spread = alpha[-1] * x[0], sigma[-1] ** 2
            return total - 0.5 * (loc**2 + spread - 1 - jnp.log(spread))

        values = jax.vmap(jax.vmap(at, in_axes=(None, 0)), in_axes=(0, None))(
            jnp.asarray(LOC + SCALE * nodes), jnp.asarray(nodes)
        )
        return jnp.asarray(weights) @ values @ jnp.asarray(weights)

    with jax.enable_x64(True):
        value = float(elbo())
    # What is lost: at the prior, in the chain, in the last step; each a divergence of Gaussians.
    signal = lambda log_snr: 1 / (1 + math.exp(-log_snr))  # noqa: E731
    first_signal, last_signal = signal(first), signal(last)
    variance_last = SCALE**2 * last_signal + 1 - last_signal
    at_prior = 0.5 * (last_signal * LOC**2 + variance_last - 1 - math.log(variance_last))
    in_chain = 0.5 * math.log((1 + SCALE**2 * math.exp(first)) / (1 + SCALE**2 * math.exp(last)))
    in_chain = -exact_diffusion_term(first, last, m, kind, dims=1) - in_chain
    mse = SCALE**2 * (1 - first_signal) / (SCALE**2 * first_signal + 1 - first_signal)
    at_data = 0.5 * (mse / scale**2 - 1 - math.log(mse / scale**2))
    mean_log_prob = -0.5 * math.log(2 * math.pi * math.e * SCALE**2)
    assert value + at_prior + in_chain + at_data == pytest.approx(mean_log_prob, abs=1e-4)


def test_the_elbo_of_the_model_is_that_sum():
    """`elbo_terms` averaged over data and draws, against the same decomposition, by z-score."""
    first, last, m, scale = 5.0, -5.0, 6, 0.2
    made = gaussian_chain(
        first, last, m, diffusion.beta_variance(), dims=1, likelihood=diffusion.gaussian(scale)
    )
    params = made.init(jax.random.key(0))

    def draw(key):
        key_x, key_terms = jax.random.split(key)
        return made.elbo_terms(key_terms, params, LOC + SCALE * jax.random.normal(key_x, (1,)))

    terms = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(1), 400_000))
    signal = 1 / (1 + math.exp(-first))
    mse = SCALE**2 * (1 - signal) / (SCALE**2 * signal + 1 - signal)
    last_signal = 1 / (1 + math.exp(-last))
    exact = {
        "prior": -0.5 * (last_signal * (LOC**2 + SCALE**2) - last_signal - math.log(1 - last_signal)),
        "reconstruction": -0.5 * (math.log(2 * math.pi * scale**2) + mse / scale**2),
        "diffusion": exact_diffusion_term(first, last, m, "beta", dims=1),
    }
    assert set(terms) == set(exact)
    for name, draws in terms.items():
        draws = np.asarray(draws, float)
        std_error = draws.std() / math.sqrt(len(draws))
        assert std_error < 0.004 * max(abs(exact[name]), 0.5), name
        assert abs(draws.mean() - exact[name]) < 5 * std_error + 1e-6, name


def test_importance_sampling_over_paths_tightens_the_bound():
    """`importance_log_prob` runs on it unchanged, and reaches log p(x) where that is known."""
    m, scale = 4, 0.3
    made = gaussian_chain(3.0, -4.0, m, KINDS["optimal"](), dims=1, likelihood=diffusion.gaussian(scale))
    params = made.init(jax.random.key(0))
    # The model's own marginal, by pushing mean and variance through its affine Gaussian kernels.
    log_snr = np.linspace(3.0, -4.0, m)
    signal = 1 / (1 + np.exp(-log_snr))
    noise = 1 - signal
    mean, variance = 0.0, 1.0
    gain = lambda i: SCALE**2 * np.sqrt(signal[i]) / (SCALE**2 * signal[i] + noise[i])  # noqa: E731
    bias = lambda i: noise[i] * LOC / (SCALE**2 * signal[i] + noise[i])  # noqa: E731
    for t in range(m - 1, 0, -1):
        s = t - 1
        ratio = np.exp(log_snr[t] - log_snr[s])
        slope = ratio * np.sqrt(signal[s] / signal[t]) + (1 - ratio) * np.sqrt(signal[s]) * gain(t)
        mse = SCALE**2 * noise[t] / (SCALE**2 * signal[t] + noise[t])
        eta = noise[s] * (1 - ratio) + signal[s] * (1 - ratio) ** 2 * mse
        mean = slope * mean + (1 - ratio) * np.sqrt(signal[s]) * bias(t)
        variance = slope**2 * variance + eta
    mean, variance = gain(0) * mean + bias(0), gain(0) ** 2 * variance + scale**2
    x = jnp.array([0.45])
    exact = norm.logpdf(0.45, mean, math.sqrt(variance))
    estimate = vd.importance_log_prob(made, 200_000, 10_000)(jax.random.key(1), params, x)
    assert abs(float(estimate.value) - exact) < 5 * float(estimate.std_error)
    assert float(estimate.std_error) < 0.02
    elbo = np.mean(
        jax.vmap(made.elbo_estimate, in_axes=(0, None, None))(
            jax.random.split(jax.random.key(2), 20_000), params, x
        )
    )
    assert elbo < exact


def test_samples_follow_the_data():
    made = gaussian_chain(8.0, -8.0, 20, KINDS["optimal"](), likelihood=diffusion.gaussian(0.005))
    params = made.init(jax.random.key(0))
    x, z = jax.jit(jax.vmap(made.sample, in_axes=(0, None)))(
        jax.random.split(jax.random.key(1), 40_000), params
    )
    assert z.shape == (40_000, 20, 2)
    x = np.asarray(x, float).ravel()
    assert abs(x.mean() - LOC) < 5 * SCALE / math.sqrt(x.size)
    assert abs(x.std() - SCALE) < 5 * SCALE / math.sqrt(2 * x.size)


def test_the_learned_reverse_variance_reaches_the_optimal_one():
    """Trained by the ELBO with 5 knots for 4 steps, from the middle between beta and posterior."""
    first, last, m = 4.0, -4.0, 5
    learned = diffusion.learned_variance(first, last, m)
    made = gaussian_chain(first, last, m, learned, dims=16, likelihood=diffusion.gaussian(0.2))
    params = made.init(jax.random.key(0))
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 600))

    @jax.jit
    def step(phi, opt_state, key):
        def loss(phi):
            key_x, key_terms = jax.random.split(key)
            x = LOC + SCALE * jax.random.normal(key_x, (256, 16))
            terms = jax.vmap(made.elbo_terms, in_axes=(0, None, 0))(
                jax.random.split(key_terms, 256), params._replace(phi=phi), x
            )
            return -jnp.mean(sum(terms.values()))

        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(jax.grad(loss)(phi), opt_state)
        return optax.apply_updates(phi, updates), opt_state

    phi, opt_state = params.phi, optimizer.init(params.phi)
    for i in range(600):
        phi, opt_state = step(phi, opt_state, jax.random.key(i))
    log_snr = jnp.linspace(first, last, m)
    optimal = diffusion.optimal_variance(gaussian_mse())
    for s in range(m - 1):
        reached = float(learned.apply(phi, log_snr[s], log_snr[s + 1]))
        best = float(optimal.apply((), log_snr[s], log_snr[s + 1]))
        start = float(learned.apply(params.phi, log_snr[s], log_snr[s + 1]))
        assert reached == pytest.approx(best, rel=0.01)
        assert abs(math.log(reached / best)) < 0.5 * abs(math.log(start / best))


def test_steps_drawn_by_importance_are_unbiased_and_learn_to_vary_less():
    first, last, m, dims = 6.0, -6.0, 9, 8
    log_snrs = jnp.linspace(first, last, m)
    made = vd.ddpm(
        gaussian_denoiser(),
        diffusion.betas_of(log_snrs),
        shape=(dims,),
        predict=vd.predict.data,
        reverse_variance=diffusion.posterior_variance(),
        times=diffusion.learned_times(m),
    )
    params = made.init(jax.random.key(0))

    def draw(key, lam):
        key_x, key_z, key_u = jax.random.split(key, 3)
        x = LOC + SCALE * jax.random.normal(key_x, (dims,))
        return made.rate_at(key_z, params._replace(lam=lam), x, jax.random.uniform(key_u)).value

    many = jax.jit(jax.vmap(jax.value_and_grad(draw, argnums=1), in_axes=(0, None)))
    keys = jax.random.split(jax.random.key(1), 200_000)
    # The least variance: steps in proportion to the root of the mean squared KL.
    log_snr = np.linspace(first, last, m)
    signal = 1 / (1 + np.exp(-log_snr))
    mse = SCALE**2 * (1 - signal) / (SCALE**2 * signal + 1 - signal)
    kl = 0.5 * np.expm1(log_snr[:-1] - log_snr[1:]) * np.exp(log_snr[1:]) * mse[1:]
    second = kl**2 * (dims**2 + 2 * dims)
    best = np.log(np.sqrt(second))
    exact = exact_diffusion_term(first, last, m, "posterior", dims)
    spreads = []
    for lam in (jnp.zeros(m - 1), jnp.asarray(best, jnp.float32)):
        values, gradients = jax.device_get(many(keys, lam))
        values = values.astype(float)
        assert abs(values.mean() - exact) < 5 * values.std() / math.sqrt(len(values))
        spreads.append(values.std())
        # d/d lam of minus the second moment, in units of one dimension: sum over steps of kl^2 / p.
        soft = np.exp(np.asarray(lam, float))
        soft /= soft.sum()
        p = 0.999 * soft + 0.001 / len(soft)
        slope = 0.999 * soft * second / p**2 / dims**2
        gradient = slope - soft * slope.sum()
        scores = toys.z_scores(gradients.astype(float), gradient)
        assert np.max(scores) < 5, scores
    assert spreads[1] < 0.8 * spreads[0]


@pytest.mark.parametrize("betas", [[], [0.5, 1.0], [0.0], np.full((1, 1), 0.1)])
def test_betas_are_checked(betas):
    with pytest.raises(ValueError, match="betas: got"):
        model(betas)


def test_shapes_are_checked():
    made = vd.ddpm(vd.Network(lambda key: (), lambda theta, z, log_snr: z[:1]), [0.5], shape=(2,))
    params = made.init(jax.random.key(0))
    with pytest.raises(ValueError, match="denoiser: got output of shape"):
        made.elbo_estimate(jax.random.key(0), params, jnp.zeros(2))
    with pytest.raises(ValueError, match="x: got a datum of shape"):
        made.elbo_estimate(jax.random.key(0), params, jnp.zeros(3))
    with pytest.raises(ValueError, match="num_latents: got 1"):
        diffusion.learned_times(1)
