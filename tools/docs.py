"""Build the README and the site from the notebooks, without the Quarto program.

    python tools/docs.py            # README.md and _docs/
    python tools/docs.py --fresh    # the same, ignoring what an earlier build left in _proc/
    python tools/docs.py --readme   # only README.md
    python tools/docs.py --partial  # while pages are still being written: forgive links to those that are not there yet

nbdev stages the notebooks (source links and links between pages are inserted) and smalldocs renders them. Between the two, pages get
the names that nbdev links to; afterwards, finish.py takes out whatever a page would fetch from a network. Any warning is an error.
"""
import argparse,json,os,re,shutil,sys,tempfile,time
from contextlib import contextmanager
from pathlib import Path,PurePosixPath
import yaml
from nbdev.config import get_config,nbpath2html
from nbdev.quarto import refresh_quarto_yml
from nbdev import serve
from smalldocs.site import build
from check_site import check_site
from finish import finish
from llms import llms_problems,llms_text
from readme import joined,write_readmes
from show_source import ShowSource

md_link = re.compile(r'(\]\()([^)\s]+)')
widget = re.compile(r'\A(VBox|HBox|Box|GridBox|Tab|Accordion|Output|interactive|\w*Slider|Dropdown)\(')
html_link = re.compile(r'((?:href|src)=")([^"]+)')

@contextmanager
def stderr_lines():
    "Collect what this process and its workers write to stderr, then show it"
    lines, old = [], os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try: yield lines
        finally:
            os.dup2(old, 2)
            os.close(old)
            file.seek(0)
            lines += file.read().decode('utf-8', 'replace').splitlines()
            for o in lines: print(o, file=sys.stderr)

def drop_unfinished(
    cache:Path, # Notebooks as nbdev left them
)->list[str]: # Their paths in that folder
    "Take out the notebooks that did not run, so that the next build tries them again"
    def unfinished(path): return json.loads(path.read_text(encoding='utf-8'))['metadata'].get('unfinished')
    found = [p for p in cache.rglob('*.ipynb') if unfinished(p)]
    for path in found: path.unlink()
    return [p.relative_to(cache).as_posix() for p in found]

def page_names(
    folder:Path, # Staged notebooks
)->dict[str, str]: # Path of each notebook in the folder -> its path under the name that nbdev links to
    "Where each notebook goes: `00_reward.ipynb` becomes `reward.ipynb`"
    paths = [PurePosixPath(p.relative_to(folder).as_posix()) for p in sorted(folder.rglob('*.ipynb'))]
    names = {str(p):str(p.with_name(nbpath2html(p).with_suffix('.ipynb').name)) for p in paths}
    if len(set(names.values())) < len(names): raise SystemExit(f'two notebooks would become one page: {sorted(names)}')
    return names

def new_link(
    url:str, # As the author or nbdev wrote it
    page:PurePosixPath, # The notebook it stands in
    names:dict, # From `page_names`
    doc_url:str, # Where the site will be published
    source_url:str, # Where the repository's files can be read
)->str: # The link to write
    "Links to our own site and to notebooks become relative; links to other files lead to the repository"
    if url.startswith(doc_url): return '/' + url.removeprefix(doc_url)
    if re.match(r'[a-z]+:|#|/', url): return url
    path, mark, rest = url.partition('#')
    target = os.path.normpath(page.parent/path).replace(os.sep, '/')
    if target.startswith('../'): return source_url + target.removeprefix('../')
    return f'/{names[target]}{mark}{rest}' if target in names else url

def fix_text(
    text:str, # Markdown, of a cell or of an output
    *args, # Passed on to `new_link`
)->str: # The same with links that hold inside the site
    "Rewrite every link"
    for pattern in (md_link, html_link): text = pattern.sub(lambda m: m[1] + new_link(m[2], *args), text)
    return text

def still(
    out:dict, # An output
)->dict: # The same; for a widget, a word on where it is to be found
    "A page has no kernel, so a widget would show as the text of its constructor"
    data = out.get('data', {})
    if 'text/html' in data or not widget.match(joined(data.get('text/plain', ''))): return out
    return out | dict(data={'text/markdown':'*Controls: in a running notebook they stand here.*'})

def fix_notebook(
    nb:dict, # A staged notebook, changed in place
    *args, # Passed on to `new_link`
):
    "Mend links, and drop the two lines that nbdev leaves behind and smalldocs would show"
    for cell in nb['cells']:
        text = joined(cell['source'])
        if cell['cell_type'] == 'raw': text = re.sub(r'^output-file:.*\n', '', text, flags=re.M)
        if cell['cell_type'] == 'markdown': text = fix_text(re.sub(r'\A(#\|.*\n+)+', '', text), *args)
        cell['source'] = text
        if 'outputs' in cell: cell['outputs'] = [still(o) for o in cell['outputs']]
        for out in cell.get('outputs', []):
            for kind in ('text/markdown', 'text/html'):
                if kind in out.get('data', {}): out['data'][kind] = fix_text(joined(out['data'][kind]), *args)

def only_present(
    entries:list, # `contents` of a sidebar
    names:dict, # From `page_names`
)->list: # The entries whose notebooks exist, under their new names
    "Leave out of the sidebar what is not written yet"
    kept = []
    for o in entries:
        if isinstance(o, str): kept += [names[o]] if o in names else []
        elif inner := only_present(o['contents'], names): kept.append({**o, 'contents':inner})
    return kept

def listed(
    entries:list, # `contents` of a sidebar
)->set[str]: # Notebook paths
    "Every notebook that the sidebar names"
    return {p for o in entries for p in ([o] if isinstance(o, str) else listed(o['contents']))}

