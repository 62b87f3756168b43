"""Every limit and address, from flags, the environment and a file.

The variables have the prefix CONSUMER_; flags and the keys of the file have the same names. Knows names, units and bounds;
setting_sources.py reads the sources.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from consumer.core.errors import Misconfigured
from consumer.setting_sources import CONFIG_VARIABLE, Gathered, Known, Source, gather, subject_of, variable_of

Positive = Annotated[float, Field(gt=0, le=2_000_000, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


class Settings(BaseModel):
    """All settings, with their units in their names.

    A setting that is not given is read from the environment, then from the TOML file that CONSUMER_CONFIG names; an empty
    variable counts as absent. CONSUMER_…_FILE names a file with the value of a secret. Unknown CONSUMER_ variables are
    ignored. Raises Misconfigured, one line, for a value that cannot be, a setting that there is not, and a file that cannot
    be read or has other keys.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    kafka_bootstrap_servers: str = Field("127.0.0.1:9092", description="Kafka brokers, host:port, comma-separated")
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="how to talk to Kafka"
    )
    kafka_security_ca_file: str | None = Field(None, description="CA certificates for Kafka's TLS (default: system's)")
    kafka_security_cert_file: str | None = Field(None, description="client certificate for Kafka's TLS")
    kafka_security_key_file: str | None = Field(None, description="key of the client certificate")
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] = Field(
        "PLAIN", description="SASL mechanism"
    )
    kafka_sasl_username: str | None = Field(None, description="SASL user")
    kafka_sasl_password: SecretStr | None = Field(None, description="SASL password; prefer the environment to the flag")
    kafka_sasl_token_provider: str | None = Field(
        None,
        description='for OAUTHBEARER: "module:callable" that returns a token, or a token and its expiry (Unix seconds or milliseconds, or a datetime)',
    )
    kafka_session_timeout_seconds: Positive = Field(
        30, description="how long Kafka waits for a lost machine; a lost process is reported by its supervisor at once"
    )
    kafka_heartbeat_seconds: Positive = Field(0.5, description="how often a worker asks whether it must rebalance")
    kafka_commit_interval_seconds: Positive = Field(1, description="how often positions are copied to Kafka")
    kafka_partition_fetch_bytes_max: Count = Field(1 << 20, description="most bytes fetched from a partition at once")
    kafka_batch_decompressed_bytes_max: Count = Field(
        64 << 20, description="most bytes that one compressed record batch may become; a larger one stops its partition"
    )
    kafka_client_id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9._-]{1,200}$",
        description="what Kafka's quotas and logs call this client (default: consumer-APP-N, N the worker)",
    )
    kafka_transaction_warning_seconds: Positive = Field(
        60, description="a producer's open transaction that holds a partition back for so long is warned of"
    )

    postgres_dsn: SecretStr | None = Field(None, description="PostgreSQL, postgresql://user@host/database (required)")
    postgres_ca_file: str | None = Field(
        None, description="CA certificates for PostgreSQL's TLS (default: sslrootcert of the DSN, else the system's)"
    )
    postgres_pooler: bool = Field(False, description="PostgreSQL is behind PgBouncer in transaction mode")
    postgres_lock_timeout_seconds: Positive = Field(10, description="longest wait for another transaction's lock")
    postgres_answer_timeout_seconds: Positive = Field(
        60, description="a connection that answers nothing for so long is ended, and the batch runs again"
    )
    postgres_idle_in_transaction_timeout_seconds: Positive = Field(
        60, description="PostgreSQL ends a worker's transaction that was silent for so long (a stopped process)"
    )

    ledger_retention_hours: Positive | None = Field(
        None, description="how long the ledger remembers a message, at least (absent: for ever)"
    )
    ledger_generation_hours: Positive | None = Field(
        None, description="how much of the ledger is dropped at once (absent: a quarter of the retention)"
    )
    ledger_clock_skew_hours: Annotated[float, Field(ge=0, le=2_000_000, allow_inf_nan=False)] = Field(
        1, description="how far the clocks of producers, Kafka and PostgreSQL are apart, at most"
    )

    redis_url: SecretStr | None = Field(
        None, description="Redis for the pre-check, redis://host:6379/0 (absent: without)"
    )
    redis_ca_file: str | None = Field(None, description="CA certificates for Redis's TLS (default: the system's)")
    precheck_budget_ms: Positive = Field(50, description="longest wait for Redis before going on without it")
    precheck_window_hours: Positive = Field(24, description="how long a mark is kept, at least")

    schema_registry_url: str | None = Field(
        None, description="schema registry for decoders and encoders that need one, https://host:port, comma-separated"
    )
    schema_registry_username: str | None = Field(None, description="user of the schema registry, or API key")
    schema_registry_password: SecretStr | None = Field(
        None, description="password of the schema registry, or API secret"
    )
    schema_registry_token: SecretStr | None = Field(None, description="bearer token for the schema registry")
    schema_registry_ca_file: str | None = Field(
        None, description="CA certificates for the schema registry's TLS (default: the system's)"
    )

    allow_insecure: str = Field(
        "",
        description="services that may be reached off this machine without TLS that checks who answers, of kafka, postgres, redis, "
        "registry, and http (other machines may reach ours), comma-separated",
    )

    workers: Annotated[int, Field(ge=1, le=256)] = Field(1, description="worker processes, 1 to 256")
    lanes_max: Annotated[int, Field(ge=1, le=16)] = Field(
        4, description="most batches of a worker at a time, each on a PostgreSQL connection of its own"
    )
    batch_messages_max: Count = Field(2000, description="most messages in one transaction")
    batch_bytes_max: Count = Field(4 << 20, description="most payload bytes in one transaction")
    buffer_messages_max: Count = Field(20_000, description="most messages fetched and not yet settled")
    buffer_bytes_max: Count = Field(64 << 20, description="most payload bytes fetched and not yet settled")
    parked_messages_max: Count = Field(
        10_000, description="most messages of a partition waiting for a retry, or behind one; beyond, it is not read on"
    )

    dead_letter_limit: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = Field(
        0.5,
        description="a worker stops that would make more dead letters than this share of a handler's last 1,000 messages, and at "
        "least 50; 0: at the first one, 1: never",
    )
    dead_letter_retention_hours: Positive | None = Field(
        None,
        description="erase the message of a dead letter so long after it was applied or discarded (absent: never)",
    )
    dead_letter_topic: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,249}$")] | None = Field(
        None, description="also produce dead letters to this topic, after they are kept in PostgreSQL"
    )

    outbox_relay: Literal["on", "off"] = Field(
        "on", description="off: workers publish nothing of the outbox and drop nothing of it, another relay does"
    )
    outbox_keep_hours: Annotated[float, Field(ge=0, le=2_000_000, allow_inf_nan=False)] = Field(
        1, description="how long rows of the outbox are kept after they are published, at least"
    )

    http: Annotated[str, Field(pattern=r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}$")] | None = Field(
        None,
        description="HOST:PORT that serves /metrics, /livez, /readyz and /status; other machines may be let in only with "
        "--allow-insecure http (absent: nothing is served)",
    )
    console_proxy_secret: SecretStr | None = Field(
        None,
        description="what the proxy of `consumer console --auth proxy` sends as X-Console-Secret, at least 16 "
        "characters (required when other machines reach the console)",
    )
    tracing: Literal["off", "parent", "link"] = Field(
        "off",
        description="parent: OpenTelemetry spans of handlers' calls, each a child of its message's span; link: only linked to it; needs "
        "the extra otel, and the OTEL_ variables say where spans go",
    )
    grace_seconds: Positive = Field(25, description="longest drain after SIGTERM")
    wait_seconds: Annotated[float, Field(ge=0, le=2_000_000, allow_inf_nan=False)] = Field(
        30, description="longest wait for Kafka and PostgreSQL at start"
    )
    handler_timeout_seconds: float | None = Field(
        None,
        ge=0,
        le=2_000_000,
        allow_inf_nan=False,
        description="longest call of a handler without a timeout= of its own; 0: no limit "
        "(default: half of the idle-in-transaction timeout)",
    )
    worker_memory_max_mb: int | None = Field(
        None, ge=1, description="a worker process that uses more memory drains and is replaced (absent: no limit)"
    )
    watchdog_seconds: Positive = Field(60, description="a worker that should move and does not for so long is ended")
    restarts_max: Annotated[int, Field(ge=0)] = Field(5, description="restarts in a row before giving up on a worker")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")
    log_format: Literal["auto", "text", "json"] = Field("auto", description="auto: text on a terminal, JSON otherwise")
    log_config: str | None = Field(
        None, description="file that configures logging instead: .json or .toml for dictConfig, or .ini", min_length=1
    )

    _gathered: Gathered = PrivateAttr(default_factory=Gathered)

    def __init__(self, gathered: Gathered | None = None, /, **given: Any) -> None:
        if gathered is None:
            gathered = gather(known_settings(), given, os.environ, None)
        try:
            super().__init__(**gathered.values)
        except ValidationError as error:
            raise Misconfigured("; ".join(_problem(gathered, dict(problem)) for problem in error.errors())) from None
        self._gathered = Gathered(gathered.config, {}, gathered.sources)

    @field_validator("log_level", "log_format", "outbox_relay", "tracing", mode="before")
    @classmethod
    def _in_lower_case(cls, given: object) -> object:
        return given.lower() if isinstance(given, str) else given

    @field_validator("kafka_bootstrap_servers")
    @classmethod
    def _without_user(cls, given: str) -> str:
        if "@" in given or not given.strip():
            raise ValueError("host:port, comma-separated; a user is CONSUMER_KAFKA_SASL_USERNAME")
        return given

    @field_validator("allow_insecure")
    @classmethod
    def _services(cls, given: str) -> str:
        if odd := sorted(_names(given) - {"kafka", "postgres", "redis", "registry", "http"}):
            raise ValueError(f"{odd[0][:40]!r} is none of kafka, postgres, redis, registry, http")
        return given

    @model_validator(mode="after")
    def _together(self) -> Settings:
        if self.ledger_generation_hours is not None and self.ledger_retention_hours is None:
            raise ValueError(
                "CONSUMER_LEDGER_GENERATION_HOURS has no effect without CONSUMER_LEDGER_RETENTION_HOURS; set both, or neither"
            )
        if self.postgres_lock_timeout_seconds >= self.postgres_answer_timeout_seconds:
            raise ValueError(
                "CONSUMER_POSTGRES_LOCK_TIMEOUT_SECONDS must be less than CONSUMER_POSTGRES_ANSWER_TIMEOUT_SECONDS; "
                "else a wait for a lock is taken for a connection that is lost"
            )
        return self

    @property
    def insecure(self) -> set[str]:
        """The services that may be reached without TLS on other machines."""
        return _names(self.allow_insecure)

    @property
    def http_address(self) -> tuple[str, int] | None:
        """The host and port to serve on. Raises Misconfigured."""
        if self.http is None:
            return None
        host, _, port = self.http.rpartition(":")
        if int(port) > 65535:
            raise Misconfigured(f"CONSUMER_HTTP: {port} is no port; write HOST:PORT with a port up to 65535")
        return host.strip("[]"), int(port)

    @property
    def dsn(self) -> str:
        """The DSN as text. Raises Misconfigured without one."""
        if self.postgres_dsn is None or not self.postgres_dsn.get_secret_value():
            raise Misconfigured(
                "CONSUMER_POSTGRES_DSN: not set; set it (or --postgres-dsn) to postgresql://user@host/database"
            )
        return self.postgres_dsn.get_secret_value()

    def at(self, dsn: str) -> Settings:
        """Return the same settings for another database."""
        return self.model_copy(update={"postgres_dsn": SecretStr(dsn)})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with other values, which count as given."""
        copied = super().model_copy(update=update, deep=deep)
        sources = self._gathered.sources | {name: Source("flag") for name in update or ()}
        copied._gathered = Gathered(self._gathered.config, {}, sources)
        return copied

    @property
    def config_file(self) -> str | None:
        """The path of the TOML file that was read, as given."""
        return self._gathered.config

    def source_of(self, name: str) -> Source:
        """Return where a setting's value comes from."""
        return self._gathered.sources.get(name, Source())

    def dump(self) -> dict[str, str]:
        """Return the settings as environment variables, with secrets.

        A secret that came from a file is given as the path of its file. Only for a child process, never for a log.
        """
        environment: dict[str, str] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if (path := self.source_of(name).secret_file) is not None:
                environment[f"{variable_of(name)}_FILE"] = path
            elif value is not None:
                text = value.get_secret_value() if isinstance(value, SecretStr) else value
                environment[variable_of(name)] = str(text)
        return environment

    def child_environment(self) -> dict[str, str]:
        """Return the environment of a child process, with these settings.

        The child reads no configuration file again: it may have changed, and the settings are all here.
        """
        known = known_settings()
        replaced = {CONFIG_VARIABLE, *map(variable_of, known.types)}
        replaced |= {f"{variable_of(name)}_FILE" for name in known.secrets}
        kept = {name: text for name, text in os.environ.items() if name.upper() not in replaced}
        return kept | self.dump()


