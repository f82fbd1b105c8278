"""Probes that measure what a model remembers, and `audit`, which runs a list of them on a model."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "audit":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from palimpsest.audit.battery import audit

    return audit
