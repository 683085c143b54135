"""One yardstick: every family on the same bits, in one table, by its own experiment."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import vdiff as vd
from experiments import exits, runs, training, yardstick


def config_of(directory, *families, **changes):
    return dataclasses.replace(
        yardstick.PRESETS["smoke"][1], run_dir=directory, families=families, eval_images=20, **changes
    )


@pytest.mark.parametrize("size", ["smoke", "digits", "mnist"])
def test_every_family_has_settings_of_each_size(size):
    made = yardstick.families_of(yardstick.Config(size=size, data="my.npz", seed=3, eval_images=50))
    assert [family.name for family in made] == list(yardstick.ROWS)
    for family in made:
        runs.check_settings(family.config)
        assert (family.config.data, family.config.seed, family.config.eval_images) == ("my.npz", 3, 50)
        assert getattr(family.config, "likelihood", "bernoulli") == "bernoulli"


def test_fashion_mnist_is_mnist_with_other_images():
    """Images have the same size: so have the models."""
    fashion = yardstick.PRESETS["fashion_mnist"][1]
    assert (fashion.size, fashion.data) == ("mnist", "fashion_mnist")
    for family in yardstick.families_of(fashion):
        runs.check_settings(family.config)
        assert family.config.data == "fashion_mnist"


@pytest.mark.slow
def test_all_are_judged_on_the_same_bits(tmp_path, monkeypatch):
    judged = {}

    def transformed(transform, key, images):
        bits = vd.evaluate.evaluate(lambda key, params, x: transform(key, x), key, vd.Params(), images)
        raise InterruptedError(bits)

    monkeypatch.setattr(training, "transformed", transformed)
    for family in yardstick.families_of(config_of(tmp_path, seed=5)):
        with pytest.raises(InterruptedError) as caught:
            family.experiment.run(dataclasses.replace(family.config, run_dir=tmp_path / family.name))
        judged[family.name] = caught.value.args[0]
    assert len(judged) == len(yardstick.ROWS)
    for name, bits in judged.items():
        assert bits.shape[0] == 20 and set(np.unique(bits)) == {0, 1}
        np.testing.assert_array_equal(bits, judged["vae"], err_msg=name)


@pytest.mark.slow
def test_the_page_compares_what_was_trained_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path.parent)
    directory = Path(tmp_path.name)  # relative, as the presets have it
    yardstick.run(config_of(directory, "vae"))
    config = config_of(directory, "diffusion", "made", "rbm")
    page = yardstick.run(config)
    text, table = page.read_text(), (tmp_path / "table.md").read_text()
    bounds = {
        "made": ("MADE", "exact"),
        "rbm": ("RBM, persistent CD", "AIS"),
        "vae": ("VAE, ELBO", "importance"),
        "diffusion": ("diffusion", "ELBO"),
    }
    assert len(table.splitlines()) == 2 + len(bounds)
    for name, (label, bound) in bounds.items():
        assert f'href="{name}/report.html"' in text and label in text
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
        [row] = [line for line in table.splitlines() if line.startswith(f"| {label} |")]
        assert (
            bound in row
            and f"`python -m experiments.yardstick smoke --data digits --seed 0 --families {name}`" in row
        )
    assert (tmp_path / "draws.png").stat().st_size > 1000
    assert "autoregressive" in text and "q(z | x)" in text and "ms" in text
    capsys.readouterr()
    yardstick.run(config)
    assert capsys.readouterr().out.count("found") == 3


def test_data_that_is_not_there_is_refused(tmp_path, capsys):
    assert exits.exit_code(yardstick.run, config_of(tmp_path / "run", data="nowhere")) == 2
    assert "nowhere" in capsys.readouterr().err and not (tmp_path / "run").exists()
