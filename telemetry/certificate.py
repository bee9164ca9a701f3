"""When the certificate that callers see expires: it is read from CERTIFICATE_FILE, which nginx presents; nginx is not
asked.

    expiry(Path("/etc/ssl/certs/prediction-server.pem"))     # seconds since 1970
"""

import logging
import ssl
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily

from processes import LogLimit

_limit = LogLimit(logging.getLogger(__name__), 3600.0)
_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
_VERSION, _UTC_TIME, _GENERALIZED_TIME = 0xA0, 0x17, 0x18  # tags of ASN.1


class NoCertificate(Exception):
    """The file cannot be used. The message is for the operator."""


def expiry(path: Path) -> float:
    """Return when the first certificate of a PEM file expires, in seconds since 1970. Raises: NoCertificate.

    Source: RFC 5280, section 4.1 (Certificate ::= SEQUENCE { tbsCertificate SEQUENCE { version, serialNumber,
    signature, issuer, validity { notBefore, notAfter }, … } … }).
    """
    try:
        text = path.read_text("ascii", "replace")
        der = ssl.PEM_cert_to_DER_cert(_BEGIN + text.split(_BEGIN)[1].split(_END)[0] + _END)
        (_, certificate), *_ = _values(der)
        (_, signed), *_ = _values(certificate)
        fields = [(tag, value) for tag, value in _values(signed) if tag != _VERSION]
        (_, _), (tag, end) = _values(fields[3][1])
        form = {_UTC_TIME: "%y%m%d%H%M%SZ", _GENERALIZED_TIME: "%Y%m%d%H%M%SZ"}[tag]
        return datetime.strptime(end.decode(), form).replace(tzinfo=UTC).timestamp()
    except OSError as error:
        raise NoCertificate(f"{path} cannot be read: {error.strerror}") from None
    except (IndexError, KeyError, ValueError):
        raise NoCertificate(f"{path} holds no certificate in PEM form") from None


def _values(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the tag and the content of each value in DER."""
    at = 0
    while at < len(der):
        tag, length, at = der[at], der[at + 1], at + 2
        if length & 0x80:  # so many bytes of length follow
            at += length & 0x7F
            length = int.from_bytes(der[at - (length & 0x7F) : at])
        yield tag, der[at : at + length]
        at += length


def families(path: Path) -> Iterable[Metric]:
    """Return the metric, none if the file cannot be used, which is logged."""
    try:
        when = expiry(path)
    except NoCertificate as error:
        _limit.error("", "CERTIFICATE_FILE: %s", error)
        return []
    name = "prediction_certificate_expiry_timestamp_seconds"
    return [GaugeMetricFamily(name, "When the certificate that callers see expires", value=when)]
