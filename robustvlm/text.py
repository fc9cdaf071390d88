"""Text that others wrote: control characters as escapes, secrets cut from URLs, and when two spellings are one name;
and numbers as text, rounded so that they still hold."""

import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any

HIDDEN = "***"
"""What stands where a secret stood."""

_SCHEME = r"(?<![\w+.-])([A-Za-z][A-Za-z0-9+.-]{0,30}://)"
_USER = re.compile(_SCHEME + r"([^\s/?#\\@]*@)+")
# A password with a "/", "?" or "#" that should have been percent-encoded; what follows the colon is no port.
_LOOSE_USER = re.compile(_SCHEME + r"[^\s/?#@:\[\]\\]{1,80}:(?!\d+[/?#])[^\s@'\"<>\\]{1,200}@")
# A key and its value, as in the query or fragment of a URL; a percent-encoded "=" or "&" ends nothing. JSON may have
# its "&" escaped.
_PAIR = re.compile(r"([?&#;]|\\u0026)([\w.~%-]{1,80})=([^\s&#;'\"<>\\]*)")
_URL = re.compile(r"(?<![\w+.-])[A-Za-z][A-Za-z0-9+.-]{0,30}://(?:[^\s'\"<>\\]|\\u0026)+")
# A path with a query: HTTP clients name a URL so in their errors, the host apart; users leave out the scheme.
_PATH = re.compile(r"(?<![^\s'\"(=])[^\s'\"<>\\?]{0,500}\?(?:[^\s'\"<>\\]|\\u0026)+")
_SECRET_WORDS = (
    "signature", "token", "secret", "passw", "credential", "apikey", "accesskey", "authoriz", "authkey", "session",
)  # fmt: skip
# Short ones count at the end only: "usersig" is one, "design" and "author" are none.
_SECRET_ENDS = ("sig", "pwd", "auth")
_SECRET_NAMES = frozenset(("key", "pass", "policy", "hmac", "jwt", "ticket"))
# Beside the signature itself: what is new in each URL that a store signs (AWS and its kin, Google, Azure, CloudFront).
_SIGNED_WITH = frozenset(
    ("expires", "expiry", "keypairid", "googleaccessid", "se", "st", "sp", "sv", "sr", "spr", "sip", "ske", "skt",
     "sks", "skv", "skoid", "sktid", "ss", "srt", "date")
)  # fmt: skip
# What a bare "key" names where it is that of an object in a store, and opens nothing.
_FILE = re.compile(r".*\.(tar|tgz|gz|zip|parquet|arrow|jsonl?|csv|txt|jpe?g|png|webp)", re.IGNORECASE)
_OPAQUE = re.compile(r"(?=[^\d]*\d)(?=[^A-Za-z]*[A-Za-z])[\w.~+/=%-]{24,}")
_BEARER = re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{8,}", re.IGNORECASE)
_TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,})")


def without_secrets(text: str) -> str:
    """Return `text` with what opens doors replaced: user names, passwords, signatures and tokens of URLs, bearer keys.

    A URL signed anew gives the same text, so that it can stand for the place in what a run is known by. A value that
    looks random under a name that says nothing becomes a digest: it may be a secret, or what tells two places apart.

    Example:
        >>> without_secrets("wds:https://me:pw@host/a.tar?X-Amz-Date=20260101&X-Amz-Signature=0f3a&part=7")
        'wds:https://***@host/a.tar?X-Amz-Date=***&X-Amz-Signature=***&part=7'
        >>> without_secrets("class 3 of 7")
        'class 3 of 7'
    """
    if "://" in text:
        text = _URL.sub(_bare, _LOOSE_USER.sub(rf"\1{HIDDEN}@", _USER.sub(rf"\1{HIDDEN}@", text)))
    if "?" in text and "=" in text:
        text = _PATH.sub(lambda found: _bare(found, digests=False), text)
    if "earer" in text.lower() or "asic " in text.lower():
        text = _BEARER.sub(rf"\1 {HIDDEN}", text)
    return _TOKEN.sub(HIDDEN, text)


def address_shown(url: str) -> str:
    """Return an address whose query may hold a key, for messages: of each part of the query its name alone.

    Works for what is no URL as well, as one without its scheme.

    Example:
        >>> address_shown("http://host/v1?code=a1b2&v=2"), address_shown("me:pw@host/v1?api-key=a1b2")
        ('http://host/v1?code=***&v=***', '***@host/v1?api-key=***')
    """
    text = without_secrets(url)
    if "://" not in text and "@" in text:
        text = f"{HIDDEN}@{text.rpartition('@')[2]}"
    place, mark, query = text.partition("#")[0].partition("?")
    names = [name + equals for name, equals, _ in (pair.partition("=") for pair in query.split("&"))]
    return place + mark + "&".join((name if name.endswith("=") else "") + HIDDEN for name in names if mark)


