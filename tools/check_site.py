"""Check a built site: every internal link, picture and anchor exists, tags close, nothing is fetched from a network, basic accessibility holds.

    python tools/check_site.py _docs
"""
import re,sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote,urlsplit

LOADING = {'script', 'img', 'iframe', 'source', 'video', 'audio', 'embed', 'object', 'input'}
LOADING_RELS = {'stylesheet', 'icon', 'shortcut', 'preload', 'modulepreload', 'prefetch', 'preconnect', 'manifest'}

VOID = set('area base br col embed hr img input link meta source track wbr'.split()) # Have no end
OPEN_END = set('html head body p li dt dd tr td th thead tbody tfoot option optgroup colgroup'.split()) # Need none
REFERRING = {'for', 'aria-labelledby', 'aria-describedby', 'aria-controls'} # Name ids of the same page

class PageReader(HTMLParser):
    "Collect a page's ids, what it links to and what it loads, and whether its tags close"
    def __init__(self):
        super().__init__()
        self.ids, self.links, self.loads, self.refers, self.problems, self.lang = [], [], [], [], [], ''
        self.open, self.titles, self.headings = [], 0, []

    def handle_starttag(self, tag, attrs):
        "One more open element"
        self.look(tag, attrs)
        if tag == 'a' and any(o == 'a' for o,_ in self.open): self.problems.append(f'line {self.getpos()[0]}: a link inside a link')
        if tag not in VOID: self.open.append((tag, self.getpos()[0]))

    def handle_startendtag(self, tag, attrs):
        "SVG and MathML close in place; in HTML only elements without an end may"
        self.look(tag, attrs)
        if tag not in VOID and not any(o in ('svg', 'math') for o,_ in self.open): self.problems.append(f'line {self.getpos()[0]}: <{tag}/> does not close itself')

    def handle_endtag(self, tag):
        "Close the innermost element of that name, and report what stood open inside"
        if tag in VOID: return
        if not any(o == tag for o,_ in self.open):
            if tag != 'p': self.problems.append(f'line {self.getpos()[0]}: </{tag}> closes nothing')
            return
        while (last := self.open.pop())[0] != tag: self.unclosed(*last)

    def unclosed(self, tag, line):
        "Report an element that was left open, where that matters"
        if tag not in OPEN_END: self.problems.append(f'line {line}: <{tag}> is not closed')

    def close(self):
        "The end of the page closes everything"
        super().close()
        while self.open: self.unclosed(*self.open.pop())

    def look(self, tag, attrs):
        "Keep what the checks below look at"
        a = {k:v or '' for k,v in attrs}
        if len(a) < len(attrs): self.problems.append(f'line {self.getpos()[0]}: an attribute of <{tag}> is given twice')
        self.titles += tag == 'title' and not any(o == 'svg' for o,_ in self.open)
        if re.fullmatch('h[1-6]', tag): self.headings.append(int(tag[1]))
        for name in REFERRING & set(a): self.refers += [(name, o) for o in a[name].split()]
        if 'id' in a: self.ids.append(a['id'])
        if tag == 'a' and 'name' in a: self.ids.append(a['name'])
        if tag == 'html': self.lang = a.get('lang', '')
        if tag == 'img' and 'alt' not in a: self.problems.append(f'picture without alt text: {a.get("src", "")[:60]}')
        if tag in ('a', 'area') and 'href' in a: self.links.append(a['href'])
        if tag in LOADING: self.loads += [a[k] for k in ('src', 'data', 'poster') if k in a]
        if tag == 'link' and LOADING_RELS & set(a.get('rel', '').split()): self.loads.append(a.get('href', ''))

def read_page(
    path:Path, # An HTML file
)->PageReader: # What it holds
    "Parse one page"
    reader = PageReader()
    reader.feed(path.read_text(encoding='utf-8'))
    reader.close()
    return reader

def is_external(
    url:str, # As written in the page
)->bool: # Does it name another place?
    "A URL with a scheme or a host"
    return bool(re.match(r'[a-zA-Z][\w+.-]*:|//', url))

def broken_target(
    url:str, # A relative URL
    page:Path, # The page it stands on
    ids:dict, # Each page's ids, by resolved path
)->str: # What is wrong, or ''
    "Say why a link inside the site leads nowhere"
    parts = urlsplit(url)
    target = page if not parts.path else (page.parent/unquote(parts.path)).resolve()
    if target.is_dir(): target = target/'index.html'
    if not target.exists(): return 'no such file'
    anchor = unquote(parts.fragment)
    if anchor and target in ids and anchor not in ids[target]: return 'no such place on the page'
    return ''

def style_problems(
    root:Path, # The built site
)->list[str]: # One line a problem
    "What stylesheets load from elsewhere, or load and do not find"
    found = []
    for path in sorted(root.rglob('*.css')):
        css = path.read_text(encoding='utf-8')
        for url in re.findall(r'@import\s+(?:url\()?["\']?([^"\')\s]+)|url\(["\']?([^"\')]+)', css):
            url = url[0] or url[1]
            if url.startswith('data:') or url.startswith('#'): continue
            if is_external(url): found.append(f'{path.relative_to(root)}: loads {url} from the network')
            elif not (path.parent/unquote(urlsplit(url).path)).exists(): found.append(f'{path.relative_to(root)}: {url} does not exist')
    return found

def page_problems(
    path:Path, # A page
    page:PageReader, # What it holds
    ids:dict, # Each page's ids, by resolved path
)->list[str]: # One line a problem, without the page's name
    "Check one page"
    found = list(page.problems)
    if not page.lang: found.append('no language on <html>')
    if page.titles != 1: found.append(f'{page.titles} titles, not one')
    if page.headings.count(1) > 1: found.append(f'{page.headings.count(1)} headings of the first level')
    found += [f'{name} names {o}, which is not there' for name,o in page.refers if o not in page.ids]
    found += [f'id used twice: {o}' for o in sorted({o for o in page.ids if page.ids.count(o) > 1})]
    found += [f'loads {o[:80]} from the network' for o in page.loads if is_external(o) and not o.startswith('data:')]
    inside = [o for o in page.links + page.loads if o and not is_external(o)]
    found += [f'{o}: {why}' for o in dict.fromkeys(inside) if (why := broken_target(o, path, ids))]
    return found

def check_site(
    root:Path, # The built site
)->list[str]: # One line a problem
    "Check every page and stylesheet of a site"
    root = Path(root).resolve()
    pages = {p:read_page(p) for p in sorted(root.rglob('*.html'))}
    if not pages: return [f'{root.name}: no pages']
    ids = {p:set(o.ids) for p,o in pages.items()}
    found = [f'{p.relative_to(root)}: {o}' for p,page in pages.items() for o in page_problems(p, page, ids)]
    return found + style_problems(root)

if __name__ == '__main__':
    problems = check_site(Path(sys.argv[1] if len(sys.argv) > 1 else '_docs'))
    for o in problems: print(o)
    sys.exit(f'{len(problems)} problems' if problems else 0)
