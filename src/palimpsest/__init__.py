"""What a neural model remembers: write it, keep it, erase it, audit it, make it fit, recall it.

    import palimpsest as pal
    from palimpsest.audit import audit

    model = pal.load("my-model")
    data = pal.Roles(forget=..., retain=...)
    erased = pal.create("npo").apply(model, data, pal.Run())
    audit(erased, data)

Names are imported when they are used, so that `import palimpsest` is quick.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "PalimpsestError": "palimpsest.errors",
    "Method": "palimpsest.system",
    "Probe": "palimpsest.system",
    "Store": "palimpsest.system",
    "system": "palimpsest.system",
    "configuration": "palimpsest.system",
    "setting": "palimpsest.system",
    "settings": "palimpsest.system",
    "catalogue": "palimpsest.system",
    "facts_of": "palimpsest.system",
    "create": "palimpsest.system",
    "Run": "palimpsest.run",
    "Record": "palimpsest.data.records",
    "Roles": "palimpsest.data.records",
    "by_subject": "palimpsest.data.records",
    "load_records": "palimpsest.data.loading",
    "write_records": "palimpsest.data.loading",
    "tofu": "palimpsest.data.tofu",
    "people": "palimpsest.data.fictitious",
    "Model": "palimpsest.models.model",
    "load": "palimpsest.models.loading",
    "anatomy": "palimpsest.models.anatomy",
    "Training": "palimpsest.train",
    "Reading": "palimpsest.audit.reading",
    "Value": "palimpsest.audit.reading",
    "probes": "palimpsest.audit.battery",
    "measure": "palimpsest.audit.session",
    "audit_saved": "palimpsest.audit.session",
    "described": "palimpsest.audit.session",
    "forget": "palimpsest.forgetting",
    "ConversationMemory": "palimpsest.recall.hema",
    "Task": "palimpsest.comparison",
    "compare": "palimpsest.comparison",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'palimpsest' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
