"""How a page shows exported code: the name with a link to its source, then the cell itself.

nbdev's own pages show signatures and leave the bodies out, which suits a reference and not pages that explain code. A signature beside
its own source would say everything twice, so only the heading of each entry is kept, for links and for the table of contents.
"""
import ast,os,re,sys,warnings
from pathlib import Path
from nbdev.process import Processor
from nbdev.processors import FilterDefaults,add_fold,mv_exports

def only_imports(
    source:str, # Code of a cell
)->bool: # Nothing there that a reader would miss?
    "Does a cell hold imports alone?"
    return all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in ast.parse(source).body)

def keep_source(cell):
    "Let exported cells stay on the page, imports excepted"
    if cell.cell_type != 'code' or 'export' not in cell.directives_ or 'hide' in cell.directives_ or only_imports(cell.source): return
    cell.directives_['exports'] = cell.directives_.pop('export')

def keep_heading(cell):
    "Cut the signature out of an entry that nbdev inserted, since the source follows it"
    if not getattr(cell, 'has_sd', False): return
    for out in cell.get('outputs', []):
        if 'text/markdown' in out.get('data', {}):
            out['data']['text/markdown'] = re.split(r'^```', ''.join(out['data']['text/markdown']), maxsplit=1, flags=re.M)[0]

class MoveSource(Processor):
    "Put the source of a cell behind the headings of what it defines, which nbdev inserts last name first"
    def begin(self):
        cells = self.nb.cells
        for cell in [o for o in cells if o.cell_type == 'code' and 'exports' in o.directives_]:
            start = end = cells.index(cell)
            while end+1 < len(cells) and getattr(cells[end+1], 'has_sd', False): end += 1
            cells[start:end+1] = [*reversed(cells[start+1:end+1]), cell]

class ShowSource(FilterDefaults):
    "nbdev's steps, with exported code left on the page"
    def base_procs(self):
        "The steps in order"
        steps = [o for o in super().base_procs() if o not in (add_fold, mv_exports)]
        return [keep_source, *steps, keep_heading, MoveSource]

    def __call__(self, nb):
        "Process a notebook, naming it in each warning; in a partial build, one that does not run yet is marked and left out"
        name = Path(nb.path_).name
        with warnings.catch_warnings(record=True) as caught:
            try: super().__call__(nb)
            except Exception as error:
                if not os.environ.get('DOCS_PARTIAL'): raise
                print(f'left out, does not run yet: {name}: {str(error).strip().splitlines()[-1]}', file=sys.stderr)
                nb['metadata']['unfinished'] = True
        for o in caught: print(f'{o.category.__name__}: {name}: {" ".join(str(o.message).split())[:160]}', file=sys.stderr)
