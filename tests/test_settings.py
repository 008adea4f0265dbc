"""From URLs, mappings and the environment to brokers: what counts, what is refused, and that secrets stay secret."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from dispytch_integrations import connect
from dispytch_integrations.backend import BrokerURL, read_secret, scrub
from dispytch_integrations.errors import BrokerUnavailableError, ConfigurationError, MissingExtraError
from dispytch_integrations.hooks import Hook
from dispytch_integrations.serialization import JSONSerializer
from dispytch_integrations.settings import BrokerSpec, Config, load_brokers

ROOT = Path(__file__).parents[1]
SECRET = "s3cr3t-Pa55"


def problems(config: Config, **keywords: Any) -> list[str]:
    """What is wrong with these settings."""
    with pytest.raises(ConfigurationError) as caught:
        load_brokers(config, keywords)
    return caught.value.problems


def only(config: Config, **keywords: Any) -> BrokerSpec:
    (spec,) = load_brokers(config, keywords)
    return spec


# -- where settings come from --------------------------------------------------------------------------------------


def test_a_url_is_the_broker_named_default() -> None:
    """The shortest configuration is a URL."""
    spec = only("memory://")
    assert (spec.alias, spec.backend.address, spec.options.timeout) == ("default", "memory://", 5.0)


def test_the_environment_counts_when_nothing_else_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deployment sets DISPYTCH_URL and the code says connect()."""
    monkeypatch.setenv("DISPYTCH_URL", " memory://kafka \n")
    assert only(None).backend.address == "memory://kafka"
    assert only("memory://").backend.address == "memory://"


@pytest.mark.parametrize("value", [None, "", "  "])
def test_no_configuration_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    """A forgotten variable must not become an app that silently emits nothing."""
    if value is None:
        monkeypatch.delenv("DISPYTCH_URL", raising=False)
    else:
        monkeypatch.setenv("DISPYTCH_URL", value)
    (problem,) = problems(None)
    assert "DISPYTCH_URL" in problem
    assert "connect('kafka://localhost:9092')" in problem


def test_callables_are_read_at_each_start_and_not_before() -> None:
    """Settings that are loaded after the import count, and a rotated URL counts at the next start."""
    urls = iter(["memory://", "memory://redis"])
    spec: Config = lambda: next(urls)  # noqa: E731
    assert [only(spec).backend.address, only(spec).backend.address] == ["memory://", "memory://redis"]
    assert only({"default": {"url": lambda: "memory://"}}).backend.address == "memory://"
    assert only(lambda: {"alerts": lambda: "memory://"}).alias == "alerts"


async def test_nothing_is_read_before_the_start() -> None:
    """`connect` may stand at module level, before the settings are there."""
    called: list[str] = []

    def url() -> str:
        called.append("read")
        return "memory://"

    brokers = connect(url)
    assert not called
    async with brokers:
        assert called == ["read"]


def test_the_nearer_to_the_broker_the_stronger() -> None:
    """The URL's query wins over the broker's mapping, that over the keywords."""
    specs = load_brokers(
        {
            "one": "memory://?timeout=1",
            "two": {"url": "memory://?timeout=1", "timeout": 2},
            "three": {"url": "memory://", "timeout": 2},
            "four": {"url": "memory://"},
        },
        {"timeout": 3.0, "prefix": "p."},
    )
    assert [spec.options.timeout for spec in specs] == [1.0, 1.0, 2.0, 3.0]
    assert {spec.options.prefix for spec in specs} == {"p."}


def test_the_query_is_read_by_type() -> None:
    """A URL knows only text; options get numbers, booleans and None."""
    options = only(
        "memory://?timeout=2.5&required=false&cloudevents=no&prefix=staging.&on_timeout=log&source=%2Fshop"
    ).options
    assert (options.timeout, options.required, options.cloudevents) == (2.5, False, False)
    assert (options.prefix, options.on_timeout, options.source) == ("staging.", "log", "/shop")
    assert only("memory://?cloudevents=my_").options.cloudevents == "my_"


