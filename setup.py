"""Builds `longcat_kernels._C` by CMakeLists.txt; everything else about the package stands in pyproject.toml."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Leaves the module out, with a warning, where CMake finds no compiler; any other failure fails the build."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)
        device = target.parent / "device"  # what NVRTC compiles; a source tree has it in csrc
        shutil.rmtree(device, ignore_errors=True)
        device.mkdir(parents=True)
        for file in (ROOT / "csrc" / "cuda").glob("*.cuh"):
            shutil.copy(file, device)
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        cmake, ninja = (shutil.which(tool, path=path) for tool in ("cmake", "ninja"))
        if cmake is None or ninja is None:
            raise RuntimeError("longcat-kernels: cmake and ninja must be installed (or leave pip its build isolation)")
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "LONGCAT_VERSION": self.distribution.get_version(),
            "LONGCAT_CUDA": os.environ.get("LONGCAT_CUDA", "ON"),
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        configure = [cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *defines]
        if subprocess.call(configure) != 0:  # perhaps a cache of a tree since moved, or of a compiler since removed
            subprocess.check_call([*configure, "--fresh"])
        subprocess.check_call([cmake, "--build", build])

    def copy_extensions_to_source(self):
        """An editable install has the prebuilt kernels beside the module, too."""
        super().copy_extensions_to_source()
        built, place = Path(self.build_lib) / "longcat_kernels" / "cubins", ROOT / "longcat_kernels" / "cubins"
        shutil.rmtree(place, ignore_errors=True)
        if built.is_dir():
            shutil.copytree(built, place)


# CMake knows the sources; here they are what a source distribution must carry.
SOURCES = ["CMakeLists.txt", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file())]
MODULE = Extension("longcat_kernels._C", sources=[], depends=SOURCES, optional=True)
setup(ext_modules=[MODULE], cmdclass={"build_ext": CMakeBuild})
