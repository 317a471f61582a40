"""The progress bar draws on terminals and nowhere else."""

import io

from megatron_internvlx.reporting.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_silent_without_a_terminal():
    stream = io.StringIO()
    with ProgressBar(stream) as bar:
        bar.update(1, 10, loss=2.0, tokens_per_s=100.0, accuracy=0.5)
    assert not bar.enabled
    assert stream.getvalue() == ""


def test_shows_numbers_on_one_line():
    stream = Terminal()
    with ProgressBar(stream) as bar:
        bar.update(1, 4, loss=2.0)
        bar.update(2, 4, loss=1.25, tokens_per_s=1234.5, accuracy=0.875)
        bar.update(4, 4, loss=1.0, left="> 8 min 10 s")
    shown = stream.getvalue()
    last = shown.rstrip("\n").split("\r")[-1]
    assert "4/4" in last and "loss 1.000" in last
    assert "accuracy 87.5%" in last  # kept from the evaluation before
    assert "> 8 min 10 s left, loss" in last
    assert shown.count("\n") == 1


def test_resumed_run_starts_where_it_is():
    stream = Terminal()
    with ProgressBar(stream) as bar:
        bar.update(50, 100)
    assert "50/100" in stream.getvalue()


def test_lines_above_the_bar():
    for stream in (Terminal(), io.StringIO()):
        with ProgressBar(stream) as bar:
            bar.update(1, 2)
            bar.write("saved")
        assert "saved\n" in stream.getvalue()


def test_close_twice_is_fine():
    bar = ProgressBar(Terminal())
    bar.update(1, 2)
    bar.close()
    bar.close()
