"""What `experiments.diffusion` can be asked for, and the model and data that follow from it."""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import vdiff as vd
from experiments import pixels, runs
from vdiff import data, diffusion, nets
from vdiff.diffusion import predict
from vdiff.types import Key, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(runs.RunConfig):
    """Train a diffusion model on images, or on a VAE's latents, and judge it in nats."""

    model: Literal["vdm", "ddpm"] = "vdm"
    """log-SNR as a function of time, or a chain under fixed betas."""
    num_latents: int | None = None
    """Latents of the chain; when not given, continuous time (vdm only)."""
    schedule: Literal["learned", "monotone", "linear", "cosine"] = "learned"
    """How log-SNR falls; the first two are learned (lam) and for a vdm only."""
    log_snr_max: float = 9.0
    """log-SNR at the data's end (vdm only)."""
    log_snr_min: float = -8.0
    """log-SNR at the noise's end (vdm only)."""
    likelihood: Literal["levels", "discretized", "bernoulli"] = "levels"
    """p(x | z_1): Bayes' rule over the levels, a discretised Gaussian, or levels of a binary draw of the grey level.
    In latents, what the VAE takes a pixel for: categorical, binned logistic, Bernoulli."""
    network: Literal["unet", "dit", "mlp"] = "unet"
    """U-Net, transformer over patches, or perceptron."""
    width: int = 32
    """Channels of the U-Net's finest level, doubled at each next; units of a layer of the others."""
    depth: int = 2
    """Levels of the U-Net, blocks of the transformer, hidden layers of the perceptron."""
    patch: int | None = None
    """Side of the squares of pixels that the network takes for one position: 2 in the transformer when not given, and 1
    in the U-Net, for which 2 leaves out its costliest level."""
    prediction: Literal["level", "preconditioned", "velocity", "noise", "data"] = "level"
    """What the network gives: logits of each pixel's levels, or one of the readings in vdiff.predict."""
    reverse_variance: Literal["posterior", "beta", "learned"] = "posterior"
    """The spread of a reverse step: of the chain's ELBO, and of the samples."""
    remat: bool = False
    """Compute what lies within the network's blocks again for the gradient, and so hold less of it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the computation inside the network."""
    latent_dim: int | None = None
    """Units of a VAE's z, on which the diffusion is then a prior (phi); when not given, it is one of pixels."""
    hidden: tuple[int, ...] = (512, 512)
    """That VAE's hidden layers, in the encoder; the decoder has them in reverse."""
    weight: Literal["elbo", "simple", "min_snr", "edm", "sigmoid"] = "elbo"
    """How the loss weighs log-SNRs in training; judged is the ELBO itself."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises to its peak."""
    eval_times: int = 64
    """Times of one sweep along the path, in continuous time; a chain's sweep takes each of its steps once."""
    eval_sweeps: int = 2
    """Independent sweeps per test image."""
    eval_images: int = 10_000
    """How many test images are judged, from the first."""
    sampler: Literal["ancestral", "ddim", "heun", "dpm_solver", "dpm_solver_sde"] = "ancestral"
    """How samples are drawn: by the chain's own steps, or by a solver of few steps."""
    grid: Literal["time", "log_snr", "karras"] = "time"
    """Where a sample's latents lie: even in the schedule's time, in log-SNR, or as Karras et al. place them."""
    sample_steps: int = 200
    """Latents that a sample visits: calls of the network."""


_BETAS = {"linear": diffusion.linear_betas, "cosine": diffusion.cosine_betas}
_SCHEDULES = {
    "learned": diffusion.learned_log_snr,
    "monotone": diffusion.monotone_log_snr,
    "linear": diffusion.linear_log_snr,
    "cosine": diffusion.cosine_log_snr,
}
_VARIANCES = {
    "posterior": diffusion.posterior_variance,
    "beta": diffusion.beta_variance,
    "learned": diffusion.learned_variance,
}
_SAMPLERS = {
    "ancestral": diffusion.ancestral,
    "ddim": diffusion.ddim,
    "heun": diffusion.heun,
    "dpm_solver": diffusion.dpm_solver,
    "dpm_solver_sde": diffusion.dpm_solver_sde,
}
GRIDS = {
    "time": diffusion.uniform_time,
    "log_snr": diffusion.uniform_log_snr,
    "karras": diffusion.karras(),
}


class Problem(NamedTuple):
    """Hold a model and its data, as `build` makes them.

    Attributes:
        model: what is trained: the diffusion itself, or a VAE whose prior it is.
        diffusion: the diffusion in it, with the sampler that was asked for.
        vae: the VAE, or None.
        within: `(objective of the diffusion) -> objective of the model`, in which that one takes the place of the
            diffusion's own terms.
        own: `(params) -> params` of the diffusion in it.
        latent: `(key, params, x) -> y`, the diffusion's datum.
        dataset: the images, as integer levels.
        transform: `(key, levels) -> x`, the model's datum.
        levels: how many values a pixel of x has.
    """

    model: vd.ModelLike
    diffusion: vd.Diffusion
    vae: vd.VAE | None
    within: Callable[[vd.Objective], vd.Objective]
    own: Callable[[Params], Params]
    latent: Callable[[Key, Params, jax.Array], jax.Array]
    dataset: data.Dataset
    transform: Callable[[Key, jax.Array], jax.Array]
    levels: int