def test_the_clients_own_options_reach_the_client() -> None:
    """Every option of the underlying client is a keyword, a key, or a part of the query."""
    for config, keywords in (
        ("redis://h?health_check_interval=7&socket_keepalive=true", {}),
        ("redis://h", {"health_check_interval": 7, "socket_keepalive": True}),
        ({"default": {"url": "redis://h", "client": {"health_check_interval": 7, "socket_keepalive": True}}}, {}),
    ):
        backend: Any = only(config, **keywords).backend
        given = {name: value for value_of in vars(backend).values() if isinstance(value_of, dict)
                 for name, value in value_of.items()}  # fmt: skip
        assert (given.get("health_check_interval"), given.get("socket_keepalive")) == (7, True)


# -- what is refused -----------------------------------------------------------------------------------------------


def test_all_that_is_wrong_is_told_at_once() -> None:
    """One deployment per typo is what this spares."""
    found = problems(
        {
            "a": "kafak://localhost",
            "b": {"url": "memory://?timeout=soon", "timeuot": 2},
            "c": "redis://localhost:99999",
            "d": {"timeout": 2},
            "e": "memory://",
        }
    )
    assert len(found) == 5
    for alias, expected in {
        "a": "kafka",
        "b": "timeout",
        "c": "host",
        "d": "url",
    }.items():
        assert any(problem.startswith(f"broker {alias!r}") and expected in problem for problem in found)
    assert not any("broker 'e'" in problem for problem in found)


def test_what_each_look_finds_is_told_together() -> None:
    """Names, values, what the transport wants and what is plugged in: none of them hides another."""
    found = problems(
        {
            "a": {"url": "kafka://h/path?lingerms=3", "acks": "most", "timeout": 1.0},
            "b": {"url": "redis://h/abc", "client": {"socket_timeot": 1}},
            "c": {"url": "memory://", "serializer": JSONSerializer, "hooks": [object(), Hook], "prefix": "\n"},
        }
    )
    for expected in (
        "broker 'a': unknown option 'lingerms' (did you mean 'linger_ms'?)",
        "broker 'a': acks is one of",
        "broker 'a': kafka:// takes no path",
        "broker 'b': unknown option client='socket_timeot'",
        "broker 'b': redis:// ends with the number of a database",
        "broker 'c': serializer: the serializer is an object",
        "derive it from Hook; a hook is an object, not the class Hook",
        "broker 'c': prefix: it holds a control character",
    ):
        assert any(expected in problem for problem in found), (expected, found)


def test_an_unknown_option_is_refused_with_the_nearest() -> None:
    """A misspelt option that is ignored is a production surprise."""
    (problem,) = problems("memory://", timeuot=2)
    assert "'timeuot'" in problem
    assert "'timeout'" in problem
    (problem,) = problems("redis://h?health_check_intervall=3")
    assert "'health_check_interval'" in problem
    (problem,) = problems("redis://h", client={"socket_keepaliv": True})
    assert "client='socket_keepaliv'" in problem
    assert "'socket_keepalive'" in problem


