"""Addresses, settings and arguments that cannot work.

One line that says what to write, and no secret.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Place, consumer, is_one_line
from pooler import Pooler, needs_pgbouncer

from consumer import App, Misconfigured, RegistrationError, Settings
from consumer.app_loader import load_app
from consumer.cli.output import _URL_USER
from consumer.kafka.log_reader import parse
from consumer.local_servers import Postgres, Valkey
from consumer.postgres.connection import connect, session_settings
from consumer.precheck.client import Precheck
from consumer.settings import load
from consumer.tls import postgres_tls, redis_url

SECRET = "s3cret"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("write postgresql://user@host/database", "write postgresql://user@host/database"),
        ("write redis://user:password@host:6379/0", "write redis://user:password@host:6379/0"),
        (f"at postgresql://bob:{SECRET}@host/x, no", "at postgresql://***@host/x, no"),
        (f"at postgresql://bob:{SECRET}/a@b@host/x", "at postgresql://***@host/x"),
        (f"at redis://:{SECRET}@host", "at redis://***@host"),
        (f"at redis://{SECRET}@host", "at redis://***@host"),
        (f"user:{SECRET}@ is no address", f"user:{SECRET}@ is no address"),
    ],
)
def test_password_filter_hides_passwords_and_leaves_hints(text: str, shown: str) -> None:
    assert _URL_USER.sub(r"\1***@", text) == shown


def test_missing_dsn_is_an_error_with_a_hint_to_copy(tmp_path: Path) -> None:
    is_one_line(consumer(tmp_path, "migrate", "--check"), "postgresql://user@host/database")


@pytest.mark.parametrize(
    "option",
    ["connect_timeout=5", "channel_binding=require", "keepalives_idle=30", "gssencmode=disable", "hostaddr=::1"],
)
def test_option_of_libpq_is_named(option: str) -> None:
    with pytest.raises(Misconfigured, match=f"{option.partition('=')[0]} is an option of libpq, .*leave it out"):
        postgres_tls(Settings(postgres_dsn=f"postgresql://u:{SECRET}@127.0.0.1/x?{option}"))


def test_verify_ca_on_this_machine_checks_the_chain_alone() -> None:
    context = postgres_tls(Settings(postgres_dsn="postgresql://u@127.0.0.1/x?sslmode=verify-ca"))
    assert context is not None and not context.check_hostname and context.verify_mode.name == "CERT_REQUIRED"
    context = postgres_tls(Settings(postgres_dsn="postgresql://u@127.0.0.1/x?sslmode=verify-full"))
    assert context is not None and context.check_hostname
    with pytest.raises(Misconfigured, match="verify-full"):
        postgres_tls(Settings(postgres_dsn="postgresql://u@db.example.org/x?sslmode=verify-ca"))


@pytest.mark.parametrize("path", ["/abc", "/0x1", "/1/2", "/-1", "/ 1", "/1.5", f"/{SECRET}"])
def test_redis_database_that_is_no_number_is_refused(path: str) -> None:
    for scheme in ("redis", "rediss"):
        with pytest.raises(Misconfigured, match="number of a database") as refusal:
            redis_url(Settings(redis_url=f"{scheme}://127.0.0.1:6379{path}"))
        assert SECRET not in str(refusal.value)


@pytest.mark.parametrize("path", ["", "/", "/0", "/15"])
def test_redis_database_that_is_a_number_is_taken(path: str) -> None:
    assert redis_url(Settings(redis_url=f"redis://127.0.0.1:6379{path}")) == f"redis://127.0.0.1:6379{path}"


async def test_redis_database_that_is_not_there_is_named(valkey: Valkey) -> None:
    precheck = Precheck(valkey.url.rstrip("/0") + "/99" if valkey.url.endswith("/0") else valkey.url + "/99", "a", 1, 1)
    try:
        with pytest.raises(Misconfigured, match="no database of that number"):
            await precheck.start("")
    finally:
        await precheck.stop()


def test_generation_hours_without_retention_hours_are_refused() -> None:
    with pytest.raises(Misconfigured, match=r"^CONSUMER_LEDGER_GENERATION_HOURS has no effect without"):
        load(ledger_generation_hours=1)
    assert load(ledger_generation_hours=1, ledger_retention_hours=4).ledger_generation_hours == 1


def test_a_wait_for_a_lock_that_outlasts_the_limit_of_an_answer_is_refused() -> None:
    with pytest.raises(Misconfigured, match=r"^CONSUMER_POSTGRES_LOCK_TIMEOUT_SECONDS must be less than"):
        load(postgres_answer_timeout_seconds=10)
    assert load(postgres_answer_timeout_seconds=10, postgres_lock_timeout_seconds=9).postgres_lock_timeout_seconds == 9


def test_a_limit_below_a_millisecond_is_not_taken_for_none() -> None:
    limits = session_settings(
        load(postgres_lock_timeout_seconds=0.0004, postgres_idle_in_transaction_timeout_seconds=0.0004)
    )
    assert (limits["lock_timeout"], limits["idle_in_transaction_session_timeout"]) == ("1", "1")


@pytest.mark.parametrize("name", ["a\udcff", "\ud800"])
def test_handler_name_with_a_lone_surrogate_is_refused(name: str) -> None:
    app = App("shop")
    for options in ({"name": name}, {}):
        topics = ["orders"] if options else [f"orders{name}"]
        with pytest.raises(RegistrationError, match="lone surrogate"):

            @app.handler(*topics, **options)  # type: ignore[call-overload, untyped-decorator]
            async def settle(order: bytes) -> None: ...


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["dlq", "retry", "shop:app", "1", "--value", "x.json", "--new-id", "\udcff"], "--new-id"),
        (["dlq", "list", "shop", "--handler", "\udcff"], "--handler"),
        (["replay", "shop:app", "\udcff"], "TOPIC"),
        (["status", "shop\udcff:app"], "APP"),
    ],
)
def test_argument_that_is_not_utf8_is_named(place: Place, tmp_path: Path, arguments: list[str], flag: str) -> None:
    result = consumer(tmp_path, *arguments, CONSUMER_POSTGRES_DSN=place.worker_dsn)
    is_one_line(result, f"{flag}: not valid UTF-8")


@needs_pgbouncer
async def test_pooler_that_is_not_declared_is_named_at_once(postgres: Postgres) -> None:
    with (
        Pooler(postgres) as pooler,
        pytest.raises(Misconfigured, match="it is PgBouncer; set CONSUMER_POSTGRES_POOLER=true"),
    ):
        await connect(Settings(postgres_dsn=pooler.dsn(postgres.dsn())))


def test_import_failing_in_a_library_names_the_applications_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unset_variable.py").write_text('import os\n\nURL = os.environ["NOT_SET_ANYWHERE"]\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Misconfigured, match=r"KeyError: 'NOT_SET_ANYWHERE' \(.*unset_variable.py:3\)"):
        load_app("unset_variable:app")


@pytest.mark.parametrize(
    ("names", "says"), [({}, "latest, position, an"), ({"names": "latest, committed"}, "committed, an")]
)
def test_bound_that_is_no_bound_is_refused_with_the_words_of_its_command(names: dict[str, str], says: str) -> None:
    with pytest.raises(Misconfigured, match=says):
        parse("yesterday", "--move-to", 0, **names)
