"""Measures every layout against one process and writes docs/layouts.md.

python -m tests.layout_table
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.distributed import Pool
from tests.layout_cases import CASES, CURVES, STEPS, Case, Runner

HEAD = """# Every layout gives the numbers of one process

Measured by `python -m tests.layout_table` on CPU with gloo, fp32 (bf16 where named); `make test` checks
every row of one step and one of the curves, `make test-heavy` the other curves.
Each row trains one step on the same four micro-batches from the same weights and is compared
with one process: the loss (relative, limit 2e-6), the gradient norm used for reporting and clipping (the
same limit), every gradient gathered to full shape (norm of the difference divided by the norm, and largest element of
the difference divided by the largest element: limit 2e-5), every weight after the step (absolute, limit 2e-6). The
worst of all tensors is shown; 0e+00 is bit-equal. Gradients of replicated weights must be bit-equal on all TP ranks.

bf16 is compared with bf16 on one process. Tensor parallelism then rounds partial sums, so that a gradient
differs by a hundredth of its norm; the limits are 5e-4, 4e-3, 2.5e-2, 1.2e-1 and 2e-3, and for a gradient whose
norm is below a hundredth of the whole gradient's, the difference is divided by that hundredth. An error of 5 % in one
layer or projector exceeds these limits.

`make test-heavy` adds static boundaries to every row that lacks them, and to the layouts of adapters: 51 more, compared
with the same one process, whose boundaries are variable, within the same limits. Measured at most: loss and norm 1e-07,
gradient 3e-06 and element 4e-06 (experts; all others 1e-06 and 2e-06), weight 2e-07; bf16 2e-04, 1e-03, 2e-02, 8e-02
and 1e-03. Only drop is compared with one static process, because a number is drawn for the windows of blank tiles too;
that process equals the variable one where both are given the same draws.

The model has 8 decoder layers, two query heads per key-value head and 8 x 8 patches per tile, which give
2 x 2 shallow and 4 x 4 deep tokens. Settings: lvtc expands at layer 3 and injects at 5, packed samples;
frozen: no gradient of the vision encoder; three: expansion at 2, injections at 4 and 6; crowded: 4, 5
and 6 on one stage; expand at n: no injection except at 6 for n = 4; off: no LVTC; single: one sample per
micro-batch, one of them without image; text: every second micro-batch has text only (with DP 2, one
replica has no tile at all); tied: output layer tied to the embedding; square: other loss weights, MLP
projector, nearest upsampling; drop: 0.3 of the projectors' windows dropped; experts, balanced: 4 experts
without and with the load-balancing loss.

Layout words: tp, pp, ep, etp: sizes, the last two of the experts (data parallelism fills the ranks); sp:
sequence parallel; per_stage: layers per virtual stage, which makes the schedule interleaved; layers:
explicit layout of virtual stages (E embedding and vision encoder, t decoder layer, L loss); static:
fixed budgets; few: one of supervised tokens among them; full, selective, moe (experts): recompute; zero: distributed
optimizer; overlap: overlapped reduction and gather; batched, flush: Megatron's other communication modes.

| setting | layout | ranks | loss | norm | gradient | element | weight |
|---|---|---|---|---|---|---|---|"""

CURVE_HEAD = f"""
Loss curves over {STEPS} steps, largest relative difference of a step's loss (limit 1e-4):

| setting | layout | ranks | loss |
|---|---|---|---|"""


def _row(case: Case, *numbers: float) -> str:
    cells = [case.setting, case.layout.replace("|", "\\|"), str(case.ranks), *(f"{x:.0e}" for x in numbers)]
    return f"| {' | '.join(cells)} |"


def lines(runner: Runner) -> Iterator[str]:
    """The file, line by line; stops at a layout that is not equal."""
    yield from HEAD.splitlines()
    for case in CASES:
        d = runner.difference(case)
        broken = d.exceeded()
        assert not broken, f"{case.name}: {broken}"
        yield _row(case, d.loss, d.norm, d.gradient, d.element, d.weight)
    yield from CURVE_HEAD.splitlines()
    for case in CURVES:
        yield _row(case, runner.curve(case))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pool = Pool()
        try:
            written = []
            for line in lines(Runner(pool, Path(folder))):
                print(line, flush=True)
                written.append(line)
        finally:
            pool.close()
    Path("docs/layouts.md").write_text("\n".join(written) + "\n")


if __name__ == "__main__":
    main()
