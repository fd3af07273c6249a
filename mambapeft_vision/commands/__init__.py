"""What `mambapeft COMMAND` does: each module has `main(arguments)`, which raises UserError for mistakes of the user.

The functions return an exit code, or None for success; run/exit.py turns errors into messages and codes.
"""
