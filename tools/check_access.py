"""Check a built site with axe-core in a headless browser: every page light, every fourth dark as well.

    python tools/check_access.py _docs PATH/axe.min.js [CHROMIUM]
"""
import html,json,re,subprocess,sys,tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

run_axe = """<script>window.addEventListener("load", () => axe.run({resultTypes: ["violations"]}).then((result) => {
const found = document.createElement("pre"); found.id = "axe-found";
const row = (v) => [v.impact, v.id, v.nodes.length, v.nodes[0].html.slice(0, 120)];
found.textContent = JSON.stringify(result.violations.map(row));
document.body.appendChild(found); }))</script>"""

def check_page(
    page:Path, # A page of the site
    axe:str, # axe-core, as text
    browser:str, # Chromium or Chrome
    dark:bool, # Which of the two themes
)->list[str]: # One line a serious problem
    "Run axe-core on one page"
    text = page.read_text(encoding='utf-8').replace('</body>', f'<script>{axe}</script>{run_axe}</body>')
    copy = page.with_name(f'{page.stem}-{"dark" if dark else "light"}-check.html')
    flags = f'--blink-settings=preferredColorScheme={0 if dark else 1}', '--virtual-time-budget=20000', '--window-size=1400,1000'
    copy.write_text(text, encoding='utf-8')
    try:
        with tempfile.TemporaryDirectory() as profile:
            command = [browser, '--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={profile}', *flags, '--dump-dom', copy.as_uri()]
            dom = subprocess.run(command, capture_output=True, text=True, encoding='utf-8', timeout=180).stdout
    finally: copy.unlink()
    found = re.search(r'<pre id="axe-found"[^>]*>(.*?)</pre>', dom, flags=re.S)
    where = f'{page.name} ({"dark" if dark else "light"})'
    if found is None: return [f'{where}: axe-core gave no result']
    rows = [o for o in json.loads(html.unescape(found[1])) if o[0] in ('serious', 'critical')]
    return [f'{where}: {name}, {n} places, such as {example}' for _,name,n,example in rows]

def main():
    "Command line"
    root, axe = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).read_text(encoding='utf-8')
    browser = sys.argv[3] if len(sys.argv) > 3 else 'chromium'
    pages = sorted(root.rglob('*.html'))
    jobs = [(page, axe, browser, False) for page in pages] + [(page, axe, browser, True) for page in pages[::4]]
    with ThreadPoolExecutor(2) as pool: results = list(pool.map(lambda job: check_page(*job), jobs))
    problems = [o for found in results for o in found]
    for o in problems: print(o)
    print(f'{len(jobs)} views, {len(problems)} serious problems')
    sys.exit(1 if problems else 0)

if __name__ == '__main__': main()
