"""Which timesteps a spec keeps, and which specs are refused."""

from typing import Any

import pytest

from fastdiff import space_timesteps

from .support import load_json

CASES = load_json("respacing.json")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['num_timesteps']}:{case['spec']}")
def test_space_timesteps(case: dict[str, Any]) -> None:
    assert set(case) in ({"num_timesteps", "spec", "steps"}, {"num_timesteps", "spec", "error"})
    if case.get("error"):
        with pytest.raises(ValueError, match=r"\d"):
            space_timesteps(case["num_timesteps"], case["spec"])
    else:
        assert sorted(space_timesteps(case["num_timesteps"], case["spec"])) == case["steps"]
