"""The repository itself: nothing machine-bound, nothing stated twice, nothing slow to open."""
import ast,configparser,re,subprocess,sys,tomllib
from pathlib import Path
import pytest

top = Path(__file__).parent.parent
text_kinds = {'.py', '.md', '.ipynb', '.toml', '.ini', '.txt', '.yml', '.yaml', '.css', '.cfg', '.json', '.in', ''}

def tracked()->list[Path]:
    "The files that git knows, or all but the ignored folders where there is no git"
    run = subprocess.run(['git', 'ls-files'], cwd=top, capture_output=True, text=True, encoding='utf-8')
    if run.returncode == 0: return [top/o for o in run.stdout.splitlines() if (top/o).is_file()]
    skip = {'.git', '.venv', 'venv', '_proc', '_docs', '__pycache__', 'build', 'dist'}
    return [p for p in top.rglob('*') if p.is_file() and not skip & set(p.relative_to(top).parts)]

texts = {p.relative_to(top).as_posix():p for p in tracked() if p.suffix in text_kinds and p.name != 'LICENSE'}

def lines_matching(pattern, allowed='$^', only=None):
    "`path:line: text` for every line that matches"
    found = []
    for name,path in texts.items():
        if name == 'tests/test_repo.py' or (only and not name.endswith(only)): continue
        for i,line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
            for match in re.finditer(pattern, line):
                if not re.search(allowed, line[max(0, match.start()-30):match.end()+30]): found.append(f'{name}:{i}: {line.strip()[:120]}')
    return found

def test_no_machine_paths():
    assert lines_matching(r'(?<![\w.])(/tmp/|/work/|/root/|/home/|/opt/|/Users/|[A-Z]:\\\\Users)\w', allowed=r'/tmp/(demo|run|out)') == []

def test_no_registry_hosts():
    assert lines_matching(r'pypi\.org|pythonhosted\.org|index-url\s+(?!https://download\.pytorch\.org/)|find-links') == []

def test_no_stub_markers():
    assert lines_matching(r'\b(TODO|FIXME|XXX)\b|NotImplementedError', only=('.py', '.ipynb')) == []

def test_text_is_unix_text():
    assert [name for name,path in texts.items() if not name.startswith('tests/data/') and b'\r' in path.read_bytes()] == []

def settings():
    "settings.ini as a mapping"
    config = configparser.ConfigParser(delimiters=['='], interpolation=None)
    config.read(top/'settings.ini', encoding='utf-8')
    return config

def project(): return tomllib.loads((top/'pyproject.toml').read_text(encoding='utf-8'))
def package_names(text): return [re.match(r'[\w.-]+', o.strip())[0].lower().replace('_', '-') for o in text.splitlines() if o.strip()]

def test_settings_and_pyproject_state_nothing_twice():
    conf, proj = settings(), project()['project']
    assert {'dependencies', 'optional-dependencies', 'version'} <= set(proj['dynamic'])
    assert not {'dependencies', 'optional-dependencies', 'version'} & set(proj)
    assert not set(conf['DEFAULT']) & set(proj)

def test_constraints_pin_every_requirement():
    conf = settings()
    pinned = {o.partition('==')[0].lower().replace('_', '-') for o in (top/'constraints.txt').read_text(encoding='utf-8').splitlines() if '==' in o}
    extras = ''.join('\n' + v for k,v in conf['extras'].items() if k not in conf.defaults())
    wanted = package_names(conf['DEFAULT']['requirements'] + '\n' + conf['DEFAULT']['dev_requirements'] + extras)
    assert set(wanted) - pinned == set()
    assert 'torch==2.13.0' in (top/'constraints.txt').read_text(encoding='utf-8').splitlines()

def test_installed_version_is_the_package_version():
    from importlib.metadata import version
    import finrl_grpo
    assert version('finrl_grpo') == finrl_grpo.__version__
    assert f'## {finrl_grpo.__version__}' in (top/'CHANGELOG.md').read_text(encoding='utf-8')

