"""Plain English: words that are banned in code and documents, and the form of docstrings.

Files that are not clean yet are listed. The lists may only shrink: a file that has become clean must leave its list.
`python tests/project/test_language.py` prints both lists as they are now, with `--all` every fault.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests" / "support")]

import documents  # noqa: E402

pytestmark = pytest.mark.unit

BANNED = re.compile(
    r"\b(anew|told|whoever|nobody|heed(s|ed)?|in vain|lest|thereof|therein|whatsoever|befall(s|en)?|as ever|made (of|known)"
    r"|is at it|comes? about|unasked|to be believed|a flat no)\b",
    re.IGNORECASE,
)
FIRST_LINE_WORDS_MAX = 12
CODE = sorted((ROOT / "consumer").rglob("*.py"))
SQL = sorted((ROOT / "consumer").rglob("*.sql"))

# Files that still have banned words, and files with docstrings whose first line is too long or unfinished.
WORDS_LEFT: set[str] = {
    "consumer/admin/report.py",
    "consumer/cli/dlq_settle.py",
    "consumer/cli/help_text.py",
    "consumer/cli/migrate.py",
    "consumer/cli/positions.py",
    "consumer/cli/purge.py",
    "consumer/cli/status.py",
    "consumer/core/constraints.py",
    "consumer/core/dead_letter_seal.py",
    "consumer/core/evidence.py",
    "consumer/core/hosts.py",
    "consumer/core/identity.py",
    "consumer/core/models.py",
    "consumer/core/values.py",
    "consumer/demo/__init__.py",
    "consumer/kafka/log_reader.py",
    "consumer/local_servers.py",
    "consumer/logs.py",
    "consumer/postgres/claim_sql.py",
    "consumer/postgres/dead_letters.py",
    "consumer/postgres/migrate.py",
    "consumer/postgres/migrations/0001_schema.sql",
    "consumer/postgres/sql_text.py",
    "consumer/postgres/stopped_partitions.py",
    "consumer/postgres/waiting_messages.py",
    "consumer/precheck/breaker.py",
    "consumer/precheck/client.py",
    "consumer/rebuild/absent_rows.py",
    "consumer/rebuild/compare.py",
    "consumer/rebuild/compare_sql.py",
    "consumer/rebuild/copy_sql.py",
    "consumer/rebuild/drawn.py",
    "consumer/rebuild/drawn_values.py",
    "consumer/rebuild/first_rows.py",
    "consumer/rebuild/left_out.py",
    "consumer/rebuild/one_snapshot.py",
    "consumer/rebuild/rebuild.py",
    "consumer/rebuild/result.py",
    "consumer/rebuild/shadow_session.py",
    "consumer/rebuild/shadow_tables.py",
    "consumer/rebuild/single_pass.py",
    "consumer/rebuild/statement_guard.py",
    "consumer/replay/check.py",
    "consumer/replay/edited_letters.py",
    "consumer/replay/findings.py",
    "consumer/replay/html_page.py",
    "consumer/replay/ledger_diff.py",
    "consumer/replay/sealed_letters.py",
    "consumer/replay/timeline.py",
    "consumer/retention/task.py",
    "consumer/schemes/database.py",
    "consumer/schemes/lock.py",
    "consumer/schemes/moves.py",
    "consumer/schemes/redis_call.py",
    "consumer/schemes/states.py",
    "consumer/schemes/tokens.py",
    "consumer/schemes/unique.py",
    "consumer/schemes/versioned.py",
    "consumer/schemes/web.py",
    "consumer/sharding/shards.py",
    "consumer/testing/messages.py",
    "consumer/testing/outside_statements.py",
    "consumer/testing/server.py",
    "consumer/testing/trial.py",
    "consumer/testing/undisturbed.py",
    "consumer/worker/assignment.py",
    "consumer/worker/conflict_turns.py",
    "consumer/worker/health.py",
    "consumer/worker/lane.py",
    "consumer/worker/offset_commits.py",
    "consumer/worker/restart_policy.py",
    "consumer/worker/supervisor.py",
}
DOCSTRINGS_LEFT: set[str] = {
    "consumer/__init__.py",
    "consumer/__main__.py",
    "consumer/admin/__init__.py",
    "consumer/admin/report.py",
    "consumer/app_loader.py",
    "consumer/cli/__init__.py",
    "consumer/cli/demo.py",
    "consumer/cli/diagram.py",
    "consumer/cli/dlq.py",
    "consumer/cli/dlq_settle.py",
    "consumer/cli/help_text.py",
    "consumer/cli/interrupts.py",
    "consumer/cli/main.py",
    "consumer/cli/migrate.py",
    "consumer/cli/name_filters.py",
    "consumer/cli/position_actions.py",
    "consumer/cli/positions.py",
    "consumer/cli/purge.py",
    "consumer/cli/run.py",
    "consumer/cli/show.py",
    "consumer/cli/status.py",
    "consumer/core/__init__.py",
    "consumer/core/cloudevents.py",
    "consumer/core/constraints.py",
    "consumer/core/dead_letter_seal.py",
    "consumer/core/decode.py",
    "consumer/core/evidence.py",
    "consumer/core/fingerprint.py",
    "consumer/core/hosts.py",
    "consumer/core/identifiers.py",
    "consumer/core/identity.py",
    "consumer/core/models.py",
    "consumer/core/retry.py",
    "consumer/core/sqlstate.py",
    "consumer/core/values.py",
    "consumer/deferred_writes/catalog.py",
    "consumer/deferred_writes/rounds.py",
    "consumer/demo/__init__.py",
    "consumer/demo/application.py",
    "consumer/error_places.py",
    "consumer/handler_records/__init__.py",
    "consumer/handler_records/coverage.py",
    "consumer/handler_records/handler_code.py",
    "consumer/handler_records/id_rules.py",
    "consumer/handler_records/notices.py",
    "consumer/handler_records/settled_ranges.py",
    "consumer/handler_records/source_text.py",
    "consumer/kafka/bounds.py",
    "consumer/kafka/brokers.py",
    "consumer/kafka/decompression.py",
    "consumer/kafka/log_reader.py",
    "consumer/kafka/record_batch.py",
    "consumer/local_servers.py",
    "consumer/logs.py",
    "consumer/postgres/claim_sql.py",
    "consumer/postgres/claims.py",
    "consumer/postgres/connection.py",
    "consumer/postgres/connection_shortage.py",
    "consumer/postgres/dead_letters.py",
    "consumer/postgres/epoch.py",
    "consumer/postgres/errors.py",
    "consumer/postgres/generations.py",
    "consumer/postgres/grants.py",
    "consumer/postgres/handler_history.py",
    "consumer/postgres/handlers.py",
    "consumer/postgres/ledger_queries.py",
    "consumer/postgres/migrate.py",
    "consumer/postgres/positions.py",
    "consumer/postgres/protocol.py",
    "consumer/postgres/server.py",
    "consumer/postgres/session.py",
    "consumer/postgres/shard_tables.py",
    "consumer/postgres/sql_settings.py",
    "consumer/postgres/sql_text.py",
    "consumer/postgres/stopped_partitions.py",
    "consumer/postgres/waiting_messages.py",
    "consumer/precheck/__init__.py",
    "consumer/precheck/breaker.py",
    "consumer/precheck/client.py",
    "consumer/rebuild/__init__.py",
    "consumer/rebuild/absent_rows.py",
    "consumer/rebuild/applied.py",
    "consumer/rebuild/applied_order.py",
    "consumer/rebuild/beginnings.py",
    "consumer/rebuild/chosen_handlers.py",
    "consumer/rebuild/compare.py",
    "consumer/rebuild/compare_sql.py",
    "consumer/rebuild/copy_sql.py",
    "consumer/rebuild/drawn.py",
    "consumer/rebuild/drawn_values.py",
    "consumer/rebuild/first_rows.py",
    "consumer/rebuild/left_out.py",
    "consumer/rebuild/one_snapshot.py",
    "consumer/rebuild/pass_report.py",
    "consumer/rebuild/rebuild.py",
    "consumer/rebuild/result.py",
    "consumer/rebuild/shadow_session.py",
    "consumer/rebuild/shadow_tables.py",
    "consumer/rebuild/single_pass.py",
    "consumer/rebuild/state.py",
    "consumer/rebuild/statement_guard.py",
    "consumer/rebuild/statement_rules.py",
    "consumer/rebuild/table_model.py",
    "consumer/rebuild/trace_sql.py",
    "consumer/replay/__init__.py",
    "consumer/replay/check.py",
    "consumer/replay/edited_letters.py",
    "consumer/replay/effects.py",
    "consumer/replay/findings.py",
    "consumer/replay/html_page.py",
    "consumer/replay/ledger_diff.py",
    "consumer/replay/resume.py",
    "consumer/replay/resume_rules.py",
    "consumer/replay/sealed_letters.py",
    "consumer/replay/second_look.py",
    "consumer/replay/session.py",
    "consumer/replay/timeline.py",
    "consumer/retention/__init__.py",
    "consumer/retention/task.py",
    "consumer/schemes/__init__.py",
    "consumer/schemes/database.py",
    "consumer/schemes/lock.py",
    "consumer/schemes/moves.py",
    "consumer/schemes/redis_call.py",
    "consumer/schemes/states.py",
    "consumer/schemes/tokens.py",
    "consumer/schemes/unique.py",
    "consumer/schemes/versioned.py",
    "consumer/schemes/web.py",
    "consumer/settings.py",
    "consumer/sharding/shards.py",
    "consumer/testing/__init__.py",
    "consumer/testing/messages.py",
    "consumer/testing/outside_rows.py",
    "consumer/testing/outside_statements.py",
    "consumer/testing/server.py",
    "consumer/testing/trial.py",
    "consumer/testing/undisturbed.py",
    "consumer/tls.py",
    "consumer/worker/__init__.py",
    "consumer/worker/assignment.py",
    "consumer/worker/batch_results.py",
    "consumer/worker/conflict_turns.py",
    "consumer/worker/connections.py",
    "consumer/worker/event_loop.py",
    "consumer/worker/fetcher.py",
    "consumer/worker/group_check.py",
    "consumer/worker/halts.py",
    "consumer/worker/health.py",
    "consumer/worker/kafka_reports.py",
    "consumer/worker/lane.py",
    "consumer/worker/lifetime.py",
    "consumer/worker/log_monitor.py",
    "consumer/worker/message_log.py",
    "consumer/worker/offset_commits.py",
    "consumer/worker/partition_table.py",
    "consumer/worker/partitions.py",
    "consumer/worker/process.py",
    "consumer/worker/registration.py",
    "consumer/worker/restart_policy.py",
    "consumer/worker/shard.py",
    "consumer/worker/shard_check.py",
    "consumer/worker/start_positions.py",
    "consumer/worker/supervisor.py",
    "consumer/worker/upkeep.py",
    "consumer/worker/wait_reports.py",
    "consumer/worker/watchdog.py",
    "consumer/worker/worker.py",
}


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def words_of(path: Path) -> list[str]:
    """The banned words of a file. Code in a document does not count: it is tested where it is from."""
    text = documents.prose(path) if path.suffix == ".md" else path.read_text("utf-8")
    return [match[0] for match in BANNED.finditer(text.replace("_", " "))]


def docstrings_of(path: Path) -> Iterator[tuple[str, str]]:
    """Name and first paragraph's first line of each docstring."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "name", path.stem), text.split("\n", 1)[0]


