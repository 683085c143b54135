"""The demo: one table and one page over all families."""

import dataclasses

import pytest

import vdiff as vd
from experiments import demo

pytestmark = pytest.mark.long


def test_the_demo_writes_one_page_that_links_every_run(tmp_path, capsys):
    page = demo.run(dataclasses.replace(demo.PRESETS["smoke"][1], run_dir=tmp_path / "demo"))
    text = page.read_text()
    for name in ("gmm", "vae", "diffusion"):
        assert f'href="{name}/report.html"' in text
        assert (page.parent / name / "report.html").exists()
        run = vd.load_run(page.parent / name)
        assert run.config["seed"] == 0 and run.elbo_estimate is not None and run.sample is not None
    printed = capsys.readouterr().out
    for word in ("Gaussian mixture", "VAE", "Diffusion", "ELBO over the path", "nats per datum"):
        assert word in printed
