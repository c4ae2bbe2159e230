"Hands settings.ini, which holds every setting of the package, to setuptools."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
ini = ConfigParser()
ini.read(ROOT/"settings.ini", encoding="utf-8")
settings = ini["DEFAULT"]

# What a wheel takes along beside the package: what its commands run, and a trained network to begin with.
RESOURCES = """settings.ini constraints.txt
               nbs/train.ipynb nbs/evaluate.ipynb nbs/sweep.ipynb nbs/explore.ipynb
               nbs/params/*.yaml nbs/params/*.py nbs/page/**/*
               outputs/toy/config.json outputs/toy/ema.safetensors""".split()


class BuildWithResources(build_py):
    """A wheel contains what tinycats.cloud sends to a container (notebooks, parameter files, pinned
    versions), what tinycats.export copies (the page for the browser), and the toy run to draw with."""

    def run(self):
        super().run()
        if self.editable_mode:  # a clone has them where they are
            return
        target = Path(self.build_lib)/settings["lib_name"]/"resources"
        for pattern in RESOURCES:
            found = sorted(path for path in ROOT.glob(pattern) if path.is_file())
            assert found, f"{pattern} is missing: build from a complete checkout"
            for path in found:
                name = path.relative_to(ROOT)
                (target/name).parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(path, target/name)


def absolute_links(text):
    "The README for pages outside of the repository, where its relative links and images would lead nowhere."
    place = f"{settings['git_url']}/%s/{settings['branch']}/"
    text = re.sub(r"(!\[[^]]*\]\()(?![a-z]+:|#)", lambda m: m[1] + place % "raw", text)
    return re.sub(r"(\]\()(?![a-z]+:|#)", lambda m: m[1] + place % "blob", text)


versions = settings["python_versions"].split()
keys = [key for key in settings if key.endswith("_requirements")]
extras = {key.removesuffix("_requirements"): settings[key].split() for key in keys}
extras["all"] = []  # what a user may want: all but what measures (bench) and what changes tinycats (dev)
for extra in set(extras) - {"all", "bench", "dev"}:
    extras["all"] = sorted({*extras["all"], *extras[extra]})

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    author=settings["author"],
    url=settings["git_url"],
    license="Apache-2.0",
    keywords=settings["keywords"].split(),
    long_description=absolute_links((ROOT/"README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Education", "Typing :: Typed",
                 "Topic :: Scientific/Engineering :: Artificial Intelligence",
                 *(f"Programming Language :: Python :: {version}" for version in versions)],
    packages=[settings["lib_name"]],
    package_data={settings["lib_name"]: ["py.typed"]},
    entry_points=dict(console_scripts=["tinycats = tinycats.__main__:main"]),
    cmdclass={"build_py": BuildWithResources},
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require=extras,
)
