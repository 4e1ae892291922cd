"""
visualize_training.py --html: one self-contained page with the panels of the picture. It needs plotly, which the test
extra brings.
"""

import json
import re
import sys
from html.parser import HTMLParser

import pytest

import visualize_training as vis
from run_logs import Run, load_runs
from test_visualize import axes_of, write_log

pytest.importorskip('plotly', reason='the test extra brings it')
from interactive_page import page

STATE = dict(parameters=4, gradients=4, optimizer=8)


class Page(HTMLParser):
    """The titles and the table of a page, and every address that it would load something from."""

    def __init__(self, text):
        super().__init__()
        self.titles, self.cells, self.addresses, self.within = [], [], [], None
        self.feed(text)
        # plotly.js is megabytes of code, so search for calls of Plotly.newPlot(id, traces, layout, config) after it
        calls = re.findall(r'Plotly\.newPlot\(\s*"[\w-]+",\s*(.*?),\s*(\{"template.*?\}),\s*\{"responsive', text, re.S)
        self.charts = [(json.loads(traces), json.loads(layout)) for traces, layout in calls]

    def handle_starttag(self, tag, attrs):
        self.within = tag
        self.addresses += [value for name, value in attrs if name in ('src', 'href')]

    def handle_data(self, data):
        if self.within in ('h1', 'h2'):
            self.titles.append(data)
        elif self.within in ('th', 'td'):
            self.cells.append(data)
        self.within = None


def test_one_run(tmp_path):
    figure = vis.draw([Run(write_log(tmp_path))])
    shown = Page(page(figure))
    assert shown.addresses == []
    assert shown.titles == ['DDP · shakespeare_char · completed', *(title for title, _ in vis.TITLES.values()), 'Run']
    assert '16,384 tokens per step' in shown.cells and len(shown.charts) == len(vis.TITLES)
    loss = shown.charts[0][0]
    axes = axes_of(figure)
    assert [trace['showlegend'] for trace in loss] == [
        not line.get_label().startswith('_') for line in axes['loss'].lines
    ]
    assert loss[1]['x'][-1] == 199 and loss[1]['name'].startswith('training')
    low, high = shown.charts[0][1]['yaxis']['range']
    checkpoints = next(trace for trace in loss if trace['name'] == 'checkpoint')
    assert checkpoints['x'] == [50, 100, 150] and all(low < y < high for y in checkpoints['y'])
    utilization = [trace for trace in shown.charts[3][0] if trace.get('yaxis') == 'y2']
    assert len(utilization) == 1 and 'MFU' in shown.charts[3][1]['yaxis2']['title']['text']


def test_several_runs(tmp_path):
    paths = [write_log(tmp_path / name, name, state_bytes=STATE) for name in ('nanoGPT', 'phase1_zero1')]
    shown = Page(page(vis.draw(load_runs(paths))))
    assert shown.titles[1:] == ['Loss', *(title for title, _ in vis.BARS.values())]
    traces, layout = shown.charts[2]
    assert [(bar['base'], bar['x']) for bar in traces] == 2 * [([0], [4]), ([4], [4]), ([8], [8])]
    assert layout['yaxis']['ticktext'] == ['DDP', 'ZeRO-1']
    assert '16  baseline' in [note['text'] for note in layout['annotations']]


def test_names_are_text(tmp_path):
    """Not markup, and not bytes that a page cannot hold."""
    name = '</script><b>x & y\udcff'
    figure = vis.draw([Run(write_log(tmp_path, phase=name, dataset=name))], title=name)
    text = page(figure)
    text.encode()
    shown = Page(text)
    assert shown.titles[0] == '</script><b>x & y\\udcff' and len(shown.charts) == len(vis.TITLES)


def test_the_page_replaces_the_last_one(tmp_path, capsys):
    log, target = write_log(tmp_path), tmp_path / 'page.html'
    for _ in range(2):
        assert vis.main([log, '--html', str(target)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f'wrote {target}'
    assert target.read_text().startswith('<!DOCTYPE html>') and 'plotly.js' in target.read_text()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ['.html', '.json', '.png']
    assert vis.main([log, '--html', str(tmp_path / 'no' / 'page.html')]) == 2


def test_without_plotly(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'plotly', None)
    assert vis.main([write_log(tmp_path), '--html', str(tmp_path / 'page.html')]) == 2
    assert 'pip install plotly' in capsys.readouterr().err
