"Turn notebooks into Markdown files at the top of the repository: `nbs/index.ipynb` becomes `README.md`, the guide `README.zh-TW.md`."
import base64,json,os,re
from pathlib import Path

readmes = {'index.ipynb':'README.md', 'guide_zh_tw.ipynb':'README.zh-TW.md'}
directive = re.compile(r'^#\|.*\n?', re.M)

def joined(
    text, # A notebook stores text as a string or as a list of lines
)->str: # One string
    "Notebook text as one string"
    return text if isinstance(text, str) else ''.join(text)

def fenced(
    text:str, # What goes between the fences
    language:str='', # For highlighting
)->str: # Markdown
    "A code block, its fence longer than any inside"
    longest = max(map(len, re.findall(r'`{3,}', text)), default=2)
    fence = '`' * max(3, longest+1)
    return f'{fence}{language}\n{text.rstrip()}\n{fence}'

def picture(
    data:dict, # The forms in which a notebook stored one output
)->tuple[str, bytes, str]|None: # Suffix, content and alt text, None if the output is no picture
    "An output as a picture file"
    alt = joined(data.get('text/plain', 'Figure')).strip().splitlines()[0]
    if 'image/svg+xml' in data: return '.svg', joined(data['image/svg+xml']).encode('utf-8'), alt
    if 'image/png' in data: return '.png', base64.b64decode(joined(data['image/png'])), 'Figure'

def output_text(
    out:dict, # One output of a cell
    keep=None, # Called with suffix and content of a picture; returns the path to link
    caption:str='', # What a picture shows
)->str: # Markdown, '' for a picture that is not kept
    "An output as a reader of plain Markdown can see it"
    if out['output_type'] == 'stream': return fenced(joined(out['text']))
    data = out.get('data', {})
    if 'text/markdown' in data: return joined(data['text/markdown']).strip()
    if image := picture(data): return f'![{caption or image[2]}]({keep(*image[:2])})' if keep else ''
    return fenced(joined(data['text/plain'])) if 'text/plain' in data else ''

def cell_text(
    cell:dict, # A notebook cell
    keep=None, # See `output_text`
)->str: # Markdown, '' for a hidden cell
    "One cell as Markdown"
    text = joined(cell['source'])
    if cell['cell_type'] == 'markdown': return directive.sub('', text).strip()
    marks = ' '.join(directive.findall(text))
    if cell['cell_type'] != 'code' or re.search(r'\bhide\b|include: *false|readme: *false|default_exp', marks): return ''
    code = directive.sub('', text).strip()
    parts = [] if re.search(r'echo: *false', marks) or not code else [fenced(code, 'python')]
    found = re.search(r"^#\| fig-cap: *['\"]?(.*?)['\"]?$", text, flags=re.M)
    return '\n\n'.join(parts + [o for o in (output_text(out, keep, found[1] if found else '') for out in cell['outputs']) if o])

def local_links(
    text:str, # Markdown with links that hold beside the notebook
    folder:str, # The notebooks' folder, seen from where the file will lie
)->str: # The same with links that hold there
    "Links to notebooks and pictures, seen from the top of the repository; a notebook that becomes a file there is that file"
    def move(match): return match[1] + (readmes.get(match[2]) or os.path.normpath(os.path.join(folder, match[2])).replace(os.sep, '/'))
    return re.sub(r'(\]\()(?![a-z]+:|#|/)([^)\s]+)', move, text)

def is_code(
    text:str, # Markdown of one cell
)->bool: # Is it one block of Python and nothing else?
    "A code cell without output"
    return text.startswith('```python\n') and text.count('```') == 2

def join_code(
    texts:list[str], # Markdown of each cell
)->str: # One text
    "Cells one after the other, code cells without output between them as one block"
    whole = ''
    for before,text in zip(['', *texts], texts):
        if is_code(before) and text.startswith('```python\n'): whole = whole.removesuffix('```') + '\n' + text.removeprefix('```python\n')
        else: whole += ('\n\n' if whole else '') + text
    return whole

def notebook_markdown(
    path:Path, # A notebook
    folder:str, # Its folder, seen from where the file will lie
)->tuple[str, dict[str, bytes]]: # The whole file, and its pictures by path beside the notebook
    "A notebook as one Markdown file, with a note on where it comes from"
    pictures = {}
    def keep(suffix, content):
        name = f'images/{path.stem}-{len(pictures)+1}{suffix}'
        pictures[name] = content
        return name
    nb = json.loads(path.read_text(encoding='utf-8'))
    body = join_code([o for o in (cell_text(cell, keep) for cell in nb['cells']) if o])
    note = f'<!-- Made from {folder}/{path.name} by tools/docs.py: edit the notebook. -->'
    return f'{note}\n\n{local_links(body, folder)}\n', pictures

def missing_targets(
    text:str, # Markdown
    top:Path, # The folder its links start from
)->list[str]: # Paths that do not exist
    "Links of a Markdown file that lead nowhere"
    targets = re.findall(r'\]\((?![a-z]+:|#)([^)\s#]+)', text)
    return [o for o in dict.fromkeys(targets) if not (top/o).exists()]

def write_readmes(
    nbs:Path, # Folder of the notebooks
    top:Path, # Top of the repository
)->list[str]: # Problems, none if all is well
    "Write each Markdown file whose notebook exists"
    problems = []
    for source,target in readmes.items():
        if not (nbs/source).exists(): continue
        text, pictures = notebook_markdown(nbs/source, nbs.relative_to(top).as_posix())
        (top/target).write_text(text, encoding='utf-8')
        for name,content in pictures.items():
            (nbs/name).parent.mkdir(exist_ok=True)
            if not (nbs/name).exists() or (nbs/name).read_bytes() != content: (nbs/name).write_bytes(content)
        problems += [f'{target}: {o} does not exist' for o in missing_targets(text, top)]
    return problems
