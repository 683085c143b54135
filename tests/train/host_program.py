"""One process of several: what the tests of `vdiff.train.hosts` start, with two forced devices in each.

python -m tests.train.host_program PORT NUM_PROCESSES PROCESS_ID FILE
"""

import itertools
import json
import sys

import jax
import numpy as np
import optax
from jax.sharding import Mesh

import vdiff as vd
from tests.states import leaves_of, small_vae
from vdiff.train import restore
from vdiff.train.hosts import from_first, is_first, largest, on_one_device

NUM_STEPS, BATCH_SIZE = 20, 48
OPTIMIZERS = {"sgd": optax.sgd(1e-2), "adam": optax.adam(1e-3)}
# Number of processes -> (mode, optimizer, parts): two try all, four where most could go wrong.
CASES = {
    2: list(itertools.product(("jit", "fsdp"), OPTIMIZERS, (1, 2))),
    4: [("jit", "sgd", 1), ("fsdp", "sgd", 2), ("fsdp", "adam", 1)],
}


def trained(model, images, optimizer, compile_step, *, num_accumulate=1, share=(0, 1)):
    """Train for NUM_STEPS; return the step, the state where it lies, and the metrics of every step."""
    step = compile_step(vd.make_train_step(model.elbo_terms, optimizer, num_accumulate=num_accumulate))
    batches = vd.data.batches(images, BATCH_SIZE, seed=0, share=share)
    state, rows = vd.init_state(jax.random.key(0), model, optimizer, shardings=step.shardings), []
    for i in range(NUM_STEPS):
        state, metrics = step(state, batches(i))
        rows.append({name: float(value) for name, value in metrics.items()})
    return step, state, rows


def compilations(call):
    """Call, and count what was compiled."""
    counted = []

    def listen(event, duration, **kwargs):
        counted.extend([event] * (event == "/jax/core/compile/backend_compile_duration"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        return call(), len(counted)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def saved_and_restored(directory, step, state):
    """Save and restore what all hold; return whether it is the same, and how often this process summed a folder."""
    sums, verify = [], restore.verify
    restore.verify = lambda folder, **settings: sums.append(folder) or verify(folder, **settings)
    vd.save(directory, state)
    sums.clear()
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    restored = vd.restore(directory, shapes, shardings=step.shardings)
    restore.verify = verify
    one, other = (leaves_of(on_one_device(tree)) for tree in (state, restored))
    same = all(np.array_equal(one[name], other[name]) for name in one)
    pairs = zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True)
    there = all(leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim) for leaf, like in pairs)
    return same and there, len(sums)


def refusal(call):
    """What a call is refused with."""
    try:
        call()
    except (ValueError, FileNotFoundError) as error:
        return str(error)


def main(port, num_processes, process_id, path):
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(address, num_processes, process_id, coordinator_bind_address=address)
    mesh, share = vd.data_mesh(), (jax.process_index(), jax.process_count())
    modes = {"jit": lambda step: vd.jit_step(step, mesh), "fsdp": lambda step: vd.fsdp_step(step, mesh)}
    model, images = small_vae()
    arrays, facts = {}, {"metrics": {}, "compiled for gathering": 0}
    for mode, optimizer, parts in CASES[num_processes]:
        name = f"{mode} {optimizer} {parts}"
        step, state, rows = trained(
            model, images, OPTIMIZERS[optimizer], modes[mode], num_accumulate=parts, share=share
        )
        whole, num_compiled = compilations(lambda state=state: on_one_device(state))
        facts["compiled for gathering"] += num_compiled
        arrays |= {f"{name} {leaf}": value for leaf, value in leaves_of(whole).items()}
        facts["metrics"][name] = rows[-1]
    facts["num_devices"] = (jax.device_count(), jax.local_device_count())
    facts["largest"] = [largest(10 * process_id), largest(-process_id)]
    facts["from first"] = from_first(7 + process_id)
    facts["is_first"] = is_first()
    facts["alone"] = all(leaf.is_fully_addressable for leaf in jax.tree.leaves(whole))
    facts["compiled for gathering again"] = compilations(lambda: on_one_device(state))[1]
    facts["split"] = sum(not leaf.is_fully_replicated for leaf in jax.tree.leaves(state))
    facts["restored, sums"] = saved_and_restored(f"{path}-checkpoints", step, state)
    own = f"{path}-checkpoints" if is_first() else f"{path}-elsewhere"
    across = Mesh(np.reshape(jax.devices(), (1, -1)), ("data", "model"))
    plain = vd.make_train_step(model.elbo_terms, OPTIMIZERS["sgd"])
    facts["refused"] = {
        "batch": refusal(lambda: vd.jit_step(plain, mesh).place(images[None, :3])),
        "model": refusal(lambda: vd.data_mesh(model=jax.device_count())),
        "across": refusal(lambda: vd.fsdp_step(plain, across).place(images[None, :4])),
        "elsewhere": refusal(lambda: vd.restore(own, state)),
        "nowhere": refusal(lambda: vd.restore(f"{path}-nowhere", state)),
    }
    np.savez(f"{path}-{process_id}.npz", **arrays)
    with open(f"{path}-{process_id}.json", "w") as file:
        json.dump(facts, file)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