def is_well_formed(line: str) -> bool:
    """Whether a first line is a short sentence."""
    return line.rstrip().endswith((".", ":", "?")) and len(line.split()) <= FIRST_LINE_WORDS_MAX


def badly_formed(path: Path) -> list[str]:
    return [f"{name}: {line}" for name, line in docstrings_of(path) if not is_well_formed(line)]


def unclean_words() -> set[str]:
    return {_name(path) for path in [*CODE, *SQL] if words_of(path)}


def unclean_docstrings() -> set[str]:
    return {_name(path) for path in CODE if badly_formed(path)}


DOCUMENTS = [*documents.PAGES, ROOT / "Makefile"]


def test_documents_have_no_banned_word() -> None:
    assert {_name(path): words_of(path) for path in DOCUMENTS if words_of(path)} == {}


@pytest.mark.parametrize(
    ("now", "left"),
    [(unclean_words(), WORDS_LEFT), (unclean_docstrings(), DOCSTRINGS_LEFT)],
    ids=["banned words", "first lines of docstrings"],
)
def test_the_lists_of_unclean_files_only_shrink(now: set[str], left: set[str]) -> None:
    assert now - left == set(), "`python tests/project/test_language.py --all` prints the faults"
    assert left - now == set(), "clean now: take it from the list"


def main() -> None:
    for title, files in (("WORDS_LEFT", unclean_words()), ("DOCSTRINGS_LEFT", unclean_docstrings())):
        print(f"{title}: set[str] = {{")
        print(*(f'    "{name}",' for name in sorted(files)), sep="\n")
        print("}")
    for path in [*CODE, *SQL] if "--all" in sys.argv else []:
        for line in [*words_of(path), *(badly_formed(path) if path.suffix == ".py" else [])]:
            print(f"{_name(path)}: {line}")


if __name__ == "__main__":
    main()
