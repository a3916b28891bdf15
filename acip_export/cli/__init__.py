"""One file per command. Reads flags, calls :mod:`acip_export.pipeline`, draws with :mod:`acip_export.console`.

Numpy, torch and the stages are imported when a command runs: help, ``inspect`` and ``check`` start at once.
"""
