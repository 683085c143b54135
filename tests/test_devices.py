"""One device, eight by jit and eight by pmap are one computation; eight are forced in a process of their own.

Run as a script, this file makes the comparisons and prints them as JSON; the tests judge them.
"""

import functools
import json
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vdiff as vd
from tests import processes, toys, zoo
from tests.states import distance, numbers, small_vae
from vdiff import baselines

NUM_STEPS, BATCH_SIZE, NUM_DEVICES = 20, 64, 8
# Two reductions of 64 gradients in another order differ by about 1e-7 of a leaf's norm at each step; measured
# after 20 steps 1.7e-7 under SGD and 2.9e-7 under Adam, over all leaves of the state.
OPTIMIZERS = {"sgd": lambda: optax.sgd(1e-2), "adam": lambda: optax.adam(1e-3)}
LARGEST_DISTANCE = 2e-6
# Of one gradient. Measured over all estimators and leaves: at most 6e-7, under jit and under pmap.
LARGEST_GRADIENT_DISTANCE = 2e-6
NUM_SAMPLES = 5


def build():
    model, images = small_vae()
    return model, vd.data.batches(images, BATCH_SIZE, seed=0)


def compiled_steps(model, optimizer, **settings):
    plain = vd.make_train_step(model.elbo_terms, optimizer, **settings)
    mapped = vd.make_train_step(model.elbo_terms, optimizer, axis_name="data", **settings)
    return {
        "one": vd.jit_step(plain),
        "jit": vd.jit_step(plain, vd.data_mesh()),
        "pmap": vd.pmap_step(mapped),
    }


def largest_ratio(rows, others):
    """The largest relative difference of any metric at any step; zeros must be zeros."""
    pairs = [(row[name], other[name]) for row, other in zip(rows, others, strict=True) for name in other]
    return float(max(abs(one - two) / max(abs(two), 1e-30) for one, two in pairs))


