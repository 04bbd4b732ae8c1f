"""Time grids: where their timesteps are, and that there are as many as asked."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.config import TimeGrid
from fastdiff.diffusion import get_named_beta_schedule, space_timesteps
from fastdiff.diffusion.time_grids import distinct, grid_timesteps

NAMED = [grid for grid in TimeGrid if grid is not TimeGrid.TUNED]


def alphas(schedule: str = "linear", count: int = 1000) -> np.ndarray:
    return np.cumprod(1 - get_named_beta_schedule(schedule, count))


@given(st.sampled_from(NAMED), st.integers(21, 200), st.data(), st.sampled_from(["linear", "cosine"]))
def test_a_grid_has_as_many_timesteps_as_asked(grid: TimeGrid, count: int, data: st.DataObject, schedule: str) -> None:
    steps = data.draw(st.integers(2, count))
    found = grid_timesteps(alphas(schedule, count), steps, grid)
    assert len(found) == steps
    assert found == sorted(set(found))
    assert found[0] >= 0
    assert found[-1] == count - 1
    assert found[0] == 0


@given(st.data(), st.integers(1, 30))
def test_timesteps_that_collide_give_way(data: st.DataObject, count: int) -> None:
    wanted = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count).map(sorted))
    found = distinct(np.array(wanted), count)
    assert len(found) == len(wanted)
    assert found == sorted(set(found))
    assert (found[0] >= 0, found[-1]) == (True, count - 1)
    if len(set(wanted)) == len(wanted) and wanted[-1] == count - 1:
        assert found == wanted


def test_uniform_is_the_even_spacing() -> None:
    for steps in (1, 2, 7, 50, 1000):
        assert grid_timesteps(alphas(), steps, TimeGrid.UNIFORM) == sorted(space_timesteps(1000, str(steps)))


def test_the_formulas() -> None:
    ab = alphas(count=10_000)
    sigma = np.sqrt(1 - ab) / np.sqrt(ab)
    assert grid_timesteps(ab, 5, TimeGrid.QUADRATIC) == [0, 625, 2500, 5624, 9999]
    lambdas = -np.log(sigma[grid_timesteps(ab, 9, TimeGrid.LOG_SNR)[:-1]])
    assert np.diff(lambdas) == pytest.approx(-(np.log(80 / sigma[0])) / 8, rel=0.02)
    roots = sigma[grid_timesteps(ab, 9, TimeGrid.KARRAS)[:-1]] ** (1 / 7)
    assert np.diff(roots) == pytest.approx((80 ** (1 / 7) - sigma[0] ** (1 / 7)) / 8, rel=0.02)


@pytest.mark.parametrize("grid", [TimeGrid.LOG_SNR, TimeGrid.KARRAS])
def test_noise_that_hides_everything_takes_one_step(grid: TimeGrid) -> None:
    """Though it is half of log-SNR in a cosine schedule, and all but nothing of it where alpha_T is 0."""
    for ab in (alphas("cosine"), np.append(alphas("cosine")[:-1], 0.0)):
        found = grid_timesteps(ab, 8, grid)
        assert ab[found[-2]] > 1 / 80**2 * 0.9
        assert found[-1] == 999


@pytest.mark.parametrize("grid", NAMED)
def test_few_and_too_many(grid: TimeGrid) -> None:
    assert grid_timesteps(alphas(), 1, grid) == ([0] if grid is TimeGrid.UNIFORM else [999])
    assert grid_timesteps(alphas(count=25), 25, grid) == list(range(25))
    assert grid_timesteps(np.array([0.5]), 1, grid) == [0]
    with pytest.raises(ValueError, match=r"^steps 26: the process has 25 timesteps$"):
        grid_timesteps(alphas(count=25), 26, grid)


def test_the_tuned_one_is_no_formula() -> None:
    with pytest.raises(ValueError, match=r"^time_grid tuned: it is stored"):
        grid_timesteps(alphas(), 8, TimeGrid.TUNED)
