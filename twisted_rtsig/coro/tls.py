"""What the two sides of a TLS connection have agreed on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from twisted_rtsig.coro.output import handshake_is_done, tls_layer

if TYPE_CHECKING:
    # It cannot be imported where pyOpenSSL is missing.
    from twisted.internet.ssl import Certificate


class TLSInfo(NamedTuple):
    """
    What a TLS handshake has negotiated.  See ``Stream.tls``.

    :ivar version: the version of the protocol: ``"TLSv1.3"``.
    :ivar cipher: the name of the cipher suite, as OpenSSL has it.
    :ivar cipher_bits: the length of its secret key.
    :ivar alpn_protocol: the application protocol that both sides have agreed on by
        ALPN (RFC 7301), ``"h2"`` for example; None without one.
    :ivar server_hostname: the name that the client has asked for by SNI (RFC 6066);
        None if it did not.
    :ivar peer_certificate: the certificate of the peer; None if it has sent none, as
        most clients.  ``peer_certificate.dump()`` is its DER encoding.
    """

    version: str
    cipher: str
    cipher_bits: int
    alpn_protocol: str | None
    server_hostname: str | None
    peer_certificate: Certificate | None


def tls_info(transport: Any) -> TLSInfo | None:
    """
    What the handshake of ``transport`` has negotiated; None if there is no TLS, or the
    handshake is not done.
    """
    if not handshake_is_done(transport):
        return None
    connection = tls_layer(transport).getHandle()
    from twisted.internet.ssl import Certificate

    name = connection.get_servername()
    protocol = connection.get_alpn_proto_negotiated()
    certificate = connection.get_peer_certificate()
    return TLSInfo(
        connection.get_protocol_version_name(),
        connection.get_cipher_name(),
        connection.get_cipher_bits(),
        protocol.decode("latin-1") if protocol else None,
        name.decode("latin-1") if name else None,
        None if certificate is None else Certificate(certificate),
    )
