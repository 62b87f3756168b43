"""Handlers take topics by name and by pattern; others are refused."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest

from consumer import App, Misconfigured, RegistrationError
from consumer.admin.produce import readers
from consumer.core.message import Partition
from consumer.core.topic_names import TopicSelection, matches, text_of
from consumer.handler_records.coverage import HandlerCoverage
from consumer.handler_records.settled_ranges import At, Gap
from consumer.replay.selection import choose_handlers
from consumer.testing import Sent
from consumer.testing.messages import partition_of

pytestmark = pytest.mark.unit

PAYMENTS = re.compile(r"payments\.(eu|us)")


async def take(body: dict[str, int]) -> None: ...
async def call(body: dict[str, int]) -> str:
    return ""


def app_of(**handlers: tuple[tuple[str, ...], re.Pattern[str] | None]) -> App:
    app = App("shop")
    for name, (topics, pattern) in handlers.items():
        app.handler(*topics, topics=pattern, name=name)(take)
    return app


def names(app: App) -> dict[str, list[str]]:
    return {topic: [handler.name for handler in handlers] for topic, handlers in app.by_topic().items()}


@pytest.mark.parametrize(
    ("pattern", "topic", "is_match"),
    [
        (PAYMENTS, "payments.eu", True),
        (PAYMENTS, "payments.eu.old", False),
        (PAYMENTS, "old.payments.eu", False),
        (PAYMENTS, "PAYMENTS.EU", False),
        (re.compile("payments", re.I), "PAYMENTS", True),
        (re.compile("pay  ments # all", re.X), "payments", True),
        (re.compile(".*"), "payments", True),
        (re.compile(".*"), "_schemas", True),
        (re.compile(".*"), "__consumer_offsets", False),
        (re.compile("[_a-z]+"), "__consumer_offsets", False),
        (re.compile("payments.*$"), "payments\n", False),
        (None, "payments", False),
    ],
)
def test_the_whole_name_matches(pattern: re.Pattern[str] | None, topic: str, is_match: bool) -> None:
    assert matches(pattern, topic) is is_match


WRONG: list[tuple[tuple[Any, ...], Any, str]] = [
    ((), None, "name at least one topic"),
    ((), "payments.*", "topics='payments.*': text; a pattern is compiled"),
    ((), ["payments"], "topics=['payments']: no compiled pattern"),
    ((), 7, "topics=7: no compiled pattern"),
    ((), re.compile(b"payments"), "a pattern of bytes"),
    ((), re.compile("payments", re.M | re.S), "the flag MULTILINE and DOTALL means nothing"),
    ((), re.compile(""), "the pattern is empty"),
    ((), re.compile("^$"), "the pattern is empty"),
    ((), re.compile("^__connect.*"), "begin with two underscores"),
    ((PAYMENTS,), None, "a pattern among the names of topics"),
    (("a b",), PAYMENTS, "topic 'a b'"),
    (("a", "a"), PAYMENTS, "a topic is named twice"),
]


@pytest.mark.parametrize(("topics", "pattern", "says"), WRONG)
def test_wrong_patterns_are_refused_in_one_line(topics: tuple[Any, ...], pattern: Any, says: str) -> None:
    app = App("shop")
    for register in (
        lambda: app.handler(*topics, topics=pattern)(take),
        lambda: app.effect(*topics, topics=pattern, remembers=timedelta(hours=1))(call),
    ):
        with pytest.raises(RegistrationError) as caught:
            register()
        assert says in str(caught.value) and "\n" not in str(caught.value) and __file__ in str(caught.value)
    assert not app.handlers


def test_topics_get_the_handlers_that_match_in_order_of_registration() -> None:
    app = app_of(
        audit=((), re.compile(r".*\.eu")),
        settle=(("payments.eu", "refunds"), PAYMENTS),
        count=(("payments.us",), None),
    )
    # What another handler names is matched at once; what exists has to be found.
    assert names(app) == {
        "payments.eu": ["audit", "settle"],
        "payments.us": ["settle", "count"],
        "refunds": ["settle"],
    }
    app.discover(["orders.eu", "payments.eu", "payments.fr", "__x.eu"])
    app.discover(["orders.eu"])
    assert names(app)["orders.eu"] == ["audit"]
    assert app.topics == ["orders.eu", "payments.eu", "payments.us", "refunds"]
    assert app.handlers["settle"].topics == ("payments.eu", "refunds", "payments.us")
    assert app.handlers["count"].topics == ("payments.us",)


def test_a_topic_that_is_named_in_a_command_need_not_exist() -> None:
    app = app_of(settle=((), PAYMENTS))
    assert app.topics == [] and app.has_patterns
    assert not app.takes("payments.fr") and app.topics == []
    assert app.takes("payments.us") and app.topics == ["payments.us"]
    assert not app_of(settle=(("a",), None)).has_patterns


def test_consumer_produce_sends_to_topics_that_match() -> None:
    app = app_of(settle=((), PAYMENTS))
    assert [handler.name for handler in readers(app, "shop:app", "payments.us")] == ["settle"]
    with pytest.raises(Misconfigured, match=r"neither has a handler.*; it has: those that payments\\.\(eu"):
        readers(app, "shop:app", "payments.fr")


def test_a_replay_says_what_a_handler_takes() -> None:
    app = app_of(settle=((), PAYMENTS), count=(("refunds",), None))
    with pytest.raises(Misconfigured, match=r"'settle': does not take refunds; it takes those that payments\\.\(eu"):
        choose_handlers(app, ["refunds"], ["settle"])


def test_gaps_are_of_topics_that_match() -> None:
    app = app_of(settle=((), PAYMENTS))
    positions = {Partition(topic, 0): At(0, 5, frozenset()) for topic in ("payments.eu", "payments.fr")}
    gaps = HandlerCoverage({}, positions, {}, {}, {}).assess(app).gaps
    assert gaps == (Gap("settle", Partition("payments.eu", 0), 0, 5),)


def test_an_effect_takes_a_pattern() -> None:
    app = App("shop")
    effect = app.effect(topics=PAYMENTS, remembers=timedelta(hours=1))(call)

    @effect.settled
    async def settled(body: dict[str, int], reply: str) -> None: ...

    assert app.takes("payments.eu") and names(app) == {"payments.eu": ["call"]}


def test_a_pattern_that_matches_what_the_app_publishes_is_refused() -> None:
    app = App("shop", publishes=["payments.us", "receipts"])
    with pytest.raises(RegistrationError, match=r"matches 'payments.us', which the App publishes to") as caught:
        app.handler(topics=PAYMENTS)(take)
    assert __file__ in str(caught.value) and not app.handlers
    app.handler("payments.us", topics=PAYMENTS)(take)  # on purpose
    with pytest.raises(RegistrationError, match=r"matches 'receipts'"):
        app.handler(topics=re.compile("receipts?"), name="again")(take)


def test_selection_is_of_names_and_patterns() -> None:
    selection = app_of(settle=(("refunds", "__own"), PAYMENTS)).selection
    taken = ["refunds", "__own", "payments.eu", "payments.fr", "__consumer_offsets", "other"]
    assert [topic for topic in taken if selection.takes(topic)] == ["refunds", "__own", "payments.eu"]
    assert selection.suggestion("other") == r"it has: __own, refunds, those that payments\.(eu|us) matches"
    assert TopicSelection(["refunds"], []).suggestion("refund") == "did you mean refunds?"


def test_text_of_a_pattern_has_its_flags() -> None:
    assert text_of(PAYMENTS) == r"payments\.(eu|us)"
    assert text_of(re.compile("a", re.I | re.A)) == "(?ia)a"


def test_the_pytest_plugin_takes_messages_of_matching_topics() -> None:
    app = app_of(settle=((), PAYMENTS))
    assert partition_of(Sent("payments.eu", {}), app) == ("payments.eu", 0)
    with pytest.raises(Misconfigured, match=r"no handler of topic 'payments.fr'; it has: those that payments"):
        partition_of(Sent("payments.fr", {}), app)
    with pytest.raises(Misconfigured, match="no handler of topic 7"):
        partition_of(Sent(7, {}), app)  # type: ignore[arg-type]
