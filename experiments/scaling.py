"""Count what a training step computes and sends, and from that how far it scales.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m experiments.scaling
"""

import dataclasses
import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import AbstractMesh, PartitionSpec
from rich.table import Table

import vdiff as vd
from experiments import runs
from vdiff.train import sharding
from vdiff.train.parallel import CompiledStep
from vdiff.types import Key, Params, Terms

MODEST = {"width": 128, "depth": 2, "heads": 4}
DEVICES = (8, 64, 256, 1024, 4096)
OPTIMIZER = optax.adam(1e-4)
# Forward one part, backward two: the gradient may be sent while the way back goes on.
BACKWARD = 2 / 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Count what a training step of a diffusion transformer computes and sends, and how far it scales."""

    kind: str = "TPU v4"
    """The name of the device, for the table."""
    peak: float = 275e12
    """Its arithmetic, FLOP/s in bfloat16."""
    bandwidth: float = 100e9
    """What it sends along a ring, both ways round together, bytes/s."""
    utilization: float = 0.4
    """The part of the peak that a step reaches."""
    width: int = 768
    """Of the transformer, as are the next two; the defaults are DiT-B/2 on 32 x 32 x 4 latents."""
    depth: int = 12
    """Blocks."""
    heads: int = 12
    """Attention heads."""
    num_steps: int = 10
    """Steps measured in each mode."""


def parts(shape: tuple[int, ...], **size: int) -> tuple[vd.Model, vd.Objective]:
    """Build a transformer and the objective of taking noise off."""
    network = vd.nets.dit(shape, patch=2, **size)

    def objective(key: Key, params: Params, x: jax.Array) -> Terms:
        noise = jax.random.normal(key, x.shape)
        return {"fit": -jnp.sum(jnp.square(network.apply(params.theta, x + noise, jnp.float32(0.0)) - noise))}

    return vd.Model(lambda key: Params(theta=network.init(key)), *[None] * 4), objective


def abstract(model: vd.Model) -> vd.TrainState:
    """Describe a state without making it."""
    return jax.eval_shape(lambda: vd.init_state(jax.random.key(0), model, OPTIMIZER))


def reduced_bytes(step: CompiledStep, state: vd.TrainState, batch: jax.ShapeDtypeStruct) -> int:
    """Add up the operands of every all-reduce in a step as it is lowered."""
    operands = re.findall(
        r"stablehlo\.all_reduce.*?\}\) : \((.*?)\) ->", step.lower(state, batch).as_text(), re.S
    )
    shapes = re.findall(r"tensor<((?:\d+x)*)f32>", " ".join(operands))
    return sum(4 * math.prod(int(n) for n in shape.split("x") if n) for shape in shapes)


def compute(config: Config) -> tuple[dict[str, float], vd.TrainState]:
    """Count FLOPs of a datum, parameters, and bytes sent, of the large model; nothing is run."""
    shape = (32, 32, 4)
    model, objective = parts(shape, width=config.width, depth=config.depth, heads=config.heads)
    state, step = abstract(model), vd.make_train_step(objective, OPTIMIZER)

    def flops(batch_size: int) -> float:
        batch = jax.ShapeDtypeStruct((1, batch_size, *shape), np.float32)
        return vd.jit_step(step).lower(state, batch).cost_analysis()["flops"]

    num_devices = jax.device_count()
    batch = jax.ShapeDtypeStruct((1, num_devices, *shape), np.float32)
    counted = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "bytes of state": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        "FLOPs of a datum": (flops(4) - flops(2)) / 2,
        "bytes reduced": reduced_bytes(vd.jit_step(step, vd.data_mesh()), state, batch),
    }
    return counted, state


def held_bytes(state: vd.TrainState, num_data: int, num_model: int) -> float:
    """Add up what one device of a mesh holds of a state, by the rules of `fsdp_step`."""
    mesh = AbstractMesh((num_data, num_model), (sharding.AXIS, sharding.MODEL_AXIS))
    specs = sharding.state_specs(state, sharding.by_rules(mesh))

    def held(leaf: jax.ShapeDtypeStruct, spec: PartitionSpec) -> float:
        shares = math.prod(mesh.shape[name] for name in spec if name)
        return leaf.size * leaf.dtype.itemsize / shares

    return sum(jax.tree.leaves(jax.tree.map(held, state, specs)))


def scale(config: Config, counted: dict[str, float], state: vd.TrainState) -> list[list[str]]:
    """Predict, for each number of devices, the all-reduce, the batch that hides it, and what a device holds."""
    rows = []
    for n in DEVICES:
        seconds = 2 * (n - 1) / n * counted["bytes reduced"] / config.bandwidth
        of_datum = BACKWARD * counted["FLOPs of a datum"] / (config.peak * config.utilization)
        hides = math.ceil(seconds / of_datum)
        held = [held_bytes(state, *mesh) for mesh in ((1, 1), (n, 1), (n // 4, 4))]
        rows.append(
            [
                f"{n:,}",
                f"{seconds * 1e3:.1f}",
                f"{hides}",
                f"{hides * n:,}",
                *(f"{b / 1e6:,.1f}" for b in held),
            ]
        )
    return rows


def measure(config: Config) -> list[list[str]]:
    """Take steps on forced devices: processor time of a step, all threads together, and bytes per device."""
    model, objective = parts((8, 8, 1), **MODEST)
    step = vd.make_train_step(objective, OPTIMIZER)
    x = np.random.default_rng(0).normal(size=(64, 8, 8, 1)).astype(np.float32)
    rows = []
    for n in [n for n in (1, 2, 4, 8) if n <= jax.device_count()]:
        mesh = vd.data_mesh(devices=jax.devices()[:n])
        for name, compiled in (("jit", vd.jit_step(step, mesh)), ("fsdp", vd.fsdp_step(step, mesh))):
            state, _ = compiled(vd.init_state(jax.random.key(0), model, OPTIMIZER), x)
            jax.block_until_ready(state)
            began = time.process_time()
            for _ in range(config.num_steps):
                state, _ = compiled(state, x)
            jax.block_until_ready(state)
            seconds = (time.process_time() - began) / config.num_steps
            held = sum(
                leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state._replace(key=()))
            )
            rows.append([name, str(n), f"{seconds * 1e3:.0f}", f"{held / 1e6:.2f}"])
    return rows


def run(config: Config) -> None:
    """Measure, count, predict and print."""
    measured = Table(
        "mode", "devices", "processor ms a step", "state, MB a device", title="measured, forced devices"
    )
    for row in measure(config):
        measured.add_row(*row)
    runs.console.print(measured)
    counted, state = compute(config)
    table = Table("counted in the step", "")
    for name, value in counted.items():
        table.add_row(name, f"{value:.4g}")
    runs.console.print(table)
    columns = ("devices", "all-reduce, ms", "data a device that hide it", "batch")
    states = ("jit: state, MB a device", "fsdp", "fsdp, features over 4")
    predicted = Table(*columns, *states, title=f"computed, {config.kind}")
    for row in scale(config, counted, state):
        predicted.add_row(*row)
    runs.console.print(predicted)


if __name__ == "__main__":
    run(tyro.cli(Config))
