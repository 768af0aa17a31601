"""Pictures: whatever files and runs are called."""

import warnings

from gau import plots


def test_names_with_dollar_signs_and_letters_that_no_font_has_are_drawn(tmp_path):
    name = 'text:/data/$RUN_{x$/漢.txt'
    rows = [{'step': step, 'split': split, 'loss': 1.0 / step} for step in (1, 2) for split in ('train', name)]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        plots.plot_loss(rows, tmp_path / 'loss.png', title=name)
        plots.plot_runs({'a': {1: 2.0}, name: {1: 3.0}}, tmp_path / 'runs.png', title=name)
    assert all((tmp_path / f'{file}.png').stat().st_size > 1000 for file in ('loss', 'runs'))
    # A log scale still has its powers.
    canvas, axes = plots.figure('x', 'y', name)
    axes.plot([1, 1000], [1, 2])
    axes.set_xscale('log')
    plots.save(canvas, tmp_path / 'log.png')
    assert all(tick.get_parse_math() for tick in axes.get_xticklabels())
