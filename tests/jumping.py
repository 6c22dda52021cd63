"""An event loop whose clock jumps: real sockets, and nobody waits.

Where nothing is ready and the next timer is far, time moves there at once. So a server and its clients in one process
speak real HTTP and live through minutes in seconds, and how busy the machine is changes nothing of what they see.
Only for parties in this process: to another one no time would pass.
"""

import asyncio
import selectors

GRACE_S = 0.0005
"Real seconds in which bytes just written arrive at the other end, in this very process, before time jumps."


class _Selector(selectors.DefaultSelector):
    """Never waits for a timer."""

    def __init__(self):
        super().__init__()
        self.now = 0.0

    def select(self, timeout=None):
        ready = super().select(0 if timeout is not None else None)
        if not ready and timeout:
            ready = super().select(GRACE_S)
            if not ready:
                self.now += timeout
        return ready


class JumpingLoop(asyncio.SelectorEventLoop):
    """Its time begins at 0 and stands still while anything is to be done."""

    def __init__(self):
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self):
        """Seconds of its own clock."""
        return self._clock.now
