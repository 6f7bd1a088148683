"""How the tests run: offline, on two threads, with one shared cache for the tiny model.

`--slow` adds the tests that take minutes, `--gpu` those that need a CUDA card. Tests marked `browser` need Chromium or Chrome and say so
in the summary when they are skipped for want of it.
"""
import os,shutil
import pytest

BROWSERS = 'chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome'
DEFAULTS = dict(OMP_NUM_THREADS='2', MKL_NUM_THREADS='2', TOKENIZERS_PARALLELISM='false', MPLBACKEND='Agg',
    HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1', HF_DATASETS_OFFLINE='1', WANDB_MODE='offline')
for name,value in DEFAULTS.items(): os.environ.setdefault(name, value)

def find_browser()->str|None: # Path of the program
    "The first Chromium-type browser on this machine"
    return os.environ.get('CHROMIUM') or next(filter(None, map(shutil.which, BROWSERS)), None)

def pytest_addoption(parser):
    "Two flags for what a normal run leaves out"
    parser.addoption('--slow', action='store_true', help='also run the tests that take minutes')
    parser.addoption('--gpu', action='store_true', help='also run the tests that need a CUDA card')

def pytest_configure(config):
    "Build `builtin:tiny` once for all tests, and keep it between runs"
    os.environ.setdefault('FINRL_GRPO_CACHE', str(config.cache.mkdir('finrl_grpo')))

def pytest_collection_modifyitems(config, items):
    "Skip what was not asked for, or cannot run here"
    reasons = {}
    if not config.getoption('--slow'): reasons['slow'] = 'slow; run with --slow'
    if not config.getoption('--gpu'): reasons['gpu'] = 'needs a CUDA card; run with --gpu'
    if find_browser() is None: reasons['browser'] = 'no Chromium or Chrome on this machine'
    for item in items:
        for marker,reason in reasons.items():
            if item.get_closest_marker(marker): item.add_marker(pytest.mark.skip(reason=reason))

def pytest_terminal_summary(terminalreporter):
    "One line a reason, so that a skipped check is seen"
    counts = {}
    for report in terminalreporter.stats.get('skipped', []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        counts[reason] = counts.get(reason, 0) + 1
    for reason,n in counts.items(): terminalreporter.write_line(f'skipped {n}: {reason.removeprefix("Skipped: ")}')

@pytest.fixture(scope='session')
def browser()->str: # Path of the program
    "Chromium or Chrome, for tests marked `browser`"
    path = find_browser()
    if path is None: pytest.skip('no Chromium or Chrome on this machine')
    return path

@pytest.fixture(scope='session')
def repo(pytestconfig): # `pathlib.Path`
    "The top folder of the repository"
    return pytestconfig.rootpath
