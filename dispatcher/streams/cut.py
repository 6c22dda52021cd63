"""The command that cuts a stream's past, for all who keep one short."""

CUT_MAX = 100_000
"""Entries that one cut takes, in some 6 ms.

Redis' own limit for `~` is 10,000: cut each 10 s, a stream of more than 1,000 entries a second would grow for ever.
"""


def older(stream: str, before: str) -> tuple[str, ...]:
    """Cut what is older than this entry, by whole nodes.

    >>> older("hg:{default}:results", "1731500000123-0")
    ('XTRIM', 'hg:{default}:results', 'MINID', '~', '1731500000123-0', 'LIMIT', '100000')
    """
    return ("XTRIM", stream, "MINID", "~", before, "LIMIT", str(CUT_MAX))
