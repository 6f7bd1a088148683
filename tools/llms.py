"The site for language models: llms.txt names every page in reading order, with its Markdown copy and what it is about."
import json,re
from pathlib import Path,PurePosixPath
import yaml
from nbdev.config import nbpath2html
from readme import directive,joined

def about(
    path:Path, # A notebook
)->tuple[str, str, str]: # Title, summary, and the overview where there is one
    "What a page says of itself at its top"
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    texts = [joined(o['source']) for o in cells if o['cell_type'] == 'markdown']
    title, summary = next(m.groups() for m in (re.match(r'# (.+)\s+> (.+)', o) for o in texts) if m)
    return title, summary, next((directive.sub('', o).strip() for o in texts if o.startswith('#| export')), '')

def page_url(
    name:str, # Path of a notebook in its folder
    doc_url:str, # Where the site is published
)->str: # Of the page's Markdown copy
    "Where a page can be read as plain text"
    return doc_url + PurePosixPath(name).with_name(nbpath2html(PurePosixPath(name)).name).as_posix() + '.md'

def llms_text(
    nbs:Path, # Folder of the notebooks
    doc_url:str, # Where the site is published
)->str: # Markdown, in the form that llmstxt.org proposes
    "The index, in the order of the sidebar"
    title, summary, overview = about(nbs/'index.ipynb')
    parts = [f'# {title}\n\n> {summary}\n\n{overview}']
    for section in yaml.safe_load((nbs/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']:
        pages = [o for o in section['contents'] if (nbs/o).exists()]
        lines = [f'- [{about(nbs/o)[0]}]({page_url(o, doc_url)}): {about(nbs/o)[1]}' for o in pages]
        parts.append(f'## {section["section"]}\n\n' + '\n'.join(lines))
    return '\n\n'.join(parts) + '\n'

def llms_problems(
    root:Path, # The built site, with its llms.txt
    doc_url:str, # Where it will be published
)->list[str]: # One line a problem
    "Pages that llms.txt names and the site does not have"
    named = re.findall(r'\]\(([^)]+)\)', (root/'llms.txt').read_text(encoding='utf-8'))
    return [f'llms.txt: {o} does not exist' for o in named if not (root/o.removeprefix(doc_url)).is_file()]
