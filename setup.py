"settings.ini is the single source; this file only hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup
from setuptools.command.build_py import build_py

ini = ConfigParser()
ini.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
cfg = ini["DEFAULT"]


class WithNotebooks(build_py):
    "A wheel carries what tinycats.cloud sends to a container: the notebooks that papermill runs, their parameters, and the pinned versions."
    def run(self):
        super().run()
        here, there = Path(__file__).parent, Path(self.build_lib)/cfg["lib_name"]/"carried"
        notebooks = [p for n in ("train", "evaluate", "sweep") if (p := here/f"nbs/{n}.ipynb").exists()]
        if self.editable_mode: return  # a clone has them where they are
        for path in (here/"settings.ini", here/"constraints.txt", *notebooks, *here.glob("nbs/params/*.yaml")):
            (there/path.relative_to(here)).parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(path, there/path.relative_to(here))


setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], author=cfg["author"],
    url=cfg["git_url"], license="Apache-2.0", keywords=cfg["keywords"].split(),
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    classifiers=[f"Programming Language :: Python :: {v}" for v in cfg["python_versions"].split()],
    packages=[cfg["lib_name"]], cmdclass={"build_py": WithNotebooks}, python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={k.removesuffix("_requirements"): v.split() for k, v in cfg.items() if k.endswith("_requirements")},
)
