"""The guide's command line and imports, re-exported from `finrl_grpo`

`python gpu_training/grpo_trainer.py --help` shows the flags; the explanation is in nbs/15_cli.ipynb."""
import sys
from pathlib import Path

if not __package__: sys.path.insert(0, str(Path(__file__).resolve().parent.parent)) # Run by its path: take the package beside it

try:
    from finrl_grpo.cli import guide_main
    from finrl_grpo.reward import FinancialRewardConfig, FinancialRewardModel
except ModuleNotFoundError as e:
    if __package__: raise
    sys.exit(f'error: the package `{e.name}` is missing\n  fix: in the folder of this repository: pip install -c constraints.txt -e .')

__all__ = ['FinancialRewardConfig', 'FinancialRewardModel', 'guide_main']

if __name__ == '__main__': sys.exit(guide_main())
