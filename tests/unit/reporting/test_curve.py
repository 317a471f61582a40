"""The curve of a run over several starts."""

from megatron_internvlx.reporting.curve import FILE, Curve


def test_points_up_to_the_checkpoint_are_loaded(tmp_path):
    Curve([(1, 2.0), (2, 1.5), (3, 1.2)], [(2, 0.5)]).save(tmp_path)
    later = Curve([(3, 1.25)], [])  # step 3 again, after a kill
    later.load_earlier(tmp_path, 2)
    assert later == Curve([(1, 2.0), (2, 1.5), (3, 1.25)], [(2, 0.5)])


def test_what_cannot_be_read_or_written_is_said_and_stops_nothing(tmp_path, capsys):
    curve = Curve([(3, 1.0)])
    curve.load_earlier(tmp_path, 2)
    assert capsys.readouterr().err == ""
    (tmp_path / FILE).write_text('{"losses": [[1')
    curve.load_earlier(tmp_path, 2)
    assert curve.losses == [(3, 1.0)]
    curve.save(tmp_path / FILE)
    said = capsys.readouterr().err
    assert "the curve begins at step 2" in said and "could not be written" in said
