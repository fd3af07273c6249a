"""timm's own model tests on every backbone here, and what else timm's users rely on.

timm's tests are part of its source distribution. They are fetched with pip when these tests run (and kept in pytest's
cache); where that is impossible they are skipped, with the reason.
"""

import os
import subprocess
import sys
import tarfile
import textwrap
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import timm
import torch

from mambapeft_vision.backbones.registry import registered

ROOT = Path(__file__).resolve().parents[2]
TINY = [name for name in registered() if "_pico_" in name or "_nano_" in name]
MODULES = ["arm", "mambareg", "videomamba", "vim", "vit"]
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

#: Test of timm → beginnings of the names that it cannot hold for, and why.
_FX = "where special tokens and prompts stand is Python data that passes along with the tokens; FX traces tensors"
CANNOT_HOLD = {
    "test_model_forward_torchscript": ("", "weights are read through ports, which TorchScript does not compile"),
    "test_model_forward_fx": ("", _FX),
    "test_model_backward_fx": ("", _FX),
    "test_model_forward_fx_torchscript": ("", _FX),
    # timm compares both with num_features: features of a token and what the head reads.
    "test_model_default_cfgs_non_std": (
        tuple(f"mambareg_{size}_" for size in ("tiny", "small", "base", "large")),
        "the head reads n · D / r features of the registers, more than a token's D",
    ),
}


@pytest.fixture(scope="session")
def timm_tests(pytestconfig) -> Path:
    """timm's tests/test_models.py, of the version that is installed."""
    folder = Path(pytestconfig.cache.mkdir("timm-sdist"))
    archive = folder / f"timm-{timm.__version__}.tar.gz"
    if not archive.is_file():
        command = f"-m pip download --no-deps --no-binary timm timm=={timm.__version__} -d".split()
        done = subprocess.run([sys.executable, *command, str(folder)], capture_output=True, text=True, timeout=300)
        if not archive.is_file():
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            pytest.skip(f"timm's tests could not be fetched: pip download timm=={timm.__version__} says {last}")
    with tarfile.open(archive) as content:
        text = content.extractfile(f"timm-{timm.__version__}/tests/test_models.py").read()
    path = folder / "test_models.py"
    path.write_bytes(text)
    return path


def run_timm_tests(source: Path, folder: Path, names: list[str]) -> dict[str, str]:
    """Runs timm's tests on `names`; returns "test[name]" → "" for what passes, else the reason."""
    text = source.read_text()
    for lists, new in (("NON_STD_FILTERS", registered()), ("FEAT_INTER_FILTERS", MODULES)):
        # As for timm's own transformers: tokens are no maps, and intermediates come from forward_intermediates.
        marker = "NUM_NON_STD = len(NON_STD_FILTERS)\n"
        assert marker in text
        text = text.replace(marker, f"{lists} += {new!r}\n{marker}")
    (folder / "test_models.py").write_text(text)
    (folder / "conftest.py").write_text(
        textwrap.dedent(f"""
            import timm
            import mambapeft_vision.backbones

            NAMES = {names!r}
            everything = timm.list_models
            timm.list_models = lambda *a, **k: [name for name in everything(*a, **k) if name in NAMES]
            timm.list_pretrained = lambda *a, **k: []


            def pytest_collection_modifyitems(items):
                parameters = [getattr(item, "callspec", None) and item.callspec.params for item in items]
                items[:] = [item for item, p in zip(items, parameters) if p and p.get("model_name") in NAMES]
        """)
    )
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=report.xml", "test_models.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert (folder / "report.xml").is_file(), done.stdout + done.stderr
    results = {}
    for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
        problems = [child.get("message", "") for child in case if child.tag in ("failure", "error", "skipped")]
        results[case.get("name")] = problems[0] if problems else ""
    return results


def cannot_hold(case: str) -> bool:
    test, _, parameters = case.partition("[")
    name = parameters.removesuffix("]").partition("-")[2] or parameters.removesuffix("]")
    return test in CANNOT_HOLD and name.startswith(CANNOT_HOLD[test][0])


def check(results: dict[str, str], names: list[str]) -> None:
    assert results, "timm's tests ran on nothing"
    assert all(any(name in case for case in results) for name in names)
    failed = {case: reason for case, reason in results.items() if reason}
    assert {case for case in failed if not cannot_hold(case)} == set(), failed
    now_holds = {case for case in results if cannot_hold(case) and case not in failed}
    assert not now_holds, f"listed as impossible, but passes: {now_holds}"


@pytest.mark.slow
def test_timms_own_tests_pass_on_tiny_models(timm_tests, tmp_path):
    check(run_timm_tests(timm_tests, tmp_path, TINY), TINY)