def fix_sidebar(
    folder:Path, # Staged notebooks
    names:dict, # From `page_names`
):
    "Give the sidebar the new names; a notebook it does not list is an error, but for a partial build"
    path = folder/'sidebar.yml'
    config = yaml.safe_load(path.read_text(encoding='utf-8'))
    sidebar = config['website']['sidebar']
    missing = sorted(set(names) - listed(sidebar['contents']))
    if missing and not os.environ.get('DOCS_PARTIAL'): raise SystemExit(f'nbs/sidebar.yml does not list {", ".join(missing)}')
    if missing: sidebar['contents'].append(dict(section='Not sorted yet', contents=missing))
    sidebar['contents'] = only_present(sidebar['contents'], names)
    path.write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False), encoding='utf-8')

def fix_settings(
    folder:Path, # Staged notebooks
):
    "Leave out what only Quarto makes: a second format, and the links to it"
    settings = {name:yaml.safe_load((folder/name).read_text(encoding='utf-8')) for name in ('_quarto.yml', 'nbdev.yml')}
    settings['_quarto.yml']['format'].pop('commonmark', None)
    settings['nbdev.yml'].pop('format-links', None)
    for name,o in settings.items(): (folder/name).write_text(yaml.safe_dump(o, allow_unicode=True, sort_keys=False), encoding='utf-8')

def stage(
    cfg, # nbdev's configuration
    fresh:bool, # Ignore what an earlier build left
)->tuple[Path, list[str], list[str]]: # Folder ready to render, warnings, notebooks left out
    "Let nbdev process the notebooks (again only what changed), and prepare a copy for smalldocs"
    refresh_quarto_yml()
    serve.FilterDefaults = ShowSource
    cache = cfg.config_path/'_proc'
    changed = max(p.stat().st_mtime for p in Path(__file__).parent.glob('*.py'))
    if cache.exists() and (fresh or cache.stat().st_mtime < changed): shutil.rmtree(cache)
    with stderr_lines() as lines: serve.proc_nbs(n_workers=2)
    left_out = drop_unfinished(cache)
    folder = cfg.config_path/'_site_src'
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(cache, folder, ignore=shutil.ignore_patterns('_docs'))
    names = page_names(folder)
    for old,new in names.items():
        path = folder/old
        nb = json.loads(path.read_text(encoding='utf-8'))
        fix_notebook(nb, PurePosixPath(old), names, cfg.doc_url, f'{cfg.git_url}/blob/{cfg.branch}/')
        path.unlink()
        (folder/new).write_text(json.dumps(nb, ensure_ascii=False), encoding='utf-8')
    fix_sidebar(folder, names)
    fix_settings(folder)
    return folder, [o for o in lines if re.match(r'\w*Warning: ', o)], left_out

def build_site(
    cfg, # nbdev's configuration
    fresh:bool=False, # Ignore what an earlier build left
)->tuple[list[str], list[str]]: # Warnings and problems, none if all is well; notebooks left out
    "Stage, render, finish and check the site, and put it in `_docs`"
    folder, warnings, left_out = stage(cfg, fresh)
    site = build(folder, quiet=True)
    finish(site.out)
    shutil.rmtree(cfg.doc_path, ignore_errors=True)
    shutil.move(site.out, cfg.doc_path)
    shutil.rmtree(folder)
    (cfg.doc_path/'llms.txt').write_text(llms_text(cfg.nbs_path, cfg.doc_url), encoding='utf-8')
    return warnings + site.warnings + check_site(cfg.doc_path) + llms_problems(cfg.doc_path, cfg.doc_url), left_out

def unwritten(
    nbs:Path, # Folder of the notebooks
)->list[str]: # Their paths in that folder
    "Pages that the sidebar lists and nobody has written yet"
    sidebar = yaml.safe_load((nbs/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']
    return sorted(o for o in listed(sidebar['contents']) if not (nbs/o).exists())

def link_to(
    notebook:str, # Path of a notebook
)->str: # Regular expression
    "What a link to a notebook or its page looks like"
    path = PurePosixPath(notebook)
    return rf'\b({path.stem}|{nbpath2html(path).stem})\.(ipynb|html)'

def main():
    "Command line"
    parser = argparse.ArgumentParser(description='Build README.md and the site in _docs/')
    parser.add_argument('--fresh', action='store_true', help='ignore what an earlier build left in _proc/')
    parser.add_argument('--readme', action='store_true', help='build only the README')
    parser.add_argument('--partial', action='store_true', help='forgive links to pages that are listed but not written yet')
    args, start = parser.parse_args(), time.time()
    cfg = get_config()
    os.chdir(cfg.config_path)
    if args.partial: os.environ['DOCS_PARTIAL'] = '1'
    problems, left_out = write_readmes(cfg.nbs_path, cfg.config_path), unwritten(cfg.nbs_path)
    if left_out: print(f'listed in the sidebar, not written yet: {", ".join(left_out)}')
    if not args.readme:
        found, more = build_site(cfg, args.fresh)
        problems, left_out = problems + found, left_out + more
    if args.partial: problems = [o for o in problems if not any(re.search(link_to(name), o) for name in left_out)]
    elif left_out: problems.append(f'{len(left_out)} pages are listed and not written; --partial forgives that')
    for o in problems: print('problem:', o)
    if problems: sys.exit(f'{len(problems)} problems')
    pages = 0 if args.readme else len(list(cfg.doc_path.rglob('*.html')))
    print(f'README and {pages} pages in {time.time()-start:.1f} s, no problems')

if __name__ == '__main__': main()
