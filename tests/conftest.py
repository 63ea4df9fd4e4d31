"""Makes `import ptxrun` mean tests/ptxrun, without tests/ on the path, where folders would pass for packages (data, models, kernels)."""

import importlib.util
import sys
from pathlib import Path

_FOLDER = Path(__file__).parent / "ptxrun"


def _load(name: str, folder: Path) -> None:
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


if "ptxrun" not in sys.modules:
    _load("ptxrun", _FOLDER)
