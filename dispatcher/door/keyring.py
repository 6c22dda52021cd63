"""Who may come in, and as which tenant."""

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

from dispatcher.door.refusal import Refusal
from scheduler.errors import SettingsError
from scheduler.settings import DoorSettings
from scheduler.wire.words import ID_PATTERN

SCHEME = "bearer"
"In whichever case: HTTP's schemes have none."


class Keyring:
    """API keys and whose they are; an empty one lets everybody in, each as the tenant it says."""

    def __init__(self, tenants: Mapping[str, str]) -> None:
        """Tenants by key; kept are digests, so that every comparison is of equal lengths."""
        self._tenants = [(_digest(key), tenant) for key, tenant in tenants.items()]
        self._named = frozenset(tenants.values()) - {""}

    @classmethod
    def from_settings(cls, settings: DoorSettings, environ: Mapping[str, str]) -> Self:
        """The keys in the file and in the variable that the settings name.

        Raises:
            SettingsError: one is named and cannot be read, or holds no key.
        """
        tenants: dict[str, str] = {}
        if settings.api_keys_file:
            where = "door.api_keys_file"
            _add(tenants, _read(_lines_of(settings.api_keys_file), where), where)
        if settings.api_keys_variable:
            lines = environ.get(settings.api_keys_variable, "").replace(",", "\n").splitlines()
            where = f"door.api_keys_variable ({settings.api_keys_variable})"
            _add(tenants, _read(lines, where), where)
        return cls(tenants)

    def tenant(self, headers: Mapping[str, str]) -> str | None:
        """Whose key these headers show; None or empty: as they say themselves.

        Raises:
            Refusal: 401.
        """
        if not self._tenants:
            return None
        scheme, _, key = headers.get("Authorization", "").partition(" ")
        shown = _digest(key if scheme.lower() == SCHEME else "")
        found = None
        # Every key is compared, whichever fits, so that the time tells nothing.
        for digest, tenant in self._tenants:
            if hmac.compare_digest(digest, shown):
                found = tenant
        if found is None:
            raise Refusal(401, "unauthorized", "no API key of this door, wanted a Bearer token")
        return found

    def check_name(self, name: str, tenant: str | None) -> None:
        """A name that is asked for as this tenant; the holder of a key alone has no prefix, and none of another's.

        Raises:
            Refusal: 400, it is a name of a tenant's.
        """
        whose, colon, _ = name.partition(":")
        if not tenant and colon and whose in self._named:
            raise Refusal(
                400,
                "invalid",
                f"x-request-id is {name!r}, wanted none that begins with tenant {whose!r} of another key",
                param="x-request-id",
            )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def _lines_of(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise SettingsError(
            f"door.api_keys_file is {path!r}, wanted a readable file: {reason}"
        ) from None


def _read(lines: Iterable[str], where: str) -> dict[str, str]:
    """Lines `key tenant`; the holder of a key alone says itself who it is, as a proxy does."""
    tenants: dict[str, str] = {}
    for line in lines:
        words = line.partition("#")[0].split()
        if len(words) > 2:
            raise SettingsError(f"{where} has a line of {len(words)} words, wanted KEY TENANT")
        # No colon, which parts a tenant from a request's name: `a` asking for `b:x` would read what `a:b` was answered.
        if len(words) == 2 and (not ID_PATTERN.fullmatch(words[1]) or ":" in words[1]):
            raise SettingsError(
                f"{where} has tenant {words[1]!r}, wanted letters, digits or . _ @ -"
            )
        if words:
            _add(tenants, {words[0]: words[1] if len(words) == 2 else ""}, where)
    if not tenants:
        raise SettingsError(f"{where} holds no key, wanted lines of KEY TENANT")
    return tenants


def _add(tenants: dict[str, str], more: Mapping[str, str], where: str) -> None:
    """More keys; one is one tenant's, or whoever is read last would have the other's requests."""
    for key, tenant in more.items():
        if tenants.setdefault(key, tenant) != tenant:
            raise SettingsError(
                f"{where} gives tenant {tenant!r} a key that tenant {tenants[key]!r} has, wanted one of its own"
            )
