"settings.ini is the single source; this file only hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

ini = ConfigParser()
ini.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
cfg = ini["DEFAULT"]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], author=cfg["author"],
    url=cfg["git_url"], license="Apache-2.0", keywords=cfg["keywords"].split(),
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    classifiers=[f"Programming Language :: Python :: {v}" for v in cfg["python_versions"].split()],
    packages=[cfg["lib_name"]], python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={k.removesuffix("_requirements"): v.split() for k, v in cfg.items() if k.endswith("_requirements")},
)
