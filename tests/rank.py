"""``python -m tests.rank MODULE ARGUMENTS``: the module is run with Megatron imported as our commands import it."""

import runpy
import sys

from cosmos_mcore.parallel.imports import lasting_imports

with lasting_imports():
    import cosmos_mcore.parallel.initialize  # noqa: F401 - Megatron's imports are what takes the time

del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
