from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["fla_dist", "fla_dist.*"])
    + ["fla_dist." + name for name in find_packages(include=["kernels", "kernels.*"])]
)
