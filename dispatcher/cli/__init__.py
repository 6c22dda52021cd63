"""The command line: one module a command, one table that names them, one door for errors."""
