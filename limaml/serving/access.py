"""Who may reach a server, and over what: the token, the certificate, the address it listens on."""

from __future__ import annotations

import ipaddress
import ssl
from pathlib import Path

from limaml.errors import ConfigError

__all__ = ["check_bind", "check_tls", "read_token"]

SHORTEST = 16


def read_token(path: Path) -> str:
    """The token in a file: its first line."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        raise ConfigError(f"There is no token file '{path}'. Make one: openssl rand -hex 32 > {path}") from None
    except UnicodeDecodeError:
        text = ""
    if len(text) < SHORTEST or not text.isprintable() or " " in text:
        raise ConfigError(
            f"The token in '{path}' must be one word of at least {SHORTEST} ASCII characters. Make one: "
            f"openssl rand -hex 32 > {path}"
        )
    return text


def check_tls(certificate: Path | None, key: Path | None) -> tuple[Path, Path] | None:
    """The two files, tried together; None without them."""
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ConfigError("TLS needs both --tls-cert and --tls-key; one of them is missing.")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"The certificate '{certificate}' and the key '{key}' cannot be used: {error}. Both must be PEM files that "
            "belong together."
        ) from error
    return certificate, key


def check_bind(host: str, *, token: bool, open_to_all: bool) -> None:
    """Refuse to listen where others reach, unless they need a token or `--open` says that this is meant."""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not (local or token or open_to_all):
        raise ConfigError(
            f"--host {host} can be reached from other machines, and nobody would be asked for a token. Add --token-file "
            "FILE, or say with --open that everybody may ask (behind a proxy that does this, for example)."
        )