def build(config: Config) -> Problem:
    """Build the model that a config describes, and load its data.

    Raises:
        ValueError: if the data set is unknown, or settings do not fit each other.
    """
    dataset = data.load(config.data)
    transform, levels = (lambda key, x: x), dataset.levels
    if config.likelihood == "bernoulli":
        transform, levels = vd.transforms.binarize(dataset.levels), 2
    of_latents = config.latent_dim is not None
    shape = (config.latent_dim,) if of_latents else dataset.train.shape[1:]
    denoising = diffusion_of(config, shape, dataset, config.schedule)
    sampler = _SAMPLERS[config.sampler](denoising, config.sample_steps, grid=GRIDS[config.grid])
    denoising = denoising._replace(sample=sampler)
    if not of_latents:
        return Problem(
            denoising,
            denoising,
            None,
            lambda objective: objective,
            lambda params: params,
            lambda key, params, x: x,
            dataset,
            transform,
            levels,
        )

    name = {"bernoulli": "bernoulli", "levels": "categorical", "discretized": "logistic"}[config.likelihood]
    likelihood, out_bias = pixels.LIKELIHOODS[name](pixels.looked_at(dataset.train), dataset.levels)
    image_shape = dataset.train.shape[1:]
    encoder = nets.mlp(image_shape, (2 * config.latent_dim,), hidden=config.hidden)
    out_shape = likelihood.out_shape(image_shape)
    decoder = nets.mlp((config.latent_dim,), out_shape, hidden=config.hidden[::-1], out_bias=out_bias)

    def vae(prior: vd.ModelLike) -> vd.VAE:
        return vd.vae(encoder, decoder, latent_dim=config.latent_dim, likelihood=likelihood, prior=prior)

    whole = vae(denoising)

    def own(params: Params) -> Params:
        return Params(params.phi["theta"], params.phi["phi"], params.lam["prior"])

    def latent(key: Key, params: Params, x: jax.Array) -> jax.Array:
        loc, scale = whole.encode(params, x)
        return loc + scale * jax.random.normal(key, loc.shape)

    return Problem(
        whole,
        denoising,
        whole,
        lambda objective: vae(denoising._replace(elbo_terms=objective)).elbo_terms,
        own,
        latent,
        dataset,
        transform,
        levels,
    )


def diffusion_of(
    config: Config, shape: tuple[int, ...], dataset: data.Dataset, schedule: str
) -> vd.Diffusion:
    """Build the diffusion of data of this shape, under a schedule that may be another than the config's."""
    levels = 2 if config.likelihood == "bernoulli" else dataset.levels
    if config.latent_dim is not None:
        if (config.network, config.prediction == "level") != ("mlp", False):
            raise ValueError(
                f"network, prediction: got {config.network} and {config.prediction} for latents, expected mlp and any "
                "prediction but level; use --network mlp --prediction velocity"
            )
        likelihood, data_scale = diffusion.gaussian(), 1.0
    else:
        of_pixels = {"levels": diffusion.levels, "discretized": diffusion.discretized_gaussian}
        likelihood = of_pixels.get(config.likelihood, diffusion.levels)(levels)
        data_scale = 2.0 / levels * _spread(pixels.looked_at(dataset.train), levels)
    settings = {
        "shape": shape,
        "predict": _prediction(config, data_scale),
        "reverse_variance": _VARIANCES[config.reverse_variance](),
        "likelihood": likelihood,
    }
    network = _network(config, shape, levels)
    if config.model == "ddpm":
        if config.num_latents is None or schedule not in _BETAS:
            raise ValueError(
                f"num_latents, schedule: got {config.num_latents} and {schedule} for a ddpm, expected a number and "
                f"one of {', '.join(_BETAS)}; use --num-latents 1000 --schedule cosine"
            )
        return vd.ddpm(network, _BETAS[schedule](config.num_latents), **settings)
    log_snr = _SCHEDULES[schedule](config.log_snr_max, config.log_snr_min)
    return vd.vdm(network, log_snr, num_steps=config.num_latents, **settings)


def _spread(images: np.ndarray, levels: int) -> float:
    """Return the standard deviation of a pixel, in levels; with two, of a binary draw of the grey level."""
    if levels > 2:
        return float(images.std()) or 1.0
    mean = float(images.mean() / images.max())
    return float(np.sqrt(mean * (1.0 - mean)))


def _prediction(config: Config, data_scale: float) -> predict.Prediction:
    if config.prediction == "preconditioned":
        return predict.preconditioned(data_scale)
    name = "data" if config.prediction == "level" else config.prediction
    return {"data": predict.data, "noise": predict.noise, "velocity": predict.velocity}[name]


def _network(config: Config, shape: tuple[int, ...], levels: int) -> vd.Network:
    dtype = jnp.dtype(config.precision)
    blocks = {"around": nets.rematerialized_block} if config.remat else {}
    if config.network == "mlp":
        if config.prediction == "level":
            raise ValueError(
                "prediction: got level for the network mlp, expected another; use --prediction data"
            )
        net = nets.time_mlp(shape, hidden=(config.width,) * config.depth, dtype=dtype)
        return nets.rematerialized(net) if config.remat else net
    channels = shape[-1] * (levels if config.prediction == "level" else 1)
    if config.network == "unet":
        features = tuple(config.width * 2**level for level in range(config.depth))
        coarsest = (config.depth - 1,)
        net = nets.unet(
            shape,
            out_channels=channels,
            features=features,
            attention=coarsest,
            patch=config.patch or 1,
            dtype=dtype,
            **blocks,
        )
    else:
        heads = next(heads for heads in (4, 3, 2, 1) if config.width % heads == 0)
        size = {"patch": config.patch or 2, "width": config.width, "depth": config.depth, "heads": heads}
        net = nets.dit(shape, out_channels=channels, dtype=dtype, **size, **blocks)
    return diffusion.expected_level(net, levels) if config.prediction == "level" else net


def num_times(config: Config) -> int:
    """Count the times of one sweep along the path: a chain's steps, or as many as were asked for."""
    return config.eval_times if config.num_latents is None else max(config.num_latents - 1, 1)
