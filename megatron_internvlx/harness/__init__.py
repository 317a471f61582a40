"""Models of this project in evaluation harnesses: lmms-eval and VLMEvalKit, in an environment of their own.

`tools/eval_env.sh` makes that environment. Only the modules named after a harness import it, so that everything else
works without.
"""
