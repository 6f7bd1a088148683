"What a rendered page still needs: MathML for TeX, links on the map, our own search, and nothing fetched from a network."
import html,os,re,shutil
from pathlib import Path
from latex2mathml.converter import convert
from check_site import read_page

landmarks = {'class="navbar':'Site', 'class="quarto-secondary-nav"':'Place', 'id="quarto-sidebar"':'Pages', 'id="TOC"':'On this page'}
languages = {'guide_zh_tw':'zh-Hant'} # Pages that are not in English
elsewhere = re.compile(r'<(link|script)[^>]*(?:href|src)="https?://[^"]*(?:katex|mermaid|jszip)[^>]*>(?:</script>)?')

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
    def room(match):
        page = f'{match[1]}.html'
        return f'<a href="{up}/{page}">{match[0]}</a>' if (out/page).exists() else match[0]
    text = re.sub(r'<g data-room="(\w+)">.*?</g>', room, text, flags=re.S)
    return re.sub(r'(<div class="flow-map"[^>]*><svg[^>]*) role="img"', r'\1 role="group"', text)

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
    for start,name in landmarks.items(): text = text.replace(f'<nav {start}', f'<nav aria-label="{name}" {start}')
    text = re.sub(r'(<i class="bi [^"]*") role="img"', r'\1 aria-hidden="true"', text)
    text = re.sub(r'(data-bs-target="(#quarto-sidebar-section-\d+)") role="navigation"', r'\1 href="\2" role="button"', text)
    return re.sub(r'<(pre|div class="(?:flow-map|sd-table)")(?![^>]*tabindex)', r'<\1 tabindex="0"', text)

def finish_page(
    path:Path, # A page
    out:Path, # Top of the site
):
    "MathML for TeX, links on the map, alt texts, our own search; out with the scripts and styles of other hosts"
    text = path.read_text(encoding='utf-8')
    if path.stem in languages: text = re.sub(r'(<html[^>]*\blang=")[^"]*', rf'\g<1>{languages[path.stem]}', text, count=1)
    text = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', mathml, text, flags=re.S)
    text = elsewhere.sub('', text)
    text = text.replace('site_libs/fuse/fuse.min.js', 'site_libs/search.js')
    text = re.sub(r'<img(?![^>]*\balt=)([^>]*)>(.*?(?:</figure>|</div>|</p>))', alt_text, text, flags=re.S)
    path.write_text(accessible(link_rooms(text, path, out)), encoding='utf-8')

def mend_symbols(
    out:Path, # The rendered site
):
    "nbdev links every name in backticks; one without an entry of its own (a method, a helper) leads to its class or page"
    ids = {p.resolve():set(read_page(p).ids) for p in out.rglob('*.html')}
    for path in ids:
        def mend(match):
            target = (path.parent/match[1]).resolve() if match[1] else path
            if target not in ids or match[2] in ids[target]: return match[0]
            owner = match[2].rpartition('.')[0]
            link = match[1] + (f'#{owner}' if owner in ids[target] else '')
            return f'<a href="{link}"><code>' if link else '<a><code>'
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
