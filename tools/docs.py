"""Build the README and the site from the notebooks, without the Quarto program.

    python tools/docs.py            # README.md and _docs/
    python tools/docs.py --fresh    # the same, ignoring what an earlier build left in _proc/
    python tools/docs.py --readme   # only README.md
    python tools/docs.py --partial  # while pages are still being written: links to pages that only the sidebar knows are no error

nbdev stages the notebooks (its signatures and links are inserted), smalldocs renders them, and this file does what lies between: pages get
the names that nbdev links to, TeX becomes MathML, and whatever a page would fetch from a network is taken out. Any warning is an error.
"""
import argparse,html,json,os,re,shutil,sys,tempfile,time
from contextlib import contextmanager
from pathlib import Path,PurePosixPath
import yaml
from latex2mathml.converter import convert
from nbdev.config import get_config,nbpath2html,update_llms_txt
from nbdev.quarto import refresh_quarto_yml
from nbdev import serve
from smalldocs.site import build
from check_site import check_site,read_page
from readme import joined,write_readmes
from show_source import ShowSource

md_link = re.compile(r'(\]\()([^)\s]+)')
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
    found = [p for p in cache.rglob('*.ipynb') if json.loads(p.read_text(encoding='utf-8'))['metadata'].get('unfinished')]
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
    "Links to our own site and to notebooks become relative; links to other files of the repository go to the repository"
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
        if isinstance(o, str) and o in names: kept.append(names[o])
        elif not isinstance(o, str) and (inner := only_present(o['contents'], names)): kept.append({**o, 'contents':inner})
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
    for name,drop in [('_quarto.yml', lambda c: c['format'].pop('commonmark', None)), ('nbdev.yml', lambda c: c.pop('format-links', None))]:
        config = yaml.safe_load((folder/name).read_text(encoding='utf-8'))
        drop(config)
        (folder/name).write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False), encoding='utf-8')

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

def mathml(
    match:re.Match, # A `span.math` with its TeX
)->str: # MathML, which needs no script and no network
    "Turn one formula into MathML"
    tex = html.unescape(match[2]).strip()
    return convert(tex, display='block' if match[1] == 'display' else 'inline')

def link_rooms(
    text:str, # A page
    path:Path, # Where it lies
    out:Path, # Top of the site
)->str: # The page with a map that leads to the other pages
    "Make each room on the map of the flow a link to its page"
    up = os.path.relpath(out, path.parent).replace(os.sep, '/')
    def room(match): return f'<a href="{up}/{match[1]}.html">{match[0]}</a>' if (out/f'{match[1]}.html').exists() else match[0]
    text = re.sub(r'<g data-room="(\w+)">.*?</g>', room, text, flags=re.S)
    return re.sub(r'(<svg[^>]*viewBox="0 0 752 212"[^>]*) role="img"', r'\1 role="group"', text)

def alt_text(
    match:re.Match, # A picture, and all that follows it in its figure
)->str: # The same with an alt text
    "A plot's caption says what it shows"
    caption = re.search(r'<figcaption[^>]*>(.*?)</figcaption>', match[2], flags=re.S)
    words = re.sub(r'<[^>]+>', '', caption[1]).strip() if caption else 'Figure; the text around it says what it shows'
    return f'<img alt="{html.escape(words, quote=True)}"{match[1]}>{match[2]}'

def accessible(
    text:str, # A page
)->str: # The same, usable from a keyboard and with a screen reader
    "Mend what smalldocs leaves: unnamed regions, switches that are no buttons, boxes that scroll and cannot be reached"
    text = text.replace('<nav class="navbar', '<nav aria-label="Site" class="navbar').replace('<nav class="quarto-secondary-nav"', '<nav aria-label="Place" class="quarto-secondary-nav"')
    text = text.replace('<nav id="quarto-sidebar"', '<nav aria-label="Pages" id="quarto-sidebar"').replace('<nav id="TOC"', '<nav aria-label="On this page" id="TOC"')
    text = re.sub(r'(<i class="bi [^"]*") role="img"', r'\1 aria-hidden="true"', text)
    text = re.sub(r'(data-bs-target="(#quarto-sidebar-section-\d+)") role="navigation"', r'\1 href="\2" role="button"', text)
    return re.sub(r'<(pre|div class="flow-map")(?![^>]*tabindex)', r'<\1 tabindex="0"', text)

def finish_page(
    path:Path, # A page
    out:Path, # Top of the site
):
    "MathML for TeX, links on the map, alt texts, our own search; out with the scripts and styles of other hosts"
    text = path.read_text(encoding='utf-8')
    text = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', mathml, text, flags=re.S)
    text = re.sub(r'<(link|script)[^>]*(?:href|src)="https?://[^"]*(?:katex|mermaid|jszip)[^>]*>(?:</script>)?', '', text)
    text = text.replace('site_libs/fuse/fuse.min.js', 'site_libs/search.js')
    text = re.sub(r'<img(?![^>]*\balt=)([^>]*)>(.*?(?:</figure>|</div>|</p>))', alt_text, text, flags=re.S)
    path.write_text(accessible(link_rooms(text, path, out)), encoding='utf-8')

def mend_symbols(
    out:Path, # The rendered site
):
    "nbdev links every name in backticks; a name without an entry of its own (a method, a private helper) leads to its class or page"
    ids = {p.resolve():set(read_page(p).ids) for p in out.rglob('*.html')}
    for path in ids:
        def mend(match):
            target = (path.parent/match[1]).resolve() if match[1] else path
            if target not in ids or match[2] in ids[target]: return match[0]
            owner = match[2].rpartition('.')[0]
            return f'<a href="{match[1]}{"#" + owner if owner in ids[target] else ""}"><code>' if match[1] else '<a><code>'
        text = path.read_text(encoding='utf-8')
        path.write_text(re.sub(r'<a href="([\w./-]*)#([\w.]+)"><code>', mend, text), encoding='utf-8')

def finish(
    out:Path, # The rendered site
):
    "What has to be done to pages and styles after rendering"
    for path in out.rglob('*.html'): finish_page(path, out)
    mend_symbols(out)
    for path in out.rglob('*.css'):
        text = path.read_text(encoding='utf-8')
        path.write_text(re.sub(r'@import\s+url\(["\']?https?://[^)]*\);?', '', text), encoding='utf-8')
    for path in out.rglob('*.llms.md'):
        new = path.rename(path.with_name(path.name.replace('.llms.md', '.html.md')))
        new.write_text(new.read_text(encoding='utf-8').replace('.llms.md', '.html.md'), encoding='utf-8')
    shutil.rmtree(out/'site_libs'/'fuse', ignore_errors=True)
    shutil.copy(Path(__file__).with_name('search.js'), out/'site_libs')
    (out/'.nojekyll').write_text('', encoding='utf-8')

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
    update_llms_txt()
    llms = cfg.nbs_path/'llms.txt'
    if llms.exists(): shutil.copy(llms, cfg.doc_path)
    return warnings + site.warnings + check_site(cfg.doc_path), left_out

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
    what = 'README' if args.readme else f'README and {len(list(cfg.doc_path.rglob("*.html")))} pages in {cfg.doc_path.name}/'
    print(f'{what} in {time.time()-start:.1f} s, no problems')

if __name__ == '__main__': main()
