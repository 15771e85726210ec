"""Makes a wheel bring its C++ libraries along, compiled; all else is in pyproject.toml.

They are compiled where the build can see torch, as with `python -m build --no-isolation`. A build
that cannot, as pip's when it installs from source, makes a wheel of sources, whose libraries are
compiled on first use; FX_SPARSITY_WHEEL=pure asks for one.
"""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import setuptools
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.errors import ExecError

ROOT = Path(__file__).parent


def compiles() -> bool:
    """Whether libraries are compiled now."""
    return os.environ.get("FX_SPARSITY_WHEEL") != "pure" and find_spec("torch") is not None


class Build(build_py):
    """Compiles the libraries beside the modules, except for an editable installation."""

    def run(self) -> None:
        """Copy the modules, then compile."""
        super().run()
        compiled = (ROOT / self.build_lib / "fx_sparsity" / "_native" / "compiled").absolute()
        shutil.rmtree(compiled, ignore_errors=True)
        if self.editable_mode:
            return
        if not compiles():
            self.warn("a wheel of sources: its C++ libraries are compiled on first use")
            return
        command = [sys.executable, "-m", "fx_sparsity._native.wheel", str(compiled)]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            raise ExecError(
                "the C++ libraries cannot be compiled, see above; FX_SPARSITY_WHEEL=pure makes a "
                "wheel that compiles them on first use"
            )


class Wheel(bdist_wheel):
    """For any Python, since no library calls it."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, its ABI, and the platform: any, if nothing is compiled."""
        return "py3", "none", super().get_tag()[2]


class Distribution(setuptools.Distribution):
    """For one platform, if libraries are compiled."""

    def has_ext_modules(self) -> bool:
        """Whether there is something compiled in it."""
        return compiles()


setuptools.setup(distclass=Distribution, cmdclass={"build_py": Build, "bdist_wheel": Wheel})
