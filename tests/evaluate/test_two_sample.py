"""The classifier test on sets of one law, on shifted ones, and against a classifier whose accuracy is known."""

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression

from vdiff.evaluate.two_sample import classifier_two_sample


def normals(num, shift=0.0, seed=0, dim=3):
    return np.random.default_rng(seed).normal(size=(num, dim)) + shift


class Threshold:
    """Says "sampled" where the first entry is above a number, whatever it was shown."""

    def __init__(self, at):
        self.at = at

    def fit(self, X, y):
        assert len(X) == len(y) and np.sum(y == 0) == np.sum(y == 1)

    def predict(self, X):
        return (X[:, 0] > self.at).astype(int)


def test_sets_of_one_law_are_not_told_apart():
    """Over 30 pairs: the mean accuracy is 1/2 within its error, and the z's are no wider than a coin's."""
    accuracies, p_values = [], []
    for seed in range(30):
        found = classifier_two_sample(
            normals(400, seed=2 * seed), normals(300, seed=2 * seed + 1), classifier=LogisticRegression()
        )
        assert found.num_test == 300
        accuracies.append(found.accuracy)
        p_values.append(found.p_value)
    z = (np.array(accuracies) - 0.5) / np.sqrt(0.25 / 300)
    assert abs(z.mean()) * np.sqrt(len(z)) < 5 and np.abs(z).max() < 5 and z.std() < 1.6
    assert min(p_values) > 1e-5 and 0.2 < np.median(p_values) < 0.8


def test_a_shift_is_found_and_its_accuracy_is_known():
    """N(0, 1) against N(1, 1) cut at 1/2: Phi(1/2) of both are right; the std_error is the coin's of that share."""
    found = classifier_two_sample(normals(4000), normals(4000, 1.0, seed=1), classifier=Threshold(0.5))
    exact = norm.cdf(0.5)
    assert found.std_error == pytest.approx(np.sqrt(exact * (1 - exact) / 4000), rel=0.03)
    assert abs(found.accuracy - exact) < 5 * found.std_error
    assert found.p_value < 1e-50


def test_the_default_sees_what_no_mean_shows():
    """A ring and a Gaussian of the same two first moments: the perceptron tells them apart, a line cannot."""
    rng = np.random.default_rng(3)
    angle = rng.uniform(0, 2 * np.pi, 800)
    ring = np.sqrt(2) * np.stack([np.cos(angle), np.sin(angle)], 1)
    cloud = normals(800, seed=4, dim=2)
    seen = classifier_two_sample(ring, cloud)
    assert seen.accuracy - 0.5 > 10 * np.sqrt(0.25 / 800) and seen.p_value < 1e-20
    by_line = classifier_two_sample(ring, cloud, classifier=LogisticRegression())
    assert abs(by_line.accuracy - 0.5) < 5 * np.sqrt(0.25 / 800)


def test_the_default_does_not_see_what_is_not_there():
    same = classifier_two_sample(normals(600, seed=5), normals(600, seed=6))
    assert abs(same.accuracy - 0.5) < 5 * np.sqrt(0.25 / 600) and same.p_value > 1e-5


def test_one_answer_for_all_is_one_half():
    """Half of all answers are right; by chance that many or more come more often than not."""
    found = classifier_two_sample(normals(101), normals(500, seed=1), classifier=Threshold(99.0))
    assert found.accuracy == 0.5 and found.std_error == 0.0 and found.num_test == 102
    assert 0.5 < found.p_value < 0.6


def test_images_and_the_same_seed():
    real, sampled = normals(60, dim=4).reshape(60, 2, 2), normals(60, seed=1, dim=4).reshape(60, 2, 2)
    results = {
        classifier_two_sample(real, sampled, classifier=LogisticRegression(), seed=seed)
        for seed in (0, 0, 1, 2)
    }
    assert len(results) == 3


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"sampled: got data of shape \(2,\).*\(3,\)"):
        classifier_two_sample(normals(50), normals(50, dim=2))
    with pytest.raises(ValueError, match="at least 20"):
        classifier_two_sample(normals(50), normals(19))
    broken = normals(50)
    broken[7] = np.nan
    with pytest.raises(ValueError, match="sampled: got numbers that are not finite"):
        classifier_two_sample(normals(50), broken)
