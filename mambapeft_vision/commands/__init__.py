"""The commands: each module has the `main(arguments)` of `mambapeft COMMAND`, which raises UserError for mistakes.

The functions return an exit code, or None for success; run/exit.py turns errors into messages and codes.
"""
