"""The console script, and `python -m dispatcher.cli`: the same where no script is installed, and for our own children.

Until a command runs, Ctrl-C ends the process without a word: half a second of imports would else answer with a
traceback, or with an error of the library that was interrupted in its middle.
"""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as under nohup
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from dispatcher.cli.root import main

if __name__ == "__main__":
    main()
