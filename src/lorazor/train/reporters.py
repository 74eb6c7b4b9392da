"""Trackers that the Trainer logs to, by the names that transformers gives them."""

from __future__ import annotations

from lorazor.errors import SettingsError


def reporters(report_to: str) -> list[str]:
    """The names in `report_to`, for transformers' `TrainingArguments`.

    Args:
        report_to: names separated by commas, or `none`.
    Raises:
        SettingsError: a name that transformers does not know, or whose package is not installed.
    """
    names = [name.strip() for name in report_to.split(",") if name.strip()]
    if names in ([], ["none"]):
        return []
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise SettingsError(f"report_to={name!r} is unknown to transformers. Pass none, or some of {known}.")
        # flyte cannot be found this way, and says so itself
        if name not in get_available_reporting_integrations() and name != "flyte":
            raise SettingsError(f"report_to={name!r} needs a package that is not installed. Run: pip install {name}")
    return names
