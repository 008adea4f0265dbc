"""Values of a client's options, checked before the client fails because of them in the middle of a connection.

And TLS that cannot work, told from an outage: a client that sees a connection end does not know which it is.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dispytch_integrations.errors import ConfigurationError

__all__ = ["answers_plainly", "load_own", "require_files", "speaks_tls", "tls_problem", "wrong_types"]

_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "True or False"),
    ((int, float), "a number"),
    (str, "a str"),
)
"""(what a default is, what a value has to be); bool before int, of which it is a kind."""


def wrong_types(
    given: Mapping[str, Any], defaults: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]]
) -> Iterator[str]:
    """What is wrong with options: each is to be of the type of its default, else of the one in `kinds`.

    Where the default is None, so may the value be. The values themselves are not told: they may be secrets.
    """
    for name, value in given.items():
        default = defaults.get(name)
        if default is None:
            if value is not None and name in kinds and not isinstance(value, kinds[name]):
                yield f"{name} is of type {type(value).__name__}; write one of type {_names(kinds[name])}"
            continue
        for kind, words in _KINDS:
            if isinstance(default, kind):
                if not _fits(value, kind):
                    yield f"{name} is of type {type(value).__name__}; write {words}, such as {name}={default!r}"
                break


def _fits(value: Any, kind: type | tuple[type, ...]) -> bool:
    if kind is bool:
        return isinstance(value, int) and value in (0, 1)
    return isinstance(value, kind) and not isinstance(value, bool)


def _names(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(each.__name__ for each in kinds)


# -- TLS ------------------------------------------------------------------------------------------------------------

_OUT_OF_DATE = (9, 10)
_OTHER_HOST = (62, 63, 64)
"""OpenSSL's numbers (X509_V_ERR_...) for a certificate that is not valid yet or no more, and of another host."""
_OURS = ("CERTIFICATE", "UNKNOWN_CA", "HANDSHAKE_FAILURE", "ACCESS_DENIED", "DECRYPT_ERROR")
_NO_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE")
_PROBE_SECONDS = 1.0


_File = str | Path | None


def require_files(**files: _File) -> None:
    """Raise ConfigurationError for options whose files are not there, or cannot be read."""
    problems = [
        f"{name}: {'there is no file' if not os.path.isfile(path) else 'this user may not read'} {str(path)!r}"
        for name, path in files.items()
        if path and not (os.path.isfile(path) and os.access(path, os.R_OK))
    ]
    if problems:
        raise ConfigurationError(problems)


def load_own(context: ssl.SSLContext, password: str | None, advice: str, **files: _File) -> None:
    """Load our own certificate and its key, two options by their names, in this order.

    `advice`: what to write where the key has a password. Raises ConfigurationError; never asks at the terminal.
    """
    require_files(**files)
    (certificate, certfile), (key, keyfile) = files.items()
    if not certfile:
        if keyfile:
            raise ConfigurationError(f"{key} is the key of a certificate: write {certificate}=..., too")
        return
    try:
        # Without a password OpenSSL would ask for it at the terminal.
        context.load_cert_chain(certfile, keyfile or None, password or "")
    except OSError as exc:  # ssl.SSLError is one.
        if getattr(exc, "reason", None) == "KEY_VALUES_MISMATCH":
            told = f"the key is not the one of the certificate; check {certificate} and {key}"
        else:
            told = (
                f"{certificate} holds no certificate, or {key} (by default the same file) no key, or the key has "
                f"{'another password' if password else f'a password: {advice}'}"
            )
        raise ConfigurationError(f"our certificate cannot be loaded ({exc.strerror or exc}): {told}") from exc


def tls_problem(exc: BaseException, *, trust: str, own: str, port: str) -> str | None:
    """What is wrong with TLS, and what to write, when trying again is of no use; None: something else happened.

    `exc`: what the client raised, the error of the module ssl somewhere behind it. `trust`: the option for certificates
    to trust; `own`: those for our own; `port`: what to write to get the right port.
    """
    found = _ssl_error(exc)
    if isinstance(found, ssl.SSLCertVerificationError):
        told = f"its certificate is not accepted: {found.verify_message.rstrip('.')}; "
        if found.verify_code in _OUT_OF_DATE:
            return f"{told}renew it at the broker, or set this machine's clock"
        if found.verify_code in _OTHER_HOST:
            return f"{told}write a host that the certificate names, or give the broker one for this host"
        return f"{told}write {trust}=... with the certificate of the authority that signed it"
    reason = (found.reason if found is not None else None) or ""
    words = reason.replace("_", " ").lower()
    if any(each in reason for each in _NO_TLS):
        return f"it speaks no TLS there ({words}); write {port}"
    if "ALERT" in reason and any(each in reason for each in _OURS):
        return f"it wants another certificate of ours ({words}); write {own}=..., of an authority that it trusts"
    if "PROTOCOL" in reason:
        return f"it and this machine have no version of TLS in common ({words}); allow a newer one at the broker"
    return None


def _ssl_error(exc: BaseException) -> ssl.SSLError | None:
    found: BaseException | None = exc
    seen: set[int] = set()
    while found is not None and not isinstance(found, ssl.SSLError):
        seen.add(id(found))
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
        if id(found) in seen:  # aiormq raises an error from one that it had raised from it.
            return None
    return found


async def speaks_tls(host: str, port: int) -> bool:
    """Does a host answer a TLS handshake? Asked when a connection without TLS has ended without a word."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        async with asyncio.timeout(_PROBE_SECONDS):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except ssl.SSLError as exc:
        return "ALERT" in (exc.reason or "")
    except OSError:  # TimeoutError is one.
        return False
    writer.transport.abort()
    return True


async def answers_plainly(host: str, port: int, greeting: bytes) -> bool:
    """Does a host answer `greeting` without TLS? Asked when TLS gets no answer. Nothing secret is sent."""
    try:
        async with asyncio.timeout(_PROBE_SECONDS):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(greeting)
                return (await reader.read(1)) not in (b"", _ALERT)
            finally:
                writer.transport.abort()
    except OSError:
        return False


_ALERT = b"\x15"
"""How a server of TLS begins when it is spoken to without."""
