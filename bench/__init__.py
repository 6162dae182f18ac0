"""Benchmarks. In a checkout that was never installed, the folder kernels is made to be streamaug.kernels."""

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

if find_spec("streamaug.kernels") is None:
    _folder = Path(__file__).parents[1] / "kernels"
    _spec = spec_from_file_location(
        "streamaug.kernels", _folder / "__init__.py", submodule_search_locations=[str(_folder)]
    )
    assert _spec is not None and _spec.loader is not None
    sys.modules["streamaug.kernels"] = _module = module_from_spec(_spec)
    _spec.loader.exec_module(_module)