def missing_encoding(path):
    "Calls that open text without naming its encoding"
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if not isinstance(node, ast.Call): continue
        name = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
        keywords, strings = {k.arg for k in node.keywords}, [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        mode = next((k.value.value for k in node.keywords if k.arg == 'mode' and isinstance(k.value, ast.Constant)), '')
        binary = any(re.fullmatch(r'[rwaxb+]+', o) and 'b' in o for o in [*strings, mode])
        opens = isinstance(node.func, ast.Name) and name == 'open' or name == 'fdopen'
        reads = name in ('read_text', 'write_text')
        runs = name in ('run', 'Popen', 'check_output') and keywords & {'text', 'universal_newlines'}
        if (opens and not binary or reads or runs) and 'encoding' not in keywords: found.append(f'{path.relative_to(top)}:{node.lineno}: {name}')
    return found

@pytest.mark.parametrize('folder', ['finrl_grpo', 'gpu_training', 'tools'])
def test_text_files_are_opened_with_an_encoding(folder):
    assert [o for p in sorted((top/folder).rglob('*.py')) for o in missing_encoding(p)] == []

def dangerous(path):
    "Calls that run what a file says"
    tree = ast.parse(path.read_text(encoding='utf-8'))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    found = [f'{path.name}:{n.lineno}: {n.func.id}' for n in calls if isinstance(n.func, ast.Name) and n.func.id in ('eval', 'exec')]
    found += [f'{path.name}:{n.lineno}: trust_remote_code' for n in calls for k in n.keywords
        if k.arg == 'trust_remote_code' and not (isinstance(k.value, ast.Constant) and k.value.value is False)]
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names] + [n.module or '' for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    return found + [f'{path.name}: imports pickle' for o in names if o.split('.')[0] in ('pickle', 'dill', 'joblib')]

def test_the_package_runs_nothing_that_a_file_says():
    assert [o for p in sorted((top/'finrl_grpo').rglob('*.py')) for o in dangerous(p)] == []

def test_no_star_imports_in_the_package():
    found = [f'{p.name}:{n.lineno}' for p in sorted((top/'finrl_grpo').rglob('*.py')) for n in ast.walk(ast.parse(p.read_text(encoding='utf-8')))
        if isinstance(n, ast.ImportFrom) and any(a.name == '*' for a in n.names)]
    assert found == []

heavy = ('torch', 'transformers', 'datasets', 'matplotlib', 'trl', 'peft', 'wandb', 'pandas', 'IPython')
probe = 'import sys\n{}\nprint([m for m in ' + repr(heavy) + ' if m in sys.modules])'

def loaded_by(code):
    "Which heavy packages a fresh interpreter has loaded after running some code"
    run = subprocess.run([sys.executable, '-c', probe.format(code)], capture_output=True, text=True, encoding='utf-8', cwd=top)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1]

@pytest.mark.parametrize('module', ['config', 'text', 'lexicon', 'reward', 'data', 'checkpoint', 'flow', 'cli'])
def test_light_modules_load_nothing_heavy(module): assert loaded_by(f'import finrl_grpo.{module}') == '[]'

def test_help_loads_nothing_heavy():
    code = "sys.argv = ['finrl-grpo', '--help']\nfrom finrl_grpo.cli import main\ntry: main()\nexcept SystemExit as e: assert not e.code, e.code"
    assert loaded_by(code) == '[]'

def test_licence_is_apache(): assert 'Apache License' in (top/'LICENSE').read_text(encoding='utf-8')[:200]

def test_ci_can_be_run():
    script = top/'.ci'/'run'
    assert script.read_text(encoding='utf-8').startswith('#!/usr/bin/env bash')

def test_files_for_other_places_say_that_nobody_tried_them():
    for name in ('binder/README.md', '.devcontainer/devcontainer.json', '.github/workflows/ci.yml', '.github/workflows/docs.yml'):
        assert 'not verified' in (top/name).read_text(encoding='utf-8'), name
    assert (top/'binder'/'requirements.txt').read_text(encoding='utf-8').splitlines() == ['-c ../constraints.txt', '-e .']
