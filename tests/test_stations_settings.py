"""What the settings of stations may be."""

from __future__ import annotations

import pytest

from stationmaster.errors import ConfigError
from stationmaster.settings import PipelineSettings


@pytest.mark.parametrize(
    ("told", "fault"),
    [
        ({"job_timeout_s": 0.0}, "job_timeout_s: 0.0 is not above 0"),
        ({"job_timeout_s": float("nan")}, "job_timeout_s: nan is not above 0"),
        ({"breaker_failures": -1}, "breaker_failures: -1 is below 0"),
        ({"breaker_probe_s": 0.0}, "breaker_probe_s: 0.0 is not above 0"),
        (
            {"idle_s": 9.0, "breaker_probe_s": 10.0},
            "idle_s: 9 is below breaker_probe_s (10)",
        ),
    ],
)
def test_nonsense_is_refused(told: dict[str, float], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PipelineSettings(**told)  # type: ignore[arg-type]
    assert caught.value.faults == (fault,)


def test_what_is_off_is_said_so() -> None:
    settings = PipelineSettings(breaker_failures=0, job_timeout_s=None)
    assert settings.breaker_failures == 0
