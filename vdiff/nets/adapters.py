"""Any Flax or Equinox module as a `Network`, in one line.

A model knows of a network only `init(key) -> params` and `apply(params, *inputs) -> array`, for one datum.
Statistics over a batch, as batch normalisation keeps, have no meaning there and are refused.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
from flax import nnx
from jaxtyping import Array

from vdiff.types import Key, Network, PyTree, check_key


def from_linen(module: nn.Module, *example_inputs: Array) -> Network:
    """Wrap a Linen module.

        from_linen(MyDecoder(), jnp.zeros(latent_dim))

    Args:
        module: a Linen module of one datum.
        *example_inputs: arrays of the shapes and dtypes of one datum's inputs.

    Returns:
        A `Network`; its params are the module's "params" collection.

    Raises:
        ValueError: at init, if the module keeps other collections, such as batch statistics; at trace time,
            if the first input has another shape than the example.
    """

    def init(key: Key) -> PyTree:
        variables = module.init(check_key(key), *example_inputs)
        others = sorted(set(variables) - {"params"})
        if others:
            raise ValueError(
                f"module: got {type(module).__name__} with collections {others}, expected 'params' only; a "
                "network is a pure function of one datum, so replace batch statistics, e.g. by LayerNorm"
            )
        return variables.get("params", {})

    def apply(params: PyTree, *inputs: Array) -> Array:
        for i, (given, example) in enumerate(zip(inputs, example_inputs, strict=True)):
            if given.shape != example.shape:
                raise ValueError(
                    f"inputs[{i}]: got shape {given.shape}, expected {example.shape} for "
                    f"{type(module).__name__}; a network takes one datum, so vmap over a batch"
                )
        return module.apply({"params": params}, *inputs)

    return Network(init, apply)


def from_nnx(build: Callable[[nnx.Rngs], nnx.Module]) -> Network:
    """Wrap an NNX module, given the function that builds it.

        from_nnx(lambda rngs: MyDecoder(latent_dim, rngs=rngs))

    Args:
        build: `(rngs) -> module` of one datum.

    Returns:
        A `Network`; its params are the module's `nnx.Param` state, as a plain nested dict.

    Raises:
        ValueError: if the module keeps state other than parameters, such as batch statistics.
    """
    abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    graphdef, _, others = nnx.split(abstract, nnx.Param, ...)
    names = sorted({type(leaf).__name__ for _, leaf in nnx.to_flat_state(others)} - {"RngKey", "RngCount"})
    if names:
        raise ValueError(
            f"build: got a module with state of kinds {names}, expected nnx.Param only; a network is a pure "
            "function of one datum, so replace batch statistics, e.g. by LayerNorm"
        )

    def init(key: Key) -> PyTree:
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(check_key(key))), nnx.Param))

    def apply(params: PyTree, *inputs: Array) -> Array:
        _, state, others = nnx.split(abstract, nnx.Param, ...)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graphdef, state, others)(*inputs)

    return Network(init, apply)


def from_equinox(build: Callable[[Key], PyTree]) -> Network:
    """Wrap an Equinox module, given the function that builds it; needs the `equinox` extra.

        from_equinox(lambda key: eqx.nn.MLP(2, 784, 512, 2, key=key))

    Args:
        build: `(key) -> module` of one datum.

    Returns:
        A `Network`; its params are the module with all but its floating-point arrays left out.

    Raises:
        ImportError: if equinox is not installed.
    """
    import equinox as eqx

    # A real module, not an abstract one: what is no parameter, such as an integer array, keeps its values.
    _, static = eqx.partition(build(jax.random.key(0)), eqx.is_inexact_array)

    def init(key: Key) -> PyTree:
        return eqx.filter(build(check_key(key)), eqx.is_inexact_array)

    def apply(params: PyTree, *inputs: Array) -> Array:
        return eqx.combine(params, static)(*inputs)

    return Network(init, apply)
