"""One process of several: what the tests of `vdiff.train.hosts` start, with two forced devices in each.

python -m tests.train.host_program PORT NUM_PROCESSES PROCESS_ID FILE
"""

import itertools
import json
import sys

import jax
import numpy as np
import optax

import vdiff as vd
from vdiff.train.hosts import is_first, largest, on_one_device

NUM_STEPS, BATCH_SIZE, LATENT_DIM = 20, 48, 4
OPTIMIZERS = {"sgd": optax.sgd(1e-2), "adam": optax.adam(1e-3)}


def build():
    data = vd.data.load("digits")
    shape, likelihood = data.train.shape[1:], vd.likelihoods.categorical(data.levels)
    model = vd.vae(
        vd.nets.mlp(shape, (2 * LATENT_DIM,), hidden=(24,)),
        vd.nets.mlp((LATENT_DIM,), likelihood.out_shape(shape), hidden=(24,)),
        latent_dim=LATENT_DIM,
        likelihood=likelihood,
    )
    return model, data.train


def trained(model, images, optimizer, compile_step, *, num_accumulate=1, share=(0, 1)):
    """Train for NUM_STEPS; return the whole state and the metrics of every step."""
    step = compile_step(vd.make_train_step(model.elbo_terms, optimizer, num_accumulate=num_accumulate))
    batches = vd.data.batches(images, BATCH_SIZE, seed=0, share=share)
    state, rows = vd.init_state(jax.random.key(0), model, optimizer), []
    for i in range(NUM_STEPS):
        state, metrics = step(state, batches(i))
        rows.append({name: float(value) for name, value in metrics.items()})
    return on_one_device(state), rows


def numbers(state):
    """The leaves of a state by path, on the host."""
    state = state._replace(key=jax.random.key_data(state.key))
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def main(port, num_processes, process_id, path):
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(address, num_processes, process_id, coordinator_bind_address=address)
    mesh, share = vd.data_mesh(), (jax.process_index(), jax.process_count())
    modes = {"jit": lambda step: vd.jit_step(step, mesh), "fsdp": lambda step: vd.fsdp_step(step, mesh)}
    model, images = build()
    arrays, facts = {}, {"metrics": {}}
    for mode, optimizer, parts in itertools.product(modes, OPTIMIZERS, (1, 2)):
        name = f"{mode} {optimizer} {parts}"
        state, rows = trained(
            model, images, OPTIMIZERS[optimizer], modes[mode], num_accumulate=parts, share=share
        )
        arrays |= {f"{name} {leaf}": value for leaf, value in numbers(state).items()}
        facts["metrics"][name] = rows[-1]
    facts["num_devices"] = (jax.device_count(), jax.local_device_count())
    facts["largest"] = [largest(10 * process_id), largest(-process_id)]
    facts["is_first"] = is_first()
    facts["alone"] = all(leaf.is_fully_addressable for leaf in jax.tree.leaves(state))
    try:
        vd.jit_step(vd.make_train_step(model.elbo_terms, OPTIMIZERS["sgd"]), mesh).place(images[None, :3])
    except ValueError as error:
        facts["refused"] = str(error)
    np.savez(f"{path}-{process_id}.npz", **arrays)
    with open(f"{path}-{process_id}.json", "w") as file:
        json.dump(facts, file)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
