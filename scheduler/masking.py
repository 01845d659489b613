"""Passwords stay out of what is shown, logged and written.

Covers database URLs (`masked`, `bare`), and text that may repeat one (`scrubbed`). Standard library only, so that the
command line's own errors can use it. A URL is shown only as far as it is understood: of one that is not, nothing but
the scheme and what is certainly its host.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

MASK = "***"
# With an authority, and without one (`sqlite:////home/me@work/study.db`: there an @ is part of the path).
_URL = re.compile(
    r"(?P<scheme>[A-Za-z][\w+.-]*)://"
    r"(?:(?P<user>[^:/@?\s]*)(?::(?P<password>[^@]*))?@)?"
    r"(?P<host>[\w.-]*|\[[0-9A-Fa-f:.%]+\])(?P<port>:\d*)?"
    r"(?P<path>/[^?@]*)?(?:\?(?P<query>.*))?",
    re.DOTALL,
)
_LOCAL = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*)://(?P<path>/[^?]*)(?:\?(?P<query>.*))?", re.DOTALL)
_HOST_AT_LEAST = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*)://[^?]*@(?P<rest>[\w.-]+(:\d+)?(/[\w.-]*)?)(\?[^@]*)?")
# Of a query only what is known to hold no secret; drivers have too many names for a password to list those.
# fmt: off
_PLAIN_KEYS = frozenset((
    "application_name", "cache", "charset", "check_same_thread", "client_encoding", "collation",
    "connect_timeout", "dbname", "driver", "gssencmode", "host", "hostaddr", "isolation_level", "keepalives",
    "keepalives_idle", "local_infile", "mode", "nolock", "port", "read_timeout", "sslmode", "ssl_mode",
    "sslrootcert", "target_session_attrs", "timeout", "tcp_user_timeout", "unix_socket", "uri", "user",
    "username", "vfs", "write_timeout",
))
# fmt: on
_PLAIN_VALUE = re.compile(r"[\w./:,@+ -]*")
_IN_TEXT = re.compile(r"[A-Za-z][\w+.-]*://[^\s'\"<>]+")
_PAIR_IN_TEXT = re.compile(r"(?<![\w./])([\w.%+-]+|[\w+.-]+:/[\w.%+-]+):(?!//)[^\s@'\"]+@(?=[\w\[])")
_known: set[str] = set()  # what `learn` was told; scrubbed from the errors of database drivers


def masked(url: str) -> str:
    """Return the URL for people: its password and the values of its query that may be one as ***."""
    return _render(url, MASK)


def bare(url: str) -> str:
    """Return the URL without its secrets, still usable where PGPASSWORD, ~/.pgpass or the like have them."""
    return _render(url, None)


def has_secret(url: str) -> bool:
    """Tell whether it holds anything that `masked` hides."""
    return masked(url) != url


def is_clear(url: str) -> bool:
    """Is it certain which part of it is the password? Not so with an @, / or ? in it that should be written %40, ...

    Such a URL is better refused: a driver would take the rest of the password for the host, and say so in its errors.
    """
    return _parsed(url) is not None


def learn(url: str) -> None:
    """From now on `scrubbed` also removes this URL's secrets where they stand alone."""
    found = _parsed(url)
    if found is None:
        return
    secrets = [found["password"] or ""] if "password" in found else []
    secrets += [value for key, value in _pairs(found["query"]) if not _is_plain(key, value)]
    for secret in secrets:
        # A shorter one would cut words apart, and stands in no error of a driver that we know of.
        _known.update(form for form in (secret, unquote(secret)) if len(form) >= 4)


def scrubbed(text: str) -> str:
    """Return the text with every password in it as ***: of URLs, of `name:password@host`, and those that `learn` was
    told."""
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, MASK)
    text = _IN_TEXT.sub(_mask_match, text)
    return _PAIR_IN_TEXT.sub(rf"\1:{MASK}@", text)


def _mask_match(match: re.Match[str]) -> str:
    url = match[0].rstrip("()[]{},.;:!")  # the sentence's, not the URL's
    return masked(url) + match[0][len(url) :]


def _parsed(url: str) -> dict[str, str | None] | None:
    for pattern in (_LOCAL, _URL):
        if (match := pattern.fullmatch(url)) is not None:
            found = match.groupdict()
            password = found.get("password") or ""
            return None if "?" in password and "=" in password else found  # its host may be forgotten
    return None


def _render(url: str, mask: str | None) -> str:
    found = _parsed(url)
    if found is None:
        return _unclear(url)
    user, password = found.get("user"), found.get("password")
    login = "" if user is None else user + ("" if password is None or mask is None else f":{mask}") + "@"
    shown = f"{found['scheme']}://{login}{found.get('host') or ''}{found.get('port') or ''}{found['path'] or ''}"
    pairs = [
        (key, value if _is_plain(key, value) else mask)
        for key, value in _pairs(found["query"])
        if mask is not None or _is_plain(key, value)
    ]
    query = "&".join(key if value is None else f"{key}={value}" for key, value in pairs)
    return f"{shown}?{query}" if query or (found["query"] == "" and mask is not None) else shown


def _unclear(text: str) -> str:
    """Return what is certain: the scheme, and the host where it follows the only @ that can end the password."""
    if (match := _HOST_AT_LEAST.fullmatch(text)) is not None:
        return f"{match['scheme']}://{MASK}@{match['rest']}"
    scheme, found, _ = text.partition("://")
    if found:
        return f"{scheme}://{MASK}" if re.fullmatch(r"[A-Za-z][\w+.-]*", scheme) else MASK
    return MASK if "@" in text or ":" in text else text


def _pairs(query: str | None) -> list[tuple[str, str]]:
    """(key, value) of a query; what has no = is taken for a value without a name."""
    parts = re.split(r"[&;]", query) if query else []
    return [(part.partition("=")[0], part.partition("=")[2]) if "=" in part else ("", part) for part in parts]


def _is_plain(key: str, value: str) -> bool:
    return key.lower() in _PLAIN_KEYS and _PLAIN_VALUE.fullmatch(value) is not None
