"""The site: what the builder does to a page, and what the link checker finds. The whole build is checked by `.ci/run`."""
import json,re,subprocess,sys
from pathlib import Path
import pytest

tools = Path(__file__).parent.parent/'tools'
sys.path.insert(0, str(tools))
from check_site import check_site
from docs import still
from finish import finish_page
from llms import llms_problems,llms_text
from readme import cell_text,fenced,local_links,missing_targets,notebook_markdown,readmes

TOP = '<html lang="en"><title>Page</title>'

@pytest.fixture
def site(tmp_path):
    "Two pages that are in order"
    (tmp_path/'a.html').write_text(f'{TOP}<h2 id="top">A</h2><a href="b.html#end">b</a><a href="#top">a</a><ul><li>1<li>2</ul><br><svg><path d=""/></svg></html>', encoding='utf-8')
    (tmp_path/'b.html').write_text(f'{TOP}<p id="end"><a href="./a.html">a</a><a href="https://example.org">out</a></html>', encoding='utf-8')
    (tmp_path/'s.css').write_text('@import "t.css"; p { background: url(data:image/png;base64,AA) }', encoding='utf-8')
    (tmp_path/'t.css').write_text('', encoding='utf-8')
    return tmp_path

def test_a_good_site_has_no_problems(site): assert check_site(site) == []

@pytest.mark.parametrize('page,word', [
    (TOP + '<a href="gone.html">x</a>', 'no such file'),
    (TOP + '<a href="b.html#gone">x</a>', 'no such place'),
    (TOP + '<img src="gone.png" alt="x">', 'no such file'),
    (TOP + '<img src="data:image/png;base64,AA">', 'without alt text'),
    (TOP + '<script src="https://cdn.example.org/x.js"></script>', 'from the network'),
    (TOP + '<link rel="stylesheet" href="//fonts.example.org/x.css">', 'from the network'),
    (TOP + '<p id="x"><p id="x">', 'used twice'),
    (TOP + '<div><p>x', '<div> is not closed'),
    (TOP + '<ul><li><em>x</ul>', '<em> is not closed'),
    (TOP + '<p>x</p></div>', '</div> closes nothing'),
    (TOP + '<div/>', 'does not close itself'),
    (TOP + '<a href="b.html"><b><a>x</a></b></a>', 'link inside a link'),
    (TOP + '<p class="a" class="b">x', 'given twice'),
    (TOP + '<label for="gone">x</label>', 'for names gone'),
    (TOP + '<h1>a</h1><h1>b</h1>', '2 headings of the first level'),
    ('<html lang="en"><p>x', '0 titles'),
    ('<html><title>x</title><p>x', 'no language')])
def test_each_fault_is_found(site, page, word):
    (site/'a.html').write_text(page, encoding='utf-8')
    found = check_site(site)
    assert len(found) == 1 and word in found[0] and found[0].startswith('a.html')

def test_stylesheets_load_nothing_from_elsewhere(site):
    (site/'s.css').write_text('@import url("https://fonts.example.org/x"); p { background: url(gone.png) }', encoding='utf-8')
    assert [o.split(':')[0] for o in check_site(site)] == ['s.css', 's.css']

def test_a_site_without_pages_is_a_fault(tmp_path): assert check_site(tmp_path)

def test_the_checker_exits_non_zero(site):
    run = lambda: subprocess.run([sys.executable, tools/'check_site.py', site], capture_output=True, text=True, encoding='utf-8')
    assert run().returncode == 0
    (site/'a.html').write_text(TOP + '<a href="gone.html">x</a>', encoding='utf-8')
    assert run().returncode == 1

def code(source, *outputs): return dict(cell_type='code', source=source, outputs=list(outputs))
def stream(text): return dict(output_type='stream', text=text)

def test_readme_cells():
    assert cell_text(code('#| hide\nx')) == ''
    assert cell_text(code('print(1)', stream('1\n'))) == '```python\nprint(1)\n```\n\n```\n1\n```'
    assert cell_text(code('#| echo: false\nf()', stream('1\n'))) == '```\n1\n```'
    assert cell_text(dict(cell_type='markdown', source=['#| export\n', '你好'])) == '你好'
    table = dict(output_type='execute_result', data={'text/markdown':'| a |', 'text/plain':'T'})
    assert cell_text(code('#| echo: false\nt', table)) == '| a |'
    assert cell_text(code('#| echo: false\n#| readme: false\nt', table)) == ''

def test_fences_are_longer_than_what_they_hold(): assert fenced('```\nx\n```').startswith('````\n')

def test_readme_links_start_from_the_top(tmp_path):
    text = local_links('[a](03_reward.ipynb) [b](../CHANGELOG.md) [c](https://x.y/z) [d](#here) ![p](images/p.png)', 'nbs')
    assert text == '[a](nbs/03_reward.ipynb) [b](CHANGELOG.md) [c](https://x.y/z) [d](#here) ![p](nbs/images/p.png)'
    (tmp_path/'CHANGELOG.md').write_text('', encoding='utf-8')
    assert missing_targets(text, tmp_path) == ['nbs/03_reward.ipynb', 'nbs/images/p.png']

@pytest.mark.parametrize('source,target', readmes.items())
def test_readmes_are_their_notebooks(repo, source, target):
    text, pictures = notebook_markdown(repo/'nbs'/source, 'nbs')
    assert (repo/target).read_text(encoding='utf-8') == text
    assert missing_targets(text, repo) == []
    for name,content in pictures.items(): assert (repo/'nbs'/name).read_bytes() == content

def test_readmes_lead_to_each_other(repo):
    for target,other in zip(readmes.values(), reversed(readmes.values())):
        assert f']({other})' in (repo/target).read_text(encoding='utf-8')[:600]

