"""Check a built site with axe-core in a headless browser: every page light, every fourth dark as well.

    python tools/check_access.py _docs PATH/axe.min.js [CHROMIUM]
"""
import html,json,re,subprocess,sys,tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

run_axe = """<script>window.addEventListener("load", () => axe.run({resultTypes: ["violations"]}).then((result) => {
const found = document.createElement("pre"); found.id = "axe-found";
found.textContent = JSON.stringify(result.violations.map((v) => [v.impact, v.id, v.nodes.length, v.nodes[0].html.slice(0, 120)]));
document.body.appendChild(found); }))</script>"""

def check_page(
    page:Path, # A page of the site
    axe:str, # axe-core, as text
    browser:str, # Chromium or Chrome
    dark:bool, # Which of the two themes
)->list[str]: # One line a serious problem
    "Run axe-core on one page"
    text = page.read_text(encoding='utf-8').replace('</body>', f'<script>{axe}</script>{run_axe}</body>')
    with tempfile.TemporaryDirectory() as profile, tempfile.NamedTemporaryFile('w', suffix='.html', dir=page.parent, delete=False, encoding='utf-8') as copy:
        copy.write(text)
        copy.close()
        scheme = f'--blink-settings=preferredColorScheme={0 if dark else 1}'
        command = [browser, '--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={profile}', scheme, '--allow-file-access-from-files',
            '--virtual-time-budget=20000', '--window-size=1400,1000', '--dump-dom', Path(copy.name).as_uri()]
        try: dom = subprocess.run(command, capture_output=True, text=True, encoding='utf-8', timeout=180).stdout
        finally: Path(copy.name).unlink()
    found = re.search(r'<pre id="axe-found"[^>]*>(.*?)</pre>', dom, flags=re.S)
    where = f'{page.name} ({"dark" if dark else "light"})'
    if found is None: return [f'{where}: axe-core gave no result']
    return [f'{where}: {name}, {n} places, such as {example}' for impact,name,n,example in json.loads(html.unescape(found[1])) if impact in ('serious', 'critical')]

def main():
    "Command line"
    root, axe, browser = Path(sys.argv[1]), Path(sys.argv[2]).read_text(encoding='utf-8'), (sys.argv[3:] or ['chromium'])[0]
    pages = sorted(root.rglob('*.html'))
    jobs = [(page, axe, browser, False) for page in pages] + [(page, axe, browser, True) for page in pages[::4]]
    with ThreadPoolExecutor(2) as pool: problems = [o for found in pool.map(lambda job: check_page(*job), jobs) for o in found]
    for o in problems: print(o)
    print(f'{len(jobs)} views, {len(problems)} serious problems')
    sys.exit(1 if problems else 0)

if __name__ == '__main__': main()
