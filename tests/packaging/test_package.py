"""The package as it is installed: imports, layers, environment variables, promises in one place."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tolerances import FLOOR, TIMES_STOCK

import resnet_fused as rf
from resnet_fused import modules
from resnet_fused.backends.accuracy import tolerance

ROOT = Path(rf.__file__).parent

# A module may import from its own layer and from those to the right.
LAYERS = [
    "cli",
    "accept",
    "accept_page",
    "verification",
    "bench",
    "models",
    "modules",
    "fusion",
    "tuning",
    "functional",
    "ops",
    "runtime",
    "backends",
]
FOUNDATION = {"config", "text", "env_report"}


def _modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def _layer(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("resnet_fused.")}


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downward_only(path: Path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in _imports(path):
        other = _layer(name)
        if other in FOUNDATION or own in ("__init__", "env_report") or other == "__init__":
            continue
        if other not in LAYERS:
            continue  # a name of the package itself, which the functions of the bench use as users do
        assert own not in FOUNDATION, f"{path.name} imports {name}; it may import nothing of the package"
        assert LAYERS.index(own) <= LAYERS.index(other), f"{path.relative_to(ROOT)} imports {name}, which is above it"


def test_one_op_never_imports_another():
    shared = {"common", "checks", "flops", "batch_norm"}
    for path in (ROOT / "ops").glob("*.py"):
        if path.stem == "__init__":
            continue
        used = {name.split(".")[2] for name in _imports(path) if name.startswith("resnet_fused.ops.") and name.count(".") > 1}
        assert used <= shared, f"ops/{path.name} imports {used - shared}"


def test_import_brings_in_neither_triton_nor_a_compiled_library_nor_a_driver():
    code = (
        "import sys, torch, resnet_fused as rf\n"
        "assert 'triton' not in sys.modules, 'triton was imported'\n"
        "assert not any(name.startswith('resnet_fused.backends.triton') for name in sys.modules), 'its kernels were loaded'\n"
        "assert not torch.cuda.is_initialized(), 'the CUDA driver was touched'\n"
        "assert not any('resnet_fused' in str(p) for p in torch.ops.loaded_libraries), 'a library was loaded'\n"
        "assert 'torchvision' not in sys.modules and 'rich' not in sys.modules and 'matplotlib' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_blocks_bring_in_torchvision_and_work_without_it():
    """What fails in torchvision's import, and how, must not matter."""
    code = (
        "import pickle, sys, types\n"
        "if sys.argv[1] == 'absent': sys.modules['torchvision'] = None\n"
        "if sys.argv[1] == 'broken': sys.modules['torchvision'] = types.ModuleType('torchvision')\n"
        "import resnet_fused as rf\n"
        "assert {*rf.__all__} <= {*dir(rf)} and 'torchvision.models' not in sys.modules\n"
        "from resnet_fused import BasicBlock\n"
        "from resnet_fused.modules import Bottleneck\n"
        "assert BasicBlock is rf.BasicBlock and Bottleneck is rf.Bottleneck and rf.models.ResNet is rf.ResNet\n"
        "assert ('torchvision.models' in sys.modules) == (sys.argv[1] == 'present')\n"
        "block = pickle.loads(pickle.dumps(BasicBlock(8, 8)))\n"
        "assert type(block) is BasicBlock and rf.resnet18().layer1[0].conv1.out_channels == 64\n"
    )
    for torchvision in ("present", "absent", "broken"):
        subprocess.run([sys.executable, "-c", code, torchvision], check=True)


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="module 'resnet_fused' has no attribute 'resnet51'"):
        _ = rf.resnet51
    with pytest.raises(AttributeError, match=r"module 'resnet_fused\.modules' has no attribute 'Block3'"):
        _ = modules.Block3


def test_only_config_reads_the_environment():
    for path in _modules():
        if path.name != "config.py":
            assert not re.search(r"os\.environ|os\.getenv", path.read_text()), f"{path} reads the environment"


def test_every_environment_variable_is_documented():
    config = (ROOT / "config.py").read_text()
    documented = ast.get_docstring(ast.parse(config))
    assert documented is not None
    page = (ROOT.parent / "docs" / "configuration.md").read_text()
    for name in set(re.findall(r"(?:RESNET_FUSED|TRITON)_[A-Z_]+", config)):
        assert f"| {name} |" in documented
        assert f"| `{name}` |" in page, f"docs/configuration.md doesn't tell of {name}"


def test_every_public_name_has_a_docstring():
    for name in rf.__all__:
        assert getattr(rf, name).__doc__, f"rf.{name} has no docstring"
    for name in rf.functional.__all__:
        assert getattr(rf.functional, name).__doc__, f"rf.functional.{name} has no docstring"


def test_the_library_promises_what_the_tests_hold():
    assert tolerance.FLOOR == FLOOR
    assert tolerance.TIMES_STOCK == TIMES_STOCK


def test_use_backend_nests_restores_and_names_what_is_wrong():
    from resnet_fused.backends import choice

    with rf.use_backend("onednn"):
        with rf.use_backend("reference"):
            assert choice() == "reference"
        assert choice() == "onednn"
        assert choice("reference") == "reference", "an argument goes before the context"
    with (
        pytest.raises(ValueError, match="name is 'tensorrt'; it must be 'auto' or one of 'reference'"),
        rf.use_backend("tensorrt"),
    ):
        pass


def test_environment_chooses_the_backend():
    code = "import resnet_fused.backends as b; print(b.choice())"
    for value, expected in (("reference", "reference"), ("", "auto")):
        run = subprocess.run([sys.executable, "-c", code], env={"RESNET_FUSED_BACKEND": value}, capture_output=True, text=True)
        assert run.stdout.strip() == expected, run.stderr
    run = subprocess.run([sys.executable, "-c", code], env={"RESNET_FUSED_BACKEND": "fast"}, capture_output=True, text=True)
    assert "RESNET_FUSED_BACKEND is 'fast'; it must be 'auto' or one of" in run.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++; install a C++ compiler")
def test_native_code_compiles_with_the_headers_of_older_pytorch(tmp_path):
    """PyTorch 2.11's stable ABI has no STABLE_TORCH_ERROR_CODE_CHECK."""
    older = tmp_path / "older.h"
    older.write_text(
        "#include <torch/csrc/stable/ops.h>\n#include <torch/csrc/stable/tensor.h>\n#undef STABLE_TORCH_ERROR_CODE_CHECK\n"
    )
    include = Path(torch.__file__).parent / "include"
    source = ROOT.parent / "csrc" / "cpu" / "activations.cpp"
    command = ["g++", "-std=c++20", "-fsyntax-only", f"-I{include}", "-include", str(older), str(source)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