def message(call):
    """The line of the ValueError that a call raises."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def compare_modes(start, steps, batches):
    """Train in the three modes; tell how far they are apart, and from where they began."""
    states, metrics = {}, {}
    began = numbers(start())
    shapes = {name: list(leaf.shape) for name, leaf in began.items()}
    for mode, step in steps.items():
        state, rows = start(), []
        for i in range(NUM_STEPS):
            state, row = step(state, batches(i))
            rows.append({name: np.asarray(value).astype(np.float64) for name, value in row.items()})
        states[mode], metrics[mode] = state, rows
    ends = {mode: numbers(state) for mode, state in states.items()}
    params = [name for name in began if name.startswith(".params")]
    return {
        "distance": {mode: distance(ends[mode], ends["one"]) for mode in ("jit", "pmap")},
        "metrics": {mode: largest_ratio(metrics[mode], metrics["one"]) for mode in ("jit", "pmap")},
        "metric_names": {mode: sorted(rows[0]) for mode, rows in metrics.items()},
        "shapes_kept": {
            mode: {name: list(leaf.shape) for name, leaf in end.items()} == shapes
            for mode, end in ends.items()
        },
        "moved": min(
            float(np.linalg.norm(ends["one"][name] - began[name]) / np.linalg.norm(ends["one"][name]))
            for name in params
        ),
        "num_devices": {mode: len(state.step.devices()) for mode, state in states.items()},
    }


def compare_calls(start, steps, batches):
    """The loop in calls of four steps, the last one short, against single steps."""
    found = {}
    for mode in ("jit", "pmap"):
        together = vd.fit(start(), steps[mode], batches, 6, steps_per_call=4)
        single = vd.fit(start(), steps[mode], batches, 6, steps_per_call=1)
        found[mode] = distance(numbers(together), numbers(single))
    return found


def compare_resumes(start, steps, batches):
    """Save after 3 steps of one mode, restore and go on to 6 in another; against 6 of one device."""
    straight = numbers(vd.fit(start(), steps["one"], batches, 6))
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        for before, after in (("one", "pmap"), ("jit", "pmap"), ("pmap", "jit"), ("pmap", "one")):
            path = Path(directory) / f"{before}-{after}"
            state = vd.fit(start(), steps[before], batches, 3)
            vd.save(path, state)
            restored = vd.restore(path, start())
            is_exact = distance(numbers(restored), numbers(state)) == 0.0
            end = numbers(vd.fit(restored, steps[after], batches, 6))
            found[f"{before} to {after}"] = {"is_exact": is_exact, "distance": distance(end, straight)}
    return found


def refusals(start, steps, batches):
    state, mesh = start(), vd.data_mesh()
    x = np.concatenate([batches(0), batches(1)])
    return {
        "jit 60": message(lambda: steps["jit"](state, x[:60])),
        "pmap 60": message(lambda: steps["pmap"](state, x[:60])),
        "shard_batch 60": message(lambda: vd.shard_batch(x[:60], mesh)),
        "pmap 3": message(lambda: steps["pmap"](state, x[:3])),
        "shard_batch 0": message(lambda: vd.shard_batch(x[:0], mesh)),
        "fit 60": message(lambda: vd.fit(state, steps["pmap"], lambda i: batches(i)[:60], 2)),
        "pytree": message(lambda: vd.shard_batch({"a": x[:64], "b": x[:60]}, mesh)),
    }


def sharding(start, steps, batches):
    """What a user does by hand: a batch sharded over the mesh goes into the jitted step as it is."""
    mesh, x = vd.data_mesh(), batches(0)
    shards = vd.shard_batch({"x": x}, mesh)["x"]
    ends = [numbers(steps["jit"](start(), batch)[0]) for batch in (x, shards)]
    return {
        "axis_names": list(mesh.axis_names),
        "num_devices": mesh.size,
        "shard_shapes": sorted({shard.data.shape[0] for shard in shards.addressable_shards}),
        "placed_by_jit": sorted({s.data.shape[:2] for s in steps["jit"].place(x[None]).addressable_shards}),
        "placed_by_pmap": steps["pmap"].place(x[None]).shape[:3],
        "same_values": bool(np.array_equal(np.asarray(shards), x)),
        "distance": distance(*ends),
    }


def reductions(start, steps, batches):
    """How many operands each all-reduce of the compiled step has, scalars left out; and how many lie outside loops."""
    found = {}
    for mode in ("jit", "pmap"):
        text = steps[mode].lower(start(), batches(0)[None]).compile().as_text()
        for where, part in (("anywhere", text), ("outside loops", text[text.index("\nENTRY ") :])):
            operands = [
                re.findall(r"f32\[[\d,]+\]", types) for types in re.findall(r"= (.*?) all-reduce\(", part)
            ]
            found[f"{mode}, {where}"] = [len(arrays) for arrays in operands if arrays]
    return found


def baseline_network():
    """A linear one, of x [2]; RELAX's is of z [2] too."""

    def init(key):
        return {"weight": 0.3 * jax.random.normal(key, (2,)), "bias": jnp.float32(-3.0)}

    def apply(cv, *inputs):
        return cv["weight"] @ sum(inputs) + cv["bias"]

    return vd.Network(init, apply)


