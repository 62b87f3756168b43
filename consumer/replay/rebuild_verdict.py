"""Judge the differences of a rebuild: problems, or doubts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from consumer.replay.wording import counted, problem

Rebuilt: TypeAlias = Mapping[str, Any]  # rebuild/result.py: as_dict

# Kinds of doubt about rows that the rebuild has taken out of the differences itself.
UNSTABLE = ("depends_on_order", "beginning_unknown")
_DIFFERENCES = {
    "missing": "missing (the topic says that they should be there)",
    "extra": "too many (no message of the topic made them, or one was applied twice)",
    "different": "different from what the topic says",
}


def difference_problems(rebuilt: Rebuilt) -> Iterator[dict[str, Any]]:
    """Yield a problem for each table and kind, unless something explains it."""
    if _is_conclusive(rebuilt):
        for table, kind, count in _differences(rebuilt):
            yield problem("differences", count, f"{table}: {counted(count, 'row')} {_DIFFERENCES[kind]}")


def difference_doubts(rebuilt: Rebuilt) -> list[dict[str, Any]]:
    """Return the doubts of the rebuild, and differences that prove nothing."""
    doubts = list(rebuilt.get("unknown", ()))
    if not _is_conclusive(rebuilt) and (rows := sum(count for *_, count in _differences(rebuilt))):
        doubts.append(problem("differences", rows, f"{counted(rows, 'row')} differ, and {_explanation(rebuilt)}"))
    return doubts


def _differences(rebuilt: Rebuilt) -> list[tuple[str, str, int]]:
    return [
        (table["table"], kind, table[kind])
        for table in rebuilt.get("tables", ())
        for kind in _DIFFERENCES
        if table[kind]
    ]


def _is_conclusive(rebuilt: Rebuilt) -> bool:
    """Return whether a difference proves a fault: nothing unknown may explain it."""
    doubts = [doubt for doubt in rebuilt.get("unknown", ()) if doubt["kind"] not in UNSTABLE]
    return not doubts and not any(rebuilt.get(key) for key in ("failed", "compacted", "excuses"))


def _explanation(rebuilt: Rebuilt) -> str:
    """Return what may explain the differences."""
    if rebuilt.get("compacted"):
        return f"the log of {', '.join(rebuilt['compacted'])} is compacted, so records are missing from it by design"
    if rebuilt.get("failed"):
        return "messages failed in the rebuild"
    if rebuilt.get("excuses"):
        return f"this may explain it: {'; '.join(rebuilt['excuses'][:3])}"
    return "what is unknown may explain it"
