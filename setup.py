"""The one part of the build that pyproject.toml cannot express: C kernels that may fail to compile.

Without a compiler the package installs all the same and the server says once that its CPU path is the slower one.
"""

from setuptools import Extension, setup

_KERNELS = "rollout_server/kernels/cpu"

setup(
    ext_modules=[
        Extension(
            "rollout_server.kernels.cpu._kernels",
            [f"{_KERNELS}/kernels.c"],
            depends=[f"{_KERNELS}/{name}.h" for name in ("attention", "bodies", "linear", "rows", "sample", "vector")],
            extra_compile_args=[
                "-O3",
                "-fopenmp",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-Wno-psabi",
                "-fno-strict-aliasing",
            ],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ]
)