def estimators():
    """Return {(toy, name): (objective, cv)}: every estimator, on a toy that it takes."""
    linear, bits, both = (toys.toy(name) for name in ("linear", "bernoulli", "mixed c, u"))
    network, key, k = baseline_network(), jax.random.key(1), NUM_SAMPLES
    learned, rebar, relax = (f(key) for f in (network.init, vd.rebar_init, vd.relax_init(network)))
    relaxed = (bits.model, bits.logits)
    return {
        ("linear", "pathwise"): (vd.pathwise(linear.model, vd.elbo, k), ()),
        ("linear", "doubly_reparameterized"): (vd.doubly_reparameterized(linear.model, vd.iwae, k), ()),
        ("linear", "score_function"): (vd.score_function(linear.model, vd.iwae, k), ()),
        ("bernoulli", "learned baseline"): (
            vd.score_function(bits.model, vd.elbo, k, baseline=vd.learned_baseline(network)),
            learned,
        ),
        ("bernoulli", "wake_phase"): (vd.wake_sleep(bits.model, k), ()),
        ("bernoulli", "sleep_phase"): (vd.wake_sleep(bits.model, k, phase=vd.sleep_phase), ()),
        ("bernoulli", "likelihood_gradient"): (vd.likelihood_gradient(bits.model, k), ()),
        ("mixed c, u", "mixed"): (vd.mixed(both.model, both.logits, vd.iwae, k), ()),
        ("bernoulli", "relaxed"): (vd.relaxed(*relaxed, 0.5, vd.iwae, k), ()),
        ("bernoulli", "straight_through"): (vd.straight_through(*relaxed, 1.0, vd.elbo, k), ()),
        ("bernoulli", "rebar"): (vd.rebar(*relaxed, vd.iwae, k), rebar),
        ("bernoulli", "relax"): (vd.relax(*relaxed, network, vd.elbo, k), relax),
        ("bernoulli", "enumerated"): (vd.enumerated(bits.model, jnp.asarray(toys.BITS), vd.iwae, k), ()),
    }


def of_models():
    """Return {name: (objective, params, data)} of hierarchies, discrete codes, autoregressive models and baselines."""
    found = {}
    for name in ("hvae", "ladder"):
        model, params, data = zoo.built(name)
        found[name] = (vd.doubly_reparameterized(model, vd.iwae, NUM_SAMPLES), params, data)
    model, params, data = zoo.built("vqvae")
    codes = vd.straight_through(model, model.logits, relaxation=vd.relaxations.one_hot)
    found["vqvae"] = (codes, params, data)
    for name in ("made, no latent", "pixelcnn, no latent"):
        model, params, data = zoo.built(name)
        found[name] = (model.elbo_terms, params, data)
    return found | zoo.baselines_own()


def compare_estimators():
    """The mean gradient of every estimator over one batch, in the three modes; each has params of its own.

    They are the terms of ONE objective, so that they compile together; plain SGD keeps the gradient as its trace.
    """
    members, batch, noise = {}, {}, np.random.default_rng(0)
    for (of, name), (objective, cv) in estimators().items():
        members[name] = (objective, toys.toy(of)[1]._replace(cv=cv), of)
    for of in sorted({of for _, _, of in members.values()}):
        data = np.tile(toys.toy(of).data, (22, 1))[:BATCH_SIZE]
        batch[of] = data + 0.1 * noise.standard_normal(data.shape, np.float32)
    for name, (objective, of_model, data) in of_models().items():
        members[name] = (objective, of_model, name)
        batch[name] = np.tile(data, (22, *[1] * (data.ndim - 1)))[:BATCH_SIZE]
    params = {name: of_model for name, (_, of_model, _) in members.items()}

    def objective(key, params, x):
        every = ((name, o, of) for name, (o, _, of) in members.items())
        return {name: vd.total(o)(key, params.theta[name], x[of]) for name, o, of in every}

    model = toys.toy("linear").model._replace(init=lambda key: vd.Params(theta=params))
    optimizer = optax.sgd(1.0, momentum=0.0)
    steps = compiled_steps(model._replace(elbo_terms=objective), optimizer)

    def gradients(mode, seed=0):
        state, _ = steps[mode](vd.init_state(jax.random.key(seed), model, optimizer), batch)
        return {name: numbers(own) for name, own in state.opt_state[0].trace.theta.items()}

    one, another = gradients("one"), gradients("one", seed=1)
    return {
        "distance": {
            mode: {name: gradient_distance(found, one[name]) for name, found in gradients(mode).items()}
            for mode in ("jit", "pmap")
        },
        "of_another_key": {name: gradient_distance(found, one[name]) for name, found in another.items()},
        "zero": {name: [path for path, leaf in own.items() if not np.any(leaf)] for name, own in one.items()},
    }


