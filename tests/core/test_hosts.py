"""Which addresses are local, by their text and to the drivers."""

from __future__ import annotations

from typing import Any

import pytest
from aiokafka.conn import collect_hosts
from asyncpg import connect_utils
from hypothesis import given
from hypothesis import strategies as st

from consumer.core.hosts import certificate_fault, elsewhere, is_local, of_kafka, of_postgres

pytestmark = pytest.mark.unit

# What the driver makes of a DSN; it has no public name.
DRIVERS_PARSER: Any = vars(connect_utils)["_parse_connect_dsn_and_args"]


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost", "127.0.0.1", "127.9.9.9", "::1", "[::1]", "/run/postgresql"]
)
def test_address_of_this_machine_is_local(host: str) -> None:
    assert is_local(host)


@pytest.mark.parametrize(
    "host",
    [
        "localhost.example",
        "localhost.",
        "127.0.0.1.example",
        "127.1",
        "0177.0.0.1",
        "2130706433",
        "0.0.0.0",
        "10.0.0.1",
        "::",
        "::ffff:10.0.0.1",
        "kafka",
        "",
        " ",
        "localhost ",
        "@/run",
        "./run",
        "db,localhost",
        "1270.0.0.1",
        "l\u043ecalhost",  # a Cyrillic o
    ],
)
def test_address_of_another_machine_is_elsewhere(host: str) -> None:
    assert not is_local(host)


HOSTS = st.sampled_from(
    ["localhost", "127.0.0.1", "db.example", "[::1]", "[fd00::1]", "10.1.2.3", "%2Frun%2Fsocket", "a-b"]
)
PORTS = st.sampled_from(["", ":5432", ":1"])
SPECS = st.lists(st.builds(str.__add__, HOSTS, PORTS), max_size=3).map(",".join)
USERS = st.sampled_from(["", "user@", "user:pass@", "user:p%40ss@", "user:p@ss@", "@"])
QUERIES = st.lists(
    st.sampled_from(
        ["host=other.example", "host=/run/x", "host=127.0.0.1,far.example", "port=7", "sslmode=require", "user=u"]
    ),
    unique_by=lambda parameter: parameter.split("=")[0],
    max_size=3,
).map("&".join)


@given(USERS, SPECS, QUERIES, st.sampled_from(["", "env.example", "localhost,env.example"]))
def test_the_hosts_are_those_that_the_driver_will_try(user: str, spec: str, query: str, variable: str) -> None:
    dsn = f"postgresql://{user}{spec}/base" + (f"?{query}" if query else "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGPASSWORD", "none")
        for name in ("PGHOST", "PGPORT", "PGSERVICE", "PGSSLMODE"):
            patch.delenv(name, raising=False)
        if variable:
            patch.setenv("PGHOST", variable)
        names = "host port user password passfile database service servicefile direct_tls server_settings"
        names += " target_session_attrs krbsrvname gsslib"
        try:
            addresses, _ = DRIVERS_PARSER(dsn=dsn, ssl=False, **dict.fromkeys(names.split()))
        except Exception:
            return  # it will try nothing
        if not spec and not variable and "host=" not in query:
            return  # its own list of sockets, and localhost
        tried = [
            address.rpartition("/.s.PGSQL.")[0] if isinstance(address, str) else address[0] for address in addresses
        ]
        assert of_postgres(dsn, variable)[0] == tried


@given(
    st.lists(
        st.builds(str.__add__, HOSTS.filter(lambda host: "%" not in host), st.sampled_from(["", ":9092"])), min_size=1
    )
)
def test_the_brokers_are_those_that_the_client_will_try(servers: list[str]) -> None:
    text = ", ".join(servers)
    assert of_kafka(text) == [host for host, *_ in collect_hosts(text, randomize=False)]


def test_an_address_without_brackets_and_one_that_is_none() -> None:
    assert of_kafka("::1,fd00::1") == ["::1", "fd00::1"]
    assert elsewhere(of_kafka("127.0.0.1:1,kafka:9092,[::1]:1,[fd00::1]:1")) == ["kafka", "fd00::1"]
    with pytest.raises(ValueError):
        of_postgres("mysql://db/x")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (10, "expired"),
        (62, "another host"),
        (64, "another host"),
        (18, "no trusted issuer"),
        (19, "no trusted issuer"),
        (20, "no trusted issuer"),
        (9, "not valid yet"),
        (7, "not accepted"),
    ],
)
def test_each_fault_of_a_certificate_says_what_to_check(code: int, says: str) -> None:
    assert says in certificate_fault(code, "text", "THE_CA", "THE_ADDRESS")