def test_an_unknown_scheme_is_refused_with_the_nearest() -> None:
    """The answer to a typo is the word, not a stack trace."""
    (problem,) = problems("amqb://localhost")
    assert "nobody serves amqb://" in problem
    assert "amqp" in problem.split(";")[0]
    (problem,) = problems("http://localhost")
    assert "kafka://" in problem


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "the mapping of brokers is empty"),
        ({"url": "memory://"}, "starts with aliases"),
        ({"default": None}, "write {'url'"),
        ({"default": {}}, "write {'url'"),
        ({"default": 3}, "the URL is a int"),
        ({"": "memory://"}, "alias"),
        ({3: "memory://"}, "alias"),
        (["memory://"], "a list configures no broker"),
        (b"memory://", "a bytes configures no broker"),
        ("", "URL is empty"),
        ("localhost:9092", "write scheme://host:port"),
        ("redis://h:0", "host"),
        ("redis://h:x", "host"),
        ("redis://[::1", "host"),
        ("redis://h?timeout", "option=value"),
        ("redis://u:p/w@h", "%2F"),
        ("redis://h/0?client_name=a@b", "%40"),
        ("memory://kafak", "memory://kafka"),
        ("memory://?timeout=0", "timeout"),
        ("memory://?timeout=-1", "timeout"),
        ("memory://?on_timeout=explode", "on_timeout"),
        ("memory://?required=maybe", "required"),
        ("redis://h?socket_keepalive=maybe", "socket_keepalive"),
        ("memory://?timeout=inf", "timeout"),
        ("memory://?timeout=1&timeout=2", "gives an option twice"),
        ("memory://?source=", "write a URI-reference"),
        ({"a": {"url": "memory://", "timeout": True}}, "timeout: True is no number"),
        ("redis://h?ssl=true", "unknown option 'ssl' (it is for TLS: write rediss://)"),
        ({"a": {"url": "valkey://h", "ssl_ca_certs": "x"}}, "(it is for TLS: write valkeys://)"),
        ({"a": {"url": "amqps://h", "keyfile_password": "x"}}, "write ssl_context="),
        ({"a": {"url": "memory://", "TIMEOUT": 3}}, "unknown option 'TIMEOUT' (write 'timeout')"),
        ({"a": {"URL": "memory://"}}, "there is no 'url', but 'URL'; options are in lower case"),
        ({"URL": "memory://"}, "starts with aliases"),
        ({"a": {"url": "memory://", "on_timeout": "ignore"}}, "on_timeout: write 'raise', 'log', or a function"),
        ({"a": {"url": "kafka+ssl://h", "keyfile": "x"}}, "keyfile is the key of a certificate: write certfile="),
        ("kafka://h?acks=al", "acks is one of 'all', 0, 1, -1 (did you mean 'all'?)"),
        ("kafka://h?compression_type=zst", "(did you mean 'zstd'?)"),
        (
            "amqp://h?exchanges=orders",
            "exchanges: it is of type str; write a mapping from names to types, such as exch",
        ),
        (
            {"a": {"url": "amqp://h", "exchanges": ["mails"]}},
            "write a mapping from names to types, such as exchanges={'",
        ),
        ({"a": {"url": "amqp://h", "exchanges": {"mails": 5}}}, "exchanges: 'mails' is of type int; write a type ('t"),
        ({"a": {"url": "amqp://h", "exchanges": {"mails": "Topics"}}}, "unknown type 'Topics' (did you mean 'topic'?)"),
        ({"a": {"url": "amqp://h", "exchanges": {"mails": {"durable": 1}}}}, "'mails' has no type (write 'type': 'top"),
        (
            {"a": {"url": "amqp://h", "exchanges": {"e": {"type": "topic", "durabel": True, "arguments": 5}}}},
            "exchanges: 'e' has the unknown option 'durabel' (did you mean 'durable'?), has a wrong arguments: Input",
        ),
    ],
)
def test_wrong_settings_say_what_to_write(config: Any, expected: str) -> None:
    """Whoever reads the error knows what to change."""
    assert any(expected in problem for problem in problems(config))


