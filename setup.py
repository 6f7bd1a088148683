"Hand setuptools the dependencies that `settings.ini` lists, and put the notebooks into the wheel; `pyproject.toml` holds the rest."
from configparser import ConfigParser
from pathlib import Path
from shutil import copyfile
from setuptools import setup
from setuptools.command.build_py import build_py

cfg = ConfigParser(delimiters=['='], interpolation=None)
cfg.read('settings.ini', encoding='utf-8')

def reqs(section, key): return [o.strip() for o in cfg[section].get(key, '').split('\n') if o.strip()]

class BuildWithNotebooks(build_py):
    "`finrl-grpo notebooks DIR` copies them out again after a plain `pip install`"
    def run(self):
        super().run()
        if self.editable_mode: return
        for nb in Path('nbs').rglob('*.ipynb'):
            if any(o.startswith(('.', '_')) for o in nb.parts): continue
            to = Path(self.build_lib)/'finrl_grpo'/'notebooks'/nb.relative_to('nbs')
            to.parent.mkdir(parents=True, exist_ok=True)
            copyfile(nb, to)

extras = {k:reqs('extras', k) for k in cfg['extras'] if k not in cfg.defaults()}
setup(install_requires=reqs('DEFAULT', 'requirements'), cmdclass={'build_py':BuildWithNotebooks},
      extras_require={'dev':reqs('DEFAULT', 'dev_requirements'), **extras})