def known_settings() -> Known:
    """Return the type of each setting, and which are secret."""
    fields = Settings.model_fields
    types = {name: _type_of(field.annotation) for name, field in fields.items()}
    return Known(
        {name: str if kind is SecretStr else kind for name, kind in types.items()},
        {name for name, kind in types.items() if kind is SecretStr},
    )


def _type_of(annotation: Any) -> type:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return str
    if origin is None:
        assert isinstance(annotation, type)
        return annotation
    return _type_of(arguments[0])  # of Annotated, and of "… | None"


def _names(given: str) -> set[str]:
    return {part.strip().lower() for part in given.split(",") if part.strip()}


def load(config: str | None = None, **flags: Any) -> Settings:
    """Return the settings: flags first, then the environment, then the file.

    config: the path of a TOML file; without it CONSUMER_CONFIG names one. Flags that are None are not given. Raises
    Misconfigured, one line that names each variable or key and never its value.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    return Settings(gather(known_settings(), given, os.environ, config))


def _problem(gathered: Gathered, problem: Mapping[str, Any]) -> str:
    what = str(problem["msg"]).removeprefix("Value error, ")
    if not problem["loc"]:
        return what
    name = "_".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        near = get_close_matches(name, Settings.model_fields, 1)
        return f"Settings: no setting {name!r}" + (f", did you mean {near[0]!r}?" if near else "")
    action = "; correct the file" if gathered.sources.get(name, Source()).kind == "file" else ""
    return f"{subject_of(gathered, name)}: {what}{action}"