def test_exchanges_of_every_form_are_taken() -> None:
    """What a plugin brings, too, whose types nobody knows beforehand."""
    forms = {"a": "topic", "b": {"type": "fanout", "durable": "no"}, "c": None, "d": "x-delayed-message"}
    options: Any = only({"default": {"url": "amqp://h", "exchanges": forms}}).backend
    assert list(options._options.exchanges) == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("url", "module", "line"),
    [
        ("kafka://h?compression_type=lz4", "cramjam", "compression_type='lz4'.*pip install 'aiokafka.lz4.'"),
        ("kafka://h?sasl_mechanism=GSSAPI", "gssapi", "sasl_mechanism='GSSAPI'.*pip install 'aiokafka.gssapi.'"),
    ],
)
def test_a_library_that_the_client_lacks_is_told_with_the_pip_line(
    url: str, module: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client says "Compression library for lz4 not found", once it connects."""
    monkeypatch.setitem(sys.modules, module, None)
    [problem] = problems(url)
    assert re.search(line, problem)


@pytest.mark.parametrize(
    ("url", "module", "extra"),
    [("kafka://h", "aiokafka", "kafka"), ("amqp://h", "aio_pika", "rabbitmq"), ("redis://h", "redis", "redis")],
)
def test_a_missing_client_library_is_told_with_the_pip_line(url: str, module: str, extra: str) -> None:
    """The first run after `pip install dispytch-integrations` says what else to install."""
    code = f"""
        import sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == {module!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

        sys.meta_path.insert(0, Absent())
        from dispytch_integrations.settings import load_brokers
        try:
            load_brokers({url!r}, {{}})
        except ImportError as exc:
            print(type(exc).__name__, exc)
        try:
            load_brokers({{"a": {url!r}, "b": "memory://?timeuot=3"}}, {{}})
        except Exception as exc:
            print(len(exc.problems))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "MissingExtraError" in done.stdout, done.stderr
    assert f"pip install 'dispytch-integrations[{extra}]'" in done.stdout
    assert done.stdout.endswith("\n2\n")


def test_a_missing_extra_is_both_kinds_of_error() -> None:
    """`except ImportError` and `except ConfigurationError` both catch it."""
    error = MissingExtraError("kafka://", extra="kafka", package="aiokafka")
    assert isinstance(error, ImportError)
    assert isinstance(error, ConfigurationError)
    assert "kafka:// needs aiokafka" in str(error)


# -- URLs ----------------------------------------------------------------------------------------------------------


def test_a_url_is_taken_apart() -> None:
    """Several hosts, one user for all, IPv6, default ports, percent signs."""
    url = BrokerURL.parse("KAFKA+SSL://us%40er:p%2Fw%3A1@h1,h2:1234,[2001:db8::1]:9,[::1]/a%2Fb?x=1&y=a%20b&z=")
    assert url.scheme == "kafka+ssl"
    assert (url.username, url.password) == ("us@er", "p/w:1")
    assert url.hosts == (("h1", None), ("h2", 1234), ("2001:db8::1", 9), ("::1", None))
    assert url.path == "/a%2Fb"
    assert url.query == {"x": "1", "y": "a b", "z": ""}
    assert str(url) == "kafka+ssl://h1,h2:1234,[2001:db8::1]:9,[::1]/a%2Fb"


@pytest.mark.parametrize(
    ("url", "username", "password"),
    [
        ("redis://h", None, None),
        ("redis://:pw@h", None, "pw"),
        ("redis://user@h", "user", None),
        ("redis://user:@h", "user", ""),
        ("redis://user:p@ss:w@h", "user", "p@ss:w"),
    ],
)
def test_credentials_are_read(url: str, username: str | None, password: str | None) -> None:
    """Redis has passwords without a user; an @ in a password is forgiven."""
    parsed = BrokerURL.parse(url)
    assert (parsed.username, parsed.password) == (username, password)


_hosts = st.from_regex(r"[a-z][a-z0-9.-]{0,12}", fullmatch=True)
_ports = st.none() | st.integers(1, 65535)
_words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(st.lists(st.tuples(_hosts, _ports), min_size=1, max_size=3), _words, _words, st.dictionaries(_words, _words))
def test_what_is_quoted_comes_back(
    hosts: list[tuple[str, int | None]], username: str, password: str, query: dict[str, str]
) -> None:
    """Any password works once it is percent-encoded."""
    places = ",".join(host if port is None else f"{host}:{port}" for host, port in hosts)
    options = "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in query.items())
    text = f"kafka://{quote(username, safe='')}:{quote(password, safe='')}@{places}" + (
        f"?{options}" if options else ""
    )
    url = BrokerURL.parse(text)
    assert (url.hosts, url.username, url.password, url.query) == (tuple(hosts), username, password, query)


@given(st.text(max_size=60) | st.from_regex(r"\A[a-z]{1,6}://[\w:@/?#\[\]&=,%.-]{0,40}\Z"))
def test_any_text_is_a_url_or_a_configuration_error(text: str) -> None:
    """A strange variable in the environment is told as a wrong setting, not as a bug of ours."""
    try:
        url = BrokerURL.parse(text)
    except ConfigurationError:
        return
    assert BrokerURL.parse(str(url)).hosts == url.hosts


@given(
    st.sampled_from(["redis", "amqp", "kafka", "nobody"]),
    st.sampled_from(["", "user", "us er", "u:v"]),
    st.text("/?#@:&=%[] ,1a", max_size=6),
    st.text("/?#@:&=%[] ,1a", max_size=6),
    st.sampled_from(["h", "h:1", "h:x", "[::1]:2", "h?timeuot=1", ""]),
)
@example("redis", "user", "12/", "", "h:1")
@example("redis", "user", "12?", "=1", "h:1")
@example("redis", "user", "12#", "", "h")
@example("redis", "", "@", "/", "h")
def test_no_password_is_told_however_badly_it_is_written(
    scheme: str, user: str, before: str, after: str, host: str
) -> None:
    """Passwords with / ? # @ are pasted into URLs unquoted; the error must not print what it could not read."""
    assume(user or before)
    text = f"{scheme}://{user}:{before}{SECRET}{after}@{host}"
    try:
        specs = load_brokers(text, {})
    except ConfigurationError as exc:
        told = f"{exc} {exc!r} {exc.problems} {exc.__cause__!r} {exc.__context__!r}"
        assert SECRET not in told
    else:
        for spec in specs:
            assert SECRET not in f"{spec!r} {spec.backend!r} {spec.backend.address}"
    try:
        url = BrokerURL.parse(text)
    except ConfigurationError:
        return
    assert SECRET not in f"{url} {url!r}"


# -- secrets -------------------------------------------------------------------------------------------------------


def test_secrets_are_in_no_repr_and_no_error() -> None:
    """Settings are printed in logs, debug pages and error reports."""
    url = f"redis://user:{SECRET}@h:1/0"
    brokers = connect(url, client={"password": SECRET})
    assert SECRET not in repr(brokers)
    assert SECRET not in repr(BrokerURL.parse(url))
    assert SECRET not in repr(only(url))
    assert SECRET not in f"{problems(url, timeuot=3, timeout=SECRET, on_timeout=SECRET)}"
    assert SECRET not in f"{problems(f'redis://h?pasword={SECRET}')}"


def test_secrets_may_come_from_files_and_functions(tmp_path: Path) -> None:
    """Orchestrators mount them as files."""
    path = tmp_path / "password"
    path.write_text(f" {SECRET} \r\n")
    assert read_secret(path) == f" {SECRET} "
    assert read_secret(lambda: SECRET) == SECRET
    assert read_secret(SECRET) == SECRET
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_secret(tmp_path / "absent")


def test_scrubbing_removes_every_secret() -> None:
    """Client libraries put what they were given into their errors."""
    assert scrub(f"cannot log in with {SECRET} ({SECRET})", ["", SECRET]) == "cannot log in with *** (***)"


# -- secrets and texts ---------------------------------------------------------------------------------------------


def test_a_secrets_function_must_give_a_text() -> None:
    """An async function or bytes would fail later, in a client, without saying why."""

    async def asynchronous() -> str:
        return SECRET

    for function in (asynchronous, lambda: SECRET.encode(), lambda: None):
        with pytest.raises(ConfigurationError, match="must return a str") as caught:
            read_secret(function)  # type: ignore[arg-type]
        assert SECRET not in str(caught.value)


def test_a_secrets_function_that_raises_is_an_outage() -> None:
    """A vault that does not answer may answer in a second; what it said may hold the secret."""

    def failing() -> str:
        raise KeyError(SECRET)

    with pytest.raises(BrokerUnavailableError, match="failing raised KeyError") as caught:
        read_secret(failing)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("text", ["007", "7", "true"])
def test_names_in_a_url_stay_text(text: str) -> None:
    """A client called 007 is called 007."""
    backend = only(f"redis://localhost?client_name={text}").backend
    assert backend._client_options["client_name"] == text  # type: ignore[attr-defined]


def test_a_user_for_each_host_is_refused() -> None:
    """The first host would become a part of the password."""
    [problem] = problems(f"rabbitmq://u:{SECRET}@h1,u:{SECRET}@h2")
    assert "write one for all, in front" in problem
    assert SECRET not in problem
