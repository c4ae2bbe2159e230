"Hands settings.ini, which holds every setting of the package, to setuptools."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
ini = ConfigParser()
ini.read(ROOT/"settings.ini", encoding="utf-8")
settings = ini["DEFAULT"]


class BuildWithResources(build_py):
    """A wheel contains what tinycats.cloud sends to a container (notebooks, parameter files, pinned versions)
    and what tinycats.export copies (the page for the browser)."""

    def run(self):
        super().run()
        if self.editable_mode:  # a clone has them where they are
            return
        target = Path(self.build_lib)/settings["lib_name"]/"resources"
        notebooks = [f"nbs/{name}.ipynb" for name in ("train", "evaluate", "sweep")]
        params = [path.relative_to(ROOT) for path in ROOT.glob("nbs/params/*.yaml")]
        page = [path.relative_to(ROOT) for path in ROOT.glob("nbs/page/**/*") if path.is_file()]
        for name in ("settings.ini", "constraints.txt", *notebooks, *params, *page):
            (target/name).parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(ROOT/name, target/name)


versions = settings["python_versions"].split()
extras = {key: value.split() for key, value in settings.items() if key.endswith("_requirements")}

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    author=settings["author"],
    url=settings["git_url"],
    license="Apache-2.0",
    keywords=settings["keywords"].split(),
    long_description=(ROOT/"README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    classifiers=[f"Programming Language :: Python :: {version}" for version in versions],
    packages=[settings["lib_name"]],
    cmdclass={"build_py": BuildWithResources},
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require={key.removesuffix("_requirements"): names for key, names in extras.items()},
)
