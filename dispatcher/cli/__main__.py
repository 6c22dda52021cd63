"""`python -m dispatcher.cli`: the same command line where no script is installed, and for our own children."""

from dispatcher.cli.root import main

main()