def test_a_notebook_that_is_a_readme_is_linked_as_such():
    assert local_links('[a](index.ipynb) [b](guide_zh_tw.ipynb) [c](00_config.ipynb)', 'nbs') == '[a](README.md) [b](README.zh-TW.md) [c](nbs/00_config.ipynb)'

@pytest.mark.parametrize('name,language', [('guide_zh_tw', 'zh-Hant'), ('index', 'en')])
def test_pages_name_their_language(tmp_path, name, language):
    page = tmp_path/f'{name}.html'
    page.write_text('<html xmlns="x" lang="en"><p>你好</p></html>', encoding='utf-8')
    finish_page(page, tmp_path)
    assert f' lang="{language}">' in page.read_text(encoding='utf-8')

def test_pictures_become_files_and_code_runs_together(tmp_path):
    shown = dict(output_type='display_data', data={'image/png':'AAAA', 'text/plain':'<Figure>'})
    cells = [code('import a'), code('a.b()'), code('a.plot()', shown), dict(cell_type='markdown', source='end')]
    (tmp_path/'x.ipynb').write_text(json.dumps(dict(cells=cells)), encoding='utf-8')
    text, pictures = notebook_markdown(tmp_path/'x.ipynb', 'nbs')
    assert text.split('\n\n', 1)[1] == '```python\nimport a\n\na.b()\n\na.plot()\n```\n\n![Figure](nbs/images/x-1.png)\n\nend\n'
    assert pictures == {'images/x-1.png':b'\0\0\0'}

def test_llms_txt_names_every_page_in_reading_order(repo, tmp_path):
    text = llms_text(repo/'nbs', 'https://x.y/')
    listed = [o for o in re.findall(r'- ([\w/]+\.ipynb)', (repo/'nbs'/'sidebar.yml').read_text(encoding='utf-8')) if (repo/'nbs'/o).exists()]
    named = re.findall(r'\]\(https://x\.y/([\w/]+)\.html\.md\): \S', text)
    assert [o.rpartition('/')[2] for o in named] == [re.sub(r'^\d+[a-z]?_', '', Path(o).stem) for o in listed]
    for o in named[1:]:
        (tmp_path/o).parent.mkdir(exist_ok=True)
        (tmp_path/f'{o}.html.md').write_text('', encoding='utf-8')
    (tmp_path/'llms.txt').write_text(text, encoding='utf-8')
    assert llms_problems(tmp_path, 'https://x.y/') == [f'llms.txt: https://x.y/{named[0]}.html.md does not exist']

def test_widgets_do_not_show_as_code():
    shown = lambda **data: still(dict(output_type='execute_result', data={k.replace('_', '/'):v for k,v in data.items()}))['data']
    assert 'running notebook' in shown(text_plain=["VBox(children=(Text(value='x'),))"])['text/markdown']
    for kept in (dict(text_plain='Dataset(5 examples)'), dict(text_plain='VBox()', text_html='<p>x')): assert 'text/markdown' not in shown(**kept)

def test_every_notebook_is_in_the_sidebar(repo):
    sidebar = (repo/'nbs'/'sidebar.yml').read_text(encoding='utf-8')
    listed = re.findall(r'- ([\w/]+\.ipynb)', sidebar)
    written = {p.relative_to(repo/'nbs').as_posix() for p in (repo/'nbs').rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(repo).parts)}
    assert written - set(listed) == set() and len(listed) == len(set(listed))

def test_pages_do_not_share_a_name(repo):
    names = [re.sub(r'^\d+[a-z]?_', '', p.name) for p in (repo/'nbs').glob('*.ipynb')]
    assert len(names) == len(set(names))

def test_notebooks_open_as_they_should(repo):
    for path in (repo/'nbs').glob('[0-9]*.ipynb'):
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        first, second = (''.join(c['source']) for c in cells[:2])
        exports = any(''.join(c['source']).startswith('#| export') for c in cells if c['cell_type']=='code')
        assert first.startswith('#| default_exp ') == exports, path.name
        if not exports: second = first
        assert re.match(r'# .+\n\s*\n?> .+', second), f'{path.name}: title and one sentence'

def test_markdown_cells_hold_whole_directives(repo):
    for path in (repo/'nbs').rglob('*.ipynb'):
        texts = [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'markdown']
        assert not [o[:40] for o in texts if o.startswith('| export')], f'{path.name}: a `#| export` has lost its `#`'

@pytest.mark.browser
@pytest.mark.parametrize('query,first', [('保證獲利', 'promise'), ('flow_map', 'flow_map'), ('reward negation', 'negation'), ('REWARD', 'reward'), ('沒有這個詞', '')])
def test_search_finds_chinese_and_english(browser, tmp_path, query, first):
    entries = [dict(title='A reward', section='', text='all about reward', href='reward'), dict(title='A reward', section='promises', text='穩賺不賠、保證獲利都是承諾', href='promise'),
        dict(title='A reward', section='negation', text='not a promise', href='negation'), dict(title='Flow', section='flow_map', text='draws', href='flow_map'),
        dict(title='Other', section='', text='uses flow_map(room)', href='other')]
    script = f'document.body.textContent = new Fuse({json.dumps(entries)}).search({json.dumps(query)}, {{limit: 5}}).map((o) => o.item.href)[0] || "";'
    (tmp_path/'page.html').write_text(f'<meta charset="utf-8"><body><script>{(tools/"search.js").read_text(encoding="utf-8")}{script}</script></body>', encoding='utf-8')
    command = [browser, '--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={tmp_path/"profile"}', '--dump-dom', (tmp_path/'page.html').as_uri()]
    page = subprocess.run(command, capture_output=True, text=True, encoding='utf-8', timeout=120).stdout
    assert re.search(r'<body>(.*?)</body>', page, flags=re.S)[1].strip() == first
