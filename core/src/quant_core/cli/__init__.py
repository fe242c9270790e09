"""The ``quant`` command: one module per sub-command, imported when the command line is built.

A command module imports only the standard library at the top and defines

    HELP                     one line
    add_arguments(parser)    its own arguments; --json and --traceback are added by main
    run(args) -> int         does it, returns the exit code

Each collects a plain dict first and renders it second, so that ``--json`` prints the very data the
table is made of. ``formats``, ``plugins`` and ``inspect`` never import torch.
"""
