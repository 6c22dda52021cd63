"""What the command line says about settings, and the settings that follow: file, environment, options."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from msgspec.structs import replace

from scheduler.errors import SettingsError
from scheduler.parsing import parse
from scheduler.settings import RedisSettings, Settings

DEFAULT_FILE = "headgate.toml"


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options every command with settings takes; None where not given."""

    config: str | None = None
    redis: str | None = None
    pool: str | None = None

    def over(self, other: "Options") -> "Options":
        """These options, and the other's where these are silent."""
        return Options(
            config=self.config or other.config,
            redis=self.redis or other.redis,
            pool=self.pool or other.pool,
        )


def settings(options: Options, environ: Mapping[str, str]) -> Settings:
    """The settings of this run: the file's, then the environment's, then the options'.

    Raises:
        SettingsError: a file that was named cannot be read, or what `parse` finds; the file is named.
    """
    path = config_file(options, environ)
    text = _text(path, "settings file") if path else ""
    try:
        found = parse(text, environ)
    except SettingsError as error:
        raise SettingsError(f"{path or 'settings'}: {error}") from None
    redis = replace(found.redis, url=options.redis or found.redis.url)
    try:
        urlsplit(redis.url)
    except ValueError as error:  # the URL itself is not shown: nobody could find the password in it
        raise SettingsError(f"redis.url is no URL: {error}") from None
    return replace(found, redis=_with_password(redis), pool=options.pool or found.pool)


def config_file(options: Options, environ: Mapping[str, str]) -> Path | None:
    """The settings file: named by option, by $HEADGATE_CONFIG, or `headgate.toml` here if there is one."""
    named = options.config or environ.get("HEADGATE_CONFIG")
    if named:
        return Path(named)
    here = Path(DEFAULT_FILE)
    return here if here.is_file() else None


def _with_password(redis: RedisSettings) -> RedisSettings:
    if redis.password or not redis.password_file:
        return redis
    # Editors end a file with a newline that is no part of the secret.
    secret = _text(Path(redis.password_file), "redis.password_file").rstrip("\r\n")
    return replace(redis, password=secret)


def _text(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise SettingsError(f"{what} {str(path)!r} cannot be read: {reason}") from None
