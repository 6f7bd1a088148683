"The guide's import path; everything lives in `finrl_grpo`"
