"""Constraints files for pip, on the standard output.

python scripts/constraints.py tested > constraints.txt          # the installed versions of all that the project needs
python scripts/constraints.py lowest > constraints-oldest.txt   # the lowest release of each that pyproject.toml allows

`tested` looks at the environment that runs it, and takes what the dependencies themselves need too. `lowest` asks the
package index, through pip, for the lowest release with a wheel for this Python; `make test-oldest` uses it.
"""

import importlib.metadata
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version
except ImportError:  # in a new environment, where `lowest` runs
    from pip._vendor.packaging.requirements import Requirement  # type: ignore[assignment]
    from pip._vendor.packaging.utils import canonicalize_name  # type: ignore[assignment]
    from pip._vendor.packaging.version import Version  # type: ignore[assignment]
if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
EXTRAS = ("dev",)


def main() -> None:
    if sys.argv[1:] == ["tested"]:
        system = f"Python {platform.python_version()}, {sys.platform}, {platform.machine()}"
        print(f"# Installed and tested together: {system}.")
        print("# make install CONSTRAINTS=constraints.txt; written by scripts/constraints.py")
        for name, version in sorted(installed(direct()).items()):
            print(f"{name}=={version}")
    elif sys.argv[1:] == ["lowest"]:
        for requirement in direct():
            print(f"{requirement.name}=={lowest(requirement)}", flush=True)
    else:
        sys.exit(__doc__)


def direct() -> list[Requirement]:
    """The dependencies of pyproject.toml, those for development included, that apply here."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    texts = [*project["dependencies"], *(t for extra in EXTRAS for t in project["optional-dependencies"][extra])]
    return [requirement for requirement in map(Requirement, texts) if _applies(requirement, set())]


def installed(requirements: list[Requirement]) -> dict[str, str]:
    """Version by name of all that the requirements need, as it is installed. Exits where something is missing."""
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = list(requirements)
    while waiting:
        requirement = waiting.pop()
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if key in seen:
            continue
        seen.add(key)
        try:
            distribution = importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            sys.exit(f"error: {requirement} is not installed here; make install first")
        found[key[0]] = distribution.version
        waiting += _needs(distribution, requirement.extras)
    return found


def _needs(distribution: importlib.metadata.Distribution, extras: set[str]) -> Iterator[Requirement]:
    for requirement in map(Requirement, distribution.requires or []):
        if _applies(requirement, extras):
            yield requirement


def _applies(requirement: Requirement, extras: set[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras or {""})


def lowest(requirement: Requirement) -> Version:
    """The lowest final release with a wheel for this Python and platform. Exits where there is none."""
    command = [sys.executable, "-m", "pip", "index", "versions", requirement.name, "--only-binary=:all:"]
    answer = subprocess.run(command, capture_output=True, text=True)
    listed = re.search(r"^Available versions: (.*)$", answer.stdout, re.MULTILINE)
    if listed is None:
        sys.exit(f"error: the index has no wheel of {requirement.name} for this Python\n{answer.stderr}")
    known = [Version(text) for text in listed[1].split(", ")]
    fitting = [version for version in known if version in requirement.specifier and version.local is None]
    if not fitting:
        sys.exit(f"error: the index has no {requirement} for this Python; the lowest it has is {min(known)}")
    return min(fitting)


if __name__ == "__main__":
    main()