def compare_stratified():
    """A diffusion model whose times and keys belong to positions: three steps in each mode, from one start."""
    data = np.random.default_rng(0).normal(size=(3, BATCH_SIZE, 2)).astype(np.float32)
    network = vd.nets.mlp((3,), (2,), hidden=(8,), activation=jnp.tanh)

    def denoise(theta, z, log_snr):
        return network.apply(theta, jnp.append(z, 0.1 * log_snr))

    denoiser = vd.Network(network.init, denoise)
    model = vd.ddpm(denoiser, vd.linear_betas(20), shape=(2,), times=vd.diffusion.learned_times(20))
    optimizer = optax.sgd(1e-4)
    settings = {"batching": vd.stratified}
    steps = compiled_steps(model._replace(elbo_terms=model.elbo_terms_at), optimizer, **settings)
    ends = {}
    for mode in ("one", "jit", "pmap"):
        state = vd.init_state(jax.random.key(0), model, optimizer)
        for x in data:
            state, _ = steps[mode](state, x)
        ends[mode] = numbers(state)
    other = vd.init_state(jax.random.key(0), model, optimizer)
    for x in data:
        other, _ = steps["one"](other, np.roll(x, BATCH_SIZE // 2, axis=0))
    return {
        **{mode: distance(ends[mode], ends["one"]) for mode in ("jit", "pmap")},
        "of_data_at_other_positions": distance(numbers(other), ends["one"]),
    }


def compare_chains():
    """Persistent CD: five steps whose chains belong to positions, in each mode and in parts, from one start."""
    model = baselines.rbm((3, 2), 5, init_scale=1.0)
    objective = baselines.persistent_contrastive_divergence(model, 2)
    data = np.random.default_rng(0).integers(0, 2, (6, BATCH_SIZE, 3, 2)).astype(np.uint8)
    optimizer = optax.sgd(0.1)
    settings = {"batching": vd.persistent}
    steps = compiled_steps(vd.Model(model.init, *[None] * 4, objective), optimizer, **settings)
    in_parts = vd.make_train_step(objective, optimizer, num_accumulate=4, **settings)
    steps |= {"fsdp, 4 parts": vd.fsdp_step(in_parts, vd.data_mesh(), min_size=1)}
    ends = {}
    for mode, step in steps.items():
        state = vd.init_state(jax.random.key(0), model, optimizer, aux=data[5])
        for x in data[:5]:
            state, _ = step(state, x)
        ends[mode] = state
    one = np.asarray(ends["one"].aux)
    return {
        "distance": {mode: distance(numbers(end), numbers(ends["one"])) for mode, end in ends.items()},
        "same": {mode: bool(np.array_equal(end.aux, one)) for mode, end in ends.items()},
        "moved": float(np.mean(one != data[5])),
        "different": len(np.unique(one.reshape(BATCH_SIZE, -1), axis=0)),
    }


def compare_skips():
    """A NaN in one datum, and so on one device, at step 3 of 5; against the run in which that step was left out."""

    def objective(key, params, x):
        return {"fit": -jnp.sum(jnp.square(x + jax.random.normal(key, (16,)) - params.theta["loc"]))}

    data = np.random.default_rng(0).normal(size=(5, BATCH_SIZE, 16)).astype(np.float32)
    poisoned = data.copy()
    poisoned[2, 37, 1] = np.nan
    optimizer = optax.adam(0.1)
    model = vd.Model(lambda key: vd.Params(theta={"loc": jnp.zeros(16)}), *[None] * 4)
    found, steps = {}, compiled_steps(model._replace(elbo_terms=objective), optimizer)
    in_parts = vd.make_train_step(objective, optimizer, num_accumulate=2)
    steps["fsdp, 2 parts"] = vd.fsdp_step(in_parts, vd.data_mesh(), min_size=1)
    for mode, step in steps.items():
        state, left_out = (vd.init_state(jax.random.key(0), model, optimizer) for _ in range(2))
        for i in range(5):
            state, _ = step(state, poisoned[i])
            if i == 2:
                left_out = left_out._replace(step=left_out.step + 1)
            else:
                left_out, _ = step(left_out, data[i])
        shards = {int(shard.data) for shard in state.guard.num_skipped.addressable_shards}
        found[mode] = {
            "distance": distance(numbers(state._replace(guard=())), numbers(left_out._replace(guard=()))),
            "guard": [int(count) for count in state.guard],
            "num_skipped": sorted(shards),
        }
    return found


def gradient_distance(one, other):
    """The largest over the leaves of |a - b| / |b|, |b| no less than a thousandth of the whole gradient's norm."""
    assert one.keys() == other.keys()
    floor = 1e-3 * np.linalg.norm([np.linalg.norm(leaf) for leaf in other.values()])
    norms = [
        np.linalg.norm(one[name] - other[name]) / max(np.linalg.norm(other[name]), floor) for name in one
    ]
    return float(max(norms))


def main():
    model, batches = build()
    result = {"num_devices": jax.device_count()}
    for name, make in OPTIMIZERS.items():
        optimizer = make()
        start = functools.partial(vd.init_state, jax.random.key(0), model, optimizer)
        steps = compiled_steps(model, optimizer)
        result[name] = compare_modes(start, steps, batches)
        if name == "sgd":
            result["calls"] = compare_calls(start, steps, batches)
            result["resumes"] = compare_resumes(start, steps, batches)
            result["refusals"] = refusals(start, steps, batches)
            result["skips"] = compare_skips()
            result["sharding"] = sharding(start, steps, batches)
            result["reductions"] = reductions(start, steps, batches)
            parts = compiled_steps(model, optimizer, num_accumulate=4)
            result["reductions of parts"] = reductions(start, parts, batches)
            result["sgd, 4 parts"] = compare_modes(start, parts | {"one": steps["one"]}, batches)
            result["num_leaves"] = len(jax.tree.leaves(start().params))
    result["estimators"] = compare_estimators()
    result["stratified"] = compare_stratified()
    result["chains"] = compare_chains()
    print(json.dumps(result))


@pytest.fixture(scope="module")
def result():
    return processes.printed_by(__file__, NUM_DEVICES)


def test_there_are_eight_devices(result):
    assert result["num_devices"] == NUM_DEVICES
    assert result["sgd"]["num_devices"] == {"one": 1, "jit": NUM_DEVICES, "pmap": NUM_DEVICES}


@pytest.mark.parametrize("case", [*OPTIMIZERS, "sgd, 4 parts"])
def test_one_device_and_eight_train_to_the_same_state(result, case):
    """Parameters, average and optimizer's state, each leaf by its norm; 20 steps move each by far more."""
    found = result[case]
    assert found["moved"] > 1e-2
    for mode in ("jit", "pmap"):
        assert found["distance"][mode] < LARGEST_DISTANCE, mode


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_metrics_are_those_of_the_global_batch(result, optimizer):
    found = result[optimizer]
    for mode in ("one", "jit", "pmap"):
        assert found["metric_names"][mode] == ["grad_norm", "kl", "objective", "reconstruction", "skipped"]
    for mode in ("jit", "pmap"):
        assert found["metrics"][mode] < 3e-6, mode


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_state_has_no_device_axis(result, optimizer):
    assert result[optimizer]["shapes_kept"] == {"one": True, "jit": True, "pmap": True}


def test_calls_of_many_steps_are_single_steps(result):
    for mode in ("jit", "pmap"):
        assert result["calls"][mode] < 1e-6, mode


def test_each_mode_goes_on_from_the_others_checkpoint(result):
    assert len(result["resumes"]) == 4
    for modes, found in result["resumes"].items():
        assert found["is_exact"], modes
        assert found["distance"] < 2e-6, modes


def test_batches_that_do_not_divide_are_refused_with_the_numbers_that_would(result):
    expected = {
        "jit 60": (60, "8 or 56 or 64"),
        "pmap 60": (60, "8 or 56 or 64"),
        "shard_batch 60": (60, "8 or 56 or 64"),
        "fit 60": (60, "8 or 56 or 64"),
        "pytree": (60, "8 or 56 or 64"),
        "pmap 3": (3, "8"),
        "shard_batch 0": (0, "8"),
    }
    assert result["refusals"].keys() == expected.keys()
    for name, (size, fits) in expected.items():
        assert result["refusals"][name] == (
            f"batch: got {size} data for 8 devices, expected a multiple of 8; use a batch size of {fits}"
        ), name


def test_a_nan_on_one_device_skips_the_update_on_all(result):
    """Bit for bit the run without that step, in every mode; the count, the row, the step, the leaf, how many leaves."""
    assert result["skips"].keys() == {"one", "jit", "pmap", "fsdp, 2 parts"}
    for mode, found in result["skips"].items():
        assert found == {"distance": 0.0, "guard": [1, 0, 3, 0, 1], "num_skipped": [1]}, mode


def test_gradients_are_reduced_once(result):
    """One all-reduce with every leaf of the gradient in it, also where each device takes its share in four parts."""
    for found in (result["reductions"], result["reductions of parts"]):
        assert found == dict.fromkeys(found, [result["num_leaves"]]) and len(found) == 4


def test_shard_batch_splits_and_keeps(result):
    found = result["sharding"]
    assert found["axis_names"] == ["data"] and found["num_devices"] == NUM_DEVICES
    share = BATCH_SIZE // NUM_DEVICES
    assert found["placed_by_jit"] == [[1, share]] and found["placed_by_pmap"] == [NUM_DEVICES, 1, share]
    assert found["shard_shapes"] == [share] and found["same_values"]
    assert found["distance"] == 0.0


def test_every_estimator_has_one_gradient_on_one_device_and_on_eight(result):
    """Theta, phi, lambda and cv, the mean over the batch, each leaf by its norm; another key moves it by far more."""
    found = result["estimators"]
    assert found["distance"]["jit"].keys() == found["distance"]["pmap"].keys() == found["zero"].keys()
    assert len(found["zero"]) == 23
    for mode, distances in found["distance"].items():
        for name, gap in distances.items():
            assert gap < LARGEST_GRADIENT_DISTANCE, (mode, name)
    other_key = found["of_another_key"]
    for name in ("enumerated", "made, no latent", "pixelcnn, no latent", "explicit"):  # with nothing drawn
        assert other_key.pop(name) == 0.0
    assert min(other_key.values()) > 0.05, other_key


def test_times_of_a_diffusion_model_belong_to_positions(result):
    """One device and eight draw the same times; the same data elsewhere in the batch gets others."""
    found = result["stratified"]
    assert found["jit"] < 2e-6 and found["pmap"] < 2e-6
    assert found["of_data_at_other_positions"] > 1e-4


def test_chains_belong_to_positions(result):
    """Bit for bit the same on one device and on eight, by jit, pmap and fsdp in parts; each moved on its own."""
    found = result["chains"]
    assert found["same"] == dict.fromkeys(("one", "jit", "pmap", "fsdp, 4 parts"), True)
    for mode, gap in found["distance"].items():
        assert gap < LARGEST_DISTANCE, mode
    assert found["moved"] > 0.2 and found["different"] > 15


def test_every_estimator_moves_every_leaf_that_it_should(result):
    """One latent dimension has no strict lower triangle, q of c no u where c comes first, a score no constant."""
    lower, of_u = ".lam['lower']", ".lam['of_u']"
    expected = {"pathwise": [lower], "doubly_reparameterized": [lower], "score_function": [lower]}
    expected |= {"mixed": [of_u], "likelihood_gradient": [".lam['bias']", ".lam['weight']"]}
    of_scores = ("denoising", "explicit", "sliced", "sliced, variance reduced")
    expected |= dict.fromkeys(of_scores, [".theta['Dense_1']['bias']"])
    assert {name: paths for name, paths in result["estimators"]["zero"].items() if paths} == expected


if __name__ == "__main__":
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    main()
