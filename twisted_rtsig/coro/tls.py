"""The TLS layer below a stream, and what its handshake has negotiated."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    # It cannot be imported where pyOpenSSL is missing.
    from twisted.internet.ssl import Certificate


class TLSInfo(NamedTuple):
    """
    What a TLS handshake has negotiated.  See :attr:`Stream.tls`.

    :ivar version: the version of the protocol, such as ``"TLSv1.3"``.
    :ivar cipher: the name of the cipher suite, as OpenSSL has it.
    :ivar cipher_bits: the length of its secret key.
    :ivar alpn_protocol: the application protocol that both sides have agreed on by
        ALPN (RFC 7301), such as ``"h2"``; None without one.
    :ivar server_hostname: the name that the client has asked for by SNI (RFC 6066);
        None without one.
    :ivar peer_certificate: the certificate of the peer; None if it has sent none, like
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


def below_tls(transport: Any) -> Any:
    """The transport that carries TLS; or ``transport``, if there is no TLS."""
    layer = tls_layer(transport)
    return transport if layer is None else layer.transport


def tls_is_over(transport: Any) -> bool:
    """Whether there is TLS, and it has ended or failed, so that it drops writes."""
    layer = tls_layer(transport)
    return layer is not None and layer._lostTLSConnection


def handshake_is_done(transport: Any) -> bool | None:
    """
    Whether the TLS handshake is done, and the certificate of the peer accepted; None if
    there is no TLS.
    """
    layer = tls_layer(transport)
    if layer is None:
        return None
    # Twisted 23.10 verifies the name that the certificate is for at the end of the
    # handshake.  If the name is wrong, it aborts the connection, and reports the
    # handshake nevertheless.
    return bool(layer._handshakeDone and not layer._aborted)


def tls_layer(transport: Any) -> Any:
    """The ``TLSMemoryBIOProtocol`` that encrypts ``transport``; None without TLS."""
    # It cannot be imported where pyOpenSSL is missing.
    tls = sys.modules.get("twisted.protocols.tls")
    while tls is not None and transport is not None:
        # After startTLS the layer is the protocol of the transport.
        for each in (transport, getattr(transport, "protocol", None)):
            if isinstance(each, tls.TLSMemoryBIOProtocol):
                return each
        transport = getattr(transport, "transport", None)
    return None
