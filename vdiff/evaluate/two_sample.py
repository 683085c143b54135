r"""A classifier two-sample test: can anyone tell the model's samples from data?

Half of both sets trains a classifier, the other half judges it. With a_0 and a_1 the shares of held-out data and of
samples that it names rightly, n of each,

    accuracy = (a_0 + a_1) / 2,    std_error^2 = (a_0 (1 - a_0) + a_1 (1 - a_1)) / (4 n)

Samples of the data's own law leave nothing to learn: the number of right answers is then binomial, 2 n throws of a fair
coin, or less spread than that where the classifier prefers one answer. An accuracy above 1/2 is a difference that was
found; 1/2 is none that this classifier, with so many data, could find.

Source: Lopez-Paz and Oquab, Revisiting Classifier Two-Sample Tests, 2017.
"""

import warnings
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array
from scipy.stats import binom


@runtime_checkable
class Classifier(Protocol):
    """Describe what is asked of a classifier, as scikit-learn's are."""

    def fit(self, X: np.ndarray, y: np.ndarray) -> Any: ...  # noqa: D102

    def predict(self, X: np.ndarray) -> np.ndarray: ...  # noqa: D102


class TwoSample(NamedTuple):
    """Hold what a two-sample test found.

    Attributes:
        accuracy: the share of held-out data and samples told apart, 1/2 for none.
        std_error: its standard error over the held-out ones, the classifier given.
        p_value: probability of this accuracy or a higher one, were both sets of one law.
        num_test: how many were held out, 2 n.
    """

    accuracy: float
    std_error: float
    p_value: float
    num_test: int


def classifier_two_sample(
    real: np.ndarray | Array,
    sampled: np.ndarray | Array,
    *,
    classifier: Classifier | None = None,
    seed: int = 0,
) -> TwoSample:
    """Test whether samples can be told from data by a classifier that has not seen them.

    Of the larger set as many are taken as the smaller one has; half of each, at random, trains. The data must not be
    those that the model was trained on: a model that learned them by heart would pass.

    Args:
        real: [N, ...], data, flattened.
        sampled: [M, ...], samples of the same shape.
        classifier: with `fit(X, y)` and `predict(X)`, as scikit-learn's; None for a perceptron of 64 units on
            standardised inputs, of at most 300 passes.
        seed: of the split, and of that perceptron.

    Returns:
        A `TwoSample`.

    Raises:
        ValueError: if the sets differ in the shape of a datum, have fewer than 20 data, or hold what is not finite.
    """
    if real.shape[1:] != sampled.shape[1:]:
        raise ValueError(
            f"sampled: got data of shape {sampled.shape[1:]}, expected those of real, {real.shape[1:]}"
        )
    size = min(len(real), len(sampled))
    if size < 20:
        raise ValueError(f"real, sampled: got {len(real)} and {len(sampled)}, expected at least 20 of each")
    rng = np.random.default_rng(seed)
    sides = []
    for name, given in (("real", real), ("sampled", sampled)):
        chosen = np.asarray(given[rng.permutation(len(given))[:size]], np.float64).reshape(size, -1)
        if not np.all(np.isfinite(chosen)):
            raise ValueError(f"{name}: got numbers that are not finite; look at what made them first")
        sides.append(chosen)
    half = size // 2
    label = np.repeat([0, 1], half)
    judge = _perceptron(seed) if classifier is None else classifier
    with warnings.catch_warnings():
        # Whether the perceptron's loss has come to rest is told by how well it does on what was held out.
        warnings.filterwarnings("ignore", message=".*hasn't converged yet", category=UserWarning)
        judge.fit(np.concatenate([side[:half] for side in sides]), label)

    shares = [np.mean(judge.predict(side[half:]) == i) for i, side in enumerate(sides)]
    num_each = size - half
    accuracy = float(np.mean(shares))
    variance = sum(share * (1 - share) for share in shares) / (4 * num_each)
    num_right = round(2 * num_each * accuracy)
    p_value = float(binom.sf(num_right - 1, 2 * num_each, 0.5))
    return TwoSample(accuracy, float(np.sqrt(variance)), p_value, 2 * num_each)


def _perceptron(seed: int) -> Classifier:
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    network = MLPClassifier((64,), learning_rate_init=1e-2, max_iter=300, random_state=seed)
    return make_pipeline(StandardScaler(), network)
