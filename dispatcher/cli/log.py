"""Where log events go: to stderr, for a person at a terminal, as JSON for everything else."""

import logging
import sys

import structlog

from scheduler.settings import LogSettings


def configure(settings: LogSettings) -> None:
    """Send the log events of this process to stderr; stdout is for results."""
    is_text = settings.form == "text" or (settings.form == "auto" and sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *_last(is_text=is_text),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[settings.level.upper()]
        ),
        # stderr as it is when something is said, not as it is now: tests and services redirect it.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        cache_logger_on_first_use=False,
    )


def _last(*, is_text: bool) -> list[structlog.typing.Processor]:
    if is_text:
        return [structlog.dev.ConsoleRenderer()]
    return [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
