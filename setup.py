"""The one part of the build that pyproject.toml cannot express: a C kernel that may fail to compile.

Without a compiler the package installs all the same and the server says once that its CPU attention is the slower one.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "rollout_server.kernels.cpu._attention",
            ["rollout_server/kernels/cpu/attention.c"],
            extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ]
)
