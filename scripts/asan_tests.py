"""Run the kernels' tests on the package in a directory instead of the one in place.

Called by `make test-asan`, which has built it with sanitizers.
"""

import importlib
import sys
from pathlib import Path

directory = Path(sys.argv[1]).resolve()
# The package in place is found by an import hook, which comes before every path.
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
sys.path[:0] = [str(directory), str(Path.cwd())]

core = importlib.import_module("outdraft._core")
if Path(str(core.__file__)).parent.parent != directory:
    sys.exit(f"{core.__file__} is not in {directory}")
sys.exit(
    importlib.import_module("pytest").main(["tests/ops", "-p", "no:cacheprovider", *sys.argv[2:]])
)
