"""The commands of ``python -m perf``, a file each, named as the command is.

A command is a module with ``add_arguments(parser)`` and ``run(args) -> int``, the exit code: 0 when what
was asked for was done, 1 when it was not, 2 where it cannot be done (a bad command line, no GPU). Its
line in ``perf.__main__.COMMANDS`` says what it does and whether it needs a GPU. It is imported when it
is named.
"""
