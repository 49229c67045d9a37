"""The thin Python face of the native core. Needs NumPy alone; torch is looked for only where the caller has it already."""

from __future__ import annotations

import sys

try:
    from urlfast import _core
except ImportError as error:
    raise ImportError(
        f"urlfast's native extension could not be loaded ({error}).\n"
        "It is compiled at installation: from a checkout, run `pip install .`; after an update of Python or a move to another machine,\n"
        "run `pip install --force-reinstall --no-deps urlfast`. When working inside the checkout, mind that `urlfast/` there hides the\n"
        "installed package: run from another folder, or install with `pip install --no-build-isolation -e .`."
    ) from error

__version__: str = _core.__version__
set_num_threads = _core.set_num_threads


def _detached(array):
    """A torch tensor without its gradient history (sharing its memory); anything else as it is."""
    torch = sys.modules.get("torch")
    return array.detach() if torch is not None and isinstance(array, torch.Tensor) and array.requires_grad else array


# knn ------------------------------------------------------------------------------------------------------------------


# normaliser -----------------------------------------------------------------------------------------------------------


# replay ---------------------------------------------------------------------------------------------------------------


# latent ---------------------------------------------------------------------------------------------------------------
