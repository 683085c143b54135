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
from tests.states import leaves_of, small_vae
from vdiff.train.hosts import is_first, largest, on_one_device

NUM_STEPS, BATCH_SIZE = 20, 48
OPTIMIZERS = {"sgd": optax.sgd(1e-2), "adam": optax.adam(1e-3)}
# Number of processes -> (mode, optimizer, parts): two try all, four where most could go wrong.
CASES = {
    2: list(itertools.product(("jit", "fsdp"), OPTIMIZERS, (1, 2))),
    4: [("jit", "sgd", 1), ("fsdp", "sgd", 2), ("fsdp", "adam", 1)],
}


def trained(model, images, optimizer, compile_step, *, num_accumulate=1, share=(0, 1)):
    """Train for NUM_STEPS; return the whole state and the metrics of every step."""
    step = compile_step(vd.make_train_step(model.elbo_terms, optimizer, num_accumulate=num_accumulate))
    batches = vd.data.batches(images, BATCH_SIZE, seed=0, share=share)
    state, rows = vd.init_state(jax.random.key(0), model, optimizer), []
    for i in range(NUM_STEPS):
        state, metrics = step(state, batches(i))
        rows.append({name: float(value) for name, value in metrics.items()})
    return on_one_device(state), rows


def main(port, num_processes, process_id, path):
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(address, num_processes, process_id, coordinator_bind_address=address)
    mesh, share = vd.data_mesh(), (jax.process_index(), jax.process_count())
    modes = {"jit": lambda step: vd.jit_step(step, mesh), "fsdp": lambda step: vd.fsdp_step(step, mesh)}
    model, images = small_vae()
    arrays, facts = {}, {"metrics": {}}
    for mode, optimizer, parts in CASES[num_processes]:
        name = f"{mode} {optimizer} {parts}"
        state, rows = trained(
            model, images, OPTIMIZERS[optimizer], modes[mode], num_accumulate=parts, share=share
        )
        arrays |= {f"{name} {leaf}": value for leaf, value in leaves_of(state).items()}
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