def one_line(error: object, *, limit: int = 160) -> str:
    """Return the text of an error on one line of at most `limit` characters, without secrets; its type if it has none.

    Example:
        >>> one_line(ValueError("no\\nsuch thing")), one_line(KeyError()), one_line(ValueError("long " * 9), limit=12)
        ('no such thing', 'KeyError', 'long long...')
    """
    text = without_secrets(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def secrets_cut(value: Any) -> Any:
    """Return plain data (mappings, lists, texts, numbers) with `without_secrets` applied to every text in it.

    Example:
        >>> secrets_cut({"data": "wds:http://a:b@h/x.tar", "seeds": [0, 1]})
        {'data': 'wds:http://***@h/x.tar', 'seeds': [0, 1]}
    """
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, Mapping):
        return {secrets_cut(key): secrets_cut(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [secrets_cut(item) for item in value]
    return value


def visible(text: str, *, lines: bool = True) -> str:
    r"""Return `text` with everything that could steer a terminal, or hide, written as an escape.

    Control characters (C0, C1, ESC), directions and other invisible formats, lone surrogates; joiners stay, since
    scripts and emoji are written with them.

    Args:
        lines: leave line breaks and tabs as they are.

    Example:
        >>> visible("\x1b[31mred\u202e"), visible("a\nb", lines=False)
        ('\\x1b[31mred\\u202e', 'a\\nb')
    """
    if text.isprintable():
        return text
    return "".join(_escaped(mark, lines) for mark in text)


def ascii_json(text: str) -> str:
    r"""Return JSON text, with everything outside ASCII as JSON's own escapes: the same JSON in any encoding.

    Example:
        >>> ascii_json('["\u00e9"]')
        '["\\u00e9"]'
    """
    return "".join(mark if mark.isascii() else _json_escape(mark) for mark in text)


def visible_json(text: str) -> str:
    r"""Return JSON text with what `visible` escapes as JSON's own escapes, so that it stays the same JSON.

    Example:
        >>> visible_json('["\x9b31m"]')
        '["\\u009b31m"]'
    """
    if text.isprintable():
        return text
    return "".join(_json_escape(mark) if mark not in "\n\t\r" and _steers(mark) else mark for mark in text)


def _bare(found: re.Match[str], *, digests: bool = True) -> str:
    """Return an address without the values of secret names; `digests` stand for values that look random."""
    url = found.group()
    signed = any(_opens(_plain(name), value) for _, name, value in _PAIR.findall(url))

    def cut(pair: re.Match[str]) -> str:
        mark, name, value = pair.groups()
        plain = _plain(name)
        if not value or not (_opens(plain, value) or (signed and plain in _SIGNED_WITH)):
            if not digests or not _OPAQUE.fullmatch(value):
                return pair.group()
            return (
                f"{mark}{name}={HIDDEN}{hashlib.blake2b(value.encode('utf-8', 'replace'), digest_size=4).hexdigest()}"
            )
        return f"{mark}{name}={HIDDEN}"

    return _PAIR.sub(cut, url)


def _plain(name: str) -> str:
    return re.sub(r"%[0-9A-Fa-f]{2}|[^a-z0-9]", "", name.lower())


def _opens(plain: str, value: str) -> bool:
    """Whether a value is secret by its name; the key of an object in a store, as in key=val/0.tar, is its place."""
    return _secret(plain) and not (plain == "key" and _FILE.fullmatch(value))


def _secret(plain: str) -> bool:
    if plain.startswith(("xamz", "xgoog", "xoss", "xcos")) or plain in _SECRET_NAMES:
        return True
    return plain.endswith(_SECRET_ENDS) or plain.startswith("sigv") or any(word in plain for word in _SECRET_WORDS)


def _steers(mark: str) -> bool:
    if mark.isprintable() or mark in "\u200c\u200d":
        return False
    return unicodedata.category(mark) in ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp")


def _escaped(mark: str, lines: bool) -> str:
    if not _steers(mark) or (lines and mark in "\n\t"):
        return mark
    return mark.encode("unicode_escape").decode("ascii")


def _json_escape(mark: str) -> str:
    code = ord(mark)
    if code < 0x10000:
        return f"\\u{code:04x}"
    code -= 0x10000
    return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"


# When two names are the same name, however they are spelled

# A "-" before a digit at the beginning of a word is a sign, and tells two numbers apart.
_JOINTS = re.compile(r"(?:[\s_\u2010\u2011\u2012\u2013]|(?<=[^\s_])-|-(?!\d))+")


def name_key(name: str) -> str:
    """Return what two spellings of one name share: case, "_", "-" and the way accents are stored do not count.

    macOS stores file names decomposed ("e" and an accent), most lists have them composed: every comparison of names,
    of classes, tree nodes, goals and words alike, goes through this key.

    Example:
        >>> name_key("Aquarium_Fish") == name_key("aquarium fish")
        True
        >>> name_key("-5"), name_key("class_-5"), name_key("class-5")
        ('-5', 'class -5', 'class 5')
        >>> name_key("cafe\N{COMBINING ACUTE ACCENT}") == name_key("caf\N{LATIN SMALL LETTER E WITH ACUTE}")
        True
    """
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
    return _JOINTS.sub(" ", folded).strip()


def places_of(wanted: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """Return where each wanted name stands among `names`: spelled so, else the only one with the same key; else None.

    A name that stands there twice is in no one place.

    Example:
        >>> places_of(["red fox", "a", "A", "Cat"], ["Red_Fox", "A", "a", "dog"])
        [0, 2, 1, None]
    """
    exact: dict[str, list[int]] = {}
    alike: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        exact.setdefault(name, []).append(place)
        alike.setdefault(name_key(name), []).append(place)
    found: list[int | None] = []
    for name in wanted:
        places = exact.get(name) or alike.get(name_key(name), [])
        found.append(places[0] if len(places) == 1 else None)
    return found


# Numbers in print that still hold: lower bounds are rounded down, upper bounds up, what was asked for not at all
#
# A radius, a certified cosine or the lower end of an interval is printed by `format_down`; both ends of an interval by
# `format_between`; an error probability or any other "at most" by `format_up`; a radius, threshold or noise level that
# a user stated by `format_exact`.


def floor_to(value: float, digits: int = 3) -> float:
    """Return the largest multiple of `10**-digits` that is not above `value`, exact in decimal.

    Example:
        >>> floor_to(0.2999), floor_to(-0.0001), floor_to(0.29)
        (0.299, -0.001, 0.29)
    """
    return float(_floored(value, digits))


def format_down(value: float, digits: int = 3) -> str:
    """Return `value` with `digits` decimals, rounded down, so that the printed claim is implied by the computed one.

    Example:
        >>> format_down(0.9999), format_down(0.5), format_down(float("nan"))
        ('0.999', '0.500', 'nan')
    """
    return f"{_floored(value, digits):.{digits}f}" if value == value else "nan"


def format_up(value: float, significant: int = 3) -> str:
    """Return `value` with at most so many significant digits, rounded up: an upper limit that is printed still holds.

    Example:
        >>> format_up(0.0200001), format_up(0.001), format_up(12.0), format_up(1234.5), format_up(0.0)
        ('0.0201', '0.001', '12', '1240', '0')
    """
    number = Decimal(repr(float(value)))
    if not number.is_finite() or not number:
        return f"{value:g}"
    step = Decimal(1).scaleb(number.adjusted() - significant + 1)
    return _short((number / step).to_integral_value(rounding=ROUND_CEILING) * step)


def format_between(low: float, high: float, digits: int = 3) -> tuple[str, str]:
    """Return the ends of an interval with `digits` decimals, rounded outwards, so that the printed one covers it.

    Example:
        >>> format_between(0.9006, 0.9501), format_between(-0.0004, -0.0002)
        (('0.900', '0.951'), ('-0.001', '0.000'))
    """
    up = 0.0 - floor_to(-high, digits)  # never a zero with a sign
    return format_down(low, digits), f"{up:.{digits}f}"


def format_between_significant(low: float, high: float, significant: int = 4) -> tuple[str, str]:
    """Return the ends of an interval with so many significant digits at most, rounded outwards.

    Example:
        >>> format_between_significant(0.123456, 12.34501), format_between_significant(-0.5, 0.0)
        (('0.1234', '12.35'), ('-0.5', '0'))
    """
    least, most = (
        0.0 - float(format_up(-low, significant)),  # down is up on the other side of zero
        float(format_up(high, significant)),
    )
    return f"{least:.{significant}g}", f"{most:.{significant}g}"


def format_exact(value: float) -> str:
    """Return the shortest decimal that reads back as `value`: what was asked for is shown as it was asked.

    Example:
        >>> format_exact(0.1234567), format_exact(0.25), format_exact(2.0), format_exact(1e-07)
        ('0.1234567', '0.25', '2', '1e-07')
    """
    text = repr(float(value))
    return text.removesuffix(".0")


def _short(number: Decimal) -> str:
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _floored(value: float, digits: int) -> Decimal:
    # The shortest decimal that reads back as this float; what is printed reads back as a float that is not above it.
    return Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_FLOOR)
