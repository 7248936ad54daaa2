"""Sign the index of a package: docs/packaging.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pleexport.errors import InputError, MissingDependencyError
from pleexport.whole_file import read_whole

_MAKE = "`openssl ecparam -name prime256v1 -genkey -noout -out key.pem` makes one"


def signer(key: Path) -> Callable[[bytes], bytes]:
    """What signs bytes with a private key: ECDSA on P-256 with SHA-256, in DER.

    Args:
        key: a PEM file.
    Raises:
        MissingDependencyError: the package `cryptography` is not installed.
        InputError: it is no such key.
    """
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as err:
        raise MissingDependencyError(
            f"signing needs {err.name or 'cryptography'}", hint="pip install 'pleexport[sign]'"
        ) from err
    try:
        opened = load_pem_private_key(read_whole(key), password=None)
    except OSError as err:
        raise InputError(f"key `{key}` cannot be read: {err.strerror}", hint=_MAKE) from err
    except TypeError as err:
        raise InputError(
            f"key `{key}` is locked with a password, which is not asked for",
            hint=f"`openssl pkey -in {key} -out open.pem` writes it without one",
        ) from err
    except (ValueError, UnsupportedAlgorithm) as err:
        raise InputError(f"`{key}` is no private key in PEM", hint=_MAKE) from err
    if not isinstance(opened, ec.EllipticCurvePrivateKey) or opened.curve.name != "secp256r1":
        raise InputError(f"key `{key}` is not one of the curve P-256 for ECDSA", hint=_MAKE)
    private = opened
    return lambda data: private.sign(data, ec.ECDSA(SHA256()))
