"""The two-dimensional example, shrunk: reflow straightens, and helps the first step."""

import pytest
import torch

import two_moons as moons


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(moons, "SAMPLES", 2048)
        out = tmp_path_factory.mktemp("moons") / "two_moons.png"
        return out, moons.main(["--out", str(out), "--steps", "200"])


def test_reflow_straightens_and_helps_one_step(run):
    _, (fine, one, two, *students) = run
    assert two.straightness < 0.1 * one.straightness
    assert two.distance < 0.5 * one.distance
    assert fine.distance < 0.5 * one.distance
    assert all(student.distance < one.distance for student in students)


def test_saves_the_plot(run):
    out, _ = run
    assert out.read_bytes().startswith(b"\x89PNG")
    assert out.stat().st_size > 50_000


def test_paths_run_from_noise_to_samples():
    field, x0 = moons.Field(), torch.randn(8, 2)
    states = moons.euler(field, x0, 5, path=True)
    assert states.shape == (6, 8, 2)
    assert torch.equal(states[0], x0)
    assert torch.equal(states[-1], moons.euler(field, x0, 5))


def test_distance_is_the_shift_of_a_shifted_cloud():
    cloud = torch.randn(1000, 2)
    assert moons.sliced_wasserstein(cloud, cloud.flip(0)) == 0
    # A shift by s along x costs s·cos θ in direction θ: s/√2 in root mean square.
    assert moons.sliced_wasserstein(cloud, cloud + torch.tensor([3.0, 0.0])) == pytest.approx(3 / 2**0.5, rel=1e-3)


def test_says_what_steps_may_be(capsys):
    with pytest.raises(SystemExit) as stop:
        moons.main(["--steps", "0"])
    assert stop.value.code == 2
    assert "--steps must be ≥ 1, got 0" in capsys.readouterr().err
